"""Small things to do with the leaves of trees."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt._equinox import OF_STACKED, holds_equinox


def is_array(leaf: object) -> bool:
    """Whether JAX may trace and differentiate `leaf`; Python numbers, strings and other objects are static."""
    if isinstance(leaf, np.bool_):
        return False  # a flag, like True
    if isinstance(leaf, (np.ndarray, np.generic)):  # of strings and of objects there are NumPy arrays too
        return leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, np.number)
    return isinstance(leaf, jax.Array) or hasattr(leaf, "__jax_array__")


def is_shaped(leaf: object) -> bool:
    """Whether `leaf` is an array, or stands for one by its shape."""
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays in `tree`, and a function that puts others in their places; what is not an array stays as it is."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if is_shaped(leaf)]
    return [leaves[i] for i in where], lambda arrays: jax.tree.unflatten(structure, replaced(leaves, where, arrays))


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for each leaf, the path as one would write it: `['mlp']['kernel']`."""
    return [(jax.tree_util.keystr(path) or "the array", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def replaced(leaves: Sequence[Any], where: Sequence[int], values: Iterable[Any]) -> list[Any]:
    """`leaves` with `values` at the places `where`."""
    out = list(leaves)
    for i, value in zip(where, values, strict=True):
        out[i] = value
    return out


def same_leaves(a: Any, b: Any) -> bool:
    """Whether two trees hold the very same objects, in the same order."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def check_arrays(tree: Any, what: str, of_equinox: str = OF_STACKED) -> None:
    """Refuses leaves that are neither arrays nor numbers, in what is to be sliced or stacked.

    Arguments:
        of_equinox: what to write for the arrays of Equinox modules.
    """
    for name, leaf in named_leaves(tree):
        if not is_shaped(leaf) and not _has_type(leaf):
            shown = getattr(leaf, "__name__", None) or repr(leaf)
            remedy = (
                f"write {of_equinox}" if holds_equinox(tree) else "keep it apart, and close over it or pass it by keyword"
            )
            raise TypeError(f"{what}: {name} is {shown} of type {type(leaf).__name__}, and no array: {remedy}")


def _has_type(leaf: object) -> bool:
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


# What to write where parameters have no layer axis.
STACK_THEM = "; jaxckpt.stack_params makes one tree of per-block trees"


def stacked_length(tree: Any, length: int | None, what: str, remedy: str = "") -> int:
    """The leading axis that all leaves of `tree` share, which is `length` where that is given.

    Raises:
        TypeError: naming a leaf that is no array.
        ValueError: naming the leaf that has another leading axis, or none; or where nothing tells the length.
    """
    found, told_by = length, ""
    check_arrays(tree, what)
    for name, leaf in named_leaves(tree):
        shape = jnp.shape(leaf)
        if not shape:
            listed = "; make one array of a list of numbers, jnp.asarray(...)" if isinstance(tree, (list, tuple)) else ""
            raise ValueError(f"{what}: {name} has shape (); it needs a leading axis, one slice per block{listed}")
        if found is None:
            found, told_by = shape[0], f" (the leading axis of {name}, shape {shape})"
        elif shape[0] != found:
            raise ValueError(
                f"{what}: {name} has shape {shape}, but the stack has {found} blocks{told_by}: the leading axis must be "
                f"{found}, one slice per block{remedy}"
            )
    if found is None:
        raise ValueError(f"{what}: there are no parameters to tell the number of blocks; pass length=")
    if found < 1:
        raise ValueError(f"{what}: the stack has 0 blocks{told_by}; it needs at least 1")
    return found
