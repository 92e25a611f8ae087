from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal

from jaxckpt import checkpoint_scan
from tests.support import assert_no_zero_leaf, plain_loop, pull_back, random_like, relative_error

KNOBS = [dict(), dict(policy="everything"), dict(blocks_per_ckpt=2), dict(blocks_per_ckpt=2, policy="nothing", unroll=2)]
knobs = pytest.mark.parametrize(
    "knobs", KNOBS, ids=lambda knobs: " ".join(f"{k}={v}" for k, v in knobs.items()) or "default"
)


def dense(w, x):
    return jnp.tanh(x @ w)


@pytest.fixture
def w():
    return random_like(jnp.zeros((5, 4, 4)))


@pytest.fixture
def x():
    return random_like(jnp.zeros((2, 4)), seed=2)


class Pair(NamedTuple):
    a: Any
    b: Any


CARRIES = {
    "array": (lambda w, x: dense(w, x), lambda x: x),
    "dict": (
        lambda w, x: {"h": dense(w, x["h"]), "n": {"sum": x["n"]["sum"] + x["h"].sum()}},
        lambda x: {"h": x, "n": {"sum": x[0, 0]}},
    ),
    "namedtuple": (lambda w, x: Pair(dense(w, x.b), jnp.sin(x.a)), lambda x: Pair(x, x + 1)),
    "tuple": (lambda w, x: (dense(w, x[0]), (x[1][0] + x[0].mean(),)), lambda x: (x, (x[0],))),
    "list": (lambda w, x: [dense(w, x[0])], lambda x: [x]),
    "none inside": (lambda w, x: {"h": dense(w, x["h"]), "none": None}, lambda x: {"h": x, "none": None}),
}


@knobs
@pytest.mark.parametrize("kind", CARRIES)
def test_carry_trees(kind, knobs, w, x):
    block, make = CARRIES[kind]
    got = pull_back(checkpoint_scan(block, **knobs), w, make(x))
    want = pull_back(lambda w, x: plain_loop(block, w, x), w, make(x))
    assert type(got[0]) is type(make(x))
    assert_no_zero_leaf(want)
    assert relative_error(got, want) < 1e-5


@knobs
def test_none_as_a_carry(knobs, w, x):
    stack = checkpoint_scan(lambda w, x, state: (dense(w, x), state), **knobs)
    out, state = stack(w, x, None)
    assert state is None
    assert relative_error(out, plain_loop(dense, w, x)) < 1e-5


@knobs
@pytest.mark.parametrize(
    "start, step, dtype",
    [
        (0, lambda n, x: n + 1, jnp.int32),
        (0, lambda n, x: n + x.sum(), jnp.float32),
        (0.0, lambda n, x: n + x.sum(), jnp.float32),
        (0.0, lambda n, x: n + x.sum().astype(jnp.bfloat16), jnp.bfloat16),
        (1, lambda n, x: n * 2.0, jnp.float32),
        (True, lambda n, x: ~n, jnp.bool_),
        (3, lambda n, x: n, jnp.int32),
    ],
)
def test_python_numbers_in_the_carry_take_the_dtype_of_the_block(start, step, dtype, knobs, w, x):
    def block(w, n, x):
        return step(n, x), dense(w, x)

    n, last = checkpoint_scan(block, **knobs)(w, start, x)
    want, _ = plain_loop(block, w, jnp.asarray(start), x)
    assert isinstance(n, jax.Array) and n.dtype == dtype
    assert jnp.allclose(n.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2)
    assert last.shape == x.shape


def test_promotions_that_depend_on_one_another(w, x):
    """`b` becomes a float only once `a` has become one."""
    a, b, _ = checkpoint_scan(lambda w, a, b, x: (a + x.sum(), b + a, dense(w, x)))(w, 0, 0, x)
    assert a.dtype == b.dtype == jnp.float32


@knobs
def test_aux_is_stacked_in_the_order_of_the_blocks(knobs, w, x):
    def block(w, x):
        out = dense(w, x)
        return out, {"mean": out.mean(), "in": x, "none": None}

    def loop(w, x):
        rows = []
        for w_i in w:
            x, aux = block(w_i, x)
            rows.append(aux)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    got = pull_back(checkpoint_scan(block, has_aux=True, **knobs), w, x)
    want = pull_back(loop, w, x)
    assert got[0][1]["mean"].shape == (5,) and got[0][1]["in"].shape == (5, 2, 4)
    assert relative_error(got, want) < 1e-5


@knobs
def test_per_block_arguments_are_sliced_and_differentiated(knobs, w, x):
    def block(w, x, *, scale, keep):
        return jnp.where(keep["if"], dense(w, x) * scale, x)

    scale = random_like(jnp.zeros(5), seed=3)
    keep = {"if": jnp.array([True, False, True, True, False])}
    stack = checkpoint_scan(block, per_block=("scale", "keep"), **knobs)
    got = pull_back(lambda w, x, scale: stack(w, x, scale=scale, keep=keep), w, x, scale)
    want = pull_back(lambda w, x, scale: plain_loop_per_block(block, w, x, scale, keep), w, x, scale)
    assert relative_error(got, want) < 1e-5
    assert bool(got[1][2][0] != 0) and bool(got[1][2][1] == 0)


