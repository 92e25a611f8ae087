"""Runs a function in a computation of its own: a branch that is always taken, which XLA cannot know."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxckpt.engine.layout import is_for_one_gpu
from jaxckpt.engine.types import zeros


def apart(is_so: jax.Array, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` as a branch; `is_so` is from one of the functions below, called outside of the loop."""
    traced, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    return lax.cond(is_so, fn, lambda *_: jax.tree.unflatten(jax.tree.structure(out), map(zeros, traced.out_avals)), *args)


def always() -> jax.Array:
    """True, and XLA does not know."""
    return lax.optimization_barrier(jnp.array(True))


def always_on_one_gpu() -> jax.Array:
    """True, and XLA does not know if the program is for one GPU; elsewhere it does, and there is no branch."""
    return one_gpu_p.bind()


one_gpu_p = Primitive("jaxckpt_one_gpu")
one_gpu_p.def_impl(lambda: jnp.array(True))
one_gpu_p.def_abstract_eval(lambda: ShapedArray((), jnp.bool_))
mlir.register_lowering(one_gpu_p, mlir.lower_fun(lambda: jnp.array(True), multiple_results=False))


def _lowered(ctx: Any) -> Any:
    return mlir.lower_fun(always if is_for_one_gpu(ctx) else lambda: jnp.array(True), multiple_results=False)(ctx)


for _platform in ("cuda", "rocm"):
    mlir.register_lowering(one_gpu_p, _lowered, platform=_platform)
