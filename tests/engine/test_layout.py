"""Layouts are pinned for one GPU, where chunks share slots, carries go to the host or blocks are in slices, else nowhere."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint_scan

PIN = "LayoutConstraint"


def loss(w, x, **knobs):
    knobs = {"engine": "reversal", **(knobs or {"blocks_per_ckpt": 2})}
    return checkpoint_scan(lambda w, x: x + jnp.sin(jnp.sin(jnp.sin(x @ w))) @ w.T, **knobs)(w, x).sum()


def lowered(platform, devices=1, kind=AxisType.Auto, **knobs):
    mesh = AbstractMesh((devices,), ("data",), axis_types=(kind,))
    shaped = lambda shape, spec: jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))  # noqa: E731
    traced = jax.jit(jax.grad(partial(loss, **knobs))).trace(shaped((3, 4, 4), P()), shaped((8, 4), P("data")))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    "knobs, is_pinned",
    [
        ({"blocks_per_ckpt": 2}, True),
        ({"tiles": 2}, True),
        ({"tiles": 2, "snapshots": 2}, True),
        ({"tiles": 2, "engine": "scan"}, True),
        ({"offload_carry": True}, True),
        ({"policy": "nothing"}, False),
        ({"policy": "everything"}, False),
        ({"snapshots": 2}, False),
    ],
    ids=str,
)
def test_for_one_gpu(knobs, is_pinned):
    assert (PIN in lowered("cuda", **knobs)) == is_pinned


@pytest.mark.parametrize("platform, devices", [("cpu", 1), ("cuda", 8), ("cpu", 8)])
def test_not_elsewhere(platform, devices):
    assert PIN not in lowered(platform, devices)


def test_with_explicit_sharding():
    """Outside of `jax.set_mesh`, where JAX 0.12 knows the mesh by the arguments alone."""
    assert PIN not in lowered("cuda", 8, AxisType.Explicit)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_export(platform):
    args = jax.ShapeDtypeStruct((3, 4, 4), "float32"), jax.ShapeDtypeStruct((8, 4), "float32")
    assert jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(*args).platforms == (platform,)


def test_vmap_and_shard_map():
    w, xs = jnp.ones((3, 4, 4)), jnp.ones((2, 8, 4))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    batched = jax.vmap(partial(loss, w))
    assert jnp.allclose(jax.jit(batched)(xs)[0], loss(w, xs[0]))
    mapped = jax.shard_map(lambda xs: batched(xs), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert jnp.allclose(jax.jit(mapped)(xs)[0], loss(w, xs[0]))
