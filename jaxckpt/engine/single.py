"""What is no stack, a block or a whole function, under `jax.checkpoint`: by policy, in pieces, and in slices."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.stages import Piece
from jaxckpt.engine import check
from jaxckpt.engine.cutting import cut
from jaxckpt.engine.offload import guard_offload, loop_that_offloads
from jaxckpt.engine.pieces import crossing_bytes, in_pieces
from jaxckpt.engine.run import resolve
from jaxckpt.policies.grammar import JaxPolicy

# What crosses the cuts is kept where it is less than this part of the inputs, which are kept anyway: for a head's loss of
# each token a third run of the head would be a poor bargain.
_HARDLY_MORE = 1 / 50


def run_under(setting: Setting, closed: Any, arrays: list[Any], names: check.Names) -> list[Any]:
    """The outputs of a traced function on `arrays`, checkpointed as `setting` says.

    Raises:
        ValueError: side effects; or a policy or stages name tags that are not there.
    """
    check.effects(closed, setting, names, instead="Return the value instead")
    closed, keep, _ = resolve(setting, closed, names)
    closed, pieces = cut(setting, closed, (), names, keep)
    return checkpointed(closed, keep, arrays, pieces)


def checkpointed(closed: Any, keep: JaxPolicy, arrays: list[Any], pieces: Sequence[Piece] = ()) -> list[Any]:
    """What `jax.checkpoint` of a jaxpr under a policy returns; where it is in pieces, each of them is checkpointed too."""
    # It stands in no loop of ours, but one of its own may offload.
    guarded = guard_offload(keep, loop_that_offloads(closed.jaxpr, keep) is not None)
    run = in_pieces(closed, pieces, guarded.keep) if pieces else jx.as_function(closed)
    # It is straight-line code: without the barrier XLA would merge the re-run with the forward pass.
    if not pieces or crossing_bytes(closed.jaxpr, pieces) > _HARDLY_MORE * sum(jx.nbytes(jax.typeof(x)) for x in arrays):
        run = jax.checkpoint(run, policy=guarded.keep, prevent_cse=True)
    return guarded.mark(run(*guarded.mark(arrays)))
