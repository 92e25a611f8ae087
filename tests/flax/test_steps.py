"""Steps that change NNX objects are measured as `nnx.jit` runs them, however they come by the objects."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, explain, measure, plan
from jaxckpt.flax.steps import holds_objects, map_leaves
from tests.support import relative_error

X = jnp.ones((64, 16))


def update(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
    optimizer.update(model, gradients)
    return loss


def objects():
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


class Trainer(nnx.Module):
    def __init__(self):
        self.model, self.optimizer = objects()

    def update(self, x):
        return update(self.model, self.optimizer, x)


def in_a_dict(held, x):
    return update(held["model"], held["optimizer"], x)


def by_name(x, *, model, optimizer):
    return update(model, optimizer, x)


def bound(*, jitted):
    return functools.partial(nnx.jit(update) if jitted else update, *objects())


@pytest.mark.parametrize(
    "call",
    [
        lambda: (update, *objects(), X),
        lambda: (in_a_dict, dict(zip(("model", "optimizer"), objects(), strict=True)), X),
        lambda: (bound(jitted=False), X),
        lambda: (bound(jitted=True), X),
        lambda: (functools.partial(by_name, **dict(zip(("model", "optimizer"), objects(), strict=True))), X),
        lambda: (Trainer().update, X),
    ],
    ids=["arguments", "dict", "partial", "partial of nnx.jit", "partial by name", "method"],
)
@pytest.mark.parametrize("target", [None, "cpu"])
def test_what_a_step_changes_is_a_result(call, target):
    found, want = measure(*call(), target=target), measure(nnx.jit(update), *objects(), X, target=target)
    assert (found.argument_bytes, found.output_bytes) == (want.argument_bytes, want.output_bytes)
    assert found.peak_bytes == pytest.approx(want.peak_bytes, rel=0.01)
    assert want.output_bytes > 3 * 16 * 16 * 4  # parameters and both moments


def test_donated_as_it_was_jitted():
    found = measure(functools.partial(nnx.jit(update, donate_argnums=(0, 1)), *objects()), X)
    assert found.aliased_bytes > 3 * 16 * 16 * 4


class Plain:
    """No NNX module, though it holds some."""

    def __init__(self):
        self.model, self.optimizer = objects()

    def update(self, x):
        return update(self.model, self.optimizer, x)


@pytest.mark.parametrize(
    "step_with",
    [
        lambda held: lambda x: update(*held, x),
        lambda held: nnx.jit(lambda x: update(*held, x)),
        lambda held: lambda x: nnx.jit(update)(*held, x),
        lambda held: Plain().update,
    ],
    ids=["closed over", "nnx.jit around it", "nnx.jit inside", "method of another object"],
)
def test_what_is_closed_over_cannot_be_changed(step_with):
    with pytest.raises(
        ValueError, match=r"changes NNX objects that it closes over.*measure\(step, model, optimizer, \.\.\.\)"
    ):
        measure(step_with(objects()), X)


def test_the_objects_stay_as_they_are():
    model, optimizer = objects()
    before = jnp.array(model.kernel[...])
    measure(update, model, optimizer, X, time=True)
    assert bool(jnp.all(model.kernel[...] == before)) and not isinstance(model.kernel[...], jax.core.Tracer)


def test_a_state_and_what_is_shared():
    """A state that `nnx.split` made is no object, and what two layers share is one argument."""
    model = nnx.Dict(first=nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    model.second = model.first
    graph, state = nnx.split(model)
    assert holds_objects([model]) and not holds_objects([state, graph, X, None])
    run = nnx.jit(lambda model, x: model.second(model.first(x)))
    sizes = [measure(run, model, X, target=target).argument_bytes for target in (None, "cpu")]
    assert sizes[0] == sizes[1] == X.nbytes + model.first.kernel.nbytes + model.first.bias.nbytes
    copied = map_leaves(jnp.copy, model)
    assert copied.first is copied.second and copied.first is not model.first


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dropout(0.1, deterministic=False)(jnp.tanh(nn.Dense(16)(x)))
        return x + nn.BatchNorm(use_running_average=False)(h)


class BlockWithoutState(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dropout(0.1, deterministic=False)(jnp.tanh(nn.Dense(16)(x)))


@pytest.fixture(scope="module")
def variables():
    return checkpoint_scan(LinenBlock, 6)().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)


def by_apply(stack, variables, x, key):
    """Gradients of all variables, and the statistics."""

    def loss(variables):
        y, changed = stack.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])
        return (y**2).sum(), changed["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables)


def by_bind(stack, variables, x, key):
    def loss(variables):
        bound = stack.bind(variables, rngs={"dropout": key}, mutable=["batch_stats"])
        return (bound(x) ** 2).sum(), bound.variables["batch_stats"]

    return jax.grad(loss, has_aux=True)(variables)


def test_a_step_that_binds_a_linen_module_is_that_which_applies_it(variables):
    stack, key = checkpoint_scan(LinenBlock, 6, policy="everything")(), jax.random.key(2)
    found, want = (measure(functools.partial(step, stack), variables, X, key) for step in (by_bind, by_apply))
    assert (found.argument_bytes, found.output_bytes) == (want.argument_bytes, want.output_bytes)
    assert found.temp_bytes == want.temp_bytes > 6 * X.nbytes
    planned = checkpoint_scan(LinenBlock, 6, plan="auto")()
    plans = [
        plan(functools.partial(step, planned), variables, X, key, budget="1GiB", target="cpu", progress=False)
        for step in (by_bind, by_apply)
    ]
    assert plans[0].stacks == plans[1].stacks and plans[0].peak_bytes == plans[1].peak_bytes
    got, want = plans[0].around(by_bind)(planned, variables, X, key), by_apply(stack, variables, X, key)
    assert relative_error(got, want) < 1e-5


def test_a_step_that_closes_over_a_bound_linen_module(variables):
    """Its variables are constants of the program, as other arrays are that a function closes over, and all else is there."""

    def step(run, x):
        return jax.grad(lambda x: (run(x) ** 2).sum())(x)

    params, rngs = {"params": variables["params"]}, {"dropout": jax.random.key(2)}
    stack = checkpoint_scan(BlockWithoutState, 6, policy="everything")()
    bound = stack.bind(params, rngs=rngs)
    found = measure(lambda x: step(bound, x), X)
    want = measure(lambda params, x: step(functools.partial(stack.apply, params, rngs=rngs), x), params, X)
    assert found.temp_bytes == pytest.approx(want.temp_bytes, rel=0.1) and found.temp_bytes > 6 * X.nbytes
    assert found.argument_bytes == X.nbytes
    assert explain(lambda x: bound(x), X).wanted_bytes == explain(stack, params, X, rngs=rngs).wanted_bytes
    planned = checkpoint_scan(BlockWithoutState, 6, plan="auto")().bind(params, rngs=rngs)
    assert plan(lambda x: step(planned, x), X, budget="1GiB", target="cpu", progress=False).most_bytes > 6 * X.nbytes


def test_a_bound_linen_module_is_measured_as_a_function(variables):
    bound = checkpoint_scan(BlockWithoutState, 6)().bind(
        {"params": variables["params"]}, rngs={"dropout": jax.random.key(2)}
    )
    for fn in (bound, bound.__call__):
        assert measure(fn, X).output_bytes == X.nbytes
