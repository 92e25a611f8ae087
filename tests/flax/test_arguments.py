"""What blocks change in NNX objects among their arguments, beside the plain loop."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, explain
from tests.support import relative_error

N, D = 4, 3
SETTINGS = [{}, {"blocks_per_ckpt": 3}, {"engine": "reversal", "policy": "cheap"}, {"snapshots": 2}]
settings = pytest.mark.parametrize("setting", SETTINGS, ids=str)


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, *, streams, cache=None):
        x = x + self.dropout(jnp.tanh(self.linear(x)), rngs=streams)
        if cache is not None:
            cache["last"][...] = cache["last"] + x
        return x


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, *, streams, cache=None):
        x = x + streams.dropout.bernoulli(0.5, x.shape) * jnp.tanh(nn.Dense(D)(x))
        if cache is not None:
            cache["last"][...] = cache["last"] + x
        return x


def function(w, x, *, streams, cache=None):
    x = x + streams.dropout.bernoulli(0.5, x.shape) * jnp.tanh(x @ w)
    if cache is not None:
        cache["last"][...] = cache["last"] + x
    return x


def nnx_stack(**setting: Any) -> Any:
    return checkpoint_scan(Block, N, **setting)(rngs=nnx.Rngs(0))


def linen_stack(**setting: Any) -> Any:
    stack, x = checkpoint_scan(LinenBlock, N, **setting)(), jnp.ones((2, D))
    given = {"streams": nnx.Rngs(dropout=0).split(N), "cache": {"last": nnx.Cache(jnp.zeros((N, 2, D)))}}
    variables = stack.init(jax.random.key(0), x, **given)
    return lambda x, **keywords: stack.apply(variables, x, **keywords)


def function_stack(**setting: Any) -> Any:
    stack, w = checkpoint_scan(function, **setting), jax.random.normal(jax.random.key(0), (N, D, D))
    return lambda x, **keywords: stack(w, x, **keywords)


kinds = pytest.mark.parametrize("make", [nnx_stack, linen_stack, function_stack])
x = jnp.ones((2, D))


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
@kinds
def test_streams_and_caches_of_single_blocks_advance(make, setting):
    stack = make(per_block=("streams", "cache"), **setting)
    streams, cache = nnx.Rngs(dropout=1).split(N), {"last": nnx.Cache(jnp.zeros((N, 2, D)))}
    first = stack(x, streams=streams, cache=cache)
    np.testing.assert_array_equal(streams.dropout.count, np.ones(N))
    np.testing.assert_allclose(cache["last"][-1], first, rtol=1e-6)
    second = stack(x, streams=streams, cache=cache)
    assert not np.allclose(first, second), "other masks in the second step"
    np.testing.assert_allclose(cache["last"][-1], first + second, rtol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS[1:3], ids=str)
def test_steps_draw_what_the_loop_draws(x64, setting):
    blocks = [Block(rngs=nnx.Rngs(i)) for i in range(N)]
    stack = checkpoint_scan(blocks, per_block=("streams",), **setting)
    streams = nnx.Rngs(dropout=1).split(N)
    own = [nnx.merge(nnx.graphdef(streams), jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(streams))) for i in range(N)]

    @nnx.jit
    def step(stack, streams):
        return nnx.value_and_grad(lambda stack, streams: (stack(x, streams=streams) ** 2).sum())(stack, streams)

    @nnx.jit
    def by_loop(blocks, own):
        def loss(blocks, own):
            y = x
            for block, rngs in zip(blocks, own, strict=True):
                y = block(y, streams=rngs)
            return (y**2).sum()

        return nnx.value_and_grad(loss)(blocks, own)

    blocks, own = nnx.List(blocks), nnx.List(own)
    for _ in range(2):
        got, gradients = step(stack, streams)
        want, of_loop = by_loop(blocks, own)
        of_loop = nnx.to_pure_dict(of_loop)
        of_loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(of_loop[i] for i in range(N)))
        assert relative_error((got, nnx.to_pure_dict(gradients)), (want, of_loop)) < 1e-12
    np.testing.assert_array_equal(streams.dropout.count, [own[i].dropout.count[...] for i in range(N)])


@pytest.mark.parametrize("changed", [0, 1])
def test_two_caches_as_carry_are_told_apart(changed):
    def block(w, x, *caches):
        caches[changed][...] = caches[changed] + x
        return x * w, *caches

    caches = nnx.Cache(jnp.zeros(D)), nnx.Cache(jnp.zeros(D))
    _, *returned = checkpoint_scan(block)(jnp.ones((N, D)), jnp.ones(D), *caches)
    for got in (caches, returned):
        np.testing.assert_array_equal(got[changed], np.full(D, N))
        np.testing.assert_array_equal(got[1 - changed], np.zeros(D))


@settings
def test_a_stream_as_carry_advances_through_the_blocks(setting):
    def block(w, x, rngs):
        return x + rngs.bernoulli(0.5, x.shape) * (x @ w), rngs

    stack, w, rngs, own = checkpoint_scan(block, **setting), jnp.ones((N, D, D)) / D, nnx.Rngs(0), nnx.Rngs(0)
    for _ in range(2):  # with what comes back, and with the object that was given, as in the loop
        got, returned = stack(w, x, rngs)
        want = x
        for i in range(N):
            want, own = block(w[i], want, own)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert int(rngs.default.count[...]) == int(returned.default.count[...]) == int(own.default.count[...])


def test_a_module_that_is_given_as_parameters_keeps_what_blocks_change():
    """A function of modules, whose arrays have a layer axis."""

    class Norm(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(D, rngs=rngs)

        def __call__(self, x):
            return x + self.norm(x)

    one, layers = Norm(nnx.Rngs(0)), nnx.vmap(Norm)(nnx.Rngs(0).split(N))
    before = layers.norm.mean[...]
    checkpoint_scan(lambda layer, x: layer(x), blocks_per_ckpt=2)(layers, x)
    assert np.all(layers.norm.mean[...] != before)
    one(x)
    np.testing.assert_allclose(layers.norm.mean[0], one.norm.mean[...], rtol=1e-6)


def test_explain_changes_nothing():
    stack, streams = nnx_stack(per_block=("streams",)), nnx.Rngs(dropout=1).split(N)
    assert explain(stack, x, streams=streams).length == N
    np.testing.assert_array_equal(streams.dropout.count, np.zeros(N))


# What cannot be written back is refused.


def test_a_change_of_a_dictionary_of_one_block_is_refused():
    def block(w, x, *, cache):
        cache["last"] = x
        return x @ w

    with pytest.raises(
        ValueError, match=r"block changes its own arguments in place, at \['cache'\]\['last'\].*has_aux=True"
    ):
        checkpoint_scan(block, per_block=("cache",))(jnp.ones((N, D, D)), x, cache={"last": jnp.zeros((N, 2, D))})


def test_a_block_may_change_the_dictionary_of_its_parameters():
    """It is the block's own copy, and nobody looks for the change."""

    def block(w, x):
        w["kernel"] = w["kernel"].astype(x.dtype)
        return x @ w["kernel"]

    got = checkpoint_scan(block)({"kernel": jnp.ones((N, D, D), jnp.bfloat16) / D}, x)
    assert got.dtype == x.dtype


