"""The programs of `on_gpu.py`: stacks by name, and a training step of one under a setting."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from _gpu_list import BY_HAND, CHUNK, PLAN, SETTINGS
from _systems import POLICIES, Stack, flax_scan, loss_and_gradients, our_stack, pairformer, transformer, workloads

from jaxckpt.models import TransformerBlock


def stack_named(name: str, dry: bool) -> Stack:
    """A workload: "transformer", "pairformer-384", "pairformer-384 x 16" (blocks); for a dry run a small transformer."""
    base, _, blocks = name.partition(" x ")
    tokens = None if base == "transformer" else int(base.removeprefix("pairformer-"))
    if dry:
        stack = transformer(6, 8, (tokens or 512) // 16, 64, 3)
    else:
        stack = workloads()["transformer-2048"] if tokens is None else pairformer(48, tokens, 6)
    if not blocks:
        return stack
    length = min(int(blocks), stack.length)
    return dataclasses.replace(stack, length=length, title=stack.title.replace(f"{stack.length} blocks", f"{length} blocks"))


def knobs_of(setting: str, stack: Stack) -> dict[str, Any]:
    """Arguments of `checkpoint_scan`."""
    return {name: stack.chunk if value == CHUNK else value for name, value in SETTINGS[setting].items()}


def step_of(setting: str, stack: Stack, plan: Any = None) -> Any:
    """One training step: loss and gradients of a stack under a setting.

    Arguments:
        plan: of `checkpoint_scan`, where the setting is `PLAN`.
    """
    if setting == BY_HAND:
        return functools.partial(loss_and_gradients, flax_scan(POLICIES["nothing"], stack))
    knobs = {"plan": plan} if setting == PLAN else knobs_of(setting, stack)
    return functools.partial(loss_and_gradients, our_stack(**knobs)(stack))


def small_in_float64() -> Stack:
    """What gradients of offloading settings are compared on; JAX must have 64 bits enabled."""
    double = {"dtype": jnp.float64, "param_dtype": jnp.float64}
    block = TransformerBlock(64, num_heads=2, d_ff=128, **double)
    return Stack("6 transformer blocks, float64", block, 6, 3, (jax.ShapeDtypeStruct((2, 32, 64), jnp.float64),))
