"""The Pairformer block of AlphaFold 3 (Abramson et al. 2024, supplement Algorithm 17)."""

from jaxtyping import Float
from torch import Tensor, nn

from torch_ref.models._layers import GatedAttention, PairBias, Transition, TriangleUpdates, log_mask


class AttentionPairBias(nn.Module):
    """AF3 Alg 24 with an empty `s`: a layer norm instead of the adaptive one, and no gate on the output."""

    def __init__(self, c_s: int, c_z: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_s)
        self.pair_bias = PairBias(c_z, num_heads)
        self.attention = GatedAttention(c_s, num_heads, c_s // num_heads, query_bias=True)

    def forward(
        self, s: Float[Tensor, "... i c"], z: Float[Tensor, "... i j c"], mask: Float[Tensor, "... i"] | None
    ) -> Tensor:
        biases = [self.pair_bias(z)]
        if mask is not None:
            biases.append(log_mask(mask)[..., None, None, :])
        return self.attention(self.norm(s), biases, "...ihc,...jhc->...hij", "...hij,...jhc->...ihc")


class PairformerBlock(nn.Module):
    """One iteration of the Pairformer stack; the carry is `(s, z)`."""

    def __init__(
        self,
        c_s: int = 384,
        c_z: int = 128,
        c_hidden_mul: int = 128,
        num_heads_pair: int = 4,
        head_dim_pair: int = 32,
        num_heads_single: int = 16,
        transition_factor: int = 4,
        dropout_rate: float = 0.25,
    ):
        super().__init__()
        self.triangle_updates = TriangleUpdates(
            c_z, c_hidden_mul, num_heads_pair, head_dim_pair, use_bias=False, dropout_rate=dropout_rate
        )
        self.pair_transition = Transition(c_z, transition_factor)
        self.single_attention = AttentionPairBias(c_s, c_z, num_heads_single)
        self.single_transition = Transition(c_s, transition_factor)

    def forward(
        self,
        s: Float[Tensor, "... i c"],
        z: Float[Tensor, "... i j c"],
        *,
        mask: Float[Tensor, "... i"] | None = None,
        pair_mask: Float[Tensor, "... i j"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if pair_mask is None and mask is not None:
            pair_mask = mask[..., :, None] * mask[..., None, :]
        z = self.triangle_updates(z, pair_mask)
        z = z + self.pair_transition(z)
        s = s + self.single_attention(s, z, mask)
        return s + self.single_transition(s), z
