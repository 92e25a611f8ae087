"""The layer axis in the metadata of Linen's boxes and of NNX's variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import stack_params, unstack_params
from jaxckpt._metadata import add_layer_axis, remove_layer_axis

N, VALUE = 3, np.arange(6.0, dtype=np.float32).reshape(2, 3)


def linen(cls, names, value):
    return {"params": {"w": cls(value, names=names), "plain": value}}


def variable(names, value):
    metadata = {} if names is None else {"out_sharding": names}
    return {"w": nnx.Param(value, eager_sharding=False, **metadata), "plain": value}


def names_of(tree):
    w = tree.get("params", tree)["w"]
    return w.names if isinstance(w, nn.Partitioned) else w.get_metadata().get("out_sharding")


BOXES = {
    "Partitioned": lambda names, value: linen(nn.Partitioned, names, value),
    "LogicallyPartitioned": lambda names, value: linen(nn.LogicallyPartitioned, names, value),
    "nnx.Param": variable,
}
boxes = pytest.mark.parametrize("make", BOXES.values(), ids=BOXES.keys())


@boxes
@pytest.mark.parametrize("names", [("embed", "mlp"), (None, "mlp"), (None, None)])
def test_the_layer_axis_comes_in_front_and_goes_again(make, names):
    one, stacked = make(names, VALUE), make(names, np.stack([VALUE] * N))
    there = add_layer_axis(stacked)
    assert names_of(there) == ("layers", *names)
    assert names_of(stacked) == names, "the tree that was given is left alone"
    back = remove_layer_axis(jax.tree.map(lambda leaf: leaf[0], there))
    assert names_of(back) == names
    assert jax.tree.structure(back) == jax.tree.structure(remove_layer_axis(add_layer_axis(one)))
    assert names_of(there) == ("layers", *names)


@boxes
def test_arrays_are_not_copied(make):
    leaves = jax.tree.leaves(tree := make((None, "mlp"), jnp.asarray(VALUE)))
    for changed in (add_layer_axis(tree), remove_layer_axis(add_layer_axis(tree))):
        assert all(a is b for a, b in zip(jax.tree.leaves(changed), leaves, strict=True))


def test_values_without_metadata_stay_as_they_are():
    tree = {"array": VALUE, "key": jax.random.key(0), "variable": variable(None, VALUE)["w"], "none": None}
    changed = add_layer_axis(tree)
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    assert jax.tree.structure(remove_layer_axis(tree)) == jax.tree.structure(tree)


@boxes
def test_stack_params_and_unstack_params_keep_it(make):
    trees = [make((None, "mlp"), VALUE + i) for i in range(N)]
    stacked = stack_params(trees)
    assert names_of(stacked) == ("layers", None, "mlp")
    for tree, back in zip(trees, unstack_params(stacked), strict=True):
        assert names_of(back) == (None, "mlp")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(back), jax.tree.leaves(tree))


def test_a_partition_spec_has_the_layer_axis():
    specs = nn.get_partition_spec(add_layer_axis(linen(nn.Partitioned, (None, "mlp"), np.stack([VALUE] * N))))
    assert specs["params"]["w"] == jax.P("layers", None, "mlp")
