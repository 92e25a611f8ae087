"""The same training step in torch: the blocks of `torch_ref` with the Flax stack's parameters."""

import contextlib
from typing import Any

import jax
import numpy as np
import torch
from _systems import Stack
from torch import Tensor

from torch_ref import models
from torch_ref.convert import from_state_dict, to_state_dict, to_torch

SIZES = {
    "PairformerBlock": ("c_s", "c_z", "c_hidden_mul", "num_heads_pair", "head_dim_pair", "num_heads_single"),
    "TransformerBlock": ("d_model", "num_heads", "d_ff"),
}


class TorchStep:
    """One training step: the loss of `_systems.loss_and_gradients` and its gradients by the parameters.

    Arguments:
        arguments: the stacked parameters, the carry and what is shared; copied to the device.
        is_compiled: through `torch.compile`, block by block, so that what one compiles serves all.
        device: "cpu" or "cuda".
        backend: of `torch.compile`.
    """

    def __init__(
        self,
        stack: Stack,
        arguments: Any,
        blocks_per_ckpt: int | None,
        is_compiled: bool,
        device: str = "cpu",
        backend: str = "inductor",
    ):
        params, carry, shared = arguments
        kind = type(stack.block).__name__
        self.device = device
        self.like = {"params": params}
        self.blocks_per_ckpt = blocks_per_ckpt
        sizes = {name: getattr(stack.block, name) for name in SIZES[kind]}
        self.module = models.Stack(getattr(models, kind)(**sizes) for _ in range(stack.length))
        self.module.load_state_dict(to_state_dict({"params": jax.device_get(params)}, self.module.state_dict()))
        self.module.to(self.device).eval()
        if is_compiled:
            for block in self.module.blocks:
                block.compile(backend=backend)
        self.carry = [self._tensor(x) for x in carry]
        self.shared = {name: self._tensor(x) for name, x in shared.items()}
        is_half = carry[0].dtype != np.float32
        self.precision = torch.autocast(self.device, torch.bfloat16) if is_half else contextlib.nullcontext()

    def __call__(self) -> tuple[Tensor, list[Tensor]]:
        with self.precision:
            out = self.module(*self.carry, blocks_per_ckpt=self.blocks_per_ckpt, **self.shared)
        loss = torch.stack([(x.float() ** 2).sum() for x in (out if isinstance(out, tuple) else (out,))]).sum()
        gradients = torch.autograd.grad(loss, list(self.module.parameters()), materialize_grads=True)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), list(gradients)

    def as_flax(self, result: tuple[Tensor, list[Tensor]]) -> tuple[np.ndarray, Any]:
        """What a call returned, gradients as the Flax tree."""
        loss, gradients = result
        names = [name for name, _ in self.module.named_parameters()]
        tree = from_state_dict(dict(zip(names, (g.cpu() for g in gradients), strict=True)), self.like)
        return loss.cpu().numpy(), tree["params"]

    def peak_bytes(self) -> int | None:
        """The most memory that torch has allocated in one call, with this stack's parameters; None without a GPU."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - sum(t.nbytes for t in self._tensors())
        self()
        return torch.cuda.max_memory_allocated() - others

    def _tensors(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers(), *self.carry, *self.shared.values()]

    def _tensor(self, array: Any) -> Tensor:
        return to_torch(jax.device_get(array)).to(self.device)
