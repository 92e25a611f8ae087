"""The layer axis in Flax's partitioning metadata, Linen's boxes and NNX's variables alike.

A parameter boxed as `Partitioned(names=(None, "mlp"))` in the block is `Partitioned(names=("layers", None, "mlp"))`
in the stack, as under `nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"})`.
"""

from typing import Any

from flax.core import meta
from flax.nnx import spmd

_LAYERS = {meta.PARTITION_NAME: "layers"}


def add_layer_axis(tree: Any) -> Any:
    """`tree`, whose leaves have just been stacked on axis 0, with "layers" in front in all its metadata."""
    return spmd.add_axis(meta.add_axis(tree, 0, _LAYERS), 0, _LAYERS)


def remove_layer_axis(tree: Any) -> Any:
    """The inverse, for a tree whose leaves are one block's slice."""
    return spmd.remove_axis(meta.remove_axis(tree, 0, _LAYERS), 0, _LAYERS)
