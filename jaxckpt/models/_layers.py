"""Sublayers that the Pairformer and the Evoformer share: triangle updates, transitions, gated attention.

Sources: AF2 is Jumper et al. 2021, AF3 is Abramson et al. 2024; "Alg" is an algorithm of the
paper's supplement. AF3 drops the biases that AF2 has (`use_bias`) and replaces relu by SwiGLU.

Conventions of every module here:

- it returns the *update*; the block adds it to the residual stream (`residual`);
- axes are counted from the end, so leading batch axes cost nothing;
- `dtype` is the compute dtype (None promotes inputs and parameters), `param_dtype` that of the
  parameters; layer norm statistics and softmaxes are in float32 or wider;
- kernels start lecun-normal, biases at zero. AlphaFold starts output projections and gates at
  zero; here that would make most gradients of a fresh block zero, and tests of them vacuous.

Shape legend: `N` tokens, `c` channels, `H` heads.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxckpt.models._attention import attention, mask_bias, statistics_dtype


def check_channels(**expected: tuple[Array, int]) -> None:
    """Refuse an array whose last axis is not what the block was built for, naming the field."""
    for field, (array, channels) in expected.items():
        if array.shape[-1] != channels:
            raise ValueError(
                f"the block has {field}={channels}, but was called with an array of shape "
                f"{array.shape}, whose last axis is {array.shape[-1]}; "
                f"build it with {field}={array.shape[-1]}"
            )


def residual(x: Array, update: Array) -> Array:
    """`x + update` in the dtype of `x`: the residual stream keeps the dtype it came in with."""
    return x + update.astype(x.dtype)


def row_dropout(rate: float, name: str) -> nn.Dropout:
    """AF2 1.11.6 `DropoutRowwise`: on `[..., rows, columns, c]`, one mask shared by all rows."""
    return nn.Dropout(rate, broadcast_dims=(-3,), name=name)


def column_dropout(rate: float, name: str) -> nn.Dropout:
    """AF2 1.11.6 `DropoutColumnwise`: on `[..., rows, columns, c]`, one mask shared by all columns."""
    return nn.Dropout(rate, broadcast_dims=(-2,), name=name)


def dtypes_of(module: Any) -> dict[str, Any]:
    """The compute and parameter dtypes of a module, as keyword arguments for its submodules."""
    return {"dtype": module.dtype, "param_dtype": module.param_dtype}


def dense_and_norm(module: Any) -> tuple[Callable[..., nn.Dense], Callable[..., nn.LayerNorm]]:
    """Constructors of Dense (without bias unless asked) and LayerNorm in the dtypes of `module`."""
    dtypes = dtypes_of(module)
    return partial(nn.Dense, use_bias=False, **dtypes), partial(nn.LayerNorm, epsilon=1e-5, **dtypes)


class GatedAttention(nn.Module):
    """Multi-head attention over axis -2 of a normalized input, gated per head and channel.

    The common part of AF2 Alg 7, 8, 13, 14 and AF3 Alg 14, 15, 24. Tag: `attention_context`, the
    weighted values before the gate.
    """

    num_heads: int
    head_dim: int
    query_bias: bool = False
    gate_bias: bool = False
    out_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... N c"], biases: Sequence[Float[Array, "..."]] = ()) -> Float[Array, "... N c"]:
        """`biases` are added to the logits `[..., H, N, N]`."""
        dense, _ = dense_and_norm(self)
        width = self.num_heads * self.head_dim
        heads = (*x.shape[:-1], self.num_heads, self.head_dim)
        query = dense(width, use_bias=self.query_bias, name="query")(x).reshape(heads)
        key = dense(width, name="key")(x).reshape(heads)
        value = dense(width, name="value")(x).reshape(heads)
        gate = nn.sigmoid(dense(width, use_bias=self.gate_bias, name="gate")(x))
        context = checkpoint_name(attention(query, key, value, biases=biases), "attention_context")
        gated = gate * context.reshape(gate.shape)
        return dense(x.shape[-1], use_bias=self.out_bias, name="out")(gated)


class PairBias(nn.Module):
    """One bias per head and pair, `Linear(LayerNorm(z))` (AF2 Alg 7, line 3; AF3 Alg 24)."""

    num_heads: int
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "... N N c"]) -> Float[Array, "... H N N"]:
        dense, norm = dense_and_norm(self)
        # An offset here would shift all logits of a head alike, which a softmax cannot see: its
        # gradient would be zero for ever.
        normalized = norm(use_bias=False, name="norm")(z)
        return jnp.moveaxis(dense(self.num_heads, name="out")(normalized), -1, -3)


class TriangleMultiplication(nn.Module):
    """Triangle multiplicative update (AF2 Alg 11, 12; AF3 Alg 12, 13).

    Tag: `tri_mul_product`, the sum over the third corner of the triangles, O(N^3 c).
    """

    outgoing: bool
    c_hidden: int = 128
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "... N N c"], mask: Float[Array, "... N N"] | None = None
    ) -> Float[Array, "... N N c"]:
        """`mask` multiplies both edges of every triangle."""
        dense, norm = dense_and_norm(self)
        dense = partial(dense, use_bias=self.use_bias)
        x = norm(name="norm_in")(z)

        def edge(name: str) -> Array:
            gate = nn.sigmoid(dense(self.c_hidden, name=f"{name}_gate")(x))
            projected = gate * dense(self.c_hidden, name=f"{name}_proj")(x)
            if mask is None:
                return projected
            return projected * jnp.expand_dims(mask, -1).astype(projected.dtype)

        equation = "...ikc,...jkc->...ijc" if self.outgoing else "...kic,...kjc->...ijc"
        product = jnp.einsum(equation, edge("a"), edge("b"))
        product = checkpoint_name(product, "tri_mul_product")
        gate = nn.sigmoid(dense(z.shape[-1], name="out_gate")(x))
        return gate * dense(z.shape[-1], name="out_proj")(norm(name="norm_out")(product))


class TriangleAttention(nn.Module):
    """Triangle self-attention around the starting or ending node (AF2 Alg 13, 14; AF3 Alg 14, 15).

    `use_bias` is AF2's: a bias in the gate and in the output, none in query, key and value.
    """

    starting: bool
    num_heads: int = 4
    head_dim: int = 32
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "... N N c"], mask: Float[Array, "... N N"] | None = None
    ) -> Float[Array, "... N N c"]:
        """`mask` weighs the keys: edge `(i, k)` for edge `(i, j)`, or `(k, j)` for the ending node."""
        # The ending node's attention is the starting node's on the transposed pair representation.
        if not self.starting:
            z = jnp.swapaxes(z, -3, -2)
            mask = None if mask is None else jnp.swapaxes(mask, -2, -1)
        dense, norm = dense_and_norm(self)
        x = norm(name="norm")(z)
        bias = jnp.moveaxis(dense(self.num_heads, name="pair_bias")(x), -1, -3)
        biases = [jnp.expand_dims(bias, -4)]  # the same b_jk in every row i
        if mask is not None:
            biases.append(jnp.expand_dims(mask_bias(mask, statistics_dtype(x.dtype)), (-3, -2)))
        update = GatedAttention(
            self.num_heads,
            self.head_dim,
            gate_bias=self.use_bias,
            out_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="attention",
        )(x, biases)
        return update if self.starting else jnp.swapaxes(update, -3, -2)


class TriangleUpdates(nn.Module):
    """The four triangle updates of the pair representation, residuals and dropout included.

    AF2 Alg 6 lines 6-9 and AF3 Alg 17 lines 2-5, which differ in `use_bias` only. Unlike its
    sublayers it returns the new `z`. Tags: `tri_mul_outgoing`, `tri_mul_incoming`,
    `tri_att_starting`, `tri_att_ending`, each the update before dropout.
    """

    c_hidden: int = 128
    num_heads: int = 4
    head_dim: int = 32
    use_bias: bool = False
    dropout_rate: float = 0.25
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "... N N c"],
        mask: Float[Array, "... N N"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "... N N c"]:
        dtypes = dtypes_of(self)
        mul = partial(TriangleMultiplication, c_hidden=self.c_hidden, use_bias=self.use_bias, **dtypes)
        att = partial(
            TriangleAttention,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            use_bias=self.use_bias,
            **dtypes,
        )
        for layer, dropout in (
            (mul(outgoing=True, name="tri_mul_outgoing"), row_dropout),
            (mul(outgoing=False, name="tri_mul_incoming"), row_dropout),
            (att(starting=True, name="tri_att_starting"), row_dropout),
            (att(starting=False, name="tri_att_ending"), column_dropout),
        ):
            update = checkpoint_name(layer(z, mask), layer.name)
            dropped = dropout(self.dropout_rate, f"dropout_{layer.name}")(update, deterministic)
            z = residual(z, dropped)
        return z


class Transition(nn.Module):
    """AF3 Alg 11: layer norm and a SwiGLU of `factor * c` channels, no biases."""

    factor: int = 4
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        dense, norm = dense_and_norm(self)
        normalized = norm(name="norm")(x)
        gate = nn.silu(dense(self.factor * x.shape[-1], name="gate")(normalized))
        hidden = gate * dense(self.factor * x.shape[-1], name="up")(normalized)
        return dense(x.shape[-1], name="out")(hidden)


class ReluTransition(nn.Module):
    """AF2 Alg 9, 15: layer norm and a relu MLP of `factor * c` channels, with biases."""

    factor: int = 4
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        dense, norm = dense_and_norm(self)
        normalized = norm(name="norm")(x)
        hidden = nn.relu(dense(self.factor * x.shape[-1], use_bias=True, name="up")(normalized))
        return dense(x.shape[-1], use_bias=True, name="out")(hidden)
