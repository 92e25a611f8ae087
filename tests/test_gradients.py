"""Values and gradients equal the plain loop's, for stacks drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_scan
from tests.support import assert_no_zero_leaf, plain_loop, pull_back, relative_error

TOLERANCE = {"float64": 1e-12, "complex128": 1e-12, "float32": 1e-5, "complex64": 1e-5, "bfloat16": 0.2}
POLICIES = [None, "everything", "nothing", "dots", "dots_no_batch", "save:h", "except:h", "dots+save:h", "offload:h"]
WIDTH = 3

array = st.just("array")
trees = st.recursive(
    array,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=2).map(tuple)
        | st.lists(inner, min_size=1, max_size=2)
        | st.dictionaries(st.sampled_from("ab"), inner, min_size=1)
    ),
    max_leaves=3,
)


@st.composite
def cases(draw):
    length = draw(st.integers(1, 7))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    # JAX's own checkpoint cannot keep a complex value: it calls reduce_precision on it.
    policies = POLICIES[:3] if dtype.startswith("complex") else POLICIES
    return dict(
        length=length,
        blocks_per_ckpt=draw(st.none() | st.integers(1, length)),
        policy=draw(st.sampled_from(policies)),
        unroll=draw(st.sampled_from([1, 2, 3, True])),
        dtype=dtype,
        carry=draw(st.lists(trees, min_size=1, max_size=3)),
        seed=draw(st.integers(0, 2**16)),
    )


def random_arrays(tree, shape, dtype, rng):
    """`tree` with random arrays, complex where `dtype` is."""

    def draw(_):
        values = rng.normal(size=shape)
        if np.issubdtype(np.dtype(dtype), np.complexfloating):
            values = values + 1j * rng.normal(size=shape)
        return jnp.asarray(values, dtype)

    return jax.tree.map(draw, tree)


def _squash(x):
    """Bounded for complex numbers too, which a sine is not."""
    return x / (1 + (x * jnp.conj(x)).real)


def block(p, *carry, gain):
    """Mixes all leaves of the carry, so that every gradient depends on every leaf."""
    leaves, tree = jax.tree.flatten(carry)
    total = checkpoint_name(sum(leaves) * gain / len(leaves), "h")
    mixed = [_squash(leaf @ w) + 0.5 * total for leaf, w in zip(leaves, p, strict=True)]
    carry = jax.tree.unflatten(tree, mixed)
    return carry if len(carry) > 1 else carry[0]


# Without shrinking: each of its hundreds of tries would compile two programs.
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_equals_the_plain_loop(case):
    dtype, rng = case["dtype"], np.random.default_rng(case["seed"])
    with jax.enable_x64(True):
        carry = random_arrays(tuple(case["carry"]), (2, WIDTH), dtype, rng)
        leaves = jax.tree.leaves(carry)
        params = random_arrays(["array" for _ in leaves], (case["length"], WIDTH, WIDTH), dtype, rng)
        gain = random_arrays("array", (2, WIDTH), dtype, rng)
        stack = checkpoint_scan(block, blocks_per_ckpt=case["blocks_per_ckpt"], policy=case["policy"], unroll=case["unroll"])
        got = pull_back(lambda p, c, gain: stack(p, *c, gain=gain), params, carry, gain)
        want = pull_back(lambda p, c, gain: plain_loop(block, p, *c, gain=gain), params, carry, gain)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
        assert_no_zero_leaf(want)
        assert relative_error(got, want) < TOLERANCE[dtype]
