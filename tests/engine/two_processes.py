"""A program of two processes with four simulated devices each: stacks over all eight, and plans.

    python -m tests.engine.two_processes PORT NUMBER FOLDER

runs process NUMBER, 0 or 1. Both print the same: a list of errors of value and gradients, and the plan that each has made.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint_scan, plan
from tests.support import plain_loop, random_like, relative_error

N, WIDTH, HIDDEN, BATCH = 4, 16, 64, 16
KNOBS = [
    {"engine": "reversal"},
    {"stages": 2},
    {"tiles": 2},
    {"tiles": 2, "engine": "reversal"},
    {"policy": "cheap"},
    {"offload_carry": True},
    {"snapshots": 2},
]


def block(w, x, at=AxisType.Auto):
    up, down = w["up"], w["down"]
    if at == AxisType.Explicit:  # parameters are gathered where the types say so
        up, down = jax.reshard(up, P(None, None)), jax.reshard(down, P(None, None))
    return x + jnp.sin(jnp.sin(x @ up) @ down)


def step(fn, w, x):
    return jax.value_and_grad(lambda w: jnp.sum(jnp.sin(fn(w, x))))(w)


def put(mesh, leaf, spec):
    return jax.make_array_from_callback(leaf.shape, NamedSharding(mesh, spec), lambda index: np.asarray(leaf)[index])


def main(port, number, folder):
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=number)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    shapes = {"up": (N, WIDTH, HIDDEN), "down": (N, HIDDEN, WIDTH)}
    w, x = random_like(({name: np.zeros(shape) for name, shape in shapes.items()}, np.zeros((BATCH, WIDTH))))
    w = jax.tree.map(lambda leaf: leaf / 8, w)
    value, want = jax.device_get(jax.jit(partial(step, partial(plain_loop, block)))(w, x))
    errors = []
    for at in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(at,))
        split = partial(put, mesh)
        given = {"up": split(w["up"], P(None, "data")), "down": split(w["down"], P(None, None, "data"))}, split(x, P("data"))
        where = jax.tree.map(lambda leaf: leaf.sharding, given[0])
        with jax.set_mesh(mesh):
            for knobs in KNOBS if at == AxisType.Auto else KNOBS[:1]:
                stack = checkpoint_scan(partial(block, at=at), **knobs)
                loss, found = jax.jit(partial(step, stack), out_shardings=(None, where))(*given)
                found = jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), found)
                errors.append(relative_error((np.asarray(loss), found), (value, want)))
    print(json.dumps({"errors": errors, **plans(mesh, where, given, Path(folder), number)}))


def plans(mesh, where, given, folder, number):
    """A plan that each process makes, one that the first has saved and all run under, and one by the clock."""
    stack = checkpoint_scan(partial(block, at=AxisType.Explicit), plan="auto")
    with jax.set_mesh(mesh):
        to_plan = jax.jit(partial(step, stack), out_shardings=(None, where))
        found = plan(to_plan, *given, budget="1MiB", progress=False)
        if number == 0:
            found.save(folder / "plan.json")
        multihost_utils.sync_global_devices("saved")
        pinned = checkpoint_scan(partial(block, at=AxisType.Explicit), plan=folder / "plan.json")
        loss, _ = jax.jit(partial(step, pinned), out_shardings=(None, where))(*given)
        refused = []
        for how in ({"time": True}, {"calibrate": True}):
            try:
                plan(to_plan, *given, budget="1MiB", progress=False, **how)
            except ValueError as error:
                refused.append(str(error))
    return {"plan": found.to_json(), "loss": float(loss), "refused": refused}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
