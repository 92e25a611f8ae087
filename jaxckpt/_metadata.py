"""The layer axis in Flax's partitioning metadata, Linen's boxes and NNX's variables alike.

A parameter boxed as `Partitioned(names=(None, "mlp"))` in the block is `Partitioned(names=("layers", None, "mlp"))`
in the stack, as under `nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"})`. "layers" is a name for rules to
translate (`nn.logical_to_mesh`); where names are those of mesh axes, None says that the layers are not split.
"""

from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.nnx import spmd

LAYERS = "layers"


def add_layer_axis(tree: Any, name: str | None = LAYERS) -> Any:
    """`tree`, whose leaves have just been stacked on axis 0, with the layer axis's name in front in all its metadata."""
    named = {meta.PARTITION_NAME: name}
    return spmd.add_axis(meta.add_axis(tree, 0, named), 0, named)


def remove_layer_axis(tree: Any, name: str | None = LAYERS) -> Any:
    """The inverse, for a tree whose leaves are one block's slice.

    Raises:
        ValueError: the first axis of a leaf has another name.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: _names(leaf) is not None):
        names = _names(leaf)
        if names and names[0] != name:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} names its axes {names}, the first of them {names[0]!r}, where the layer axis "
                f"is named {name!r}: write partition_name={names[0]!r}, or give the parameters the stack's own names"
            )
    named = {meta.PARTITION_NAME: name}
    return spmd.remove_axis(meta.remove_axis(tree, 0, named), 0, named)


def check_partition_name(name: object) -> None:
    """Refuses what is no name of an axis."""
    if name is not None and not isinstance(name, str):
        raise TypeError(
            "partition_name, the layer axis in the partitioning metadata of parameters, must be a name, or None for an axis "
            f"that is not split; got {name!r}"
        )


def _names(leaf: Any) -> tuple[Any, ...] | None:
    """The names of a leaf's axes, if its metadata has some."""
    if isinstance(leaf, nn.Partitioned):
        return leaf.names
    return leaf.get_metadata().get("out_sharding") if isinstance(leaf, nnx.Variable) else None
