"""Blocks written for groups of examples: when, for how many, and which axis is the groups'. Values: `test_on_meshes.py`."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.analysis import inlining
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.groups import axes_of_groups, in_groups, why_slices_send
from jaxckpt.engine.cutting import pieces_of
from jaxckpt.models import PairformerBlock, TransformerBlock
from tests.support import slice_small_values

AUTO, EXPLICIT = ((kind, kind) for kind in (AxisType.Auto, AxisType.Explicit))
MESH = AbstractMesh((4, 2), ("data", "tensor"), axis_types=AUTO)
W = jax.ShapeDtypeStruct((6, 6), "float32")


def on(shape, mesh=MESH, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))


def constrained(*spec):
    return lambda w, x: lax.with_sharding_constraint(x @ w, NamedSharding(MESH, P(*spec)))


def plain(w, x):
    return x + jnp.sin(x @ w)


def said(fn, *spec):
    """A block that also says how its carry is split."""

    def block(w, x):
        return fn(w, lax.with_sharding_constraint(x, NamedSharding(MESH, P(*spec))))

    return block


TWICE = lambda w, x: constrained("tensor")(w, constrained("data")(w, x))  # noqa: E731
KERNEL = jax.ShapeDtypeStruct((3, 6, 6), "float32")
GROUPS = {
    "those that are said": (constrained("data"), [W, on((16, 6))], 4),
    "two axes that are said": (constrained(("tensor", "data")), [W, on((16, 6))], 8),
    "as many as divide the batch": (constrained(("tensor", "data")), [W, on((12, 6))], 4),
    "a batch that nothing divides": (constrained("data"), [W, on((3, 6))], 1),
    "said, and no mesh beside": (constrained("data"), [W, jax.ShapeDtypeStruct((16, 6), "float32")], 4),
    "said of another mesh": (constrained("data"), [W, on((16, 6), AbstractMesh((8,), ("dp",), axis_types=AUTO[:1]))], 4),
    "said in two ways": (TWICE, [W, on((16, 6))], 1),
    "nothing is said": (plain, [W, on((16, 6))], 1),
    "a batch that is whole": (constrained(None, "tensor"), [W, on((16, 6))], 1),
    "a batch that is left open": (constrained(P.UNCONSTRAINED, "tensor"), [W, on((16, 6))], 1),
    "an explicit mesh": (plain, [W, on((16, 6), AbstractMesh((4, 2), ("data", "tensor"), axis_types=EXPLICIT))], 1),
    "a norm over the batch": (said(lambda w, x: x @ w - x.mean(0, keepdims=True), "data"), [W, on((16, 6))], 1),
    "all examples for each": (said(lambda w, x: jnp.tanh(x @ x.T) @ x @ w, "data"), [W, on((16, 6))], 1),
    "a loss beside the carry": (said(lambda w, x: (x @ w, jnp.sum(x)), "data"), [W, on((16, 6))], 1),
    "a value for each example beside the carry": (said(lambda w, x: (x @ w, jnp.sum(x, 1)), "data"), [W, on((16, 6))], 4),
    "a kernel with a backward rule": (said(lambda w, x: jax.nn.relu(rounded(x)) @ w, "data"), [W, on((16, 6))], 1),
    "a convolution": (
        said(lambda w, x: lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")), "data"),
        [KERNEL, on((16, 8, 6))],
        1,
    ),
    "a branch": (said(lambda w, x: lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, x), "data"), [W, on((16, 6))], 1),
    "a scalar": (said(lambda w, x: x * w[0, 0]), [W, on(())], 1),
}


@jax.custom_vjp
def rounded(x):
    return jnp.round(x)


rounded.defvjp(lambda x: (rounded(x), None), lambda _, ct: (ct,))


@pytest.mark.parametrize("case", GROUPS)
def test_how_many(case):
    fn, args, expected = GROUPS[case]
    closed = jx.trace(fn, *args)
    found, count = in_groups(closed, [1])
    assert count == expected and (found is closed) == (count == 1)
    assert [(aval.shape, aval.dtype) for aval in found.out_avals] == [(aval.shape, aval.dtype) for aval in closed.out_avals]


def test_leaves_of_two_sizes_have_no_batch():
    closed = jx.trace(lambda w, x, y: (constrained("data")(w, x), y @ w), W, on((16, 6)), on((8, 6)))
    assert in_groups(closed, [1, 2]) == (closed, 1)


def test_what_is_shared_is_copied_for_each_group_where_it_has_a_gradient():
    def block(w, x, positions):
        x = lax.with_sharding_constraint(x, NamedSharding(MESH, P(("data", "tensor"))))
        return x @ w.astype(jnp.bfloat16) + jnp.take(x, positions, axis=1)

    closed = jx.trace(block, W, on((16, 6), dtype="bfloat16"), jax.ShapeDtypeStruct((6,), "int32"))
    found, _ = in_groups(closed, [1])
    made = [eqn.outvars[0].aval for eqn in jx.equations(found.jaxpr) if eqn.primitive.name == "broadcast_in_dim"]
    assert [(aval.shape, str(aval.dtype)) for aval in made if aval.shape[1:] == (6, 6)] == [((8, 6, 6), "bfloat16")]
    assert not any(aval.dtype == jnp.int32 and aval.shape[:1] == (8,) and aval.shape[-1] == 6 for aval in made)


@functools.cache
def of_model(kind, batch=16):
    """A block of a model on a mesh, written for groups, and its jaxpr's inputs that are the carry."""
    if kind == "transformer":
        block, carry = TransformerBlock(32, num_heads=8, d_ff=64), [on((batch, 8, 32))]
    else:
        block = PairformerBlock(16, 8, c_hidden_mul=8, num_heads_pair=2, head_dim_pair=4, num_heads_single=2)
        carry = [on((batch, 6, 16)), on((batch, 6, 6, 8))]
    params = jax.eval_shape(block.init, jax.random.key(0), *(jnp.zeros(x.shape) for x in carry))
    leaves, tree = jax.tree.flatten(params)

    def fn(*inputs):
        out = block.apply(jax.tree.unflatten(tree, inputs[: len(leaves)]), *inputs[len(leaves) :])
        return jax.tree.leaves(lax.with_sharding_constraint(out, NamedSharding(MESH, P(("data", "tensor")))))

    carried = range(len(leaves), len(leaves) + len(carry))
    return in_groups(jx.trace(fn, *leaves, *carry), carried)[0], carried


