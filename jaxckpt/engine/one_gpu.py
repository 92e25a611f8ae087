"""Identities that do something in programs for one GPU alone."""

from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def identity_but_on_one_gpu(name: str, fn: Callable[[Any], Any], transposed: Primitive | None = None) -> Primitive:
    """The identity of an array, also to every transformation; `fn` where a program is lowered for one GPU.

    Arguments:
        transposed: what cotangents go through, by default the same.
    """
    primitive = Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    ad.deflinear2(primitive, lambda ct, x: [(transposed or primitive).bind(ct)])
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda ctx, x: [x])

    def lowered(ctx: Any, x: Any) -> Any:
        return mlir.lower_fun(fn, multiple_results=False)(ctx, x) if _is_for_one_gpu(ctx) else [x]

    for platform in ("cuda", "rocm"):
        mlir.register_lowering(primitive, lowered, platform=platform)
    return primitive


def _is_for_one_gpu(ctx: Any) -> bool:
    """Whether a program that is lowered for GPUs runs on one alone, and is not exported."""
    module = ctx.module_context
    return not module.lowering_parameters.for_export and getattr(module.axis_context, "num_devices", 2) == 1
