"""Guards of what can be differentiated once, in reverse: they say so where JAX would speak of `custom_vjp` and `while`.

The tangent of what is guarded is refused where it is used, not where it is made: what `jax.lax.stop_gradient` drops is fine.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@jax.custom_jvp
def reverse_only(arrays: Sequence[Any]) -> Any:
    """A number for a `custom_vjp` to take beside `arrays`: its tangent can be transposed, and not computed."""
    return np.float32(0)


@partial(reverse_only.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    given = [t for t in tangents[0] if not isinstance(t, SymbolicZero)]
    return np.float32(0), unusable_p.bind(*given, transposes=True)


@jax.custom_jvp
def differentiated_once(x: Any) -> Any:
    """`x`, with a tangent that can be neither computed nor transposed."""
    return x


@differentiated_once.defjvp
def _(primals, tangents):
    return primals[0], unusable_p.bind(*tangents, transposes=False)


def _refuse(*args: Any, **params: Any) -> Any:
    raise TypeError(
        "the reversal engine has no forward mode (jvp, linearize, jacfwd) and no second derivatives (hessian, grad of "
        "grad): write engine='scan', which has both"
    )


def _transposed(ct, *tangents, transposes):
    return [ad.Zero(t.aval) for t in tangents] if transposes else _refuse()


def _batched(tangents, axes, *, transposes):
    # JAX asks the `custom_vjp` behind it next, even where nobody uses that.
    return _refuse() if transposes else (unusable_p.bind(*tangents, transposes=False), axes[0])


unusable_p = Primitive("jaxckpt_unusable")  # of all tangents a number, or of one the same
unusable_p.def_abstract_eval(lambda *ts, transposes: jax.core.ShapedArray((), np.dtype("float32")) if transposes else ts[0])
unusable_p.def_impl(_refuse)
ad.deflinear2(unusable_p, _transposed)
batching.primitive_batchers[unusable_p] = _batched
mlir.register_lowering(unusable_p, _refuse)
