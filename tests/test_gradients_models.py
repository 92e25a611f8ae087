"""Values and gradients of every model under every setting equal the plain loop over its blocks.

The full product of model, chunk size, policy, dropout and dtype is behind `-m full`; every run covers all pairs of them.
"""

import itertools
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, policies
from jaxckpt.models import EvoformerBlock, NNXTransformerBlock, PairformerBlock, TransformerBlock
from tests.support import QUICK, assert_no_zero_leaf, random_like, relative_error

LENGTH = 6
TOKENS, SEQUENCES = 3, 2
# A norm over fewer channels meets rows of almost equal values, divides by almost nothing, and turns float32's rounding into
# errors of 5e-5. Over eight they stay near 1e-6.
CHANNELS = 8
ROWS, PAIRS = (TOKENS, CHANNELS), (TOKENS, TOKENS, CHANNELS)


class Model(NamedTuple):
    block: Any  # the class with its sizes
    carry: tuple[tuple[int, ...], ...]
    masks: dict[str, tuple[int, ...]]
    tags: tuple[str, str]  # two that it has


_pair = dict(c_z=CHANNELS, c_hidden_mul=CHANNELS, num_heads_pair=2, head_dim_pair=2, transition_factor=1)
MODELS = {
    "transformer": Model(
        partial(TransformerBlock, d_model=CHANNELS, num_heads=2, d_ff=5, dropout_rate=0.3),
        carry=(ROWS,),
        masks={"mask": (TOKENS,)},
        tags=("context", "mlpwi_0"),
    ),
    "nnx transformer": Model(
        partial(NNXTransformerBlock, d_model=CHANNELS, num_heads=2, d_ff=5, dropout_rate=0.3),
        carry=(ROWS,),
        masks={"mask": (TOKENS,)},
        tags=("context", "mlpwi_0"),
    ),
    "pairformer": Model(
        partial(PairformerBlock, c_s=CHANNELS, num_heads_single=2, dropout_rate=0.3, **_pair),
        carry=(ROWS, PAIRS),
        masks={"mask": (TOKENS,), "pair_mask": (TOKENS, TOKENS)},
        tags=("attention_context", "tri_mul_product"),
    ),
    "evoformer": Model(
        partial(EvoformerBlock, c_m=CHANNELS, num_heads_msa=2, head_dim_msa=2, c_hidden_opm=2, **_pair),
        carry=((SEQUENCES, TOKENS, CHANNELS), PAIRS),
        masks={"msa_mask": (SEQUENCES, TOKENS), "pair_mask": (TOKENS, TOKENS)},
        tags=("outer_product", "tri_att_ending"),
    ),
}
CHUNKS = [None, 1, 2, 3, 5, LENGTH]
DTYPES = {"float64": 1e-12, "float32": 1e-5}


def policies_for(model):
    """Every policy by name, of those that are one rule the first, and an expression of each kind with the model's tags.

    MaxText's recipes are for blocks that have its tags, which are the transformers.
    """
    distinct = {}
    for name in policies.names():
        (term,) = policies.get(name).terms
        if term.rule is not None or "context" in MODELS[model].tags:
            distinct.setdefault((term.rule, term.verb, frozenset(term.globs)), name)
    a, b = MODELS[model].tags
    return [*distinct.values(), f"save:{a}", f"except:{a}", f"save:{b}+offload:{a}"]


class Case(NamedTuple):
    model: str
    k: int | None
    policy: str
    dropout: bool
    dtype: str


# Chunks of one are one program under every policy that does not offload, see tests/engine/test_scan.py and tests/parity.
FULL = [
    Case(model, k, policy, *rest)
    for model in MODELS
    for k, policy, *rest in itertools.product(CHUNKS, policies_for(model), (False, True), DTYPES)
    if k != 1 or policy == "nothing" or policies.get(policy).may_offload
]


def pairs(case):
    """What a cover must contain: each value of a case beside each other one, expressions by their verb."""
    kinds = case._replace(policy="".join(part.partition(":")[0] + "+" for part in case.policy.split("+")))
    return frozenset(itertools.combinations(enumerate(kinds), 2))


def pairwise_cover(cases, pairs=pairs):
    """Cases that together have all pairs of `cases`, chosen greedily: of equals the first, so cheap models go first."""
    left = {case: pairs(case) for case in cases}
    missing = frozenset().union(*left.values())
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        yield best


# A reference for a large block takes seconds, so a cover makes do with two of the four; cases that share one are neighbours.
COVER = sorted(
    pairwise_cover([c for c in FULL if "transformer" in c.model or c.dropout == (c.dtype == "float64")]),
    key=lambda case: (list(MODELS).index(case.model), case.dropout, case.dtype),
)

quick_jit = partial(jax.jit, compiler_options=QUICK)


