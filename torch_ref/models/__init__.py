"""The blocks of `jaxckpt.models` as `torch.nn.Module`s, under the same names, and a stack of them."""

from torch_ref.models._layers import Dropout as Dropout
from torch_ref.models.evoformer import EvoformerBlock as EvoformerBlock
from torch_ref.models.pairformer import PairformerBlock as PairformerBlock
from torch_ref.models.stack import Stack as Stack
from torch_ref.models.transformer import TransformerBlock as TransformerBlock

__all__ = ["Dropout", "EvoformerBlock", "PairformerBlock", "Stack", "TransformerBlock"]
