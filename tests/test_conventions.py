"""Corners of the calling conventions that users reach: names of arguments, decorators, bound modules, equal stacks."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import checkify

from jaxckpt import checkpoint_blocks, checkpoint_scan

W = 0.1 * jax.random.normal(jax.random.key(0), (6, 4, 4))
X = jnp.ones((2, 4))


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(self.width)(x))


@pytest.mark.parametrize("order", [(1, True), (True, 1), (True, False)])
def test_unroll_true_is_not_unroll_one(order):
    class Fresh(Block):  # a class that no other stack was made of
        pass

    for unroll in order:
        stack = checkpoint_scan(Fresh, 6, unroll=unroll)()
        variables = jax.eval_shape(stack.init, jax.random.key(0), X)
        (scan,) = (e for e in jax.make_jaxpr(stack.apply)(variables, X).eqns if e.primitive.name == "scan")
        assert scan.params["unroll"] == (6 if unroll is True else 1)


class BoundBlocks(nn.Module):
    make: typing.Any
    blocks_per_ckpt: int | None = 2
    policy: str = "everything"

    @nn.compact
    def __call__(self, x):
        blocks = [self.make(name=f"block_{i}") for i in range(4)]
        return checkpoint_blocks(blocks, x, self.blocks_per_ckpt, policy=self.policy)[0]


@pytest.mark.parametrize("policy", ["everything", "dots"])
@pytest.mark.parametrize("make", [functools.partial(nn.Dense, 4), lambda name: functools.partial(Block(name=name))])
def test_bound_linen_modules_can_be_initialized(make, policy):
    model, plain = BoundBlocks(make, 2, policy), BoundBlocks(make, None)
    variables = model.init(jax.random.key(0), X)
    jax.tree.map(lambda a, b: (a == b).all() or pytest.fail(), variables, plain.init(jax.random.key(0), X))
    gradients = [jax.grad(lambda v, m=m: (m.apply(v, X) ** 2).sum())(variables) for m in (model, plain)]
    assert all(jnp.allclose(a, b, atol=1e-6) for a, b in zip(*map(jax.tree.leaves, gradients), strict=True))


def test_what_a_bound_linen_module_writes_is_refused_and_not_leaked():
    model = BoundBlocks(functools.partial(nn.BatchNorm, use_running_average=False))
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"writes \['batch_stats'\].*checkpoint_scan"):
        model.apply(variables, X, mutable=["batch_stats"])
    model.copy(blocks_per_ckpt=None).apply(variables, X, mutable=["batch_stats"])


def test_mutable_collections_that_no_block_writes_are_fine():
    model = BoundBlocks(functools.partial(nn.Dense, 4))
    model.apply(model.init(jax.random.key(0), X), X, mutable=["intermediates"])


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 4}])
def test_a_shared_argument_may_have_any_name(knobs):
    def block(p, x, /, *, params, self, carry):
        return jnp.tanh(x @ p) * params * self * carry

    names = dict.fromkeys(("params", "self", "carry"), 0.5)
    want = X
    for w in W:
        want = block(w, want, **names)
    assert jnp.allclose(checkpoint_scan(block, **knobs)(W, X, **names), want)


def test_a_decorator_that_adds_an_argument():
    def configured(block):
        @functools.wraps(block)
        def with_config(params, x, **shared):
            return block("config", params, x, **shared)

        return with_config

    @configured
    def block(config, params, x, *, scale=1.0):
        return jnp.tanh(x @ params) * scale

    assert checkpoint_scan(block)(W, X, scale=2.0).shape == X.shape


def test_what_is_missing_is_not_reported_as_unknown():
    def block(params, x, *, needed, **others):
        return x

    with pytest.raises(TypeError, match=r"missing a required.*'needed'"):
        checkpoint_scan(block)(W, X, other=1.0)


def test_keyword_arguments_after_positional_only_ones_are_listed():
    def block(params, x, /, *, mask=None, scale=1.0):
        return x

    with pytest.raises(TypeError, match=r"no keyword argument 'maks'.*takes: mask, scale"):
        checkpoint_scan(block)(W, X, maks=None)


@pytest.mark.parametrize("base", [nn.Module, nnx.Module])
def test_a_module_without_call(base):
    class Nameless(base):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="Nameless has no method __call__"):
        checkpoint_scan(Nameless, 3)


def test_a_list_of_numbers_per_block():
    with pytest.raises(ValueError, match=r"'rate'.*jnp\.asarray"):
        checkpoint_scan(lambda p, x, *, rate: x * rate, per_block="rate")(W, X, rate=[0.1] * 6)


@pytest.mark.parametrize("blocks_per_ckpt", [None, 4])
def test_checkify_check_in_a_block(blocks_per_ckpt):
    def block(params, x):
        checkify.check(jnp.all(x > 0.5), "too small")
        return jnp.tanh(x @ params)

    error, _ = checkify.checkify(checkpoint_scan(block, blocks_per_ckpt=blocks_per_ckpt))(W, X)
    assert "too small" in error.get()


def test_a_partial_of_a_generic_class():
    class Generic(Block, typing.Generic[typing.TypeVar("T")]):
        pass

    stack = checkpoint_scan(functools.partial(Generic[int], width=4), 6)()
    assert stack.init(jax.random.key(0), X)["params"]["Dense_0"]["kernel"].shape == (6, 4, 4)


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


def test_equal_lists_make_equal_stacks():
    stacks = [checkpoint_scan([NNXBlock(rngs=nnx.Rngs(i)) for i in range(start, start + 3)]) for start in (0, 3)]
    assert nnx.graphdef(stacks[0]) == nnx.graphdef(stacks[1])
    traces = []
    run = nnx.jit(lambda stack, x: traces.append(stack) or stack(x))
    for stack in stacks:
        run(stack, X)
    assert len(traces) == 1
    assert type(stacks[0])(rngs=nnx.Rngs(0)).linear.kernel.shape == (3, 4, 4)
