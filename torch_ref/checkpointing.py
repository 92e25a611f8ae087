"""`checkpoint_blocks` on `torch.utils.checkpoint`, with the contract of `jaxckpt.checkpoint_blocks`.

OpenFold, `openfold/utils/checkpointing.py` (AlQuraishi Laboratory, 2021), after AlphaFold 2, supplement 1.11.8. It
differs from the original in two ways. The checkpoint is the non-reentrant one, so that gradients also reach parameters
and shared inputs when no argument asks for one. And a bad `blocks_per_ckpt` is refused whether or not gradients are on,
so that an evaluation finds the mistake that a training would.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(blocks: Sequence[Callable[..., Any]], args: Any, blocks_per_ckpt: int | None) -> tuple[Any, ...]:
    """Runs `blocks` one after the other, each on what the one before returned, checkpointed in chunks.

    Arguments:
        blocks: callables, modules among them; each takes by position what the one before returned.
        args: the arguments of the first block. What is not exactly a `tuple` is one argument. Leaves that are not
            tensors pass through untouched.
        blocks_per_ckpt: blocks per chunk, in [1, len(blocks)]; the last chunk may be shorter. None: no checkpointing.
            There is none without grad mode either, where nothing would be kept anyway.

    Returns:
        What the last block returned, always as a tuple.

    Raises:
        ValueError: `blocks_per_ckpt` is not an integer in [1, len(blocks)].

    >>> checkpoint_blocks([torch.sin, torch.cos, torch.sin], torch.zeros(2), blocks_per_ckpt=2)[0].shape
    torch.Size([2])
    """
    args = _wrap(args)
    if blocks_per_ckpt is None:
        return _run(blocks, args)
    per_chunk = _checked(blocks_per_ckpt, len(blocks))
    if not torch.is_grad_enabled():
        return _run(blocks, args)
    for start in range(0, len(blocks), per_chunk):
        chunk = blocks[start : start + per_chunk]
        args = checkpoint(lambda *a, chunk=chunk: _run(chunk, a), *args, use_reentrant=False)
    return args


def _wrap(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)


def _run(blocks: Sequence[Callable[..., Any]], args: tuple[Any, ...]) -> tuple[Any, ...]:
    for block in blocks:
        args = _wrap(block(*args))
    return args


def _checked(value: Any, count: int) -> int:
    # NumPy registers its integers with `numbers`; np.bool_ is not among them, while bool is.
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or not 1 <= value <= count:
        raise ValueError(
            f"blocks_per_ckpt must be between 1 and len(blocks) = {count}, and an integer; "
            f"got {value!r} of type {type(value).__name__}. Write None for no checkpointing."
        )
    return int(value)
