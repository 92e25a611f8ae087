"""Layers that are not written for stacks: configurations without a hash, and calls of their own."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, explain, unstack_params
from tests.support import relative_error

N, D = 4, 3
x = jnp.linspace(-1.0, 1.0, 2 * D).reshape(2, D)
mask = jnp.asarray([[1.0], [0.5]])


@dataclasses.dataclass(slots=True)  # equal by value, and so without a hash
class Config:
    width: int = D
    scale: Any = 1.0


class Layer(nnx.Module):
    """Called as real decoder layers are."""

    def __init__(self, config, rngs):
        self.config, self.linear = config, nnx.Linear(config.width, config.width, rngs=rngs)

    def __call__(self, x, positions, cache, mask):
        x = x + jnp.tanh(self.linear(x) + positions) * mask * self.config.scale
        return (None if cache is None else cache + x.sum()), x


class LinenLayer(nn.Module):
    config: Any

    def setup(self):
        self.linear, self.table = nn.Dense(self.config.width), self.param("table", nn.initializers.normal(), (1, D))

    def positions(self):
        return self.table * 2

    def __call__(self, x, positions, cache, mask):
        return cache, x + jnp.tanh(self.linear(x) + positions) * mask * self.config.scale


def call(layer, x, *, positions=0.1, mask=None):
    return layer(x, positions, None, mask)[1]


def with_own_positions(layer, x, *, mask):
    return layer(x, layer.positions(), None, mask)[1]


def layers(config=Config) -> list[Layer]:
    return [Layer(config(), nnx.Rngs(i)) for i in range(N)]


def by_loop(layers, x):
    for layer in layers:
        x = call(layer, x, mask=mask)
    return x


settings = pytest.mark.parametrize("setting", [{}, {"blocks_per_ckpt": 3}, {"snapshots": 2}], ids=str)


@settings
def test_a_list_of_layers_with_a_call_of_their_own(x64, setting):
    own, wide = layers(), x.astype(float)
    for layer in own:
        nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(layer)))
    stack = checkpoint_scan(own, call=call, **setting)
    run = nnx.jit(nnx.value_and_grad(lambda model, x: (model(x, mask=mask.astype(float)) ** 2).sum()))
    value, gradients = run(stack, wide)
    loop = nnx.jit(nnx.value_and_grad(lambda model, x: (by_loop(model, x) ** 2).sum()))
    want, of_loop = loop(nnx.List(own), wide)
    of_loop = nnx.to_pure_dict(of_loop)
    of_loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(of_loop[i] for i in range(N)))
    assert relative_error((value, nnx.to_pure_dict(gradients)), (want, of_loop)) < 1e-12


def test_an_nnx_class_with_a_call_of_its_own():
    stack = checkpoint_scan(Layer, N, call=call)(Config(), nnx.Rngs(0))
    assert stack(x, mask=mask).shape == x.shape and stack.linear.kernel.shape == (N, D, D)
    assert explain(stack, x, mask=mask).block == "Layer"


@pytest.mark.parametrize(
    "make",
    [
        lambda: checkpoint_scan(LinenLayer, N, call=with_own_positions)(Config()),
        lambda: checkpoint_scan(functools.partial(LinenLayer, Config()), N, call=with_own_positions)(),
        lambda: checkpoint_scan(LinenLayer(Config()), N, call=with_own_positions, blocks_per_ckpt=3),
    ],
    ids=["class", "partial", "instance"],
)
def test_linen_layers_with_a_call_and_a_method_of_their_own(make):
    stack = make()
    variables = stack.init(jax.random.key(0), x, mask=mask)
    got, want = stack.apply(variables, x, mask=mask), x
    one = nn.apply(functools.partial(with_own_positions, mask=mask), LinenLayer(Config()))
    for params in unstack_params(variables["params"]):
        want = one({"params": params}, want)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_method_is_a_call_and_caches_come_out_per_block():
    class Other(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def forward(self, x):
            return x + self.linear(x)

    blocks = [Other(nnx.Rngs(i)) for i in range(N)]
    want = functools.reduce(lambda y, block: block.forward(y), blocks, x)
    np.testing.assert_allclose(checkpoint_scan(blocks, call=Other.forward)(x), want, rtol=1e-5)
    with pytest.raises(TypeError, match=r"Other has no method __call__.*call=lambda layer, x"):
        checkpoint_scan(blocks)

    def with_cache(layer, x, *, cache):
        return layer(x, 0.1, cache, mask)[::-1]

    stack = checkpoint_scan(layers(), call=with_cache, per_block=("cache",), has_aux=True)
    y, caches = stack(x, cache=jnp.arange(N, dtype=x.dtype))
    want, one = x, []
    for i, layer in enumerate(layers()):
        cache, want = layer(want, 0.1, jnp.asarray(i, x.dtype), mask)
        one.append(cache)
    assert relative_error((y, caches), (want, jnp.stack(one))) < 1e-5


def test_the_call_sees_an_error_as_the_block_does():
    stack = checkpoint_scan(layers(), call=call)
    with pytest.raises(
        TypeError, match=r"Layer takes no keyword argument 'masks'; beside the carry it takes: positions, mask"
    ):
        stack(x, masks=mask)
    with pytest.raises(TypeError, match="Layer was given the carry"):
        checkpoint_scan(layers(), call=Layer.__call__)(x, positions=0.0, cache=None, mask=mask)


@pytest.mark.parametrize(
    "block, given, said",
    [
        (lambda w, x: x, call, "a function is run as it is: write it into the function"),
        (Layer, "forward", "must be a function such as lambda layer, x: .*got 'forward'"),
        (LinenLayer, Config(), r"must be a function"),
    ],
)
def test_what_is_no_call_is_refused(block, given, said):
    with pytest.raises(TypeError, match=said):
        checkpoint_scan(block, N, call=given)


def test_equal_stacks_have_the_same_call():
    assert checkpoint_scan(Layer, N, call=call) is checkpoint_scan(Layer, N, call=call)
    assert checkpoint_scan(Layer, N, call=call) is not checkpoint_scan(Layer, N)
    assert type(checkpoint_scan(layers(), call=call)) is checkpoint_scan(Layer, N, call=call)


# Configurations without a hash.


def unlike(i):
    return Config(scale=1.0 + i)


def test_configurations_without_a_hash_are_compared():
    own = layers()
    stack = checkpoint_scan(own, call=call)
    want = by_loop(own, x)
    np.testing.assert_allclose(stack(x, mask=mask), want, rtol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda model: model(x, mask=mask))(stack), want, rtol=1e-5)
    np.testing.assert_allclose(nnx.clone(stack)(x, mask=mask), want, rtol=1e-5)


@pytest.mark.parametrize(
    "scale", [lambda: 1.0, lambda: np.ones((1, D), np.float32), object], ids=["number", "array", "object"]
)
def test_configurations_that_differ_are_asked_whether_it_matters(scale):
    """Also those that cannot be compared, such as arrays, and those that are equal only to themselves."""

    class Numbered(Layer):
        def __call__(self, x, positions, cache, mask):
            factor = 1.0 if type(self.config.scale) is object else self.config.scale
            return cache, x + jnp.tanh(self.linear(x) + positions) * mask * factor

    own = [Numbered(Config(scale=scale()), nnx.Rngs(i)) for i in range(N)]
    stack = checkpoint_scan(own, call=call)
    for _ in range(2):
        np.testing.assert_allclose(stack(x, mask=mask), by_loop(own, x), rtol=1e-5)
    other = [Numbered(Config(scale=np.full((1, D), i, np.float32)), nnx.Rngs(i)) for i in range(N)]
    with pytest.raises(ValueError, match="blocks 0 and 1 of the list are different functions"):
        checkpoint_scan(other, call=call)(x, mask=mask)


def test_linen_modules_bridged_to_nnx():
    class Plain(nn.Module):
        config: Any

        @nn.compact
        def __call__(self, x):
            return x + jnp.tanh(nn.Dense(self.config.width)(x)) * self.config.scale

    blocks = [nnx.bridge.ToNNX(Plain(Config()), rngs=nnx.Rngs(i)).lazy_init(x) for i in range(N)]
    stack = checkpoint_scan(blocks, blocks_per_ckpt=3)
    want = functools.reduce(lambda y, block: block(y), blocks, x)
    np.testing.assert_allclose(stack(x), want, rtol=1e-5)


def test_modules_without_a_hash_among_the_arguments():
    class Adds(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x, *, layer, own):
            return self.linear(x) + call(layer, x, mask=1.0) + call(own, x, mask=1.0)

    own = nnx.vmap(lambda rngs: Layer(Config(), rngs))(nnx.Rngs(1).split(N))
    stack = checkpoint_scan(Adds, N, per_block=("own",))(nnx.Rngs(0))
    gradients = nnx.grad(lambda layer: stack(x, layer=layer, own=own).sum())(layers()[0])
    assert np.any(gradients["linear"]["kernel"][...] != 0)


# Blocks that call themselves: the one in the loop is a block, and not the stack that it is a part of.


def made_odd(block, x, odd):
    """Half of what a block makes of `x` less what it makes of `-x`."""
    assert type(block).__name__ in ("Odd", "LinenOdd")
    return 0.5 * (block(x, odd=False) - block(-x, odd=False)) if odd else x + nn.gelu(block.linear(x))


class Odd(nnx.Module):
    def __init__(self, rngs, number=0):
        self.linear, self.number = nnx.Linear(D, D, rngs=rngs), number

    def __call__(self, x, *, odd=True):
        return made_odd(self, x, odd)


class LinenOdd(nn.Module):
    def setup(self):
        self.linear = nn.Dense(D)

    def __call__(self, x, *, odd=True):
        return made_odd(self, x, odd)


@pytest.mark.parametrize("setting", [{}, {"snapshots": 2}], ids=str)
@pytest.mark.parametrize("numbers", [[0] * N, range(N)], ids=["equal modules", "modules that differ in a number"])
def test_an_nnx_block_may_call_itself(numbers, setting):
    blocks = [Odd(nnx.Rngs(i), number) for i, number in enumerate(numbers)]
    stack, want = checkpoint_scan(blocks, **setting), x
    for block in blocks:
        want = block(want)
    np.testing.assert_allclose(stack(x), want, rtol=1e-5, atol=1e-6)
    assert type(stack).__name__ == "ScanOdd" and checkpoint_scan(Odd, N)(nnx.Rngs(0))(x).shape == x.shape


@pytest.mark.parametrize("setting", [{}, {"snapshots": 2}], ids=str)
def test_a_linen_block_may_call_itself(setting):
    stack, want = checkpoint_scan(LinenOdd, N, **setting)(), x
    variables = stack.init(jax.random.key(0), x)
    for params in unstack_params(variables["params"]):
        want = LinenOdd().apply({"params": params}, want)
    np.testing.assert_allclose(stack.apply(variables, x), want, rtol=1e-5, atol=1e-6)
