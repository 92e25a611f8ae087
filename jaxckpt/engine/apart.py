"""Runs a function in a computation of its own: a branch that is always taken, which XLA cannot know."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt.engine.types import zeros


def apart(is_so: jax.Array, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` as a branch; `is_so` is `always()`, called outside of the loop."""
    traced, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return lax.cond(is_so, fn, lambda *_: jax.tree.unflatten(jax.tree.structure(out), map(zeros, traced.out_avals)), *args)


def always() -> jax.Array:
    """True, and XLA does not know."""
    return lax.optimization_barrier(jnp.array(True))
