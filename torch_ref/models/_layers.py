"""Sublayers of the Pairformer and the Evoformer, each written from its algorithm.

AF2 is Jumper et al. 2021, AF3 is Abramson et al. 2024; "Alg" is an algorithm of the paper's supplement. Attention is
written as the papers' index equations, with `h` a head and `c` a channel of it. Submodules bear the names that
`jaxckpt.models` gives them, so that parameters are matched by name. Every module returns the update, and the block adds
it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

MASKED_LOGIT = -1e9


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it has that: bf16 cannot hold a softmax."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_mask(mask: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """`log(mask)`, to be added to logits, so that a mask is the weight of a key; a finite bias where it is 0."""
    kept = mask > 0
    return torch.where(kept, torch.where(kept, mask, 1.0).log(), MASKED_LOGIT)


class Dropout(nn.Module):
    """Dropout with one mask for all entries along `shared_dim` (AF2 1.11.6).

    `keep`, set from outside (`torch_ref.dropout.feed`), stands in for a mask drawn here: zeros and `1 / (1 - rate)`.
    """

    def __init__(self, rate: float, shared_dim: int | None = None):
        super().__init__()
        self.rate, self.shared_dim = rate, shared_dim
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.keep is not None:
            return x * self.keep.to(x.dtype)
        shape = list(x.shape)
        if self.shared_dim is not None:
            shape[self.shared_dim] = 1
        return x * F.dropout(x.new_ones(shape), self.rate, self.training)


class GatedAttention(nn.Module):
    """Multi-head attention of a normalized input, gated per head and channel.

    The common part of AF2 Alg 7, 8, 13, 14 and AF3 Alg 14, 15, 24, which differ in the index equations of the logits
    and of the weighted values, and in the biases.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        head_dim: int,
        query_bias: bool = False,
        gate_bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        width = num_heads * head_dim
        self.heads = (num_heads, head_dim)
        self.query = nn.Linear(channels, width, bias=query_bias)
        self.key = nn.Linear(channels, width, bias=False)
        self.value = nn.Linear(channels, width, bias=False)
        self.gate = nn.Linear(channels, width, bias=gate_bias)
        self.out = nn.Linear(width, channels, bias=out_bias)

    def forward(self, x: Tensor, biases: Sequence[Tensor], logits: str, values: str) -> Tensor:
        query, key, value = (project(x).unflatten(-1, self.heads) for project in (self.query, self.key, self.value))
        scores = at_least_float32(torch.einsum(logits, query, key) / self.heads[1] ** 0.5)
        for bias in biases:
            scores = scores + bias
        weights = scores.softmax(-1).to(value.dtype)
        context = torch.einsum(values, weights, value).flatten(-2)
        return self.out(self.gate(x).sigmoid() * context)


