"""Memory of blocks that are cut into pieces, on a GPU: on a CPU XLA merges what is run again with the first run."""

import jax
import jax.numpy as jnp

from jaxckpt import checkpoint_scan, measure
from jaxckpt.models import PairformerBlock


def test_a_pairformer_needs_less(h200):
    tokens = 128
    shapes = [jax.ShapeDtypeStruct((tokens, 64), "bfloat16"), jax.ShapeDtypeStruct((tokens, tokens, 32), "bfloat16")]

    def temp_bytes(stages):
        block = checkpoint_scan(PairformerBlock, 2, stages=stages)
        stack = block(c_s=64, c_z=32, c_hidden_mul=32, num_heads_single=4, dtype=jnp.bfloat16)
        variables = jax.eval_shape(stack.init, jax.random.key(0), *shapes)
        loss = lambda variables, s, z: sum(jnp.sum(y**2) for y in stack.apply(variables, s, z))  # noqa: E731
        return measure(jax.grad(loss), variables, *shapes, target=h200).temp_bytes

    assert temp_bytes("auto") < 0.7 * temp_bytes(None)
