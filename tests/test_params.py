"""`stack_params` and `unstack_params`: bit-exact, in natural order, metadata kept, and what they refuse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from jaxckpt import checkpoint_scan, stack_params, unstack_params
from tests.support import relative_error


def _bits(leaf: Any) -> tuple[Any, tuple[int, ...], bytes]:
    data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return leaf.dtype, leaf.shape, np.asarray(data).tobytes()


def _assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert _bits(g) == _bits(w)


RNG = np.random.default_rng(0)
LEAVES = {
    "float32": lambda: jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32),
    "NumPy float64": lambda: RNG.normal(size=(2, 3)),
    "NumPy float64, one number a block": lambda: np.asarray(RNG.normal()),
    "NumPy float64 scalar": lambda: np.float64(RNG.normal()),
    "NumPy int64": lambda: RNG.integers(2**62, size=4),
    "bfloat16": lambda: jnp.asarray(RNG.normal(size=3), jnp.bfloat16),
    "NumPy bfloat16": lambda: np.asarray(RNG.normal(size=3), jnp.bfloat16),
    "int8": lambda: jnp.asarray(RNG.integers(100, size=3), jnp.int8),
    "bool": lambda: jnp.asarray(RNG.integers(2, size=3), bool),
    "complex": lambda: jnp.asarray(RNG.normal(size=3) + 1j, jnp.complex64),
    "empty": lambda: jnp.zeros((0, 2)),
    "NaN and infinity": lambda: np.array([np.nan, -np.inf, -0.0]),
    "one number a block": lambda: jnp.asarray(RNG.normal(), jnp.float32),
    "key": lambda: jax.random.key(RNG.integers(1000)),
    "keys": lambda: jax.random.split(jax.random.key(RNG.integers(1000)), 2),
}


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("leaf", LEAVES)
def test_the_round_trip_keeps_every_bit(leaf, length):
    trees = [{"a": LEAVES[leaf](), "b": [LEAVES[leaf](), (LEAVES[leaf](),)]} for _ in range(length)]
    stacked = stack_params(trees)
    for whole, one in zip(jax.tree.leaves(stacked), jax.tree.leaves(trees[0]), strict=True):
        assert (whole.shape, whole.dtype) == ((length, *one.shape), one.dtype)
    back = unstack_params(stacked)
    assert isinstance(back, list) and len(back) == length
    for got, want in zip(back, trees, strict=True):
        _assert_same_bits(got, want)
    _assert_same_bits(stack_params(back), stacked)


def test_numpy_stays_numpy():
    stacked = stack_params([{"w": np.ones(2)}, {"w": np.zeros(2)}])
    assert isinstance(stacked["w"], np.ndarray) and stacked["w"].dtype == np.float64
    assert isinstance(unstack_params(stacked)[0]["w"], np.ndarray)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["layer_10", "layer_2", "layer_1"], ["layer_1", "layer_2", "layer_10"]),
        (["10", "9", "100"], ["9", "10", "100"]),
        (["b_0", "a_1", "a_0"], ["a_0", "a_1", "b_0"]),
        (["block_1_10", "block_1_9", "block_0_11"], ["block_0_11", "block_1_9", "block_1_10"]),
        (["h", "h_1", "2"], ["2", "h", "h_1"]),
    ],
)
def test_a_mapping_is_taken_in_natural_order(names, order):
    trees = {name: {"w": np.array([i])} for i, name in enumerate(names)}
    assert stack_params(trees)["w"][:, 0].tolist() == [names.index(name) for name in order]
    assert stack_params(freeze(trees))["w"][:, 0].tolist() == [names.index(name) for name in order]


def test_any_sequence_of_trees_is_taken():
    trees = [{"w": jnp.full(2, float(i))} for i in range(3)]
    for sequence in (tuple(trees), iter(trees)):
        _assert_same_bits(stack_params(sequence), stack_params(trees))


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_linen_metadata_gains_and_loses_the_layer_axis(box):
    trees = [{"w": box(jnp.full((2, 3), float(i)), names=(None, "mlp")), "b": jnp.zeros(3)} for i in range(2)]
    stacked = stack_params(trees)
    assert type(stacked["w"]) is box
    assert stacked["w"].names == ("layers", None, "mlp")
    assert stacked["w"].value.shape == (2, 2, 3)
    assert [tree["w"].names for tree in unstack_params(stacked)] == [(None, "mlp")] * 2
    for got, want in zip(unstack_params(stacked), trees, strict=True):
        _assert_same_bits(got, want)
    assert trees[0]["w"].names == (None, "mlp"), "the given trees are left as they are"


def test_nnx_metadata_gains_and_loses_the_layer_axis():
    with nnx.use_eager_sharding(False):
        states = [nnx.State({"w": nnx.Param(jnp.full((2, 3), float(i)), out_sharding=(None, "mlp"))}) for i in range(2)]
    stacked = stack_params(states)
    assert isinstance(stacked, nnx.State) and isinstance(stacked["w"], nnx.Param)
    assert stacked["w"].shape == (2, 2, 3)
    assert stacked["w"].get_metadata("out_sharding") == ("layers", None, "mlp")
    for i, state in enumerate(unstack_params(stacked)):
        assert state["w"].get_metadata("out_sharding") == (None, "mlp")
        np.testing.assert_array_equal(state["w"][...], states[i]["w"][...])
    assert states[0]["w"].get_metadata("out_sharding") == (None, "mlp"), "the given states are left as they are"


def test_frozen_dicts_survive():
    stacked = stack_params([freeze({"a": {"w": jnp.ones(2)}})] * 3)
    assert type(stacked) is FrozenDict
    assert all(type(tree) is FrozenDict for tree in unstack_params(stacked))


@pytest.mark.parametrize("nothing", [[], (), {}])
def test_no_trees_are_refused(nothing):
    with pytest.raises(ValueError, match="stack_params needs at least one tree; got none"):
        stack_params(nothing)


W = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"mlp": {"kernel": W}}, ["tree 1 has another structure than tree 0", "['mlp']['bias']"]),
        ({"mlp": {"kernel": W, "scale": W}}, ["['mlp']['bias']", "['mlp']['scale']"]),
        ({"mlp": {"kernel": W, "bias": W, "scale": W}}, ["only one of them has ['mlp']['scale']"]),
        ({"mlp": {"kernel": W.T, "bias": W}}, ["['mlp']['kernel'] is float32[3,2] in tree 1 and float32[2,3] in tree 0"]),
        (
            {"mlp": {"kernel": W, "bias": W.astype("bfloat16")}},
            ["['mlp']['bias'] is bfloat16[2,3] in tree 1", "float32[2,3]"],
        ),
        ({"mlp": {"kernel": W, "bias": np.ones((2, 3))}}, ["['mlp']['bias'] is float64[2,3] in tree 1", "float32[2,3]"]),
        (freeze({"mlp": {"kernel": W, "bias": W}}), ["another structure", "containers or their metadata differ"]),
    ],
)
def test_trees_that_differ_are_refused_by_the_leaf(other, parts):
    with pytest.raises(ValueError, match=r"^stack_params: ") as caught:
        stack_params([{"mlp": {"kernel": W, "bias": W}}, other])
    for part in parts:
        assert part in str(caught.value)


def test_trees_of_a_mapping_are_refused_by_their_name():
    with pytest.raises(ValueError, match=r"in tree layer_10 and float32\[2,3\] in tree layer_2"):
        stack_params({"layer_10": {"w": W.T}, "layer_2": {"w": W}})


def test_partitioning_that_differs_is_refused():
    trees = [{"w": nn.Partitioned(W, names=names)} for names in ((None, "mlp"), ("mlp", None))]
    with pytest.raises(ValueError, match="stack_params: tree 1 has another structure than tree 0"):
        stack_params(trees)


@pytest.mark.parametrize("optimizer", [optax.adam, optax.adamw])
def test_an_optimizer_state_is_refused_by_its_step_count_and_its_moments_are_not(optimizer):
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    state = optimizer(1e-3).init(params)
    with pytest.raises(ValueError, match=r"unstack_params: \[0\]\.count has no layer axis.*mu and nu"):
        unstack_params(state)
    assert len(unstack_params(state[0].mu)) == 3
    _assert_same_bits(stack_params(unstack_params(state[0].nu)), state[0].nu)


def test_every_leaf_without_axes_is_named():
    with pytest.raises(ValueError) as caught:
        unstack_params({"a": jnp.ones(()), "b": jnp.ones(3), "c": {"d": 1.0}})
    assert "['a'], ['c']['d'] has no layer axis" in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "leaf", "shape"),
    [
        ({"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}, "['b']", "(2, 2)"),
        ([jnp.ones(3), {"w": jnp.ones((4, 1))}], "[1]['w']", "(4, 1)"),
    ],
)
def test_ragged_leading_axes_are_refused_by_the_leaf(tree, leaf, shape):
    with pytest.raises(ValueError) as caught:
        unstack_params(tree)
    assert f"unstack_params: {leaf} has shape {shape}" in str(caught.value)
    assert "3" in str(caught.value)


@pytest.mark.parametrize("tree", [{}, [], None, jnp.ones((0, 3))])
def test_a_tree_without_blocks_is_refused(tree):
    with pytest.raises(ValueError, match=r"^unstack_params: ") as caught:
        unstack_params(tree)
    assert "length=" not in str(caught.value), "unstack_params has no such argument"


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "mlp"))
        return x + jnp.tanh(nn.Dense(x.shape[-1], kernel_init=kernel_init)(x))


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("per_ckpt", [None, 2])
def test_per_block_variables_load_into_a_linen_stack(x64, per_ckpt, boxed):
    x = jnp.asarray(RNG.normal(size=(2, 4)))
    blocks = [Block().init(jax.random.key(i), x) for i in range(3)]
    want = x
    for variables in blocks:
        want = Block().apply(variables, want)

    stack = checkpoint_scan(Block, 3, blocks_per_ckpt=per_ckpt)()
    stacked = stack_params(blocks)
    assert jax.tree.structure(stacked) == jax.tree.structure(stack.init(jax.random.key(0), x))
    assert relative_error(stack.apply(stacked if boxed else nn.unbox(stacked), x), want) < 1e-12