def weights_like(tree, seed):
    """Random parameters of about unit gain, norms' scales and biases included, so that no gradient is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        names = jax.tree_util.keystr(path)
        if "kernel" in names:
            noise /= np.sqrt(leaf.shape[-2])
        return jnp.asarray(1 + 0.3 * noise if "scale" in names else noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


class Inputs(NamedTuple):
    """The arguments that gradients are taken for."""

    params: Any
    carry: tuple
    masks: dict


def inputs(model, params, dtype):
    rng = np.random.default_rng(1)
    masks = {name: jnp.asarray(rng.uniform(0.3, 1, shape), dtype) for name, shape in model.masks.items()}
    return Inputs(params, random_like(tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in model.carry)), masks)


class DropoutKey(nn.Module):
    """What a stack draws for its blocks, drawn by a module in its place."""

    def __call__(self):
        return self.make_rng("dropout")


def linen(model, dropout, dtype):
    """Inputs, a stack and one block of it, the latter two as functions of `Inputs`."""
    block = model.block(param_dtype=dtype)
    args = inputs(model, None, dtype)
    one = jax.eval_shape(block.init, jax.random.key(0), *args.carry)
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((LENGTH, *leaf.shape), leaf.dtype), one)
    args = args._replace(params=weights_like(stacked, seed=2))
    rngs = {"dropout": jax.random.key(3)} if dropout else {}

    def run_stack(knobs, args):
        stack = checkpoint_scan(model.block, LENGTH, **knobs)(param_dtype=dtype)
        return stack.apply(args.params, *args.carry, **args.masks, deterministic=not dropout, rngs=rngs)

    def run_block(i, args):
        params = jax.tree.map(lambda leaf: leaf[i], args.params)
        own = {"dropout": jax.random.fold_in(DropoutKey().apply({}, rngs=rngs), i)} if dropout else {}
        return block.apply(params, *args.carry, **args.masks, deterministic=not dropout, rngs=own)

    return args, run_stack, run_block


def from_nnx(model, dropout, dtype):
    blocks = [model.block(param_dtype=dtype, rngs=nnx.Rngs(i)) for i in range(LENGTH)]
    of_block = nnx.split(blocks[0], nnx.Param, ...)[0]
    _, params, others = nnx.split(checkpoint_scan(blocks), nnx.Param, ...)
    args = inputs(model, weights_like(params, seed=2), dtype)

    def run_stack(knobs, args):
        stack = checkpoint_scan(blocks, **knobs)
        nnx.update(stack, args.params)
        return stack(*args.carry, **args.masks, deterministic=not dropout)

    def run_block(i, args):
        block = nnx.merge(of_block, *jax.tree.map(lambda leaf: leaf[i], (args.params, others)))
        return block(*args.carry, **args.masks, deterministic=not dropout)

    return args, run_stack, run_block


@cache
def reference(name, dropout, dtype):
    """Inputs, the stack, and value and gradients of the plain loop over its blocks.

    The chain rule is written out, so that one block is compiled and not six.
    """
    make = from_nnx if name.startswith("nnx") else linen
    inputs, run_stack, run_block = make(MODELS[name], dropout, jnp.dtype(dtype))
    forward = quick_jit(run_block)
    pull_back = quick_jit(lambda i, args, ct: jax.vjp(partial(run_block, i), args)[1](ct)[0])
    before = [inputs]
    for i in range(LENGTH):
        value = forward(i, before[-1])
        before.append(inputs._replace(carry=value if isinstance(value, tuple) else (value,)))
    gradients = None
    ct = random_like(value, seed=4)
    for i in reversed(range(LENGTH)):
        of_block = pull_back(i, before[i], ct)
        ct = of_block.carry if isinstance(value, tuple) else of_block.carry[0]
        gradients = jax.tree.map(jnp.add, gradients, of_block) if gradients else of_block
    want = value, gradients._replace(carry=of_block.carry)
    assert_no_zero_leaf(want)
    return inputs, run_stack, want


def value_and_gradients(fn, args):
    value, vjp = jax.vjp(fn, args)
    return value, vjp(random_like(value, seed=4))[0]


def check(case):
    with jax.enable_x64(True):
        args, run_stack, want = reference(case.model, case.dropout, case.dtype)
        stack = partial(run_stack, dict(blocks_per_ckpt=case.k, policy=case.policy))
        got = quick_jit(partial(value_and_gradients, stack))(args)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(case.dtype)}
        assert relative_error(got, want) < DTYPES[case.dtype]


def name_of(case):
    return " ".join(map(str, case[:3])) + " dropout" * case.dropout + " " + case.dtype


@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_equals_the_plain_loop(case):
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", sorted(set(FULL) - set(COVER), key=FULL.index), ids=name_of)
def test_equals_the_plain_loop_in_full(case):
    check(case)


def test_the_cover_has_every_value_and_pair():
    def seen(cases):
        return {(field, case[field]) for case in cases for field in (0, 1, 3, 4)} | frozenset().union(*map(pairs, cases))

    assert seen(COVER) == seen(FULL)
    assert len(COVER) < len(FULL) / 4


@pytest.mark.parametrize("model", MODELS)
def test_dropout_changes_the_result(model):
    """Otherwise the cases with dropout would show nothing. (These two references are computed anyway.)"""
    with jax.enable_x64(True):
        with_dropout, without = reference(model, True, "float64")[2], reference(model, False, "float32")[2]
        assert relative_error(with_dropout, without) > 0.01
