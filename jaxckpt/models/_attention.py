"""Attention arithmetic that every model shares: pure functions without parameters.

Shape legend: `Q` queries, `K` keys, `H` heads, `c` channels of a head, `T` positions of a sequence.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

# exp(-1e9) is 0 in every dtype a softmax is computed in, and, unlike -inf, a row in which every key
# is masked keeps a finite softmax (uniform), and with it a finite gradient.
_MASKED_LOGIT = -1e9


def statistics_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for sums that bf16 cannot hold: float32, and float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def mask_bias(mask: Float[Array, "... K"] | Bool[Array, "... K"], dtype: DTypeLike) -> Float[Array, "... K"]:
    """A multiplicative key mask as an additive bias for the logits: `log(mask)`.

    `softmax(logits + log(mask))` is `mask * exp(logits) / sum(mask * exp(logits))`, so a mask is a
    weight on each key: 1 leaves the key as it is, 0 removes it, 0.5 halves it against the others.
    AlphaFold's `1e9 * (mask - 1)` agrees at 0 and 1, but its derivative at 1 is 1e9 times this one.

    **Arguments:** `mask`, floats in [0, 1] or booleans; `dtype`, that of the result.

    **Returns:** the bias, of the mask's shape. The derivative is 1 at `mask == 1`, and 0 at
    `mask == 0`: a removed key is out of reach of the gradient, like the input of a relu.
    """
    weight = jnp.asarray(mask).astype(dtype)
    kept = weight > 0
    # The inner `where` keeps log(0), and the nan of its gradient, out of the branch not taken.
    return jnp.where(kept, jnp.log(jnp.where(kept, weight, 1)), _MASKED_LOGIT)


def attention(
    query: Float[Array, "... Q H c"],
    key: Float[Array, "... K H c"],
    value: Float[Array, "... K H c"],
    *,
    biases: Sequence[Float[Array, "..."]] = (),
    causal: bool = False,
) -> Float[Array, "... Q H c"]:
    """`softmax(query . key / sqrt(c) + sum(biases)) . value`, with the softmax in >= float32.

    **Arguments:** `biases`, each broadcastable to the logits `[..., H, Q, K]`; `causal`, whether
    query `i` sees only keys `0..i`.

    **Returns:** the weighted values, in the dtype of `value`.
    """
    scaled = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("...qhc,...khc->...hqk", scaled, key)
    logits = logits.astype(statistics_dtype(logits.dtype))
    for bias in biases:
        logits = logits + bias.astype(logits.dtype)
    if causal:
        # -inf outranks a masked key: where all visible keys are masked, the future stays invisible.
        # A query always sees itself, so no row is all -inf. A sum, because autodiff would keep the
        # condition of a `where` for every head and batch element.
        past = jnp.tri(*logits.shape[-2:], dtype=bool)
        bias = jnp.where(past, 0, jnp.asarray(-jnp.inf, logits.dtype))
        logits = logits + jnp.expand_dims(bias, tuple(range(logits.ndim - 2)))
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khc->...qhc", weights, value)


def rotary(x: Float[Array, "... T H c"], base: float = 10_000.0) -> Float[Array, "... T H c"]:
    """Rotary position embedding (Su et al. 2021, RoFormer, eq. 34), positions `0..T-1`.

    Channels `i` and `i + c/2` form a pair, which position `t` rotates by `t * base**(-2i/c)`.
    """
    length, _, channels = x.shape[-3:]
    dtype = statistics_dtype(x.dtype)
    frequency = base ** (-jnp.arange(0, channels, 2, dtype=dtype) / channels)
    angle = jnp.outer(jnp.arange(length, dtype=dtype), frequency)
    # One axis for the heads, and as many in front as x has batch axes.
    angle = angle.reshape((1,) * (x.ndim - 3) + (length, 1, channels // 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
