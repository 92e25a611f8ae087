"""Steps that name meshes of their own, compiled for GPUs that are not there: exchanged, or refused with what to write."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxckpt import checkpoint_scan, measure, plan, targets

W, X = jnp.ones((4, 16, 16)), jnp.ones((8, 16))
stack = checkpoint_scan(lambda w, x: x + jnp.tanh(x @ w), plan="auto")


def gradient(w, x):
    return jax.grad(lambda w: jnp.sum(stack(w, x) ** 2))(w)


def constrained(where):
    return lambda w, x: gradient(w, lax.with_sharding_constraint(x, where))


def constrained_in_blocks(where):
    run = checkpoint_scan(lambda w, x: lax.with_sharding_constraint(x + jnp.tanh(x @ w), where), plan="auto")
    return lambda w, x: jax.grad(lambda w: jnp.sum(run(w, x) ** 2))(w)


def jitted(where):
    return jax.jit(gradient, in_shardings=(NamedSharding(where.mesh, PartitionSpec()), where))


def mapped(where):
    spec, whole = where.spec, PartitionSpec()
    total = jax.shard_map(
        lambda w, x: lax.psum(jnp.sum(stack(w, x) ** 2), "data"), mesh=where.mesh, in_specs=(whole, spec), out_specs=whole
    )
    return lambda w, x: jax.grad(total)(w, x)


def on_mesh(devices, axis_type=AxisType.Auto):
    return jax.make_mesh((1,), ("data",), axis_types=(axis_type,), devices=devices)


STEPS = [constrained, constrained_in_blocks, jitted, mapped]


@pytest.mark.parametrize("step_with", STEPS)
def test_a_mesh_of_other_devices_is_refused_with_what_to_write(h200, step_with):
    step = step_with(NamedSharding(on_mesh(jax.devices("cpu")[:1]), PartitionSpec("data")))
    with pytest.raises(
        ValueError, match=r"names devices .* not those of target 'h200'.*targets.get\('h200'\).mesh.*set_mesh"
    ):
        measure(step, W, X, target=h200)
    with pytest.raises(ValueError, match="Make that mesh of the target's devices"):
        plan(step, W, X, target=h200, progress=False)


@pytest.mark.parametrize("step_with", STEPS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_mesh_of_the_targets_devices(h200, step_with, count):
    target = targets.get(f"h200:{count}")
    step = step_with(NamedSharding(target.mesh((count,), ("data",)), PartitionSpec("data")))
    assert measure(step, W, X, target=target).argument_bytes == pytest.approx(W.nbytes + X.nbytes, rel=0.2)
    if step_with is jitted and count == 2:  # as it was jitted to have them
        assert measure(step, W, X, target=target).argument_bytes == W.nbytes + X.nbytes // 2


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_mesh_of_set_mesh_is_exchanged(h200, axis_type):
    plain = measure(gradient, W, X, target=h200).peak_bytes
    with jax.set_mesh(on_mesh(jax.devices("cpu")[:1], axis_type)):
        sharded = jax.device_put(X, NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data")))
        for x in (X, sharded):
            assert measure(gradient, W, x, target=h200).peak_bytes == plain
            assert plan(gradient, W, x, target=h200, progress=False).target == "h200"
        if axis_type == AxisType.Auto:
            assert measure(constrained(PartitionSpec("data")), W, X, target=h200).target == "h200"
        assert jax.sharding.get_mesh().devices.flat[0].platform == "cpu"  # as it was
        with pytest.raises(ValueError, match=r"a mesh of 1 devices, and target 'h200:2' has 2: use the target 'h200:1'"):
            measure(gradient, W, X, target="h200:2")