class PairBias(nn.Module):
    """`b_ij^h = Linear(LayerNorm(z_ij))`, heads in front (AF2 Alg 7 line 3; AF3 Alg 24).

    The norm has no offset: it would shift all logits of a head alike, which a softmax cannot see.
    """

    def __init__(self, c_z: int, num_heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(c_z, bias=False)
        self.out = nn.Linear(c_z, num_heads, bias=False)

    def forward(self, z: Float[Tensor, "... i j c"]) -> Float[Tensor, "... h i j"]:
        return self.out(self.norm(z)).movedim(-1, -3)


class TriangleMultiplication(nn.Module):
    """AF2 Alg 11, 12; AF3 Alg 12, 13."""

    def __init__(self, c_z: int, c_hidden: int, outgoing: bool, use_bias: bool):
        super().__init__()
        self.equation = "...ikc,...jkc->...ijc" if outgoing else "...kic,...kjc->...ijc"
        self.norm_in = nn.LayerNorm(c_z)
        self.a_proj = nn.Linear(c_z, c_hidden, bias=use_bias)
        self.a_gate = nn.Linear(c_z, c_hidden, bias=use_bias)
        self.b_proj = nn.Linear(c_z, c_hidden, bias=use_bias)
        self.b_gate = nn.Linear(c_z, c_hidden, bias=use_bias)
        self.norm_out = nn.LayerNorm(c_hidden)
        self.out_proj = nn.Linear(c_hidden, c_z, bias=use_bias)
        self.out_gate = nn.Linear(c_z, c_z, bias=use_bias)

    def forward(self, z: Float[Tensor, "... i j c"], mask: Float[Tensor, "... i j"] | None) -> Float[Tensor, "... i j c"]:
        z = self.norm_in(z)
        a = self.a_gate(z).sigmoid() * self.a_proj(z)
        b = self.b_gate(z).sigmoid() * self.b_proj(z)
        if mask is not None:
            weight = mask[..., None].to(a.dtype)
            a, b = a * weight, b * weight
        product = torch.einsum(self.equation, a, b)
        return self.out_gate(z).sigmoid() * self.out_proj(self.norm_out(product))


class TriangleAttention(nn.Module):
    """AF2 Alg 13, 14; AF3 Alg 14, 15.

    Starting node: `a_ijk = softmax_k(q_ij . k_ik + b_jk)`, `o_ij = sum_k a_ijk v_ik`. Ending node:
    `a_ijk = softmax_k(q_ij . k_kj + b_ki)`, `o_ij = sum_k a_ijk v_kj`.
    """

    def __init__(self, c_z: int, num_heads: int, head_dim: int, starting: bool, use_bias: bool):
        super().__init__()
        self.starting = starting
        self.norm = nn.LayerNorm(c_z)
        self.pair_bias = nn.Linear(c_z, num_heads, bias=False)
        self.attention = GatedAttention(c_z, num_heads, head_dim, gate_bias=use_bias, out_bias=use_bias)

    def forward(self, z: Float[Tensor, "... i j c"], mask: Float[Tensor, "... i j"] | None) -> Float[Tensor, "... i j c"]:
        z = self.norm(z)
        bias = self.pair_bias(z).movedim(-1, -3)  # h j k, or h k i for the ending node
        if self.starting:
            biases = [bias[..., :, None, :, :]]
            if mask is not None:
                biases.append(log_mask(mask)[..., None, :, None, :])  # of edge ik
            return self.attention(z, biases, "...ijhc,...ikhc->...hijk", "...hijk,...ikhc->...ijhc")
        biases = [bias.mT[..., :, :, None, :]]
        if mask is not None:
            biases.append(log_mask(mask).mT[..., None, None, :, :])  # of edge kj
        return self.attention(z, biases, "...ijhc,...kjhc->...hijk", "...hijk,...kjhc->...ijhc")


class TriangleUpdates(nn.Module):
    """AF2 Alg 6 lines 6-9 and AF3 Alg 17 lines 2-5; unlike the other modules it returns the new `z`."""

    def __init__(self, c_z: int, c_hidden: int, num_heads: int, head_dim: int, use_bias: bool, dropout_rate: float):
        super().__init__()
        self.tri_mul_outgoing = TriangleMultiplication(c_z, c_hidden, outgoing=True, use_bias=use_bias)
        self.tri_mul_incoming = TriangleMultiplication(c_z, c_hidden, outgoing=False, use_bias=use_bias)
        self.tri_att_starting = TriangleAttention(c_z, num_heads, head_dim, starting=True, use_bias=use_bias)
        self.tri_att_ending = TriangleAttention(c_z, num_heads, head_dim, starting=False, use_bias=use_bias)
        self.dropout_tri_mul_outgoing = Dropout(dropout_rate, shared_dim=-3)
        self.dropout_tri_mul_incoming = Dropout(dropout_rate, shared_dim=-3)
        self.dropout_tri_att_starting = Dropout(dropout_rate, shared_dim=-3)
        self.dropout_tri_att_ending = Dropout(dropout_rate, shared_dim=-2)

    def forward(self, z: Float[Tensor, "... i j c"], mask: Float[Tensor, "... i j"] | None) -> Float[Tensor, "... i j c"]:
        z = z + self.dropout_tri_mul_outgoing(self.tri_mul_outgoing(z, mask))
        z = z + self.dropout_tri_mul_incoming(self.tri_mul_incoming(z, mask))
        z = z + self.dropout_tri_att_starting(self.tri_att_starting(z, mask))
        return z + self.dropout_tri_att_ending(self.tri_att_ending(z, mask))


class Transition(nn.Module):
    """AF3 Alg 11: layer norm and SwiGLU."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.gate = nn.Linear(channels, factor * channels, bias=False)
        self.up = nn.Linear(channels, factor * channels, bias=False)
        self.out = nn.Linear(factor * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.out(F.silu(self.gate(x)) * self.up(x))


class ReluTransition(nn.Module):
    """AF2 Alg 9, 15: layer norm and a relu MLP."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, factor * channels)
        self.out = nn.Linear(factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.up(self.norm(x)).relu())
