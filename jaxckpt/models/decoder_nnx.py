"""A decoder layer as people post-train it, in Flax NNX: that of Qwen3 (Yang et al. 2025, "Qwen3 Technical Report").

Shape legend: `B` sequences, `T` tokens, `S` tokens that are seen, those of a cache included, `D` channels.
"""

import dataclasses
import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxckpt.models._attention import statistics_dtype

Cache = dict[str, Float[Array, "B S k c"]]


@dataclasses.dataclass(slots=True)
class DecoderConfig:
    """Sizes of a layer; by default of Qwen3-0.6B, which has 28 of them. It has no hash, as is common.

    Fields:
        kv_heads: heads of keys and values, each for `heads / kv_heads` heads of queries. hidden: channels of the MLP.
        longest: positions are below it.
    """

    width: int = 1024
    heads: int = 16
    kv_heads: int = 8
    head_width: int = 128
    hidden: int = 3072
    theta: float = 1e6
    eps: float = 1e-6
    longest: int = 2048
    param_dtype: DTypeLike = jnp.float32


class RMSNorm(nnx.Module):
    """Root mean square layer norm (Zhang and Sennrich 2019), its mean in float32 at least."""

    def __init__(self, width: int, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,), config.param_dtype))
        self.eps = config.eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(statistics_dtype(x.dtype))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * jnp.expand_dims(self.scale[...], range(x.ndim - 1))


class GroupedAttention(nnx.Module):
    """Attention whose heads of queries share keys and values in groups (Ainslie et al. 2023), queries and keys normed."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config, c = config, config
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, param_dtype=c.param_dtype, rngs=rngs)
        self.q = linear(c.width, (c.heads, c.head_width))
        self.k, self.v = (linear(c.width, (c.kv_heads, c.head_width)) for _ in range(2))
        self.o = linear((c.heads, c.head_width), c.width, axis=(-2, -1))
        self.q_norm, self.k_norm = (RMSNorm(c.head_width, c, rngs=rngs) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None,
        mask: Bool[Array, "B T S"],
    ) -> tuple[Cache | None, Float[Array, "B T D"]]:
        c = self.config
        q = rotary_at(self.q_norm(self.q(x)), positions, c)
        k, v = rotary_at(self.k_norm(self.k(x)), positions, c), self.v(x)
        if cache is not None:
            k, v = jnp.concatenate([cache["k"], k], 1), jnp.concatenate([cache["v"], v], 1)
            cache = {"k": k, "v": v}
        q = q.reshape(*q.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_width)
        logits = jnp.einsum("btkgd,bskd->bkgts", q * c.head_width**-0.5, k)
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits.astype(statistics_dtype(logits.dtype))).astype(v.dtype)
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        return cache, self.o(out.reshape(*out.shape[:2], c.heads, c.head_width))


def rotary_at(x: Float[Array, "B T H c"], positions: Int[Array, "B T"], config: DecoderConfig) -> Float[Array, "B T H c"]:
    """Rotary position embedding of halves of heads (Su et al. 2021), from a table that is a constant of an inner `jit`."""
    half = config.head_width // 2
    angle = np.arange(config.longest)[:, None] * config.theta ** -(np.arange(half) / half)
    table = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], -1), statistics_dtype(x.dtype))

    @jax.jit
    def rotate(x: Array, positions: Array) -> Array:
        cos, sin = jnp.moveaxis(table[positions][:, :, None], -1, 0)
        first, second = jnp.split(x.astype(table.dtype), 2, -1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)

    return rotate(x, positions)


class GatedMLP(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=config.param_dtype, rngs=rngs)
        self.gate, self.up = (linear(config.width, config.hidden) for _ in range(2))
        self.down = linear(config.hidden, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """Grouped attention and a gated MLP, each pre-normed and added to the residual stream.

    A layer is called as decoders call theirs, `cache, x = layer(x, positions, cache, mask)`. A stack of them says how:

    >>> from jaxckpt import checkpoint_scan
    >>> def call(layer, x, *, positions, mask):
    ...     return layer(x, positions, None, mask)[1]
    >>> def run(x):
    ...     config = DecoderConfig(width=16, heads=4, kv_heads=2, head_width=4, hidden=32, longest=8)
    ...     layers = [DecoderLayer(config, rngs=nnx.Rngs(i)) for i in range(3)]
    ...     positions, mask = jnp.arange(8)[None], jnp.tri(8, dtype=bool)[None]
    ...     return checkpoint_scan(layers, call=call)(x, positions=positions, mask=mask)
    >>> nnx.eval_shape(run, jnp.ones((1, 8, 16))).shape
    (1, 8, 16)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.before_attention, self.before_mlp = (RMSNorm(config.width, config, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = GroupedAttention(config, rngs=rngs), GatedMLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: Cache | None,
        mask: Bool[Array, "B T S"],
    ) -> tuple[Cache | None, Float[Array, "B T D"]]:
        """Apply the layer.

        Arguments:
            positions: of the tokens, below `config.longest`.
            cache: keys and values of tokens before these, to which these are added; None without.
            mask: which tokens each sees, those of the cache first.
        Returns:
            The cache with these tokens, or None, and the residual stream.
        """
        cache, h = self.attention(self.before_attention(x), positions, cache, mask)
        x = x + h
        return cache, x + self.mlp(self.before_mlp(x))
