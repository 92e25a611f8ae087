"""The arguments of a step with another number of examples."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.planning.examples import with_batch

W, X = jnp.ones((6, 32, 32)), jnp.ones((8, 32))


def test_none_in_arguments_and_in_axes():
    tree = {"x": X, "mask": None, "state": [W, None]}
    for axes in ({"x": 0, "mask": 0, "state": None}, {"x": 0, "mask": None, "state": [None, None]}):
        w, resized, nothing = with_batch((W, tree, None), [None, axes, 0])(16)
        assert w is W and nothing is None and resized["x"].shape == (16, 32)
        assert resized["mask"] is None and resized["state"][0] is W and resized["state"][1] is None


def test_shardings_of_a_mesh_stay():
    sharding = NamedSharding(Mesh(jax.devices()[:1], "data"), P("data"))
    (x,) = with_batch((jax.ShapeDtypeStruct((8, 4), "float32", sharding=sharding),), (0,))(32)
    assert x.shape == (32, 4) and x.sharding == sharding


def test_where_an_array_was_put_and_its_weak_type_stay():
    put = jax.device_put(X, jax.devices()[0])
    there = SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((8,), "float32", sharding=there)
    found = with_batch((put, shape, X, np.ones((8, 2)), jax.lax.full((8,), 1.0)), (0,) * 5)(16)
    assert [leaf.shape for leaf in found] == [(16, 32), (16,), (16, 32), (16, 2), (16,)]
    assert [leaf.sharding for leaf in found] == [there, there, None, None, None]
    assert [leaf.weak_type for leaf in found] == [False, False, False, False, True]
