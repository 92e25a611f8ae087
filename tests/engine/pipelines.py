"""A program for eight simulated devices: stacks in the stages of a pipeline, under `vmap` and in `shard_map`.

Prints a list of how far value and gradients are from those of a plain loop, in float64.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint_scan
from jaxckpt._setting import FIXED_IN
from tests.support import plain_loop, random_like, relative_error

STAGES, LAYERS, MICRO, BATCH, WIDTH = 4, 3, 6, 8, 16
TICKS = MICRO + STAGES - 1
KNOBS = [
    {},
    {"stages": 2},
    {"tiles": 2},
    {"engine": "reversal"},
    {"tiles": 2, "snapshots": 2},
    {"offload_carry": True},
    {"policy": "cheap"},
]


def block(w, x):
    return x + jnp.sin(jnp.sin(x @ w) @ w.T)


def under_vmap(stack, mesh, w, x):
    held, done = jnp.zeros((STAGES, BATCH, WIDTH), x.dtype), []
    for tick in range(TICKS):
        held = jnp.roll(held, 1, axis=0).at[0].set(x[min(tick, MICRO - 1)])
        held = lax.with_sharding_constraint(held, NamedSharding(mesh, P("stage", "data")))
        held = jax.vmap(stack, spmd_axis_name="stage")(w, held)
        done += [held[-1]] * (tick >= STAGES - 1)
    return jnp.stack(done)


def in_shard_map(stack, mesh, w, x):
    def of_stage(w, x):
        number, held, done = lax.axis_index("stage"), jnp.zeros(x.shape[1:], x.dtype), []
        for tick in range(TICKS):
            held = stack(w[0], jnp.where(number == 0, x[min(tick, MICRO - 1)], held))
            done += [jnp.where(number == STAGES - 1, held, 0)] * (tick >= STAGES - 1)
            held = lax.ppermute(held, "stage", [(i, (i + 1) % STAGES) for i in range(STAGES)])
        return lax.psum(jnp.stack(done), "stage")

    specs = P("stage"), P(None, "data")
    return jax.shard_map(of_stage, mesh=mesh, in_specs=specs, out_specs=P(None, "data"))(w, x)


def main():
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((4, 2), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    w, x = random_like((jnp.zeros((STAGES, LAYERS, WIDTH, WIDTH)), jnp.zeros((MICRO, BATCH, WIDTH))))
    w = w / 8
    loss = lambda fn, w, x: jnp.sum(jnp.sin(fn(w, x)))  # noqa: E731
    plain = lambda w, x: jax.vmap(partial(plain_loop, block, w.reshape(-1, WIDTH, WIDTH)))(x)  # noqa: E731
    want = jax.device_get(jax.jit(jax.value_and_grad(partial(loss, plain)))(w, x))
    given = jax.device_put(w, NamedSharding(mesh, P("stage"))), jax.device_put(x, NamedSharding(mesh, P(None, "data")))
    errors = []
    for pipeline in (under_vmap, in_shard_map):
        is_refused = pipeline is under_vmap and jax.__version_info__ < FIXED_IN  # offloading through the reversal engine
        for knobs in [knobs for knobs in KNOBS if not (is_refused and "offload_carry" in knobs)]:
            fn = partial(pipeline, checkpoint_scan(block, **knobs), mesh)
            got = jax.jit(jax.value_and_grad(partial(loss, fn)))(*given)
            errors.append(relative_error(jax.device_get(got), want))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
