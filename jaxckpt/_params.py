"""Per-block parameter trees to one stacked tree and back."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxckpt._equinox import OF_LIST
from jaxckpt._leaves import check_arrays, named_leaves, stacked_length
from jaxckpt._metadata import LAYERS, add_layer_axis, check_partition_name, remove_layer_axis


def stack_params(trees: Sequence[Any] | Mapping[str, Any], *, partition_name: str | None = LAYERS) -> Any:
    """One tree whose leaves are the leaves of `trees`, stacked on a new axis 0.

    Meant for use outside `jit`: stacking inside costs twice the parameters in temporaries.

    Arguments:
        trees: `N` trees of one structure, or a mapping from per-layer names to trees, taken in natural order
            (`"layer_2"` before `"layer_10"`). NumPy leaves stay NumPy.
        partition_name: the name that the new axis has in Flax's partitioning metadata, as in `checkpoint_scan`.
    Returns:
        A tree of that structure with leaves `[N, ...]`, bit for bit those of `trees`.
    Raises:
        ValueError: no trees, or trees that differ in structure, or in the shape or dtype of a leaf (it is named).

    >>> stack_params({"layer_10": {"w": np.ones(2)}, "layer_2": {"w": np.zeros(2)}})["w"].tolist()
    [[0.0, 0.0], [1.0, 1.0]]
    """
    check_partition_name(partition_name)
    if isinstance(trees, Mapping):
        names = sorted(trees, key=_natural)
        trees = [trees[name] for name in names]
    else:
        trees = list(trees)
        names = [str(i) for i in range(len(trees))]
    if not trees:
        raise ValueError("stack_params needs at least one tree; got none")
    for name, tree in zip(names, trees, strict=True):
        check_arrays(tree, f"stack_params: tree {name}", OF_LIST)
    for name, tree in zip(names[1:], trees[1:], strict=True):
        _check_alike(names[0], trees[0], name, tree)
    return add_layer_axis(jax.tree.map(lambda *leaves: _stack(leaves), *trees), partition_name)


def unstack_params(tree: Any, *, partition_name: str | None = LAYERS) -> list[Any]:
    """The `N` trees that `stack_params` would stack into `tree`.

    Arguments:
        tree: leaves `[N, ...]`.
        partition_name: the name of the first axis in Flax's partitioning metadata.
    Raises:
        ValueError: a leaf without axes, named (an optimizer's step count is one value for all layers: unstack its
            `mu` and `nu` instead); leading axes that differ; a tree without leaves; metadata in which
            the first axis has another name.

    >>> unstack_params({"w": np.arange(4.0).reshape(2, 2)})[1]["w"].tolist()
    [2.0, 3.0]
    """
    check_partition_name(partition_name)
    check_arrays(tree, "unstack_params", "unstack_params(eqx.filter(stacked, eqx.is_array))")
    scalars = [name for name, leaf in named_leaves(tree) if jnp.ndim(leaf) == 0]
    if scalars:
        raise ValueError(
            f"unstack_params: {', '.join(scalars)} has no layer axis. A single value, such as an optimizer's step "
            "count, does not belong to a layer: unstack the trees that do (an optimizer's mu and nu) and keep it apart"
        )
    if not jax.tree.leaves(tree):
        raise ValueError("unstack_params: a tree without leaves does not tell the number of blocks")
    length = stacked_length(tree, None, "unstack_params")
    return [remove_layer_axis(jax.tree.map(lambda leaf, i=i: leaf[i], tree), partition_name) for i in range(length)]


def _stack(leaves: Sequence[Any]) -> Any:
    # np.stack where it can: jnp.stack would narrow float64 to float32 unless x64 is on.
    return np.stack(leaves) if all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves) else jnp.stack(leaves)


def _check_alike(first_name: str, first: Any, name: str, tree: Any) -> None:
    if jax.tree.structure(first) != jax.tree.structure(tree):
        a, b = dict(named_leaves(first)), dict(named_leaves(tree))
        only = sorted(a.keys() ^ b.keys())
        raise ValueError(
            f"stack_params: tree {name} has another structure than tree {first_name}: "
            + (f"only one of them has {', '.join(only)}" if only else "their containers or their metadata differ")
        )
    for (path, x), (_, y) in zip(named_leaves(first), named_leaves(tree), strict=True):
        x, y = _type(x), _type(y)
        if x != y:
            raise ValueError(f"stack_params: {path} is {y} in tree {name} and {x} in tree {first_name}")


def _type(leaf: Any) -> str:
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _natural(name: Any) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(name)) if part]
