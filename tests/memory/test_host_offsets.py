"""Where programs that offload read and write host memory, on a GPU: no run on a CPU can show it."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_scan, targets
from jaxckpt.engine.offload import FIXED_IN
from tests.memory.host_slices import host_slices

is_fixed = jax.__version_info__ >= FIXED_IN
from_the_fix = pytest.mark.skipif(not is_fixed, reason="refused: JAX before 0.11.1 compiles it wrongly")
N = 6


def block(w, x):
    return x + checkpoint_name(jnp.tanh(x @ w), "h") @ w.T


def compiled_text(stack, target):
    shapes = jax.ShapeDtypeStruct((N, 128, 128), "float32"), jax.ShapeDtypeStruct((512, 128), "float32")
    grad = jax.grad(lambda w, x: (stack(w, x) ** 2).sum())
    text = jax.jit(grad).lower(*targets.get(target).place(shapes)).compile().as_text()
    assert "S(5)" in text, "nothing is in host memory"
    return text


@pytest.mark.parametrize(
    "knobs",
    [
        {"engine": "reversal", "offload_carry": True},
        {"engine": "reversal", "offload_carry": True, "stages": "tags:h"},
        {"engine": "reversal", "offload_carry": True, "blocks_per_ckpt": 2},
        {"engine": "reversal", "offload_carry": True, "blocks_per_ckpt": 4, "policy": "nothing"},
        {"snapshots": 2, "offload_carry": True},
        pytest.param({"offload_carry": True, "engine": "scan"}, marks=from_the_fix),
        pytest.param({"offload_carry": True, "engine": "scan", "blocks_per_ckpt": 2}, marks=from_the_fix),
        pytest.param({"policy": "offload:h"}, marks=from_the_fix),
        pytest.param({"policy": "offload:h", "blocks_per_ckpt": 2}, marks=from_the_fix),
    ],
    ids=str,
)
def test_slices_lie_where_they_are_asked_for(knobs, h200):
    found = host_slices(compiled_text(checkpoint_scan(block, **knobs), h200))
    assert all(one.asked == one.burnt_in for one in found), found


def test_the_compiler_bug_is_found(h200):
    to_host = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["h"], offload_src="device", offload_dst="pinned_host"
    )

    def stack(w, x):
        step = jax.checkpoint(lambda x, w: (block(w, x), None), policy=to_host)
        return jax.lax.scan(step, x, w)[0]

    found = host_slices(compiled_text(stack, h200))
    assert len(found) >= 2 * N
    assert all(one.asked == one.burnt_in for one in found) == is_fixed
