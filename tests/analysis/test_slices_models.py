"""Slices of every equation of the models' blocks."""

import jax
import jax.numpy as jnp

from jaxckpt.analysis import inlining
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices import rule
from jaxckpt.analysis.slices_table import ELEMENTWISE
from jaxckpt.models import EvoformerBlock, PairformerBlock, TransformerBlock
from tests.analysis.slicing import assert_equal, check_types, integers

# Sizes that two divides, and no two of which are equal but where a block says so.
PAIR = dict(c_z=8, c_hidden_mul=14, num_heads_pair=4, head_dim_pair=6, transition_factor=2)
BLOCKS = [
    (TransformerBlock(16, 4, 24, dropout_rate=0.5, dtype=jnp.bfloat16), [(2, 10, 16)], dict(mask=(2, 10))),
    (PairformerBlock(c_s=12, num_heads_single=2, **PAIR), [(10, 12), (10, 10, 8)], dict(mask=(10,))),
    (
        EvoformerBlock(c_m=12, num_heads_msa=2, head_dim_msa=16, c_hidden_opm=18, **PAIR),
        [(22, 10, 12), (10, 10, 8)],
        dict(msa_mask=(22, 10), pair_mask=(10, 10)),
    ),
]


def equations_of(block, carry, masks):
    """The equations of a block with dropout, by their signatures; without it there are no others."""
    shapes, tree = jax.tree.flatten([carry, masks], lambda x: type(x) is tuple)
    carry, masks = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    key = jax.random.key(0)
    leaves, tree = jax.tree.flatten([jax.eval_shape(block.init, key, *carry, **masks), carry, masks, key])

    def equations(deterministic):
        def run(*leaves):
            params, carry, masks, key = jax.tree.unflatten(tree, leaves)
            return jax.tree.leaves(block.apply(params, *carry, **masks, deterministic=deterministic, rngs={"dropout": key}))

        return {signature(eqn): eqn for eqn in inlining.inlined(jx.trace(run, *leaves), True).jaxpr.eqns}

    found = equations(deterministic=False)
    assert equations(deterministic=True).keys() < found.keys()
    return found


def signature(eqn):
    """What an equation is, but for the sizes in its types: those that are equal have one number.

    Where it takes numbers one by one, its axes have nothing to do with each other, and each has numbers of its own.
    """
    avals = [var.aval for var in (*eqn.invars, *eqn.outvars)]
    numbers = {}

    def number(n, axis):
        return 1 if n == 1 else numbers.setdefault((n, axis if eqn.primitive.name in ELEMENTWISE else None), -len(numbers))

    shapes = [[number(n, axis) for axis, n in enumerate(aval.shape)] for aval in avals]
    params = {name: value for name, value in eqn.params.items() if name not in ("shape", "new_sizes", "name")}
    return f"{eqn.primitive.name} {shapes} {[aval.dtype for aval in avals]} {params}"


def rules_of(eqn):
    """By output and axis, for axes of more than one entry."""
    return {(k, i): rule(eqn, k, i) for k, var in enumerate(eqn.outvars) for i, n in enumerate(var.aval.shape) if n > 1}


def test_every_equation_and_axis():
    """Every axis of more than one entry; what stays whole is what it must be."""
    eqns = {}
    for block in BLOCKS:
        eqns |= equations_of(*block)
    rules = [(eqn, rules_of(eqn)) for eqn in eqns.values()]
    sliced = {eqn.primitive.name for eqn, found in rules if any(found.values())}
    whole_somewhere = {eqn.primitive.name for eqn, found in rules if not all(found.values())}
    assert whole_somewhere - sliced == {"random_bits"}
    assert whole_somewhere & sliced == {"reshape", "split", "concatenate"}

    checked = []
    for eqn, found in rules:
        inputs = (
            [integers(var.aval.shape, var.aval.dtype, k) for k, var in enumerate(eqn.invars)] if any(found.values()) else []
        )
        checked += [(eqn, one, inputs) for one in set(found.values()) - {None}]
    for eqn, one in {id(eqn): (eqn, one) for eqn, one, _ in checked}.values():  # the axis does not matter to types
        check_types(eqn, one)
    assert_equal(checked)
    assert len(checked) > 300
