"""Small things to do with the leaves of trees."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(leaf: object) -> bool:
    """Whether JAX may trace and differentiate `leaf`; Python numbers, strings and other objects are static."""
    if isinstance(leaf, np.bool_):
        return False  # a flag, like True
    if isinstance(leaf, (np.ndarray, np.generic)):  # of strings and of objects there are NumPy arrays too
        return leaf.dtype == np.bool_ or jnp.issubdtype(leaf.dtype, np.number)
    return isinstance(leaf, jax.Array) or hasattr(leaf, "__jax_array__")


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """`(path, leaf)` for each leaf, the path as one would write it: `['mlp']['kernel']`."""
    return [(jax.tree_util.keystr(path) or "the array", leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def replaced(leaves: Sequence[Any], where: Sequence[int], values: Iterable[Any]) -> list[Any]:
    """`leaves` with `values` at the places `where`."""
    out = list(leaves)
    for i, value in zip(where, values, strict=True):
        out[i] = value
    return out
