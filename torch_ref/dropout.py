"""Dropout masks drawn once, in NumPy, and fed to both frameworks, whose own random numbers differ.

The Flax models stay as they are. What `flax.linen.intercept_methods` finds called on an `nn.Dropout` is replaced by
`x * keep`, and `keep` is read from the collection `"dropout"`, so that a stack slices it per block, like parameters. In
torch, `torch_ref.models._layers.Dropout` has a place for it. A mask is named by the path of its module.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import torch
from torch import Tensor

from torch_ref.convert import to_torch
from torch_ref.models import Stack
from torch_ref.models._layers import Dropout

COLLECTION = "dropout"
Masks = dict[str, np.ndarray]


def draw(
    block: nn.Module, variables: Any, carry: tuple[Any, ...], shared: Mapping[str, Any], length: int, seed: int = 0
) -> Masks:
    """A mask for every `nn.Dropout` of `block`, at that module's rate: `[N, ...]`, zeros and `1 / (1 - rate)`.

    Arguments:
        variables, carry, shared: of one block; only shapes and dtypes are looked at.
    """
    rng = np.random.default_rng(seed)
    masks = {}

    def record(next_fun, args, kwargs, context):
        module, x = context.module, args[0]
        if not _is_dropout(context):
            return next_fun(*args, **kwargs)
        shape = np.array(x.shape)
        shape[list(module.broadcast_dims)] = 1
        kept = rng.random((length, *shape)) >= module.rate
        masks[".".join(module.path)] = (kept / (1 - module.rate)).astype(x.dtype)
        return x

    with nn.intercept_methods(record):
        jax.eval_shape(lambda variables, carry: block.apply(variables, *carry, **shared), variables, carry)
    return masks


def collection(masks: Masks) -> dict[str, Any]:
    """`masks` as a collection of variables for a Flax stack, to go beside `"params"`."""
    return {COLLECTION: flax.traverse_util.unflatten_dict({f"{name}.keep": keep for name, keep in masks.items()}, sep=".")}


def fed() -> AbstractContextManager[Any]:
    """Within this context every `nn.Dropout` applies its mask from the collection, or raises if it has none."""

    def apply(next_fun, args, kwargs, context):
        if not _is_dropout(context):
            return next_fun(*args, **kwargs)
        if not context.module.has_variable(COLLECTION, "keep"):
            raise ValueError(f"no mask was drawn for the dropout {'.'.join(context.module.path)}")
        return args[0] * context.module.get_variable(COLLECTION, "keep").astype(args[0].dtype)

    return nn.intercept_methods(apply)


def feed(stack: Stack, masks: Mapping[str, np.ndarray]) -> None:
    """Sets the masks of every `Dropout` of a torch stack, or none of them where `masks` is empty.

    Raises:
        ValueError: a mask without a module or a module without a mask, named; or values of another rate.
    """
    for i, block in enumerate(stack.blocks):
        modules = {name: module for name, module in block.named_modules() if isinstance(module, Dropout)}
        unmatched = sorted(modules.keys() ^ masks.keys())
        if masks and unmatched:
            raise ValueError(f"only one of the masks and the torch block has {', '.join(unmatched)}")
        for name, module in modules.items():
            module.keep = to_torch(masks[name][i]) if masks else None
            if module.keep is not None and not _has_rate(module.keep, module.rate):
                raise ValueError(f"{name} has rate {module.rate}, and its mask other values than 0 and 1 / (1 - rate)")


def _has_rate(keep: Tensor, rate: float) -> bool:
    scaled = keep.double() * (1 - rate)
    return bool(torch.minimum(scaled.abs(), (scaled - 1).abs()).max() < 1e-6)


def _is_dropout(context: Any) -> bool:
    return isinstance(context.module, nn.Dropout) and context.method_name == "__call__"
