"""What is no stack, a block or a whole function, under `jax.checkpoint`: by policy, in pieces, and in slices."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from jaxckpt._plan import Knobs, StackPlan
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.numbering import Scope, as_function
from jaxckpt.analysis.stages import Piece
from jaxckpt.engine import check
from jaxckpt.engine.cutting import cut
from jaxckpt.engine.offload import guard_offload, loop_that_offloads
from jaxckpt.engine.once import not_differentiated
from jaxckpt.engine.pieces import crossing_bytes, in_pieces
from jaxckpt.engine.planned import observed, pinned, under_plan
from jaxckpt.engine.run import Run, resolve
from jaxckpt.policies.grammar import JaxPolicy

# What crosses the cuts is kept where it is less than this part of the inputs, which are kept anyway: for a head's loss of
# each token a third run of the head would be a poor bargain.
_HARDLY_MORE = 1 / 50


def run_under(setting: Setting, closed: Any, arrays: list[Any], names: check.Names) -> list[Any]:
    """The outputs of a traced function on `arrays`, checkpointed as `setting` says.

    Raises:
        ValueError: side effects; or a policy or stages name tags that are not there.
    """
    setting, planned = under_plan(setting)
    refusal = None
    if isinstance(planned, StackPlan):
        setting, refusal = pinned(setting, planned, closed, arrays, 1, names)
    if planned is not None:
        _check_planned(setting, names)
    check.effects(closed, setting, names, instead="Return the value instead")
    run = _resolved(setting, closed, arrays, names)
    if (see := observed.get()) is not None:
        see(dataclasses.replace(run, refusal=refusal))
    out = checkpointed(run.closed, run.keep, arrays, run.pieces)
    return out if refusal is None else [not_differentiated(leaf, refusal) for leaf in out]


def _check_planned(setting: Setting, names: check.Names) -> None:
    """Refuses what a plan says of stacks only."""
    of_stacks = ("blocks_per_ckpt", "snapshots", "offload_carry", "engine", "first")
    if found := [name for name in of_stacks if getattr(setting, name) != getattr(Knobs(), name)]:
        raise ValueError(
            f"{names.block}: its plan says {', '.join(found)}, which only stacks of blocks have: run jaxckpt.plan again"
        )


def _resolved(setting: Setting, closed: Any, arrays: list[Any], names: check.Names) -> Run:
    """The function under its knobs, as a stack of one block without parameters and carry."""
    closed, keep, chosen = resolve(setting, closed, names)
    closed, pieces = cut(setting, closed, (), names, keep)
    return Run(
        setting=setting,
        length=1,
        names=names,
        closed=closed,
        pieces=pieces,
        keep=keep,
        chosen=chosen,
        carry_to_host=keep,
        parameters=[],
        moving=[],
        computed=list(range(len(closed.out_avals))),
        own={},
        leaves=([], [], arrays),
        carry_names=[],
        is_stack=False,
    )


def checkpointed(
    closed: Any, keep: JaxPolicy, arrays: list[Any], pieces: Sequence[Piece] = (), scope: Scope | None = None
) -> list[Any]:
    """What `jax.checkpoint` of a jaxpr under a policy returns; where it is in pieces, each of them is checkpointed too.

    Arguments:
        scope: of each equation, by its number.
    """
    # It stands in no loop of ours, but one of its own may offload.
    guarded = guard_offload(keep, loop_that_offloads(closed.jaxpr, keep) is not None)
    again = is_run_again(closed, pieces, arrays)
    if pieces:
        run = in_pieces(closed, pieces, guarded.keep, scope, is_within=again)
    else:
        run = as_function(closed, itertools.count(), scope)
    # It is straight-line code: without the barrier XLA would merge the re-run with the forward pass.
    if again:
        run = jax.checkpoint(run, policy=guarded.keep, prevent_cse=True)
    return guarded.mark(run(*guarded.mark(arrays)))


def is_run_again(closed: Any, pieces: Sequence[Piece], arrays: Sequence[Any]) -> bool:
    """Whether what crosses the cuts is made again, and not kept."""
    if not pieces:
        return True
    inputs = sum(jx.nbytes(jax.typeof(x)) for x in arrays)
    return crossing_bytes(closed.jaxpr, pieces) > _HARDLY_MORE * inputs
