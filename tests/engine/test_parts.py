"""The first blocks of a stack under another setting than the others: the same gradients, and what each part keeps."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxckpt import checkpoint_scan, explain
from jaxckpt._plan import Knobs, under
from jaxckpt.models import NNXTransformerBlock, TransformerBlock
from tests.support import assert_no_zero_leaf, relative_error

N, WIDTH = 7, 8
CONSTANT = np.random.default_rng(0).normal(size=(WIDTH, WIDTH))
KNOBS = {
    "nothing": Knobs(engine="reversal"),
    "everything": Knobs(policy="everything", engine="reversal"),
    "dots": Knobs(policy="dots", engine="reversal"),
    "stages": Knobs(stages="auto", engine="reversal"),
    "chunks": Knobs(blocks_per_ckpt=2, policy="everything", engine="reversal"),
    "snapshots": Knobs(snapshots=1, engine="reversal"),
    "host": Knobs(offload_carry=True, engine="reversal"),
}
pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.filterwarnings("ignore")]


def block(w, x, *, shift):
    """A constant, a shared array that is differentiated, and `aux`."""
    h = jnp.tanh(x @ w["a"]) + shift[None]
    weights = jax.nn.softmax(h @ jnp.asarray(CONSTANT))
    return x + weights @ w["b"], (weights * h).sum(-1)


def arguments():
    rng = np.random.default_rng(1)
    w = {name: jnp.asarray(rng.normal(size=(N, WIDTH, WIDTH))) for name in "ab"}
    return w, jnp.asarray(rng.normal(size=(4, WIDTH))), jnp.asarray(rng.normal(size=WIDTH))


def loss(run, w, x, shift):
    y, aux = run(w, x, shift=shift)
    return (y * jnp.cos(jnp.arange(WIDTH))[None]).sum() + (aux * jnp.arange(N * 4.0).reshape(N, 4)).sum()


def by_loop(w, x, *, shift):
    found = []
    for i in range(N):
        x, aux = block(jax.tree.map(lambda leaf: leaf[i], w), x, shift=shift)  # noqa: B023
        found.append(aux)
    return x, jnp.stack(found)


def of_two(first, count, others):
    return {"": dataclasses.replace(KNOBS[others], first=(count, KNOBS[first]))}


def gradients(run):
    return jax.jit(jax.value_and_grad(lambda *given: loss(run, *given), argnums=(0, 1, 2)))(*arguments())


@pytest.mark.parametrize("first, others", list(itertools.product(KNOBS, KNOBS)))
def test_gradients_are_those_of_the_loop(first, others):
    want = gradients(by_loop)
    assert_no_zero_leaf(want)
    count = 1 + (len(first) + 2 * len(others)) % (N - 1)
    with under(of_two(first, count, others)):
        got = gradients(checkpoint_scan(block, has_aux=True, plan="auto"))
    assert relative_error(got, want) < 1e-12


def stored(*parts):
    """Residuals with a leading axis, parameters and what is returned aside, as (blocks, shape)."""
    stack = checkpoint_scan(block, has_aux=True, plan="auto")
    w, x, shift = arguments()
    with under(of_two(*parts)):
        pull = jax.eval_shape(lambda *given: jax.vjp(lambda w, x, s: stack(w, x, shift=s), *given)[1], w, x, shift)
    return sorted(leaf.shape for leaf in jax.tree.leaves(pull) if leaf.ndim == 3 and leaf.shape[1:] == (4, WIDTH))


def test_each_part_keeps_its_own():
    assert stored("nothing", 5, "nothing") == [(2, 4, WIDTH), (5, 4, WIDTH)]
    few, many = stored("nothing", 5, "everything"), stored("everything", 5, "nothing")
    assert [shape[0] for shape in few].count(5) == 1 < [shape[0] for shape in few].count(2)
    assert [shape[0] for shape in many].count(2) == 1 < [shape[0] for shape in many].count(5)


def test_blocks_are_run_as_often_as_their_part_says():
    runs = []

    @jax.custom_jvp
    def counted(x):
        return jax.pure_callback(lambda x: (runs.append(1), x)[1], jax.ShapeDtypeStruct((), x.dtype), x)

    counted.defjvp(lambda primals, tangents: (counted(*primals), *tangents))
    stack = checkpoint_scan(lambda w, x: jnp.sin(w * counted(x)), plan="auto")
    with under(of_two("nothing", 5, "everything")):
        jax.block_until_ready(jax.jit(jax.grad(lambda w: stack(w, 0.3)))(jnp.ones(N)))
    assert len(runs) == 2 * 5 + 2


def test_flax_front_ends():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)))
    linen = checkpoint_scan(TransformerBlock, N, plan="auto")(8, 2, 12, param_dtype=float)
    variables = linen.init(jax.random.key(0), x)
    make = checkpoint_scan(NNXTransformerBlock, N, plan="auto")
    graph, state = nnx.split(make(8, 2, 12, param_dtype=float, rngs=nnx.Rngs(0)))

    def of_linen(variables):
        return (linen.apply(variables, x) ** 2).sum()

    def of_nnx(params):
        return (nnx.merge(graph, params, rest)(x) ** 2).sum()

    _, params, rest = nnx.split(nnx.merge(graph, state), nnx.Param, ...)
    assert isinstance(linen, nn.Module)
    for of, at in ((of_linen, variables), (of_nnx, params)):
        want = jax.grad(of)(at)
        with under(of_two("dots", 3, "everything")):
            assert relative_error(jax.grad(of)(at), want) < 1e-12


def test_what_is_explained():
    stack = checkpoint_scan(block, has_aux=True, plan="auto")
    w, x, shift = arguments()
    with under(of_two("nothing", 5, "everything")):
        found = explain(stack, w, x, shift=shift, target="h200")
    first, others = found.parts
    assert (first.length, others.length, found.length) == (5, 2, N)
    assert found.stored_bytes == first.stored_bytes + others.stored_bytes
    assert found.wanted_bytes == explain(checkpoint_scan(block, has_aux=True), w, x, shift=shift).wanted_bytes
    assert first.forward_runs > found.forward_runs > others.forward_runs == 1
    assert f"{N} x block, the first 5 under another setting than the others" in str(found)
    assert "5 x block, policy='nothing'" in str(found) and "2 x block, policy='everything'" in str(found)
    assert found.to_json()["parts"][0]["length"] == 5 and "the first 5" in found.to_html()


def test_what_is_evaluated_or_under_vmap():
    stack = checkpoint_scan(block, has_aux=True, plan="auto")
    w, x, shift = arguments()
    want = by_loop(w, x, shift=shift)
    xs = jnp.stack([x, 2 * x])
    with under(of_two("nothing", 5, "everything")):
        assert relative_error(stack(w, x, shift=shift), want) < 1e-12
        both = jax.vmap(jax.grad(lambda x: loss(stack, w, x, shift)))(xs)
    alone = jnp.stack([jax.grad(lambda x: loss(by_loop, w, x, shift))(x) for x in xs])
    assert relative_error(both, alone) < 1e-12
