"""Sharded parameters and batches, over 8 simulated devices: the reversal engine's gradients, and bytes per device."""

import textwrap

import pytest

from tests.support import on_eight_devices

# Several devices have to be asked for before JAX starts, hence a process of its own. It prints one line per setting.
ON_EIGHT_DEVICES = """
    import sys

    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    from jaxckpt import checkpoint_scan
    from tests.support import random_like, relative_error

    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    of_params = {"data-parallel": P(), "fsdp": P(None, "data"), "fsdp, last axis": P(None, None, "data")}[sys.argv[1]]
    where = NamedSharding(mesh, of_params), NamedSharding(mesh, P("data"))
    w = {"up": jnp.zeros((12, 64, 256)), "down": jnp.zeros((12, 256, 64))}
    w, x = random_like((w, jnp.zeros((256, 64))))
    w, x = jax.device_put(jax.tree.map(lambda leaf: leaf / 16, w), where[0]), jax.device_put(x, where[1])


    def block(w, x):
        return x + jax.nn.gelu(x @ w["up"]) @ w["down"]


    def compiled(engine, knobs):
        stack = checkpoint_scan(block, engine=engine, **knobs)
        grad = jax.jit(jax.grad(lambda w, x: (stack(w, x) ** 2).sum()), out_shardings={"up": where[0], "down": where[0]})
        return grad.lower(w, x).compile()


    for policy in ("everything", "nothing", "dots"):
        for k in (None, 3):
            scan, reversal = (compiled(engine, {"policy": policy, "blocks_per_ckpt": k}) for engine in ("scan", "reversal"))
            error = relative_error(*(jax.device_get(step(w, x)) for step in (reversal, scan)))
            print(policy, k, error, *(step.memory_analysis().temp_size_in_bytes for step in (reversal, scan)))
"""


@pytest.mark.parametrize("sharded", ["data-parallel", "fsdp", pytest.param("fsdp, last axis", marks=pytest.mark.full)])
def test_no_more_bytes_per_device_than_the_scan_engine(sharded):
    done = on_eight_devices("-c", textwrap.dedent(ON_EIGHT_DEVICES), sharded)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 6
    assert not [row for row in rows if not float(row[2]) < 1e-5]
    assert not [row for row in rows if int(row[3]) > int(row[4])]
