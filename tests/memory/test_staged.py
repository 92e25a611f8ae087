"""Memory of blocks that are cut into pieces, on a GPU: on a CPU XLA merges what is run again with the first run."""

import jax
import jax.numpy as jnp
import pytest

from jaxckpt import checkpoint_scan, measure

WIDE, PIECES = 2048, 4


def hills(w, x):
    """From few channels to many and back, several times."""
    for up, down in zip(w["up"], w["down"], strict=True):
        x = x + jnp.sin(jnp.tanh(x @ up) * jnp.cos(x @ up)) @ down
    return x


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2, "policy": "nothing"}], ids=str)
def test_one_piece_at_a_time_is_alive(h200, knobs):
    shape = jax.ShapeDtypeStruct
    w = {"up": PIECES * [shape((4, 64, WIDE), "float32")], "down": PIECES * [shape((4, WIDE, 64), "float32")]}
    x = shape((8192, 64), "float32")

    def temp_bytes(stages):
        stack = checkpoint_scan(hills, stages=stages, **knobs)
        return measure(jax.grad(lambda w, x: (stack(w, x) ** 2).sum()), w, x, target=h200).temp_bytes

    assert temp_bytes("auto") < 0.5 * temp_bytes(None)
