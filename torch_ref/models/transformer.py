"""The decoder block of `jaxckpt.models.transformer`: the Llama family's (Touvron et al. 2023), without biases."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from torch_ref.models._layers import Dropout, at_least_float32, log_mask


def rotate(x: Float[Tensor, "... T h c"], base: float = 10_000.0) -> Float[Tensor, "... T h c"]:
    """Rotary positions (Su et al. 2021), as complex numbers: channels `i` and `i + c/2` are `(re, im)` of pair `i`."""
    wide = at_least_float32(x)
    length, half = x.shape[-3], x.shape[-1] // 2
    rate = base ** (-torch.arange(half, dtype=wide.dtype, device=wide.device) / half)
    angle = torch.outer(torch.arange(length, dtype=wide.dtype, device=wide.device), rate)[:, None]
    turned = torch.complex(*wide.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


class TransformerBlock(nn.Module):
    """Causal self-attention and a gated MLP, each pre-normed and added to the residual stream."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout_rate: float = 0.0):
        super().__init__()
        self.heads = (num_heads, d_model // num_heads)
        self.attention_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.attention_dropout = Dropout(dropout_rate)
        self.mlp_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.wi_0 = nn.Linear(d_model, d_ff, bias=False)
        self.wi_1 = nn.Linear(d_model, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, d_model, bias=False)
        self.mlp_dropout = Dropout(dropout_rate)

    def forward(
        self, x: Float[Tensor, "... T D"], *, mask: Float[Tensor, "... T"] | None = None
    ) -> Float[Tensor, "... T D"]:
        x = x + self.attention_dropout(self.out(self.attention(self.attention_norm(x), mask)))
        h = self.mlp_norm(x)
        return x + self.mlp_dropout(self.wo(F.silu(self.wi_0(h)) * self.wi_1(h)))

    def attention(self, h: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (project(h).unflatten(-1, self.heads) for project in (self.query, self.key, self.value))
        logits = torch.einsum("...qhc,...khc->...hqk", rotate(query), rotate(key)) / self.heads[1] ** 0.5
        logits = at_least_float32(logits)
        if mask is not None:
            logits = logits + log_mask(mask)[..., None, None, :]
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        weights = logits.masked_fill(future, -torch.inf).softmax(-1).to(value.dtype)
        return torch.einsum("...hqk,...khc->...qhc", weights, value).flatten(-2)