def test_a_block_may_take_values_out_of_a_dictionary_of_its_own():
    def block(w, x, *, cache):
        return x * w + cache.pop("last")

    got = checkpoint_scan(block, per_block=("cache",))(jnp.ones((N, D)), x[0], cache={"last": jnp.ones((N, D))})
    np.testing.assert_array_equal(got, np.full(D, 1.0 + N))


def test_a_variable_that_a_block_makes_in_an_argument_is_refused():
    def block(w, x, *, layer):
        layer.last = nnx.Cache(x)
        return x @ w

    layer = nnx.vmap(lambda rngs: nnx.Linear(D, D, rngs=rngs))(nnx.Rngs(0).split(N))
    with pytest.raises(ValueError, match=r"changes its own arguments in place, at .*last"):
        checkpoint_scan(block, per_block=("layer",))(jnp.ones((N, D, D)), x, layer=layer)
    with pytest.raises(ValueError, match=r"changes its own arguments in place, at .*last"):
        checkpoint_scan(lambda layer, x: block(jnp.eye(D), x, layer=layer))(layer, x)


def test_a_carry_that_is_changed_and_not_returned_is_refused():
    def block(w, x, rngs):
        return x + rngs.normal(x.shape), nnx.Rngs(0)

    with pytest.raises(ValueError, match=r"changes its carry in place, at .*count.*Return what it changes"):
        checkpoint_scan(block)(jnp.ones((N, D)), x, nnx.Rngs(0))


def test_one_stream_in_two_arguments_is_refused():
    def block(w, x, *, a, b):
        return x + w * a.dropout.normal(x.shape) + b.dropout.normal(x.shape)

    streams = nnx.Rngs(dropout=0).split(N)
    with pytest.raises(ValueError, match=r"is given a second time, at \['b'\].*Pass it once"):
        checkpoint_scan(block, per_block=("a", "b"))(jnp.ones((N, 1, D)), x, a=streams, b=streams)


