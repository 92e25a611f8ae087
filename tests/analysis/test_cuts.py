import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxckpt.analysis import inlining, numbering, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import REFERENCE, cost
from jaxckpt.analysis.cuts import Block, find_cuts
from jaxckpt.analysis.stages import cuts_at_tags, pieces_between, run_before_pieces
from jaxckpt.engine.cutting import pieces_of
from jaxckpt.engine.pieces import in_pieces
from jaxckpt.models import TransformerBlock
from jaxckpt.policies.grammar import nothing
from tests.support import random_like, relative_error

WIDE = 64


def hills(w, x):
    """Three times up to many channels and down again: the places to cut are where it is narrow."""
    for i in range(3):
        x = checkpoint_name(jnp.sin(jnp.sin(x @ w["up"][i])) @ w["down"][i], f"low{i}")
    return x


W = random_like({"up": 3 * [jnp.zeros((4, WIDE))], "down": 3 * [jnp.zeros((WIDE, 4))]})
X = random_like(jnp.zeros((8, 4)))


def traced(fn, *args):
    return inlining.inlined(
        jx.trace(lambda *leaves: jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves))), *leaves_of(args)), True
    )


def leaves_of(args):
    global tree
    leaves, tree = jax.tree.flatten(args)
    return leaves


def cuts_of(flat, carried, most=None):
    return find_cuts(Block(flat, carried, numbering.residual_bytes(flat)), most)


def test_cuts_where_little_is_alive():
    flat = traced(hills, W, X)
    cuts = cuts_of(flat, carried=[6])
    after = [tagging.tag_of(flat.jaxpr.eqns[cut - 1]) or flat.jaxpr.eqns[cut - 1].primitive.name for cut in cuts]
    assert len(cuts) == 2 and set(after) <= {"low0", "low1", "dot_general"}
    crossing = [flat.jaxpr.eqns[cut - 1].outvars[0].aval.shape for cut in cuts]
    assert crossing == [(8, 4), (8, 4)]


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_at_most_so_many_pieces(most):
    assert len(cuts_of(traced(hills, W, X), carried=[6], most=most)) == min(most, 3) - 1


def test_nothing_to_cut():
    assert cuts_of(traced(lambda w, x: x @ w, jnp.ones((4, 4)), X), carried=[1]) == []


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_a_transformer_is_sliced_behind_its_keys_and_values(tokens):
    x = jax.ShapeDtypeStruct((8, tokens, 1024), jnp.bfloat16)
    module = TransformerBlock(1024, num_heads=16, d_ff=4096, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    leaves, tree = jax.tree.flatten(params)
    closed = jx.trace(lambda x, *leaves: module.apply(jax.tree.unflatten(tree, leaves), x), x, *leaves)
    flat, pieces = pieces_of(closed, [0], "auto", "auto")
    block = Block(flat, [0], numbering.residual_bytes(flat))
    again = sum(cost(flat.jaxpr.eqns[i], REFERENCE).seconds for i in run_before_pieces(flat.jaxpr, pieces))
    assert again < 0.1 * block.seconds and pieces[-1].bytes < 0.1 * block.whole


def test_tags():
    flat = traced(hills, W, X)
    cuts = cuts_at_tags(flat, ["low0", "low1", "low2"])
    assert [tagging.tag_of(flat.jaxpr.eqns[cut - 1]) for cut in cuts] == ["low0", "low1"]  # behind the last there is nothing
    with pytest.raises(ValueError, match="nothing in the block is tagged 'high'; its tags are: low0, low1, low2"):
        cuts_at_tags(flat, ["low0", "high"])


@jax.jit
def inner(w, x):
    return jax.checkpoint(lambda x: hills(w, jnp.tanh(x)))(x) + jnp.where(x > 0, x, 2 * x)


def twice(w, x):
    return inner(w, inner(w, x))


@pytest.mark.parametrize("fn", [hills, twice])
@pytest.mark.parametrize("cuts", [[], [1], [3, 5], "each"])
def test_pieces_compute_what_the_whole_does(fn, cuts):
    flat = traced(fn, W, X)
    cuts = range(1, len(flat.jaxpr.eqns)) if cuts == "each" else cuts
    run = in_pieces(flat, pieces_between(flat, cuts, numbering.residual_bytes(flat)), nothing)
    leaves = leaves_of((W, X))
    got = jax.value_and_grad(lambda leaves: (run(*leaves)[0] ** 2).sum())(leaves)
    want = jax.value_and_grad(lambda args: (fn(*args) ** 2).sum())((W, X))
    assert relative_error(got, (want[0], jax.tree.leaves(want[1]))) < 1e-5


def test_gradients_wait_for_the_last_that_autodiff_wants():
    """Of two halves that meet in a product, both must be there before the product is differentiated."""

    def fn(x):
        a, b = jnp.sin(jnp.cos(x)), jnp.tanh(x)
        return jnp.exp(2.0 * a) * b + 1.0

    flat = traced(fn, X)
    (piece,) = pieces_between(flat, [], numbering.residual_bytes(flat))
    names = [eqn.primitive.name for eqn in flat.jaxpr.eqns]
    assert [names[i] for i in piece.last] == ["tanh", "exp"], names
    run = in_pieces(flat, [piece], nothing)
    text = jax.jit(jax.grad(lambda x: run(x)[0].sum())).lower(X).as_text()
    assert text.count("stablehlo.bitcast_convert") == 2 and "stablehlo.select" in text


def test_inlining_keeps_own_derivatives_and_loops_whole():
    def fn(x):
        return jax.lax.scan(lambda c, _: (jax.nn.relu(c), None), inner(W, x), None, length=2)[0]

    names = [eqn.primitive.name for eqn in traced(fn, X).jaxpr.eqns]
    assert "scan" in names and not {"jit", "pjit", "remat2", "checkpoint"} & set(names)
    kept = inlining.inlined(jx.trace(fn, X))
    assert sum(map(jx.is_checkpoint, kept.jaxpr.eqns)) == 1


def test_residual_bytes():
    flat = inlining.inlined(jx.trace(lambda x: jnp.sin(x) * 2.0, X))
    by_name = dict(zip([eqn.primitive.name for eqn in flat.jaxpr.eqns], numbering.residual_bytes(flat), strict=True))
    assert by_name["sin"] == X.nbytes  # its cosine