def plain_loop_per_block(block, w, x, scale, keep):
    return plain_loop(lambda p, x: block(p["w"], x, scale=p["scale"], keep=p["keep"]), dict(w=w, scale=scale, keep=keep), x)


@knobs
def test_shared_arguments_are_differentiated_and_statics_reach_the_block_as_they_are(knobs, w, x):
    config = object()
    seen = []

    def block(w, x, *, bias, mode, flag, depth, rate, config, none, nested):
        seen.append((mode, flag, depth, rate, config, none, nested["mode"]))
        return dense(w, x) + bias * nested["bias"]

    static = dict(mode="fast", flag=True, depth=3, rate=0.5, config=config, none=None)

    def run(stack):
        return lambda w, x, a, b: stack(block, w, x, bias=a, nested={"bias": b, "mode": "slow"}, **static)

    bias, nested = jnp.full((2, 4), 0.3), jnp.full((2, 4), 0.7)
    got = pull_back(run(lambda block, *args, **kw: checkpoint_scan(block, **knobs)(*args, **kw)), w, x, bias, nested)
    want = pull_back(run(plain_loop), w, x, bias, nested)
    assert set(seen) == {("fast", True, 3, 0.5, config, None, "slow")}
    assert_no_zero_leaf(want)
    assert relative_error(got, want) < 1e-5


@knobs
def test_parameters_may_be_any_tree(knobs, x):
    def block(p, x):
        return x + p["scale"] * jnp.tanh(x @ p["layers"][0] + p["layers"][1])

    params = random_like({"scale": jnp.zeros(5), "layers": (jnp.zeros((5, 4, 4)), jnp.zeros((5, 1, 4))), "none": None})
    got = pull_back(checkpoint_scan(block, **knobs), params, x)
    want = pull_back(lambda p, x: plain_loop(block, p, x), params, x)
    assert_no_zero_leaf(want)
    assert relative_error(got, want) < 1e-5


def test_length_without_parameters(x):
    stack = checkpoint_scan(lambda _, x: jnp.sin(x), 3, blocks_per_ckpt=2)
    assert relative_error(stack(None, x), jnp.sin(jnp.sin(jnp.sin(x)))) < 1e-6


@knobs
def test_a_carry_that_every_block_passes_on_is_returned_as_it_was_given(knobs, w, x):
    z = jnp.ones((3, 3))
    jaxpr = jax.make_jaxpr(checkpoint_scan(lambda w, x, z: (dense(w, x) * z.sum(), z), **knobs))(w, x, z).jaxpr
    assert jaxpr.outvars[1] is jaxpr.invars[2]


@knobs
def test_swapped_carries_are_not_passed_through(knobs, w, x):
    block = lambda w, a, b: (b, dense(w, a))  # noqa: E731
    got = pull_back(checkpoint_scan(block, **knobs), w, x, x + 1)
    want = pull_back(lambda w, a, b: plain_loop(block, w, a, b), w, x, x + 1)
    assert relative_error(got, want) < 1e-5


@knobs
def test_a_stack_that_only_passes_through(knobs, w, x):
    value, (of_w, of_x) = pull_back(checkpoint_scan(lambda w, x: x, **knobs), w, x)
    assert bool(jnp.array_equal(value, x)) and not of_w.any() and bool(of_x.any())


@knobs
def test_what_a_block_returns_of_its_slice_unchanged_is_not_copied(knobs, w, x):
    rates = jnp.arange(5.0)

    def block(w, x, *, rate):
        return dense(w, x), {"w": w, "rate": rate, "twice": 2 * rate}

    stack = checkpoint_scan(block, has_aux=True, per_block="rate", **knobs)
    jaxpr = jax.make_jaxpr(lambda w, x, rates: stack(w, x, rate=rates))(w, x, rates).jaxpr
    _, rate, twice, weights = jaxpr.outvars
    assert weights is jaxpr.invars[0] and rate is jaxpr.invars[2]
    assert twice not in jaxpr.invars and not isinstance(twice, Literal)


@knobs
def test_the_blocks_code_is_entered_once_per_signature(knobs, w, x):
    entered = []

    def block(w, x):
        entered.append(x.shape)
        return dense(w, x)

    stack = checkpoint_scan(block, **knobs)
    step = jax.jit(jax.grad(lambda w, x: stack(w, x).sum()))
    for _ in range(2):
        step(w, x)
    assert entered == [(2, 4)]
    step(w, jnp.ones((3, 4)))
    assert entered == [(2, 4), (3, 4)]