def test_a_changed_cache_that_is_given_twice_is_refused_wherever_it_is_given():
    """In the loop both are one object; copies would lose the changes of one, without a word."""

    def block(w, x, cache, *others, **more):
        cache[...] = cache + x
        return x * w, cache, *others

    def per_block(w, x, *carried, cache):
        cache[...] = cache + x
        x = x * jax.tree.leaves(w)[0]
        return (x, *carried) if carried else x

    w, cache, caches = jnp.ones((N, D)), nnx.Cache(jnp.zeros(D)), nnx.Cache(jnp.zeros((N, D)))
    with pytest.raises(ValueError, match=r"changes its argument at cache, which .* a second time, at carry 2.*Pass it once"):
        checkpoint_scan(block)(w, x[0], cache, cache)
    with pytest.raises(ValueError, match=r"changes its argument at cache, which .* a second time, at \['more'\]"):
        checkpoint_scan(block)(w, x[0], cache, more=cache)
    with pytest.raises(ValueError, match=r"changes its argument at \['cache'\], which .* at the parameters\['cache'\]"):
        checkpoint_scan(per_block, per_block=("cache",))({"cache": caches}, x[0], cache=caches)
    with pytest.raises(ValueError, match=r"changes its argument at \['cache'\], which .* a second time, at carry 1"):
        checkpoint_scan(per_block, per_block=("cache",))(w, x[0], caches, cache=caches)
    assert not cache[...].any() and not caches[...].any()


class Counts(nnx.Module):
    """A block that changes its own variable, or the one that it is given."""

    def __init__(self, rngs=None):
        self.inner = nnx.List([nnx.Dict(n=nnx.Variable(jnp.zeros(())))])

    def __call__(self, x, *, n, own=False, given=False):
        if own:
            self.inner[0].n[...] = self.inner[0].n + 1
        if given:
            n[...] = n + 10
        return x + n[...].sum()


@pytest.mark.parametrize("per_block", [(), ("n",)], ids=["shared", "per block"])
def test_a_variable_of_the_stack_itself_among_its_arguments_is_refused_where_it_changes(per_block):
    """It is one object in the loop; of two copies one change would be lost, without a word."""
    stacks = [
        checkpoint_scan(Counts, N, per_block=per_block)(rngs=nnx.Rngs(0)),
        checkpoint_scan([Counts() for _ in range(N)], per_block=per_block),
    ]
    for stack in stacks:
        n = stack.inner[0].n
        for own in (True, False) if per_block else (True,):  # a change of what is shared is refused in other words
            said = r"self\.inner\[0\]\.n, .* second time, at \['n'\]" if own else r"at \['n'\], .* at self\.inner\[0\]\.n"
            with pytest.raises(ValueError, match=rf"Counts changes .*{said}.*Pass it once"):
                stack(x, n=n, own=own, given=bool(per_block))
            assert not n[...].any()
        np.testing.assert_array_equal(stack(x, n=n), x)
        other = nnx.Variable(jnp.zeros(N))
        stack(x, n=other, own=True, given=bool(per_block))
        np.testing.assert_array_equal((n[...], other[...]), (np.ones(N), np.full(N, 10.0 * len(per_block))))


@pytest.mark.parametrize("per_block", [(), ("cache",)], ids=["shared", "per block"])
def test_a_change_of_what_is_static_in_an_argument_is_refused(per_block):
    class Cache(nnx.Module):
        def __init__(self):
            self.last, self.index = nnx.Cache(jnp.zeros((N, D))), 0

    def block(w, x, *, cache):
        cache.index += 1
        return x * w

    with pytest.raises(ValueError, match=r"block changes Cache\.index among its arguments, .* lost.*nnx\.Variable"):
        checkpoint_scan(block, per_block=per_block)(jnp.ones((N, D)), x[0], cache=Cache())


def test_a_changed_cache_that_is_returned_in_another_place_is_refused():
    def block(w, x, a, b):
        a[...] = a + x
        return x * w, b, a

    with pytest.raises(ValueError, match=r"changes its carry in place, at a, and returns something else there"):
        checkpoint_scan(block)(jnp.ones((N, D)), x[0], nnx.Cache(jnp.zeros(D)), nnx.Cache(jnp.zeros(D)))


def test_a_shared_stream_is_refused_with_what_works():
    with pytest.raises(ValueError, match=r"per_block=\('streams',\) and rngs\.split\(N\)"):
        nnx_stack()(x, streams=nnx.Rngs(0))
