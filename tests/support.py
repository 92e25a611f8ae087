"""What several tests need: the plain loop to compare with, random cotangents, errors relative to a tree's scale."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxckpt import checkpoint_scan
from jaxckpt.analysis import slices_cost, tiles
from jaxckpt.engine import cutting

# Compiler options for programs that run once: compiling them is what takes the time, and this halves it on JAX 0.10.2, the
# only one that has both options.
QUICK = {}
if jax.__version_info__ < (0, 11):
    QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_disable_hlo_passes": "simplification,constant_folding"}


def plain_loop(block: Callable[..., Any], params: Any, *carry: Any, **shared: Any) -> Any:
    """The stack without `lax.scan` or `jax.checkpoint`: a Python loop over the slices of `params`."""
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        out = block(jax.tree.map(lambda leaf, i=i: leaf[i], params), *carry, **shared)
        carry = out if len(carry) > 1 else (out,)
    return carry if len(carry) > 1 else carry[0]


def random_like(tree: Any, seed: int = 0) -> Any:
    """A tree of normal numbers with the shapes and dtypes of `tree`; drawn in NumPy, so the same under every setting."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), tree)


def pull_back(fn: Callable[..., Any], *args: Any, seed: int = 1) -> tuple[Any, Any]:
    """The value of `fn(*args)`, and the gradients of all `args` for a random cotangent, in one jitted program."""

    def run(*args):
        value, vjp = jax.vjp(fn, *args)
        return value, vjp(random_like(value, seed))

    return jax.jit(run)(*args)


def relative_error(got: Any, want: Any) -> float:
    """The largest difference between two trees, relative to the largest entry of `want`."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    scale = max(float(jnp.max(jnp.abs(w))) for _, w in pairs)
    assert scale > 0, "the reference is all zero and shows nothing"
    return max(float(jnp.max(jnp.abs(g - w))) for g, w in pairs) / scale


def assert_flax_stacks_are_the_loop(
    linen: type[nn.Module], module: type[nnx.Module], block: Callable[..., Any], params: Any, x: Any, **knobs: Any
) -> None:
    """Stacks of Linen and NNX modules with one parameter `w` compute what the loop over `block(w, x)` does, to 1e-12."""
    length = len(params)
    stack = checkpoint_scan(linen, length, **knobs)()
    graphdef, state = nnx.split(checkpoint_scan(module, length, **knobs)(rngs=nnx.Rngs(0)))
    state["w"][...] = params
    want = pull_back(lambda w, x: plain_loop(block, w, x), params, x)
    of_linen = pull_back(lambda w, x: stack.apply({"params": {"w": w}}, x), params, x)
    value, (of_state, of_x) = pull_back(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    assert relative_error(of_linen, want) < 1e-12
    assert relative_error((value, (of_state["w"][...], of_x)), want) < 1e-12


def assert_no_zero_leaf(tree: Any) -> None:
    """Every leaf has an entry that is not zero: a gradient test on zeros shows nothing."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert bool(jnp.any(leaf != 0)), f"{jax.tree_util.keystr(path)} is all zero"


def slice_small_values(monkeypatch: Any, least: int = 1) -> None:
    """Lets `tiles="auto"` slice values too small for a GPU, as if kernels took no time to start.

    Where all values are small, a cut is as good in many places: more of them are looked at.
    """
    monkeypatch.setattr(cutting, "_CANDIDATES_OF_TILES", 60)
    monkeypatch.setattr(tiles, "LEAST_ENTRIES", least)
    monkeypatch.setattr(slices_cost, "START", 0.0)


def on_eight_devices(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A Python process with eight simulated devices, which have to be asked for before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
