"""One problem, two frameworks: values and gradients of a Flax stack and of a torch stack, and how far they are apart."""

import functools
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import torch

from jaxckpt import checkpoint_scan
from torch_ref import dropout
from torch_ref.convert import from_state_dict, to_numpy, to_torch
from torch_ref.models import Stack

TOLERANCE = {"float64": 1e-10, "float32": 1e-4}

# Without the optimizations that compile for longer than these small programs run: for the gradient of a Pairformer stack
# 8 s of CPU time instead of 12 s with optimization level 0 alone (JAX 0.10.2; later ones lack the last option).
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False
    QUICK["xla_disable_hlo_passes"] = "simplification,constant_folding"


@dataclass(frozen=True)
class Problem:
    """What both frameworks are given, as NumPy arrays. `N` blocks."""

    block: nn.Module
    length: int
    variables: Any  # {"params": leaves [N, ...]}
    carry: tuple[np.ndarray, ...]
    shared: Mapping[str, np.ndarray]
    cotangents: tuple[np.ndarray, ...]  # random, one for each value of the carry
    masks: dropout.Masks = field(default_factory=dict)  # of dropout; none: no dropout

    def astype(self, dtype: Any) -> "Problem":
        """The same problem with arrays and parameters of another dtype."""
        cast = {name: jax.tree.map(lambda a: np.asarray(a, dtype), getattr(self, name)) for name in _ARRAYS}
        return replace(self, block=self.block.clone(param_dtype=dtype), **cast)


_ARRAYS = ("variables", "carry", "shared", "cotangents", "masks")


class Result(NamedTuple):
    """The last carry, and the gradients of parameters (as Flax's tree), first carry and shared inputs."""

    values: tuple[np.ndarray, ...]
    params: Any
    carry: tuple[np.ndarray, ...]
    shared: dict[str, np.ndarray]


class Errors(NamedTuple):
    """The largest difference relative to the largest entry, of the values, and of each kind of gradients apart."""

    values: float
    gradients: float

    def within(self, tolerance: float) -> bool:
        return self.values <= tolerance and self.gradients <= tolerance


def draw(
    block: nn.Module, length: int, *carry: np.ndarray, with_dropout: bool = False, seed: int = 0, **shared: np.ndarray
) -> Problem:
    """A problem with random parameters and cotangents.

    Nothing starts at zero or one, as biases and scales do at initialization: a gradient or a transposition would hide
    behind that. Every number is one of float32, so that the problem can be posed in both precisions.
    """
    rng = np.random.default_rng(seed)

    def parameter(path, leaf):
        noise = rng.normal(size=(length, *leaf.shape))
        name = path[-1].key
        noise = noise / leaf.shape[0] ** 0.5 if name == "kernel" else 1 + 0.3 * noise if name == "scale" else noise
        return noise.astype(np.float32).astype(leaf.dtype)

    with _precision(carry):
        one = jax.eval_shape(lambda *c: block.init(jax.random.key(0), *c, **shared), *carry)
        variables = jax.tree_util.tree_map_with_path(parameter, one)
        masks = dropout.draw(block, one, carry, shared, length, seed) if with_dropout else {}
    cotangents = tuple(rng.normal(size=x.shape).astype(np.float32).astype(x.dtype) for x in carry)
    return Problem(block, length, variables, carry, shared, cotangents, masks)


def run_flax(problem: Problem, **knobs: Any) -> Result:
    """Values and gradients of `checkpoint_scan(problem.block, N, **knobs)`, jitted."""
    with _precision(problem.carry):
        program = _program(problem.block, problem.length, bool(problem.masks), **knobs)
        return jax.device_get(program(*_arguments(problem)))


def trace_flax(problem: Problem, **knobs: Any) -> jax.stages.Traced:
    """The program of `run_flax`."""
    with _precision(problem.carry):
        return _program(problem.block, problem.length, bool(problem.masks), **knobs).trace(*_arguments(problem))


def _arguments(problem: Problem) -> tuple[Any, ...]:
    masks = dropout.collection(problem.masks) if problem.masks else {}
    return problem.variables, problem.carry, problem.shared, problem.cotangents, masks


@functools.lru_cache(maxsize=1)
def _program(block: nn.Module, length: int, feed: bool, **knobs: Any) -> Any:
    stack: Any = checkpoint_scan(block, length, **knobs)

    def forward(variables, carry, shared, masks):
        with dropout.fed() if feed else nullcontext():
            out = stack.apply({**variables, **masks}, *carry, **shared)
        return out if isinstance(out, tuple) else (out,)

    def run(variables, carry, shared, cotangents, masks):
        values, pull_back = jax.vjp(lambda *args: forward(*args, masks), variables, carry, shared)
        return Result(values, *pull_back(cotangents))

    return jax.jit(run, compiler_options=QUICK if jax.default_backend() == "cpu" else {})


def run_torch(stack: Stack, problem: Problem, blocks_per_ckpt: int | None = None) -> Result:
    """Values and gradients of a torch stack that holds the problem's parameters; without masks there is no dropout."""
    stack.train(bool(problem.masks))
    dropout.feed(stack, problem.masks)
    carry = [to_torch(x).requires_grad_() for x in problem.carry]
    shared = {name: to_torch(x).requires_grad_() for name, x in problem.shared.items()}
    values = stack(*carry, blocks_per_ckpt=blocks_per_ckpt, **shared)
    values = values if isinstance(values, tuple) else (values,)
    parameters = dict(stack.named_parameters())
    inputs = [*parameters.values(), *carry, *shared.values()]
    cotangents = [to_torch(c) for c in problem.cotangents]
    gradients = iter(torch.autograd.grad(values, inputs, cotangents, materialize_grads=True))
    return Result(
        tuple(map(to_numpy, values)),
        from_state_dict({name: next(gradients) for name in parameters}, problem.variables),
        tuple(to_numpy(next(gradients)) for _ in carry),
        {name: to_numpy(next(gradients)) for name in shared},
    )


def errors(got: Result, want: Result) -> Errors:
    """How far `got` is from `want`.

    Raises:
        ValueError: a leaf of `want` is all zero, and would agree with nothing at all.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(want._asdict()):
        if not np.any(leaf):
            raise ValueError(f"{jax.tree_util.keystr(path)} is all zero: the problem shows nothing about it")
    kinds = [_largest(a, b) for a, b in zip(got, want, strict=True) if jax.tree.leaves(b)]
    return Errors(kinds[0], float(np.max(kinds[1:])))


def distance(got: Result, want: Result) -> Errors:
    """As `errors`, with the Euclidean norm in place of the largest entry: what to compare rounding errors by."""

    def norm(tree):
        return np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree)))

    kinds = [norm(jax.tree.map(np.subtract, a, b)) / norm(b) for a, b in zip(got, want, strict=True) if jax.tree.leaves(b)]
    return Errors(float(kinds[0]), float(np.max(kinds[1:])))


def _largest(got: Any, want: Any) -> float:
    differences = jax.tree.leaves(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), got, want))
    # np.max, because Python's max would lose a nan.
    return float(np.max(differences) / np.max([np.max(np.abs(leaf)) for leaf in jax.tree.leaves(want)]))


def _precision(carry: tuple[np.ndarray, ...]) -> Any:
    return jax.enable_x64(any(x.dtype == np.float64 for x in carry))