@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.parametrize("kind", ["transformer", "pairformer"])
def test_all_that_depends_on_the_carry_has_an_axis_of_groups(kind, batch):
    closed, carried = of_model(kind, batch)
    jaxpr = inlining.merged(inlining.inlined(closed, checkpoints=True)).jaxpr
    axes = axes_of_groups(jaxpr, 8)
    assert all(var.aval.shape[axis] == (batch if var in jaxpr.outvars else 8) for var, axis in axes.items())
    of_carry = {jaxpr.invars[i] for i in carried}
    for eqn in jaxpr.eqns:
        if of_carry & set(jx.variables(eqn.invars)):
            of_carry |= set(eqn.outvars)
    made = {var for eqn in jaxpr.eqns for var in eqn.outvars}
    assert len(axes) > 50 and not (of_carry & made) - axes.keys()


@pytest.mark.parametrize("kind", ["transformer", "pairformer"])
@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.parametrize("tiles", [2, 64])
def test_no_slice_cuts_across_groups(kind, tiles, batch, monkeypatch):
    slice_small_values(monkeypatch)
    closed, carried = of_model(kind, batch)
    flat, pieces = pieces_of(closed, carried, "auto", tiles, groups=8)
    sliced = [piece for piece in pieces if piece.tiles]
    assert sliced and all(piece.groups for piece in pieces[1:])
    for piece in sliced:
        axes = axes_of_groups(flat.jaxpr, 8)
        tiling = piece.tiles.tiling
        for place, axis in tiling.entering:
            assert axes.get(place.of(flat.jaxpr)) != axis
        rules = [(flat.jaxpr.eqns[i], found) for i, found in tiling.inside.items() if found]
        outputs = itertools.chain.from_iterable(zip(eqn.outvars, found.outputs, strict=True) for eqn, found in rules)
        assert not [var for var, axis in outputs if axis is not None and axes.get(var) == axis]


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (plain, "nothing in it says how its batch is split"),
        (constrained("data"), "its examples do not stay apart"),
        (constrained(None), None),
        (constrained(P.UNCONSTRAINED, "data"), "nothing in it says"),
        (lambda w, x: x @ lax.with_sharding_constraint(w, NamedSharding(MESH, P(None))), "nothing in it says"),
        (lambda w, x: jax.jit(constrained(None))(w, x), None),
    ],
)
def test_why_slices_send(block, why):
    """Asked of a block that was not written for groups."""
    found = why_slices_send(jx.trace(block, W, on((6, 6))), [1])  # as large as the weight
    assert found is None if why is None else found.startswith(why)
