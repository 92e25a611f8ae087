"""A stack as PyTorch users write one: a Python list of modules, each with parameters of its own."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from torch_ref.checkpointing import checkpoint_blocks


class Stack(nn.Module):
    """Blocks run one after the other; positional arguments are the carry, keyword arguments are shared by all."""

    def __init__(self, blocks: Iterable[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *carry: Any, blocks_per_ckpt: int | None = None, **shared: Any) -> Any:
        blocks = [partial(block, **shared) for block in self.blocks]
        out = checkpoint_blocks(blocks, carry, blocks_per_ckpt)
        return out if len(out) > 1 else out[0]
