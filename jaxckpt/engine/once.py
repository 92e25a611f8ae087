"""Guards of what can be differentiated once, in reverse: they say so where JAX would speak of `custom_vjp` and `while`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(arrays: Sequence[Any]) -> jax.Array:
    """A number for a `custom_vjp` to take beside `arrays`, whose tangent can be transposed, and not computed."""
    return reverse_only_p.bind(*arrays)


def differentiated_once(x: Any) -> Any:
    """`x`, which has no derivative."""
    return once_p.bind(x)


def _refuse(*args: Any, **params: Any) -> Any:
    raise TypeError(
        "the reversal engine has no forward mode (jvp, linearize, jacfwd) and no second derivatives (hessian, grad of "
        "grad): write engine='scan', which has both"
    )


def _number(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda *arrays: jax.typeof(jnp.float32(0)))
    return primitive


reverse_only_p = _number("jaxckpt_reverse_only")
reverse_only_p.def_impl(lambda *arrays: jnp.float32(0))
batching.primitive_batchers[reverse_only_p] = lambda arrays, axes: (reverse_only_p.bind(), None)
mlir.register_lowering(reverse_only_p, mlir.lower_fun(lambda *arrays: jnp.float32(0), multiple_results=False))


def _jvp(primals, tangents):
    tangents = [t for t in tangents if not isinstance(t, ad.Zero)]
    return reverse_only_p.bind(*primals), tangent_p.bind(*tangents)


ad.primitive_jvps[reverse_only_p] = _jvp

tangent_p = _number("jaxckpt_tangent")
tangent_p.def_impl(_refuse)
batching.primitive_batchers[tangent_p] = _refuse
mlir.register_lowering(tangent_p, _refuse)
ad.primitive_transposes[tangent_p] = lambda ct, *tangents: [ad.Zero(t.aval) for t in tangents]

once_p = Primitive("jaxckpt_once")
once_p.def_impl(lambda x: x)
once_p.def_abstract_eval(lambda x: x)
ad.primitive_jvps[once_p] = _refuse
batching.defvectorized(once_p)
mlir.register_lowering(once_p, lambda ctx, x: [x])
