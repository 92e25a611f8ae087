"""Real blocks to train, measure and test with: a transformer, a Pairformer and an Evoformer."""

from jaxckpt.models.evoformer import EvoformerBlock as EvoformerBlock
from jaxckpt.models.pairformer import PairformerBlock as PairformerBlock
from jaxckpt.models.transformer import TransformerBlock as TransformerBlock
from jaxckpt.models.transformer import TransformerLM as TransformerLM
from jaxckpt.models.transformer_nnx import TransformerBlock as NNXTransformerBlock

__all__ = [
    "EvoformerBlock",
    "NNXTransformerBlock",
    "PairformerBlock",
    "TransformerBlock",
    "TransformerLM",
]
