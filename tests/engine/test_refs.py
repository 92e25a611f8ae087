"""A `jax.Ref` of a block's own is right under every setting; one that comes from outside is refused under every one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxckpt import checkpoint_blocks, checkpoint_scan, explain
from tests.support import assert_flax_stacks_are_the_loop, assert_no_zero_leaf, plain_loop, pull_back, relative_error

LENGTH, WIDTH = 4, 3
PARAMS, X = (
    0.5 * np.random.default_rng(0).normal(size=(LENGTH, WIDTH, WIDTH)),
    np.random.default_rng(1).normal(size=(2, WIDTH)),
)
SETTINGS = [
    {"policy": "everything"},
    {"policy": "cheap"},
    {"engine": "reversal", "policy": "everything", "blocks_per_ckpt": 3},
    {"stages": 2, "blocks_per_ckpt": 2},
]


def scratch(w, x):
    buffer = jax.new_ref(jnp.zeros_like(x))
    buffer[...] = jnp.tanh(x @ w)
    buffer[0] = buffer[0] * x[1]
    return x + buffer[...]


def pure(w, x):
    h = jnp.tanh(x @ w)
    return x + h.at[0].set(h[0] * x[1])


def in_loops(w, x):
    total = jax.new_ref(jnp.zeros_like(x))

    def body(c, _):
        total[...] += jnp.tanh(c @ w)
        return jnp.sin(c), None

    def double():
        total[...] = 2 * total[...]

    lax.scan(body, x, length=2)
    lax.cond(x[0, 0] > 0, double, lambda: None)
    jax.jit(lambda y: total.__setitem__(0, total[0] + y[0]))(x)
    return jax.freeze(total)


def in_loops_pure(w, x):
    total = jnp.tanh(x @ w) + jnp.tanh(jnp.sin(x) @ w)
    total = jnp.where(x[0, 0] > 0, 2 * total, total)
    return total.at[0].add(x[0])


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore:.*found nothing to cut")
@pytest.mark.parametrize("block, same", [(scratch, pure), (in_loops, in_loops_pure)])
def test_a_ref_of_its_own(block, same):
    want = pull_back(lambda w, x: plain_loop(same, w, x), PARAMS, X)
    assert_no_zero_leaf(want)
    for knobs in SETTINGS:
        assert relative_error(pull_back(checkpoint_scan(block, **knobs), PARAMS, X), want) < 1e-12, knobs
    for policy in ("nothing", "cheap"):

        def run(w, x, policy=policy):
            return checkpoint_blocks([lambda x, i=i: block(w[i], x) for i in range(LENGTH)], x, 2, policy=policy)[0]

        assert relative_error(pull_back(run, PARAMS, X), want) < 1e-12, policy


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scratch(self.param("w", nn.initializers.ones, (WIDTH, WIDTH), np.float64), x)


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.w = nnx.Param(rngs.normal((WIDTH, WIDTH), np.float64))

    def __call__(self, x):
        return scratch(self.w[...], x)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("knobs", [{"policy": "everything"}, {"engine": "reversal"}])
def test_flax(knobs):
    assert_flax_stacks_are_the_loop(LinenBlock, NNXBlock, pure, PARAMS, X, **knobs)


def test_explain():
    found = explain(checkpoint_scan(scratch, policy="dots"), PARAMS.astype("float32"), X.astype("float32"))
    assert [value.op for value in found.values if value.fate == "kept"] == ["input", "dot_general"]


W, Y = jnp.asarray(PARAMS, "float32"), jnp.asarray(X, "float32")


@pytest.mark.parametrize("knobs", [*SETTINGS, {}])
def test_refs_from_outside(knobs):
    ref, weights = jax.new_ref(jnp.zeros((2, WIDTH))), jax.new_ref(jnp.zeros((LENGTH, WIDTH, WIDTH)))

    def closing(w, x):
        ref[...] += x
        return x @ w

    with pytest.raises(TypeError, match=r"closing closes over a jax\.Ref.*has_aux=True"):
        checkpoint_scan(closing, **knobs)(W, Y)
    with pytest.raises(TypeError, match=r"closing closes over a jax\.Ref"):
        jax.grad(lambda w: checkpoint_scan(closing, **knobs)(w, Y).sum())(W)
    with pytest.raises(TypeError, match=r"closes over a jax\.Ref"):
        checkpoint_scan(lambda w, x: jax.jit(closing)(w, x), **knobs)(W, Y)
    with pytest.raises(TypeError, match=r"state\['sum'\] is a jax\.Ref.*Pass its value"):
        checkpoint_scan(lambda w, x, state: (x, state), **knobs)(W, Y, {"sum": ref})
    with pytest.raises(TypeError, match=r"mask is a jax\.Ref.*Pass its value"):
        checkpoint_scan(lambda w, x, *, mask: x * mask[...], **knobs)(W, Y, mask=ref)
    with pytest.raises(TypeError, match=r"parameters.* is a jax\.Ref.*Pass its value"):
        checkpoint_scan(lambda w, x: x @ w[...], **knobs)(weights, Y)
    with pytest.raises(TypeError, match=r"rate.* is a jax\.Ref.*Pass its value"):
        checkpoint_scan(lambda w, x, *, rate: x @ rate, per_block="rate", **knobs)(W, Y, rate=weights)
    assert not ref[...].any()


@pytest.mark.parametrize("policy", ["everything", "nothing", "cheap"])
def test_refs_from_outside_in_checkpoint_blocks(policy):
    ref = jax.new_ref(jnp.zeros((2, WIDTH)))

    def closing(x):
        ref[...] += x
        return jnp.sin(x)

    with pytest.raises(TypeError, match=r"a block closes over a jax\.Ref"):
        checkpoint_blocks([closing] * 4, Y, 2, policy=policy)
    with pytest.raises(TypeError, match=r"a block closes over a jax\.Ref"):
        jax.grad(lambda x: checkpoint_blocks([closing] * 4, x, 2, policy=policy)[0].sum())(Y)
    with pytest.raises(TypeError, match=r"the argument\[1\] is a jax\.Ref"):
        checkpoint_blocks([lambda x, r: (x, r)] * 4, (Y, ref), 2, policy=policy)
    assert not ref[...].any()


# A derivative of its own, beside a Ref or in the loops, branches and calls that write one.


@jax.custom_jvp
def tripled(x):
    return jnp.sin(x)


tripled.defjvp(lambda primals, tangents: (tripled(*primals), 3 * jnp.cos(primals[0]) * tangents[0]))


@jax.custom_vjp
def doubled(x):
    return jnp.cos(x)


doubled.defvjp(lambda x: (doubled(x), x), lambda x, ct: (-2 * ct * jnp.sin(x),))


def beside(ref, x):
    ref[...] = doubled(tripled(ref[...]))


def in_scan(ref, x):
    lax.scan(lambda c, _: (c, beside(ref, x)), 0, length=2)


def in_fori(ref, x):
    lax.fori_loop(0, 2, lambda i, _: beside(ref, x), None)


def in_branch(ref, x):
    lax.cond(x[0, 0] > 0, lambda: beside(ref, x), lambda: beside(ref, x))


def in_call(ref, x):
    jax.jit(lambda ref: jax.jit(beside)(ref, x))(ref)


def in_checkpoint(ref, x):
    ref[...] = jax.checkpoint(lambda v: doubled(tripled(v)))(ref[...])


def in_call_with_a_ref_of_its_own(ref, x):
    def own(v):
        inner = jax.new_ref(v)
        beside(inner, v)
        return inner[...]

    ref[...] = jax.jit(own)(ref[...])


WRITES = [beside, in_scan, in_fori, in_branch, in_call, in_checkpoint, in_call_with_a_ref_of_its_own]


@pytest.mark.parametrize("knobs", [{"policy": "everything"}, {"engine": "reversal", "policy": "cheap"}], ids=str)
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_derivative_of_its_own_stays(write, knobs, x64):
    def block(w, x):
        ref = jax.new_ref(x @ w)
        write(ref, x)
        return x + ref[...]

    want = pull_back(lambda w, x: plain_loop(block, w, x), PARAMS, X)
    assert relative_error(pull_back(checkpoint_scan(block, **knobs), PARAMS, X), want) < 1e-12


def test_a_ref_that_is_passed_to_one_is_refused():
    @jax.custom_vjp
    def write(ref, x):
        ref[...] = x
        return x

    write.defvjp(lambda ref, x: (write(ref, x), None), lambda _, ct: (None, ct))

    def block(w, x):
        ref = jax.new_ref(x)
        return write(ref, x @ w) + ref[...]

    with pytest.raises(ValueError, match=r"passes a jax\.Ref to a function with a derivative of its own \(custom_vjp\)"):
        checkpoint_scan(block)(PARAMS, X)
