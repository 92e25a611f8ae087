"""Real blocks to train, measure and test with: a transformer, a decoder layer, a Pairformer and an Evoformer."""

from jaxckpt.models.decoder_nnx import DecoderConfig as DecoderConfig
from jaxckpt.models.decoder_nnx import DecoderLayer as DecoderLayer
from jaxckpt.models.evoformer import EvoformerBlock as EvoformerBlock
from jaxckpt.models.pairformer import PairformerBlock as PairformerBlock
from jaxckpt.models.transformer import TransformerBlock as TransformerBlock
from jaxckpt.models.transformer import TransformerLM as TransformerLM
from jaxckpt.models.transformer_nnx import TransformerBlock as NNXTransformerBlock

__all__ = [
    "DecoderConfig",
    "DecoderLayer",
    "EvoformerBlock",
    "NNXTransformerBlock",
    "PairformerBlock",
    "TransformerBlock",
    "TransformerLM",
]
