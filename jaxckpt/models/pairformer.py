"""The Pairformer block of AlphaFold 3 (Abramson et al. 2024, supplement Algorithm 17).

Shape legend: `N` tokens, `c_s` channels of a token, `c_z` channels of a pair of tokens, `H` heads.
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
    Transition,
    TriangleUpdates,
    check_channels,
    dense_and_norm,
    dtypes_of,
    residual,
)


class AttentionPairBias(nn.Module):
    """Single attention with pair bias, without conditioning (AF3 Alg 24 with an empty `s`)."""

    num_heads: int = 16
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        s: Float[Array, "... N c_s"],
        z: Float[Array, "... N N c_z"],
        mask: Float[Array, "... N"] | None = None,
    ) -> Float[Array, "... N c_s"]:
        dtypes = dtypes_of(self)
        _, norm = dense_and_norm(self)
        x = norm(name="norm")(s)
        biases = [PairBias(self.num_heads, name="pair_bias", **dtypes)(z)]
        if mask is not None:
            biases.append(jnp.expand_dims(mask_bias(mask, statistics_dtype(x.dtype)), (-3, -2)))
        head_dim = s.shape[-1] // self.num_heads
        return GatedAttention(self.num_heads, head_dim, query_bias=True, name="attention", **dtypes)(x, biases)


class PairformerBlock(nn.Module):
    """One iteration of the Pairformer stack (AF3 Alg 17); the fields' defaults are AlphaFold 3's.

    >>> import jax
    >>> from jaxckpt import checkpoint_scan
    >>> stack = checkpoint_scan(PairformerBlock, 48, blocks_per_ckpt=4)(c_s=384, c_z=128)
    >>> s, z, mask = jnp.ones((16, 384)), jnp.ones((16, 16, 128)), jnp.ones(16)
    >>> (s, z), variables = jax.eval_shape(stack.init_with_output, jax.random.key(0), s, z, mask=mask)
    >>> s.shape, z.shape, variables["params"]["pair_transition"]["up"]["kernel"].shape
    ((16, 384), (16, 16, 128), (48, 128, 512))

    The carry is `(s, z)`; each leaves in the shape and dtype it came in, whatever `dtype` is.
    `dtype` is the compute dtype (None promotes inputs and parameters; `jnp.bfloat16` runs the
    matmuls in bf16 on float32 parameters); layer norm statistics, softmaxes and the residual stream
    are not lowered to it. Kernels start lecun-normal, AlphaFold's zero-initialized ones too, so that
    no gradient of a fresh block is zero.

    Tags for policies, in order: `tri_mul_outgoing`, `tri_mul_incoming`, `tri_att_starting`,
    `tri_att_ending`, `pair_transition`, `single_attention`, `single_transition` (the updates, before
    dropout); and inside them `tri_mul_product` (both multiplications) and `attention_context` (all
    three attentions). A module and its tag bear the same name.
    """

    c_s: int = 384
    c_z: int = 128
    c_hidden_mul: int = 128
    num_heads_pair: int = 4
    head_dim_pair: int = 32
    num_heads_single: int = 16
    transition_factor: int = 4
    dropout_rate: float = 0.25
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        s: Float[Array, "... N c_s"],
        z: Float[Array, "... N N c_z"],
        *,
        mask: Float[Array, "... N"] | None = None,
        pair_mask: Float[Array, "... N N"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "... N c_s"], Float[Array, "... N N c_z"]]:
        """Apply the block.

        **Arguments:**

        - `s`, `z`: the carry, single and pair representation; leading batch axes are allowed.
        - `mask`: weights of tokens in [0, 1]. They weigh the keys of the single attention.
        - `pair_mask`: weights of pairs in [0, 1]. They multiply the edges in the triangle
            multiplications and weigh the keys of the triangle attentions. When it is None and `mask`
            is given, it is `mask[i] * mask[j]`; a `pair_mask` alone leaves the single attention
            unmasked.
        - `deterministic`: False drops pair updates with `dropout_rate` (needs a `dropout` rng).

        Where a mask is 0 the outputs are meaningless but finite, and reach no other output.

        **Returns:** the new `(s, z)`.

        **Raises:** `ValueError` if `c_s`, `c_z` are not the channels of `s`, `z`, or the heads do
        not divide `c_s`.
        """
        check_channels(c_s=(s, self.c_s), c_z=(z, self.c_z))
        if self.c_s % self.num_heads_single:
            raise ValueError(
                f"num_heads_single={self.num_heads_single} does not divide c_s={self.c_s}; choose a divisor of c_s"
            )
        if pair_mask is None and mask is not None:
            pair_mask = jnp.expand_dims(mask, -1) * jnp.expand_dims(mask, -2)
        dtypes = dtypes_of(self)

        z = TriangleUpdates(
            c_hidden=self.c_hidden_mul,
            num_heads=self.num_heads_pair,
            head_dim=self.head_dim_pair,
            dropout_rate=self.dropout_rate,
            name="triangle_updates",
            **dtypes,
        )(z, pair_mask, deterministic)
        update = Transition(self.transition_factor, name="pair_transition", **dtypes)(z)
        z = residual(z, checkpoint_name(update, "pair_transition"))

        update = AttentionPairBias(self.num_heads_single, name="single_attention", **dtypes)(s, z, mask)
        s = residual(s, checkpoint_name(update, "single_attention"))
        update = Transition(self.transition_factor, name="single_transition", **dtypes)(s)
        s = residual(s, checkpoint_name(update, "single_transition"))
        return s, z
