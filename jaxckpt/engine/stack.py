"""One run of a stack: trace the block once, check it, hoist what it passes through, execute.

Everything that depends on the block is found out here, from one trace of one block, so that an error is raised at the
call, by us, and not by JAX from inside a scan. The jaxpr of that trace is what the executor runs: the block's Python
code is entered once per call of the stack (again where Python numbers in the carry change their type), and never where the
call is jitted and already compiled.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxckpt._leaves import stacked_length
from jaxckpt._plan import Knobs, StackPlan
from jaxckpt._setting import Setting, check_blocks_per_ckpt, check_snapshots, with_knobs
from jaxckpt.engine import check, refs
from jaxckpt.engine.cutting import cut
from jaxckpt.engine.once import not_differentiated
from jaxckpt.engine.planned import by_itself, observed, pinned, under_plan
from jaxckpt.engine.run import resolve, resolved
from jaxckpt.engine.trace import Block, Traced, trace_block


class Stacked(NamedTuple):
    """What a stack returns: the last carry as the block gave it, and `aux` and `extra` with a leading axis `N`."""

    carry: Any
    aux: Any
    extra: Any


def run_stack(
    block: Block,
    setting: Setting,
    length: int,
    xs: Any,
    carry: tuple,
    shared: dict[str, Any],
    names: check.Names,
    initializes: bool = False,
) -> Stacked:
    """Runs `length` blocks under `setting`.

    Arguments:
        block: `(x, carry, shared) -> (returned, extra)`, pure: `returned` is what the user's block returned (the carry,
            or `(carry, aux)`), `extra` a tree of arrays of the caller's own.
        xs: a tree of arrays `[N, ...]`, one slice per block: parameters, rng keys, per-block arguments.
        carry: the positional arguments of the first block.
        shared: keyword arguments that all blocks are given; those that are not arrays are static.
        names: what errors call the block and its arguments.
        initializes: parameters are made, and nothing is differentiated: the knobs are checked, and default ones used.
    Raises:
        TypeError, ValueError: see `jaxckpt.engine.check`.
    """
    setting, planned = under_plan(setting, initializes)
    _check_given(setting, planned, length, xs, carry, shared, names)
    with by_itself():
        traced = trace_block(block, setting, xs, carry, shared, names)
    refusal = None
    if isinstance(planned, StackPlan):
        setting, refusal = pinned(setting, planned, traced.closed, traced.carry, length, names)
        if refusal is not None and observed.get() is not None:  # by those who look at what is kept for derivatives
            raise refusal
    check.effects(traced.closed, setting, names)
    if initializes:
        setting = _for_init(setting, traced, names)
    run, mark = resolved(setting, length, traced, names)
    if (see := observed.get()) is not None:
        see(run)
    last, ys = run.execute(run.constants, *run.leaves, mark=mark)
    if refusal is not None:
        last, ys = ([not_differentiated(leaf, refusal) for leaf in leaves] for leaves in (last, ys))
    aux, extra = jax.tree.unflatten(traced.rest_tree, run.rest(ys))
    return Stacked(jax.tree.unflatten(traced.carry_tree, last), aux, extra)


def _check_given(
    setting: Setting,
    planned: StackPlan | Knobs | None,
    length: int,
    xs: Any,
    carry: tuple,
    shared: dict[str, Any],
    names: check.Names,
) -> None:
    """Refuses what needs no trace to be refused."""
    if not isinstance(planned, StackPlan):  # whose length is looked at once the block is traced
        if setting.blocks_per_ckpt is not None:
            check_blocks_per_ckpt(setting.blocks_per_ckpt, length)
        if setting.snapshots is not None:
            check_snapshots(setting.snapshots, length, setting.blocks_per_ckpt)
    of_carry = [(names.leaf(i, ()), value) for i, value in enumerate(carry)]
    refs.check_given(names.block, [*of_carry, *shared.items(), ("the stacked parameters", xs)])
    check.carry_given(carry, names)
    check.layers_whole(xs, names)


def per_block_of(
    setting: Setting, length: int, keywords: dict[str, Any], names: check.Names
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`keywords` as those with a leading axis `N`, named in `per_block`, and those that all blocks share."""
    missing = [name for name in setting.per_block if name not in keywords]
    if missing:
        raise TypeError(f"{names.block}: {', '.join(missing)} is named in per_block but was not passed by keyword")
    per_block = {name: keywords[name] for name in setting.per_block}
    for name, value in per_block.items():
        stacked_length(value, length, f"{names.block}: the per-block argument {name!r}")
    return per_block, {name: value for name, value in keywords.items() if name not in per_block}


def _for_init(setting: Setting, traced: Traced, names: check.Names) -> Setting:
    """The knobs for `init`, once those of `setting` have found the tags that they name.

    A plain loop: nothing is kept, and a lifted `init` around the stack, such as that of `nn.scan` over time, can tell that
    parameters depend on keys alone, which a `custom_vjp` hides.
    """
    resolve(dataclasses.replace(setting, blocks_per_ckpt=1), traced.closed, names)  # under which nothing is chosen
    if isinstance(setting.stages, tuple):
        cut(setting, traced.closed, traced.carried, names)
    return with_knobs(setting, Knobs(policy="everything"))
