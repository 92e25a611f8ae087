"""Guards of what can be differentiated once, in reverse: they say so where JAX would speak of `custom_vjp` and `while`."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

INSTEAD = (
    "the reversal engine runs the blocks of a stack backwards once, and {} needs more than that: write engine='scan', which "
    "all of JAX's transformations go through"
)


def reverse_only(x: Any) -> Any:
    """`x`, whose tangent may be transposed but not computed."""
    return reverse_only_p.bind(x)


def differentiated_once(x: Any) -> Any:
    """`x`, which has no derivative."""
    return once_p.bind(x)


def _refuse_forward(*args: Any, **params: Any) -> Any:
    raise TypeError(INSTEAD.format("forward mode (jvp, linearize, jacfwd)"))


def _refuse_second(*args: Any, **params: Any) -> Any:
    raise TypeError(INSTEAD.format("a derivative of a gradient (hessian, grad of grad)"))


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda x: x)
    batching.defvectorized(primitive)
    return primitive


tangent_p = _identity("jaxckpt_tangent")
tangent_p.def_impl(_refuse_forward)
mlir.register_lowering(tangent_p, _refuse_forward)
ad.deflinear2(tangent_p, lambda ct, x: [ct])

reverse_only_p = _identity("jaxckpt_reverse_only")
reverse_only_p.def_impl(lambda x: x)
mlir.register_lowering(reverse_only_p, lambda ctx, x: [x])
ad.defjvp(reverse_only_p, lambda tangent, x: tangent_p.bind(tangent))

once_p = _identity("jaxckpt_once")
once_p.def_impl(lambda x: x)
mlir.register_lowering(once_p, lambda ctx, x: [x])
ad.primitive_jvps[once_p] = _refuse_second
