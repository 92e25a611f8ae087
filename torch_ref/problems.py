"""The three models, small, with the same sizes in both frameworks.

No two axes of a problem are equally long if they can be told apart, so that a mix-up is an error of shapes; the pair
channels are as many as the heads' together, so that a transposed projection is none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch

from jaxckpt import models as flax_models
from torch_ref import models as torch_models
from torch_ref.convert import to_state_dict
from torch_ref.parity import Errors, Problem, distance, draw, run_flax, run_torch

LENGTH = 6  # chunks of 2 and of 3 leave no block over, which compiles in half the time

_PAIR = {"c_z": 6, "num_heads_pair": 2, "head_dim_pair": 3, "c_hidden_mul": 5, "transition_factor": 2}


class Model(NamedTuple):
    """A block in both frameworks; the shapes of its carry and of its shared masks."""

    flax: Callable[..., nn.Module]
    torch: Callable[..., torch.nn.Module]
    sizes: dict[str, Any]
    carry: tuple[tuple[int, ...], ...]
    masks: dict[str, tuple[int, ...]]


MODELS = {
    "transformer": Model(
        flax_models.TransformerBlock,
        torch_models.TransformerBlock,
        {"d_model": 8, "num_heads": 2, "d_ff": 12, "dropout_rate": 0.25},
        carry=((2, 6, 8),),
        masks={"mask": (2, 6)},
    ),
    "pairformer": Model(
        flax_models.PairformerBlock,
        torch_models.PairformerBlock,
        {**_PAIR, "c_s": 8, "num_heads_single": 2, "dropout_rate": 0.25},
        carry=((5, 8), (5, 5, 6)),
        masks={"mask": (5,), "pair_mask": (5, 5)},
    ),
    "evoformer": Model(
        flax_models.EvoformerBlock,
        torch_models.EvoformerBlock,
        {**_PAIR, "c_m": 8, "num_heads_msa": 2, "head_dim_msa": 4, "c_hidden_opm": 3},
        carry=((3, 5, 8), (5, 5, 6)),
        masks={"msa_mask": (3, 5), "pair_mask": (5, 5)},
    ),
}


def problem(
    name: str,
    dtype: Any = np.float64,
    *,
    masks: tuple[str, ...] | None = None,
    with_dropout: bool = False,
    compute_dtype: Any = None,
    length: int = LENGTH,
    seed: int = 0,
) -> Problem:
    """A problem for one of `MODELS`, the same numbers for the same `seed`.

    Arguments:
        masks: the masks to pass (all by default): weights in [0.25, 1], and one of them 0.
    """
    model = MODELS[name]
    rng = np.random.default_rng(100 + seed)
    carry = tuple(rng.normal(size=shape).astype(np.float32).astype(dtype) for shape in model.carry)
    weights = {key: rng.uniform(0.25, 1, shape).astype(np.float32).astype(dtype) for key, shape in model.masks.items()}
    for weight in weights.values():
        weight.flat[1] = 0
    shared = {key: weight for key, weight in weights.items() if masks is None or key in masks}
    block = model.flax(**model.sizes, param_dtype=dtype, dtype=compute_dtype)
    return draw(block, length, *carry, with_dropout=with_dropout, seed=seed, **shared)


def torch_stack(name: str, problem: Problem) -> torch_models.Stack:
    """The torch stack for a problem of `problem`, with its parameters loaded, in evaluation mode: no dropout of its own."""
    model = MODELS[name]
    stack = torch_models.Stack(model.torch(**model.sizes) for _ in range(problem.length))
    stack.to(getattr(torch, problem.carry[0].dtype.name))
    stack.load_state_dict(to_state_dict(problem.variables, stack.state_dict()))
    return stack.eval()


def bfloat16_errors(
    name: str, length: int, torch_per_ckpt: int | None, samples: int = 8, **knobs: Any
) -> tuple[Errors, Errors]:
    """How far bf16 is from float64, in Flax and in torch: the geometric means over `samples` problems.

    Both compute in bf16 on float32 parameters and a float32 stream, torch by autocast. Of one problem the error says
    little: from problem to problem that of either framework varies by a factor of ten.

    Arguments:
        torch_per_ckpt: torch's `blocks_per_ckpt`.
        knobs: those of `checkpoint_scan`.
    """
    found = []
    for seed in range(samples):
        given = problem(name, np.float32, length=length, compute_dtype=jnp.bfloat16, seed=seed)
        exact = given.astype(np.float64)
        truth = run_torch(torch_stack(name, exact), exact)
        with torch.autocast("cpu", torch.bfloat16):
            theirs = run_torch(torch_stack(name, given), given, torch_per_ckpt)
        found.append([distance(run_flax(given, **knobs), truth), distance(theirs, truth)])
    ours, theirs = np.exp(np.log(found).mean(0))
    return Errors(*map(float, ours)), Errors(*map(float, theirs))
