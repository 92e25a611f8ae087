"""The Evoformer block of AlphaFold 2 (Jumper et al. 2021, supplement Algorithm 6).

Shape legend: `S` sequences of the alignment, `R` residues, `c_m` channels of a residue of a
sequence, `c_z` channels of a pair of residues, `H` heads.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxckpt.models._attention import mask_bias, statistics_dtype
from jaxckpt.models._layers import (
    GatedAttention,
    PairBias,
    ReluTransition,
    TriangleUpdates,
    check_channels,
    dense_and_norm,
    dtypes_of,
    residual,
    row_dropout,
)


class MSARowAttention(nn.Module):
    """Row-wise gated attention with pair bias (AF2 Alg 7): each sequence over its residues."""

    num_heads: int = 8
    head_dim: int = 32
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        m: Float[Array, "... S R c_m"],
        z: Float[Array, "... R R c_z"],
        mask: Float[Array, "... S R"] | None = None,
    ) -> Float[Array, "... S R c_m"]:
        dtypes = dtypes_of(self)
        _, norm = dense_and_norm(self)
        x = norm(name="norm")(m)
        bias = PairBias(self.num_heads, name="pair_bias", **dtypes)(z)
        biases = [jnp.expand_dims(bias, -4)]  # the same for every sequence
        if mask is not None:
            biases.append(jnp.expand_dims(mask_bias(mask, statistics_dtype(x.dtype)), (-3, -2)))
        return GatedAttention(self.num_heads, self.head_dim, gate_bias=True, out_bias=True, name="attention", **dtypes)(
            x, biases
        )


class MSAColumnAttention(nn.Module):
    """Column-wise gated attention (AF2 Alg 8): each residue over the sequences."""

    num_heads: int = 8
    head_dim: int = 32
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, m: Float[Array, "... S R c_m"], mask: Float[Array, "... S R"] | None = None
    ) -> Float[Array, "... S R c_m"]:
        _, norm = dense_and_norm(self)
        x = jnp.swapaxes(norm(name="norm")(m), -3, -2)
        biases = []
        if mask is not None:
            bias = mask_bias(jnp.swapaxes(mask, -2, -1), statistics_dtype(x.dtype))
            biases.append(jnp.expand_dims(bias, (-3, -2)))
        update = GatedAttention(
            self.num_heads,
            self.head_dim,
            gate_bias=True,
            out_bias=True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="attention",
        )(x, biases)
        return jnp.swapaxes(update, -3, -2)


class OuterProductMean(nn.Module):
    """Outer product mean (AF2 Alg 10): from the alignment to pairs of residues.

    Tag: `outer_product`, the `[..., R, R, c_hidden, c_hidden]` mean before the output projection.
    """

    c_z: int
    c_hidden: int = 32
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, m: Float[Array, "... S R c_m"], mask: Float[Array, "... S R"] | None = None
    ) -> Float[Array, "... R R c_z"]:
        """`mask` weighs the residues in the mean over sequences."""
        dense, norm = dense_and_norm(self)
        x = norm(name="norm")(m)
        a = dense(self.c_hidden, use_bias=True, name="a")(x)
        b = dense(self.c_hidden, use_bias=True, name="b")(x)
        if mask is None:
            count = m.shape[-3]
        else:
            mask = jnp.asarray(mask).astype(statistics_dtype(x.dtype))
            a = a * jnp.expand_dims(mask, -1).astype(a.dtype)
            b = b * jnp.expand_dims(mask, -1).astype(b.dtype)
            # 1e-3 as in AlphaFold's code: pairs that share no sequence get 0, not 0 / 0.
            count = jnp.expand_dims(jnp.einsum("...si,...sj->...ij", mask, mask) + 1e-3, (-2, -1))
        outer = jnp.einsum("...sic,...sjd->...ijcd", a, b)
        outer = checkpoint_name((outer / count).astype(a.dtype), "outer_product")
        flat = outer.reshape(*outer.shape[:-2], self.c_hidden**2)
        return dense(self.c_z, use_bias=True, name="out")(flat)


class EvoformerBlock(nn.Module):
    """One iteration of the Evoformer stack (AF2 Alg 6); the fields' defaults are AlphaFold 2's.

    >>> import jax
    >>> from jaxckpt import checkpoint_scan
    >>> stack = checkpoint_scan(EvoformerBlock, 48, blocks_per_ckpt=1)(c_m=256, c_z=128)
    >>> m, z, mask = jnp.ones((8, 16, 256)), jnp.ones((16, 16, 128)), jnp.ones((8, 16))
    >>> (m, z), variables = jax.eval_shape(stack.init_with_output, jax.random.key(0), m, z, msa_mask=mask)
    >>> m.shape, z.shape, variables["params"]["msa_transition"]["up"]["kernel"].shape
    ((8, 16, 256), (16, 16, 128), (48, 256, 1024))

    The carry is `(m, z)`; each leaves in the shape and dtype it came in, whatever `dtype` is.
    `dtype` is the compute dtype (None promotes inputs and parameters; `jnp.bfloat16` runs the
    matmuls in bf16 on float32 parameters); layer norm statistics, softmaxes and the residual stream
    are not lowered to it. Kernels start lecun-normal, AlphaFold's zero-initialized ones too, so that
    no gradient of a fresh block is zero.

    Tags for policies, in order: `msa_row_attention`, `msa_column_attention`, `msa_transition`,
    `outer_product_mean`, `tri_mul_outgoing`, `tri_mul_incoming`, `tri_att_starting`,
    `tri_att_ending`, `pair_transition` (the updates, before dropout); and inside them
    `attention_context` (all four attentions), `outer_product` and `tri_mul_product` (both
    multiplications). A module and its tag bear the same name.
    """

    c_m: int = 256
    c_z: int = 128
    num_heads_msa: int = 8
    head_dim_msa: int = 32
    c_hidden_opm: int = 32
    c_hidden_mul: int = 128
    num_heads_pair: int = 4
    head_dim_pair: int = 32
    transition_factor: int = 4
    msa_dropout_rate: float = 0.15
    pair_dropout_rate: float = 0.25
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        m: Float[Array, "... S R c_m"],
        z: Float[Array, "... R R c_z"],
        *,
        msa_mask: Float[Array, "... S R"] | None = None,
        pair_mask: Float[Array, "... R R"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "... S R c_m"], Float[Array, "... R R c_z"]]:
        """Apply the block.

        **Arguments:**

        - `m`, `z`: the carry, alignment and pair representation; leading batch axes are allowed.
        - `msa_mask`: weights of residues of sequences in [0, 1]. They weigh the keys of both MSA
            attentions and the terms of the outer product mean.
        - `pair_mask`: weights of pairs in [0, 1]. They multiply the edges in the triangle
            multiplications and weigh the keys of the triangle attentions. Neither mask implies the
            other.
        - `deterministic`: False drops row-attention updates with `msa_dropout_rate` and triangle
            updates with `pair_dropout_rate` (needs a `dropout` rng).

        Where a mask is 0 the outputs are meaningless but finite, and reach no other output.

        **Returns:** the new `(m, z)`.

        **Raises:** `ValueError` if `c_m`, `c_z` are not the channels of `m`, `z`.
        """
        check_channels(c_m=(m, self.c_m), c_z=(z, self.c_z))
        dtypes = dtypes_of(self)
        heads = dict(num_heads=self.num_heads_msa, head_dim=self.head_dim_msa)

        update = MSARowAttention(name="msa_row_attention", **heads, **dtypes)(m, z, msa_mask)
        update = checkpoint_name(update, "msa_row_attention")
        dropout = row_dropout(self.msa_dropout_rate, "dropout_msa_row_attention")
        m = residual(m, dropout(update, deterministic))
        update = MSAColumnAttention(name="msa_column_attention", **heads, **dtypes)(m, msa_mask)
        m = residual(m, checkpoint_name(update, "msa_column_attention"))
        update = ReluTransition(self.transition_factor, name="msa_transition", **dtypes)(m)
        m = residual(m, checkpoint_name(update, "msa_transition"))

        update = OuterProductMean(self.c_z, self.c_hidden_opm, name="outer_product_mean", **dtypes)(m, msa_mask)
        z = residual(z, checkpoint_name(update, "outer_product_mean"))

        z = TriangleUpdates(
            c_hidden=self.c_hidden_mul,
            num_heads=self.num_heads_pair,
            head_dim=self.head_dim_pair,
            use_bias=True,
            dropout_rate=self.pair_dropout_rate,
            name="triangle_updates",
            **dtypes,
        )(z, pair_mask, deterministic)
        update = ReluTransition(self.transition_factor, name="pair_transition", **dtypes)(z)
        z = residual(z, checkpoint_name(update, "pair_transition"))
        return m, z
