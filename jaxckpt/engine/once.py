"""Guards of what cannot be differentiated, or once only, in reverse: they say so in our words.

The tangent of what is guarded is refused where it is used, not where it is made: what `jax.lax.stop_gradient` drops is fine.
So is what has no part in the loss, a metric in an inner loop say: loops, branches and checkpoints know that its cotangent is
zero, and do not transpose its tangent. An array of zeros, which a `custom_vjp` around it makes, is refused as any other.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(arrays: Sequence[Any]) -> jax.Array:
    """A number for a `custom_vjp` to take beside `arrays`: its tangent can be transposed, and not computed."""
    return reverse_only_p.bind(*arrays)


@jax.custom_jvp
def differentiated_once(x: Any) -> Any:
    """`x`, with a tangent that can be neither computed nor transposed."""
    return x


@differentiated_once.defjvp
def _(primals, tangents):
    return primals[0], unusable_p.bind(*tangents, transposes=False, error=_ONCE)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def not_differentiated(x: Any, error: Exception) -> Any:
    """`x`, with a tangent that raises `error` where it is used."""
    return x


@not_differentiated.defjvp
def _(error, primals, tangents):
    return primals[0], unusable_p.bind(*tangents, transposes=False, error=error)


_ONCE = TypeError(
    "the reversal engine has no forward mode (jvp, linearize, jacfwd) and no second derivatives (hessian, grad of grad): "
    "write engine='scan', which has both"
)


def _refuse(*args: Any, error: Exception, **params: Any) -> Any:
    raise error.with_traceback(None)


_NUMBER = ShapedArray((), np.dtype("float32"))


def _zero(*arrays: Any) -> jax.Array:
    return jnp.zeros((), "float32")


def _jvp(arrays, tangents):
    given = [t for t in tangents if not isinstance(t, ad.Zero)]
    return reverse_only_p.bind(*arrays), unusable_p.bind(*given, transposes=True, error=_ONCE)


reverse_only_p = Primitive("jaxckpt_reverse_only")
reverse_only_p.def_abstract_eval(lambda *arrays: _NUMBER)
reverse_only_p.def_impl(_zero)
ad.primitive_jvps[reverse_only_p] = _jvp
batching.primitive_batchers[reverse_only_p] = lambda arrays, axes: (reverse_only_p.bind(*arrays), None)
mlir.register_lowering(reverse_only_p, mlir.lower_fun(_zero, multiple_results=False))


def _transposed(ct, *tangents, transposes, error):
    return [ad.Zero(t.aval) for t in tangents] if transposes else _refuse(error=error)


def _batched(tangents, axes, *, transposes, error):
    # Tangents of a number are batched in forward mode only, where JAX would ask the `custom_vjp` behind it next.
    if transposes:
        return _refuse(error=error)
    return unusable_p.bind(*tangents, transposes=False, error=error), axes[0]


unusable_p = Primitive("jaxckpt_unusable")  # of all tangents that of the number, or of one the same
unusable_p.def_abstract_eval(lambda *tangents, transposes, error: _NUMBER if transposes else tangents[0])
unusable_p.def_impl(_refuse)
ad.deflinear2(unusable_p, _transposed)
batching.primitive_batchers[unusable_p] = _batched
mlir.register_lowering(unusable_p, _refuse)
