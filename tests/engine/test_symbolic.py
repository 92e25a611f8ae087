"""Sizes that are symbols, as `jax.export` has them."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxckpt import checkpoint, checkpoint_blocks, checkpoint_scan, explain, plan
from tests.support import plain_loop, random_like, relative_error


def block(w, x):
    return x + jax.nn.softmax(x @ w)


W, X = random_like((jnp.zeros((4, 3, 3)), jnp.zeros((2, 3))))


def symbolic():
    return jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), 3), "float32")


def gradient(stack):
    return jax.jit(jax.grad(lambda w, x: (stack(w, x) ** 2).sum()))


@pytest.mark.parametrize("knobs", [{}, {"policy": "dots", "blocks_per_ckpt": 3}, {"engine": "reversal"}])
def test_exported_for_every_size(knobs):
    exported = export.export(gradient(checkpoint_scan(block, **knobs)))(W, symbolic())
    want = gradient(lambda w, x: plain_loop(block, w, x))(W, X)
    assert relative_error(exported.call(W, X), want) < 1e-5


REFUSAL = r"float32\[batch,[13]\] has a size that is a symbol.*'dots'"


@pytest.mark.parametrize(
    "knobs",
    [{"policy": "cheap"}, {"policy": "budget:0.5"}, {"policy": "budget:1MiB"}, {"stages": "auto"}, {"tiles": "auto"}],
    ids=str,
)
@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_what_counts_bytes_refuses_by_name(knobs, engine):
    with pytest.raises(TypeError, match=REFUSAL):
        export.export(gradient(checkpoint_scan(block, engine=engine, **knobs)))(W, symbolic())


def test_checkpoint_blocks():
    def run(policy):
        return gradient(
            lambda w, x: checkpoint_blocks([lambda x, i=i: block(w[i], x) for i in range(4)], x, 2, policy=policy)[0]
        )

    want = gradient(lambda w, x: plain_loop(block, w, x))(W, X)
    assert relative_error(export.export(run("dots"))(W, symbolic()).call(W, X), want) < 1e-5
    with pytest.raises(TypeError, match=REFUSAL):
        export.export(run("cheap"))(W, symbolic())


def test_checkpoint():
    step = lambda **knobs: jax.jit(jax.grad(lambda w, x: (checkpoint(block, **knobs)(w, x) ** 2).sum()))  # noqa: E731
    want = jax.grad(lambda w, x: (block(w, x) ** 2).sum())(W[0], X)
    for knobs in ({}, {"policy": "dots"}):
        assert relative_error(export.export(step(**knobs))(W[0], symbolic()).call(W[0], X), want) < 1e-5
    with pytest.raises(TypeError, match=REFUSAL):
        export.export(step(tiles="auto"))(W[0], symbolic())


def test_explain_and_plan():
    with pytest.raises(TypeError, match=r"a size that is a symbol"):
        explain(checkpoint_scan(block), W, symbolic())
    with pytest.raises(TypeError, match=r"a size that is a symbol"):
        plan(gradient(checkpoint_scan(block, plan="auto")), W, symbolic(), budget="1GiB", target="cpu", progress=False)
