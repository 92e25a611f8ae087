"""The block of `transformer.py` in Flax NNX: the same mathematics, tags and parameter paths."""

from typing import Any

import flax.nnx as nnx
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxckpt.models._attention import attention, mask_bias, rotary, statistics_dtype
from jaxckpt.models.transformer import check_heads


class TransformerBlock(nnx.Module):
    """Causal self-attention and a gated MLP, each pre-normed and added to the residual stream.

    >>> def run(x):
    ...     return TransformerBlock(64, 4, 256, rngs=nnx.Rngs(0))(x)
    >>> nnx.eval_shape(run, jnp.ones((2, 16, 64))).shape
    (2, 16, 64)

    See the Linen `TransformerBlock` for dtypes and tags, which are the same, and so are the paths of
    the parameters (`query.kernel` here is `params/query/kernel` there).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        dropout_rate: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`rngs` gives `params` for the kernels, and `dropout` for the stream that the block keeps."""
        check_heads(d_model, num_heads)
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_heads = num_heads
        self.attention_norm = nnx.RMSNorm(d_model, **shared)
        self.query = nnx.Linear(d_model, d_model, use_bias=False, **shared)
        self.key = nnx.Linear(d_model, d_model, use_bias=False, **shared)
        self.value = nnx.Linear(d_model, d_model, use_bias=False, **shared)
        self.out = nnx.Linear(d_model, d_model, use_bias=False, **shared)
        self.mlp_norm = nnx.RMSNorm(d_model, **shared)
        self.wi_0 = nnx.Linear(d_model, d_ff, use_bias=False, **shared)
        self.wi_1 = nnx.Linear(d_model, d_ff, use_bias=False, **shared)
        self.wo = nnx.Linear(d_ff, d_model, use_bias=False, **shared)
        # One module for both updates: its stream advances at each call, so their masks differ.
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "... T D"],
        *,
        mask: Float[Array, "... T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "... T D"]:
        """Apply the block; arguments and result as in the Linen `TransformerBlock`."""
        heads = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)

        x = checkpoint_name(x, "decoder_layer_input")
        h = self.attention_norm(x)
        query = checkpoint_name(rotary(self.query(h).reshape(heads)), "query_proj")
        key = checkpoint_name(rotary(self.key(h).reshape(heads)), "key_proj")
        value = checkpoint_name(self.value(h).reshape(heads), "value_proj")
        biases = []
        if mask is not None:
            bias = mask_bias(mask, statistics_dtype(query.dtype))
            biases.append(jnp.expand_dims(bias, (-3, -2)))
        context = attention(query, key, value, biases=biases, causal=True).reshape(h.shape)
        context = checkpoint_name(context, "context")
        update = checkpoint_name(self.out(context), "out_proj")
        x = x + self.dropout(update, deterministic=deterministic).astype(x.dtype)

        h = self.mlp_norm(x)
        gate = checkpoint_name(self.wi_0(h), "mlpwi_0")
        up = checkpoint_name(self.wi_1(h), "mlpwi_1")
        update = checkpoint_name(self.wo(nnx.silu(gate) * up), "mlpwo")
        return x + self.dropout(update, deterministic=deterministic).astype(x.dtype)
