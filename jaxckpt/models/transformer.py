"""A decoder block and a byte-level language model in Flax Linen.

The block is the Llama family's (Touvron et al. 2023): pre-norm with RMSNorm, rotary positions, causal
attention, SwiGLU MLP, no biases. `transformer_nnx.py` has the same block in Flax NNX.

Shape legend: `T` positions, `D` = `d_model` channels.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxckpt import checkpoint_scan
from jaxckpt.models._attention import attention, mask_bias, rotary, statistics_dtype
from jaxckpt.models._layers import dtypes_of

VOCABULARY = 256  # bytes


def check_heads(d_model: int, num_heads: int) -> None:
    """Refuse heads that do not divide the channels, or are too odd for rotary pairs."""
    if num_heads < 1 or d_model % (2 * num_heads):
        raise ValueError(
            f"d_model={d_model} with num_heads={num_heads}: rotary positions need an even number of "
            "channels per head; choose d_model a multiple of 2 * num_heads"
        )


class TransformerBlock(nn.Module):
    """Causal self-attention and a gated MLP, each pre-normed and added to the residual stream.

    >>> import jax
    >>> stack = checkpoint_scan(TransformerBlock, 24, policy="save:*_proj")(512, 8, 2048)
    >>> x, mask = jnp.ones((2, 64, 512)), jnp.ones((2, 64))
    >>> x, variables = jax.eval_shape(stack.init_with_output, jax.random.key(0), x, mask=mask)
    >>> x.shape, variables["params"]["query"]["kernel"].shape
    ((2, 64, 512), (24, 512, 512))

    The carry is `x`; it leaves in the shape and dtype it came in, whatever `dtype` is. `dtype` is the
    compute dtype (None promotes inputs and parameters; `jnp.bfloat16` runs the matmuls in bf16 on
    float32 parameters); norm statistics, rotations and softmaxes are in float32 or wider. Kernels
    start lecun-normal.

    Tags for policies, MaxText's names, in order: `decoder_layer_input`, `query_proj`, `key_proj` (both
    after the rotation), `value_proj`, `context` (before the output projection), `out_proj`,
    `mlpwi_0` (the gate, before its silu), `mlpwi_1`, `mlpwo`.
    """

    d_model: int
    num_heads: int
    d_ff: int
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... T D"],
        *,
        mask: Float[Array, "... T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "... T D"]:
        """Apply the block.

        **Arguments:**

        - `x`: the carry; any number of leading batch axes.
        - `mask`: weights of the keys, floats in [0, 1] or booleans: 1 keeps a position, 0 hides it
            from all others, and between them its attention weights are multiplied by the mask and
            renormalized (`_attention.mask_bias`). It does not zero the output of a hidden position.
        - `deterministic`: False applies dropout with `dropout_rate` to both updates (needs a
            `dropout` rng). Attention weights are not dropped.

        **Returns:** the new `x`.
        """
        check_heads(self.d_model, self.num_heads)
        dtypes = dtypes_of(self)
        heads = (*x.shape[:-1], self.num_heads, self.d_model // self.num_heads)

        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, name=name, **dtypes)

        x = checkpoint_name(x, "decoder_layer_input")
        h = nn.RMSNorm(name="attention_norm", **dtypes)(x)
        query = rotary(dense(self.d_model, "query")(h).reshape(heads))
        query = checkpoint_name(query, "query_proj")
        key = rotary(dense(self.d_model, "key")(h).reshape(heads))
        key = checkpoint_name(key, "key_proj")
        value = dense(self.d_model, "value")(h).reshape(heads)
        value = checkpoint_name(value, "value_proj")
        biases = []
        if mask is not None:
            bias = mask_bias(mask, statistics_dtype(query.dtype))
            biases.append(jnp.expand_dims(bias, (-3, -2)))
        context = attention(query, key, value, biases=biases, causal=True).reshape(h.shape)
        context = checkpoint_name(context, "context")
        update = checkpoint_name(dense(self.d_model, "out")(context), "out_proj")
        update = nn.Dropout(self.dropout_rate, name="attention_dropout")(update, deterministic)
        x = x + update.astype(x.dtype)

        h = nn.RMSNorm(name="mlp_norm", **dtypes)(x)
        gate = checkpoint_name(dense(self.d_ff, "wi_0")(h), "mlpwi_0")
        up = checkpoint_name(dense(self.d_ff, "wi_1")(h), "mlpwi_1")
        update = checkpoint_name(dense(self.d_model, "wo")(nn.silu(gate) * up), "mlpwo")
        update = nn.Dropout(self.dropout_rate, name="mlp_dropout")(update, deterministic)
        return x + update.astype(x.dtype)


class TransformerLM(nn.Module):
    """A language model over bytes: embedding, a checkpointed stack of blocks, norm, logits.

    >>> import jax
    >>> model = TransformerLM(12, 256, 4, 1024, dtype=jnp.bfloat16, blocks_per_ckpt=3, policy="dots")
    >>> tokens = jnp.zeros((2, 64), jnp.int32)
    >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
    >>> logits.shape, logits.dtype, sorted(variables["params"])
    ((2, 64, 256), dtype('float32'), ['blocks', 'embed', 'logits', 'norm'])

    The residual stream is in `dtype`, or in `param_dtype` when that is None. `plan` is that of `checkpoint_scan`, and takes
    the place of `blocks_per_ckpt` and `policy`.
    """

    num_blocks: int
    d_model: int
    num_heads: int
    d_ff: int
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    blocks_per_ckpt: int | None = None
    policy: str = "nothing"
    plan: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "... T"],
        *,
        mask: Float[Array, "... T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "... T 256"]:
        """Logits of the next byte at every position.

        **Arguments:** `tokens`, bytes as integers in [0, 256); `mask` and `deterministic` as for
        `TransformerBlock`.

        **Returns:** the logits, in float32 (float64 for a float64 model).
        """
        dtypes = dtypes_of(self)
        x = nn.Embed(VOCABULARY, self.d_model, name="embed", **dtypes)(tokens)
        knobs: Any = {"blocks_per_ckpt": self.blocks_per_ckpt, "policy": self.policy}
        stack = checkpoint_scan(TransformerBlock, self.num_blocks, **({"plan": self.plan} if self.plan else knobs))
        x = stack(
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            dropout_rate=self.dropout_rate,
            name="blocks",
            **dtypes,
        )(x, mask=mask, deterministic=deterministic)
        x = nn.RMSNorm(name="norm", **dtypes)(x)
        logits_dtype = statistics_dtype(x.dtype)
        return nn.Dense(
            VOCABULARY,
            use_bias=False,
            dtype=logits_dtype,
            param_dtype=self.param_dtype,
            name="logits",
        )(x)
