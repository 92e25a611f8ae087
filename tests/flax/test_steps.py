"""Steps that change NNX objects are measured as `nnx.jit` runs them, however they come by the objects."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jaxckpt import measure
from jaxckpt.flax.steps import holds_objects, map_leaves

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
