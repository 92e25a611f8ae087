"""The Evoformer block of AlphaFold 2 (Jumper et al. 2021, supplement Algorithm 6).

`s`, `t` are sequences of the alignment, `i`, `j` residues.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torch_ref.models._layers import Dropout, GatedAttention, PairBias, ReluTransition, TriangleUpdates, log_mask


class MSARowAttention(nn.Module):
    """AF2 Alg 7: each sequence over its residues, with pair bias."""

    def __init__(self, c_m: int, c_z: int, num_heads: int, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.pair_bias = PairBias(c_z, num_heads)
        self.attention = GatedAttention(c_m, num_heads, head_dim, gate_bias=True, out_bias=True)

    def forward(self, m: Tensor, z: Tensor, mask: Float[Tensor, "... s i"] | None) -> Float[Tensor, "... s i c"]:
        biases = [self.pair_bias(z)[..., :, None, :, :]]
        if mask is not None:
            biases.append(log_mask(mask)[..., None, :, None, :])
        return self.attention(self.norm(m), biases, "...sihc,...sjhc->...hsij", "...hsij,...sjhc->...sihc")


class MSAColumnAttention(nn.Module):
    """AF2 Alg 8: each residue over the sequences."""

    def __init__(self, c_m: int, num_heads: int, head_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.attention = GatedAttention(c_m, num_heads, head_dim, gate_bias=True, out_bias=True)

    def forward(self, m: Tensor, mask: Float[Tensor, "... s i"] | None) -> Float[Tensor, "... s i c"]:
        biases = [] if mask is None else [log_mask(mask).mT[..., None, :, None, :]]
        return self.attention(self.norm(m), biases, "...sihc,...tihc->...hist", "...hist,...tihc->...sihc")


class OuterProductMean(nn.Module):
    """AF2 Alg 10, with AlphaFold's 1e-3 in the masked mean: pairs that share no sequence get 0."""

    def __init__(self, c_m: int, c_z: int, c_hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.a = nn.Linear(c_m, c_hidden)
        self.b = nn.Linear(c_m, c_hidden)
        self.out = nn.Linear(c_hidden**2, c_z)

    def forward(self, m: Float[Tensor, "... s i c"], mask: Float[Tensor, "... s i"] | None) -> Float[Tensor, "... i j c"]:
        m = self.norm(m)
        a, b, count = self.a(m), self.b(m), m.shape[-3]
        if mask is not None:
            a, b = a * mask[..., None].to(a.dtype), b * mask[..., None].to(b.dtype)
            count = ((mask[..., :, None] * mask[..., None, :]).sum(-3) + 1e-3)[..., None, None]
        mean = (torch.einsum("...sic,...sjd->...ijcd", a, b) / count).to(a.dtype)
        return self.out(mean.flatten(-2))


class EvoformerBlock(nn.Module):
    """One iteration of the Evoformer stack; the carry is `(m, z)`."""

    def __init__(
        self,
        c_m: int = 256,
        c_z: int = 128,
        num_heads_msa: int = 8,
        head_dim_msa: int = 32,
        c_hidden_opm: int = 32,
        c_hidden_mul: int = 128,
        num_heads_pair: int = 4,
        head_dim_pair: int = 32,
        transition_factor: int = 4,
        msa_dropout_rate: float = 0.15,
        pair_dropout_rate: float = 0.25,
    ):
        super().__init__()
        self.msa_row_attention = MSARowAttention(c_m, c_z, num_heads_msa, head_dim_msa)
        self.dropout_msa_row_attention = Dropout(msa_dropout_rate, shared_dim=-3)
        self.msa_column_attention = MSAColumnAttention(c_m, num_heads_msa, head_dim_msa)
        self.msa_transition = ReluTransition(c_m, transition_factor)
        self.outer_product_mean = OuterProductMean(c_m, c_z, c_hidden_opm)
        self.triangle_updates = TriangleUpdates(
            c_z, c_hidden_mul, num_heads_pair, head_dim_pair, use_bias=True, dropout_rate=pair_dropout_rate
        )
        self.pair_transition = ReluTransition(c_z, transition_factor)

    def forward(
        self,
        m: Float[Tensor, "... s i c"],
        z: Float[Tensor, "... i j c"],
        *,
        msa_mask: Float[Tensor, "... s i"] | None = None,
        pair_mask: Float[Tensor, "... i j"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        m = m + self.dropout_msa_row_attention(self.msa_row_attention(m, z, msa_mask))
        m = m + self.msa_column_attention(m, msa_mask)
        m = m + self.msa_transition(m)
        z = z + self.outer_product_mean(m, msa_mask)
        z = self.triangle_updates(z, pair_mask)
        return m, z + self.pair_transition(z)
