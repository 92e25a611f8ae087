"""Arrays that a block's functions close over: tables in a nested `jax.jit`, in loops and branches, in custom derivatives."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxckpt import checkpoint_blocks, checkpoint_scan, explain, plan
from tests.support import assert_flax_stacks_are_the_loop, assert_no_zero_leaf, plain_loop, pull_back, relative_error

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.filterwarnings("ignore:.*found nothing to cut")]

LENGTH, WIDTH = 4, 3
TABLE = np.linspace(0.5, 1.5, WIDTH)
PARAMS, X = (
    0.5 * np.random.default_rng(0).normal(size=(LENGTH, WIDTH, WIDTH)),
    np.random.default_rng(1).normal(size=(2, WIDTH)),
)
SETTINGS = [
    {},
    {"policy": "cheap"},
    {"engine": "reversal", "policy": "budget:0.5", "blocks_per_ckpt": 3},
    {"stages": "auto", "blocks_per_ckpt": 2},
]


def kernel(table, in_function=None):
    """A `custom_vjp` whose function and rules close over a table."""

    def act(w, x, table=table):
        return jnp.tanh(x @ w) * table[None]

    run = jax.custom_vjp(lambda w, x: act(w, x, table if in_function is None else in_function))
    run.defvjp(lambda w, x: (act(w, x), (w, x)), lambda saved, ct: jax.vjp(act, *saved)[1](ct))
    return run


def with_rule(table):
    """A `custom_jvp` whose function closes over a table."""
    run = jax.custom_jvp(lambda x: x * table[None])
    run.defjvp(lambda primals, tangents: (run(*primals), tangents[0] * table[None]))
    return run


def scaled(table):
    return jax.jit(lambda x: x * jnp.asarray(table)[None])


FUNCTIONS = {
    "jit": lambda table: lambda w, x: jnp.tanh(scaled(table)(x) @ w),
    "jit twice": lambda table: lambda w, x: (lambda f: jnp.tanh(f(f(x) @ w)))(scaled(table)),
    "jit in scan": lambda table: lambda w, x: lax.scan(lambda c, _: (jnp.tanh(scaled(table)(c) @ w), None), x, length=2)[0],
    "jit in cond": lambda table: lambda w, x: lax.cond(x[0, 0] > 0, scaled(table), jnp.sin, x @ w),
    "custom_jvp": lambda table: lambda w, x: jnp.tanh(with_rule(table)(x) @ w),
    "custom_vjp": lambda table: kernel(table),
    "custom_vjp in scan": lambda table: lambda w, x: lax.scan(lambda c, _: (kernel(table)(w, c), None), x, length=2)[0],
    "custom_vjp in cond": lambda table: lambda w, x: lax.cond(x[0, 0] > 0, kernel(table), lambda w, x: x @ w, w, x),
    "custom_vjp in checkpoint": lambda table: jax.checkpoint(kernel(table)),
}


def block_of(name, table=TABLE):
    inner = FUNCTIONS[name](table)
    return lambda w, x: x + inner(w, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_plain_loop_under_every_setting(name):
    block = block_of(name)
    want = pull_back(lambda w, x: plain_loop(block, w, x), PARAMS, X)
    assert_no_zero_leaf(want)
    for knobs in SETTINGS:
        assert relative_error(pull_back(checkpoint_scan(block, **knobs), PARAMS, X), want) < 1e-12, knobs


@pytest.mark.parametrize("name", ["jit twice", "custom_vjp in cond"])
def test_checkpoint_blocks(name):
    block = block_of(name)
    want = pull_back(lambda w, x: plain_loop(block, w, x), PARAMS, X)
    blocks = lambda w: [lambda x, i=i: block(w[i], x) for i in range(LENGTH)]  # noqa: E731
    got = pull_back(lambda w, x: checkpoint_blocks(blocks(w), x, 2, policy="cheap")[0], PARAMS, X)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("knobs", [{}, {"policy": "cheap"}, {"stages": "auto"}, {"engine": "reversal"}])
def test_a_shared_argument_that_a_custom_vjp_closes_over(knobs):
    """Nothing is differentiated by it, and nothing tries to."""
    block = lambda w, x, *, table: x + kernel(TABLE, table)(w, x)  # noqa: E731
    stack = checkpoint_scan(block, **knobs)
    want = pull_back(lambda w, x: plain_loop(block, w, x, table=TABLE), PARAMS, X)
    assert relative_error(pull_back(lambda w, x: stack(w, x, table=TABLE), PARAMS, X), want) < 1e-12


def test_what_a_custom_vjp_closes_over_has_no_silent_zero_for_a_gradient():
    def block(w, x):
        return x + lax.scan(lambda c, _: (kernel(TABLE, w[0])(w, c), None), x, length=2)[0]

    with pytest.raises(TypeError, match=r"closes over float64\[3,3\].*as an argument"):
        jax.grad(lambda w: checkpoint_scan(block, policy="budget:1")(w, X).sum())(PARAMS)


def test_gradients_reach_what_a_nested_jit_closes_over():
    def run(table, knobs):
        stack = None if knobs is None else checkpoint_scan(block_of("jit", table), **knobs)
        return lambda w, x: plain_loop(block_of("jit", table), w, x) if stack is None else stack(w, x)

    want = pull_back(lambda table, w, x: run(table, None)(w, x), TABLE, PARAMS, X)
    assert_no_zero_leaf(want)
    for knobs in SETTINGS[1:3]:
        assert relative_error(pull_back(lambda table, w, x, k=knobs: run(table, k)(w, x), TABLE, PARAMS, X), want) < 1e-12


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(0.5, np.float64), (WIDTH, WIDTH), np.float64)
        return x + kernel(TABLE)(w, scaled(TABLE)(x))


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs, table=TABLE):
        self.w = nnx.Param(0.5 * rngs.normal((WIDTH, WIDTH), np.float64))
        self.table = tuple(table.tolist())

    def __call__(self, x):
        table = np.asarray(self.table)
        return x + kernel(table)(self.w[...], scaled(table)(x))


@pytest.mark.parametrize("knobs", [{}, {"policy": "cheap"}, {"engine": "reversal", "stages": "auto"}])
def test_flax(knobs):
    block = lambda w, x: x + kernel(TABLE)(w, scaled(TABLE)(x))  # noqa: E731
    assert_flax_stacks_are_the_loop(LinenBlock, NNXBlock, block, PARAMS, X, **knobs)


def test_modules_whose_nested_jits_close_over_other_tables_are_not_equal():
    with pytest.raises(ValueError, match="are different functions"):
        checkpoint_scan([NNXBlock(rngs=nnx.Rngs(0)), NNXBlock(rngs=nnx.Rngs(1), table=2 * TABLE)])(X)


def test_explain_and_plan():
    for name in ("jit twice", "custom_vjp"):
        stack = checkpoint_scan(block_of(name), plan="auto")
        step = jax.value_and_grad(lambda w, stack=stack: stack(w, X).sum())
        assert plan(step, PARAMS, budget="1GiB", target="cpu", progress=False).peak_bytes > 0
        assert explain(checkpoint_scan(block_of(name), policy="cheap"), PARAMS, X).values
