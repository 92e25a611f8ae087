"""The arguments of a step with another number of examples in the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxckpt._setting import is_integer


def with_batch(args: tuple[Any, ...], in_axes: Sequence[Any]) -> Callable[[int], tuple[Any, ...]]:
    """The arguments with a batch of so many, as a function of that; what has no batch stays what it is."""
    if not isinstance(in_axes, (tuple, list)) or len(in_axes) != len(args):
        raise ValueError(
            f"in_axes has an entry for each argument, an axis or None or a tree of them, and the step is given {len(args)} "
            f"arguments; got {in_axes!r:.200}"
        )
    found: dict[str, int] = {}
    for i, (axes, arg) in enumerate(zip(in_axes, args, strict=True)):
        prefix, tree = jax.tree_util.tree_flatten_with_path(axes, is_leaf=_is_none)
        try:
            parts = tree.flatten_up_to(arg)
        except ValueError as error:
            raise ValueError(f"in_axes[{i}] is no tree prefix of the argument [{i}]: {error!s:.200}") from None
        for (above, axis), part in zip(prefix, parts, strict=True):
            leaves = [] if axis is None else jax.tree.leaves_with_path(part)
            for path, leaf in leaves:
                name = f"[{i}]{jax.tree_util.keystr((*above, *path))}"
                found[name] = _size_of(leaf, axis, name)
    if not found:
        raise ValueError("in_axes names no axis: the batch is an axis of at least one argument, in_axes=(None, 0), say")
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{size} of {name}" for name, size in found.items())
        raise ValueError(f"in_axes names axes of different sizes, which are not one batch: {listed}")

    def of_size(size: int) -> tuple[Any, ...]:
        def resized(axis: Any, part: Any) -> Any:
            return part if axis is None else jax.tree.map(lambda leaf: _with_size(leaf, axis, size), part)

        return jax.tree.map(resized, tuple(in_axes), args, is_leaf=_is_none)

    return of_size


def _is_none(axis: Any) -> bool:
    return axis is None


def _size_of(leaf: Any, axis: Any, name: str) -> int:
    shape = getattr(leaf, "shape", None)
    if shape is None:
        raise ValueError(f"the argument {name} is {leaf!r:.200}, which has no axes: give it None in in_axes")
    if not is_integer(axis) or not -len(shape) <= axis < len(shape):
        raise ValueError(f"in_axes names axis {axis!r} of the argument {name}, whose shape is {tuple(shape)}")
    return shape[axis]


def _with_size(leaf: Any, axis: int, size: int) -> jax.ShapeDtypeStruct:
    shape = list(leaf.shape)
    shape[axis] = size
    is_put = getattr(leaf, "committed", True)  # of arrays that nobody put anywhere the sharding says nothing
    sharding = getattr(leaf, "sharding", None) if is_put else None
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding, weak_type=jax.typeof(leaf).weak_type)
