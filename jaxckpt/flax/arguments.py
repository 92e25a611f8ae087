"""NNX objects among the arguments of a stack: what blocks change in them is written back, as parameters' state is.

A block is traced with copies of its arguments. Where it changes one in place, a stream of random numbers or a cache, the
change would end with the trace, without a word.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from jaxckpt._leaves import same_leaves
from jaxckpt._setting import Setting
from jaxckpt.engine.check import Names
from jaxckpt.engine.stack import Stacked, run_stack
from jaxckpt.engine.trace import Block
from jaxckpt.flax.objects import attribute_name, attributes, changed_static, is_object

Slots = Sequence[tuple[str, Any]]  # paths and NNX variables, or what else is a leaf


def run_and_write_back(
    block: Block,
    setting: Setting,
    length: int,
    xs: tuple,
    carry: tuple,
    shared: dict[str, Any],
    names: Names,
    initializes: bool = False,
    watched: slice = slice(-1, None),
    held: Slots = (),
) -> Stacked:
    """`run_stack`; then what blocks changed in variables of their arguments and of the carry is in those that were given.

    Arguments:
        xs: the last of it are the per-block arguments.
        initializes: as in `run_stack`.
        watched: those of `xs` that the block itself is given.
        held: variables that the block has beside.
    Raises:
        ValueError: a block changes a per-block argument that is no variable, or a variable of the carry that it does not
            return, or gives an argument a variable that it did not have, or changes what in an argument is static; or it
            changes a variable that it has twice.
    """
    advanced: list[int] = []

    def noting(x, carry, shared):
        own, per_block, carried = _of_block(x[watched]), _of_block(x[-1:]), _of_carry(carry, names)
        before = _values(own), _values(carried)
        with _static_attributes_kept((x[watched], carry, shared), names):
            returned, extra = block(x, carry, shared)
        changed = _changed(own, before[0])
        _check_nothing_else(own, _of_block(x[watched]), per_block, _of_block(x[-1:]), names)
        out = returned[0] if setting.has_aux and isinstance(returned, tuple) and returned else returned
        advanced[:] = _changed(carried, before[1])
        _check_returned([carried[i] for i in advanced], carried, _of_carry(_as_tuple(out, carry), names), names)
        return returned, (extra, {str(i): own[i][1].get_value() for i in changed})

    out = run_stack(noting, setting, length, xs, carry, shared, names, initializes)
    extra, changed = out.extra
    own, carried, last = _of_block(xs[watched]), _of_carry(carry, names), _of_carry(_as_tuple(out.carry, carry), names)
    new = [(*own[int(i)], value) for i, value in changed.items()]
    new += [(*carried[i], last[i][1].get_value()) for i in advanced]
    check_given_once(
        [(path, variable) for path, variable, _ in new],
        [*own, *carried, *_slots(shared, jax.tree_util.keystr), *held],
        names,
    )
    for _, variable, value in new:
        variable.set_value(value)
    return out._replace(extra=extra)


def _as_tuple(out: Any, carry: tuple) -> tuple:
    if len(carry) == 1:
        return (out,)
    return out if type(out) is tuple else ()  # which is no carry


def _of_block(xs: tuple) -> Slots:
    """The slots of per-block arguments, the last of `xs`, and of parameters that stand before them."""
    last = len(xs) - 1
    return _slots(xs, lambda path: ("" if path[0].idx == last else "the parameters") + jax.tree_util.keystr(path[1:]))


def _of_carry(carry: tuple, names: Names) -> Slots:
    return _slots(carry, lambda path: names.leaf(path[0].idx, path[1:]))


def slots_of(carry: tuple, keywords: dict[str, Any], names: Names) -> Slots:
    """The slots of a call's arguments."""
    return [*_of_carry(carry, names), *_slots(keywords, jax.tree_util.keystr)]


def _slots(tree: Any, name: Callable[[Any], str]) -> Slots:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [(name(path), slot) for path, slot in found]


def _values(slots: Slots) -> list[list[Any]]:
    return [jax.tree.leaves(slot) for _, slot in slots]


def _changed(slots: Slots, before: list[list[Any]]) -> list[int]:
    """The variables that hold something else than before."""
    return [i for i, (_, slot) in enumerate(slots) if not same_leaves(before[i], slot)]


def _check_nothing_else(own: Slots, own_after: Slots, per_block: Slots, after: Slots, names: Names) -> None:
    new = [path for path in _different(own, own_after) if isinstance(dict(own_after).get(path), nnx.Variable)]
    left = dict(after)  # what a block takes out of its own copy of a dictionary is no loss
    if found := new or [path for path in _different(per_block, after) if path in left]:
        raise ValueError(
            f"{names.block} changes its own arguments in place, at {', '.join(found)}: they are one block's slice of what "
            "was given, and the change would be lost. Return it (has_aux=True stacks it per block), carry it, or hold it "
            "from the start in an nnx.Variable, whose changes are written back"
        )


def _check_returned(changed: Slots, carried: Slots, out: Slots, names: Names) -> None:
    lost = [path for path in _different(changed, out) if path in dict(changed)]
    if lost and len(out) == len(carried):  # otherwise it is no carry, which is refused in other words
        raise ValueError(
            f"{names.block} changes its carry in place, at {', '.join(lost)}, and returns something else there, so that the "
            "change would be lost. Return what it changes, or change a copy"
        )


def _different(before: Slots, after: Slots) -> list[str]:
    """The paths at which there is not the same object as before."""
    a, b = dict(before), dict(after)
    return [path for path in a | b if a.get(path) is not b.get(path)]


def check_given_once(changed: Slots, given: Slots, names: Names, what: str = "its argument at ") -> None:
    """Refuses a change of a variable that a block has twice, as two copies."""
    for path, variable in changed:
        if twice := [other for other, slot in given if slot is variable and other != path]:
            raise ValueError(
                f"{names.block} changes {what}{path}, which it is given a second time, at {twice[0]}, and blocks are given "
                "copies. Pass it once, and what a block has by itself not at all"
            )


@contextlib.contextmanager
def _static_attributes_kept(trees: Any, names: Names) -> Iterator[None]:
    """Refuses a block that changes what in its arguments is static: the copies that it is given are nobody's."""
    objects = [leaf for leaf in jax.tree.leaves(trees, is_leaf=is_object) if isinstance(leaf, nnx.Pytree)]
    before = attributes(objects)
    yield
    if changed := changed_static(before, objects):
        raise ValueError(
            f"{names.block} changes {', '.join(attribute_name(objects, key) for key in changed)} among its arguments, a "
            "static attribute, and the change would be lost. Hold what blocks change in an nnx.Variable"
        )
