"""A pinned plan where nothing is differentiated: evaluation, a smaller last batch, generation; and plans from files."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import Plan, checkpoint_scan, explain, plan
from jaxckpt._plan import Knobs, StackPlan, under
from jaxckpt.engine.planned import described
from jaxckpt.memory.runs import observe
from tests.support import relative_error

N, D = 4, 8
x = jnp.linspace(-1.0, 1.0, 6 * D).reshape(6, D)
w = jax.random.normal(jax.random.key(0), (N, D, D))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        return x + nn.Dropout(0.1, deterministic=deterministic)(nn.softmax(nn.Dense(D)(x)))


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(nnx.softmax(self.linear(x)))


def block(w, x):
    return x + jax.nn.softmax(x @ w)


def plan_of(call, *args):
    """A plan of the default knobs for the stack that `call(*args)` runs, without the search."""
    seen = []
    observe(lambda args: call(*args), list(args), seen.append)
    (run,) = seen
    about = described(run)
    return StackPlan(block=run.names.block, jax_version=jax.__version__, knobs=Knobs(), **about)


@pytest.fixture(scope="module")
def found():
    stack = checkpoint_scan(block, plan="auto")
    step = lambda w, x: jax.grad(lambda w: jnp.mean(stack(w, x) ** 2))(w)  # noqa: E731
    return plan(step, w, x, budget="1GiB", target="cpu", progress=False)


def test_a_linen_stack_is_evaluated_with_other_flags_and_batches():
    model, key = checkpoint_scan(LinenBlock, N, plan="auto")(), {"dropout": jax.random.key(1)}
    variables = model.init(jax.random.key(0), x)

    def gradient(model, x):
        loss = lambda v: jnp.sum(model.apply(v, x, deterministic=False, rngs=key) ** 2)  # noqa: E731
        return jax.grad(loss)(variables)

    found = plan_of(lambda x: gradient(model, x), x)
    pinned = checkpoint_scan(LinenBlock, N, plan=found)()
    for batch in (x, x[:1]):
        want = model.apply(variables, batch)
        np.testing.assert_allclose(pinned.apply(variables, batch), want, rtol=1e-6)
        with under({"": found}):
            np.testing.assert_allclose(model.apply(variables, batch), want, rtol=1e-6)
    assert jax.tree.leaves(gradient(pinned, x))
    for run in (gradient, jax.jit(gradient, static_argnums=0)):
        with pytest.raises(ValueError, match=r"it is given .* and the plan is for .*here it is differentiated.*plan again"):
            run(pinned, x[:1])


def test_an_nnx_stack_is_evaluated():
    model = checkpoint_scan(NNXBlock, N, plan="auto")(rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def gradient(model):
        return nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)

    found = plan_of(lambda state: nnx.merge(graph, state)(x), state)
    pinned = checkpoint_scan(NNXBlock, N, plan=found)(rngs=nnx.Rngs(0))
    gradient(pinned)
    model.eval()
    pinned.eval()
    np.testing.assert_allclose(pinned(x), model(x), rtol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(pinned, x[:1]), model(x[:1]), rtol=1e-5)
    with pytest.raises(ValueError, match="it computes something else"):
        gradient(pinned)


def test_other_lengths_are_evaluated_whatever_the_knobs(found):
    knobs = dataclasses.replace(found[""].knobs, blocks_per_ckpt=3)
    pinned = checkpoint_scan(block, plan=dataclasses.replace(found[""], knobs=knobs))
    np.testing.assert_allclose(pinned(w[:2], x), checkpoint_scan(block)(w[:2], x), rtol=1e-6)
    with pytest.raises(ValueError, match="its length is 2, and the plan is for 4"):
        jax.grad(lambda w: pinned(w, x).sum())(w[:2])


def test_an_evaluation_that_the_loss_does_not_depend_on(found):
    """A teacher, or a metric, in the function that is differentiated."""
    pinned = checkpoint_scan(block, plan=found)

    def loss(w, x):
        teacher = jax.lax.stop_gradient(pinned(w, x[:3]))
        return jnp.mean(pinned(w, x) ** 2) + teacher.sum(), pinned(jax.lax.stop_gradient(w), x[:5]).sum()

    want = jax.grad(lambda w: jnp.mean(checkpoint_scan(block)(w, x) ** 2))(w)
    for grad in (jax.grad(loss, has_aux=True), jax.jit(jax.grad(loss, has_aux=True))):
        np.testing.assert_allclose(grad(w, x)[0], want, rtol=1e-4, atol=1e-6)
    evaluate = lambda x: pinned(w, x)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(evaluate)(x[None, :3])[0], evaluate(x[:3]), rtol=1e-6)
    for call in (
        lambda: jax.jvp(evaluate, (x[:3],), (x[:3],)),
        lambda: jax.vmap(jax.grad(lambda x: evaluate(x).sum()))(x[None, :3]),
        lambda: jax.hessian(lambda x: evaluate(x).sum())(x[:3]),
        lambda: explain(pinned, w, x[:3]),
    ):
        with pytest.raises(ValueError, match="the plan is for something else"):
            call()


def in_scan(run, w):
    return jax.lax.scan(lambda c, _: (c * jnp.sum(w**2), run(w)), 1.0, None, length=2)


def in_carry_of_scan(run, w):
    return jax.lax.scan(lambda c, _: ((c[0] * jnp.sum(w**2), c[1] + run(w)), None), (1.0, 0.0), None, length=2)[0]


def in_checkpoint(run, w):
    return jax.checkpoint(lambda w: (jnp.sum(w**2), run(w)))(w)


def in_cond(run, w):
    return jax.lax.cond(w[0, 0, 0] < 9.0, lambda w: (jnp.sum(w**2), run(w)), lambda w: (w.sum(), 0.0), w)


def in_a_stack(run, w):
    stack = checkpoint_scan(lambda w, c: (c * jnp.sum(w**2), run(jnp.stack([w] * N))), has_aux=True, engine="reversal")
    return stack(w, 1.0)


@pytest.mark.parametrize("where", [in_scan, in_carry_of_scan, in_checkpoint, in_cond, in_a_stack])
def test_a_metric_that_nobody_differentiates_needs_no_stop_gradient(found, where):
    """Its cotangent is no zero array in any of these: JAX, and the reversal engine, know that there is none."""
    pinned = checkpoint_scan(block, plan=found)
    got = jax.grad(lambda w: where(lambda w: pinned(w, x[:3]).sum(), w), has_aux=True)(w)
    want = jax.grad(lambda w: where(lambda w: checkpoint_scan(block)(w, x[:3]).sum(), w), has_aux=True)(w)
    assert relative_error(got, want) < 1e-6


def test_a_plan_is_loaded_for_around(found, tmp_path):
    found.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == found
    stack = checkpoint_scan(block, plan="auto")
    assert again.around(stack)(w, x).shape == x.shape
    with pytest.raises(ValueError, match=r"was made with JAX 0\.1"):
        dataclasses.replace(found, jax_version="0.1").around(stack)
