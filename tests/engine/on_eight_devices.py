"""A program for eight simulated devices, which have to be asked for before JAX starts: gradients of stacks over meshes.

    python -m tests.engine.on_eight_devices CASES

runs each of the JSON list CASES, and prints a list of what is found: how far value and gradients are from those of a plain
loop on one device, in float64, and the collectives of a step by kind.
"""

import json
import sys
import warnings
from functools import partial
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint_scan
from jaxckpt.analysis import slices_cost, tiles
from jaxckpt.cli._meshes import of_parameter
from jaxckpt.memory.collectives import collectives
from jaxckpt.models import PairformerBlock, TransformerBlock
from tests.support import QUICK, plain_loop, random_like, relative_error

N = 4
MESHES = {
    "data": ({"data": 8}, False),
    "fsdp": ({"data": 8}, True),
    "tensor": ({"tensor": 8}, False),
    "fsdp x tensor": ({"data": 4, "tensor": 2}, True),
}
TRANSFORMER = TransformerBlock(32, num_heads=8, d_ff=64, dropout_rate=0.2)
MODELS = {
    "transformer": (TRANSFORMER, [(16, 8, 32)]),
    "transformer, one example each": (TRANSFORMER, [(8, 8, 32)]),
    "pairformer": (
        PairformerBlock(16, 8, c_hidden_mul=8, num_heads_pair=2, head_dim_pair=4, num_heads_single=2),
        [(8, 6, 16), (8, 6, 6, 8)],
    ),
}


class Dense(nn.Module):
    """A block in Linen."""

    @nn.compact
    def __call__(self, x):
        return x + jnp.sin(nn.Dense(16, name="down", param_dtype="float64")(jnp.sin(nn.Dense(64, param_dtype="float64")(x))))


class NnxDense(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs):
        self.up, self.down = (nnx.Linear(*shape, param_dtype="float64", rngs=rngs) for shape in ((16, 64), (64, 16)))

    def __call__(self, x):
        return x + jnp.sin(self.down(jnp.sin(self.up(x))))


def found(model, mesh, knobs, dropout=False, says=False):
    """Of a case: the error, and the collectives.

    Arguments:
        dropout: also masks. says: the block says by a constraint how its batch is split.
    """
    axes, fsdp = MESHES[mesh]
    on = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    batch = NamedSharding(on, P("data" if "data" in axes else None))
    stack, plain, params, carry, shared = of_front_end(model, knobs, dropout, batch if says else None)
    where = jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(on, of_parameter(path, leaf, axes, fsdp)), params
    )

    def step(fn, params, carry, shared):
        loss = lambda params, carry: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(fn(params, *carry, **shared)))  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(params, carry)

    want = jax.device_get(jax.jit(partial(step, plain), compiler_options=QUICK)(params, carry, shared))
    given = jax.device_put(params, where), jax.device_put(carry, batch), shared
    program = jax.jit(partial(step, stack), out_shardings=(None, (where, (batch,) * len(carry))))
    compiled = program.lower(*given).compile(compiler_options=QUICK)
    sent = {c.kind: (c.number, c.sent_bytes) for c in collectives(compiled.as_text(), 8)}
    return relative_error(jax.device_get(compiled(*given)), want), sent


def of_front_end(model, knobs, dropout, sharding):
    """A stack as a function of stacked parameters, the plain loop, and their arguments."""
    if model in MODELS:
        module, shapes = MODELS[model]
        keys = jax.random.split(jax.random.key(5), N)
    else:
        module, shapes = Dense(), [(16, 16)]
    carry = tuple(random_like([jnp.zeros(shape, "float64") for shape in shapes]))
    one = jax.eval_shape(module.init, jax.random.key(0), *carry)["params"]
    params = random_like(jax.tree.map(lambda leaf: jnp.zeros((N, *leaf.shape), "float64"), one))
    params = jax.tree.map(lambda leaf: leaf / 4, params)
    if model not in MODELS:
        plain = partial(plain_loop, lambda p, x: module.apply({"params": p}, x))
        return of_module(model, knobs), plain, params, carry, {}

    def block(p, *carry, key, mask):
        rngs = {"dropout": key} if dropout else None
        out = module.apply({"params": p}, *carry, mask=mask, deterministic=not dropout, rngs=rngs)
        return out if sharding is None else jax.lax.with_sharding_constraint(out, sharding)

    def plain(params, *carry, key, mask):
        for i in range(N):
            rngs = {"dropout": key[i]} if dropout else None
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params)
            out = module.apply({"params": p}, *carry, mask=mask, deterministic=not dropout, rngs=rngs)
            carry = out if isinstance(out, tuple) else (out,)
        return carry

    mask = jax.random.bernoulli(jax.random.key(3), 0.8, carry[0].shape[:2]).astype("float64") if dropout else None
    return checkpoint_scan(block, per_block=("key",), **knobs), plain, params, carry, {"key": keys, "mask": mask}


def of_module(front_end, knobs):
    """A stack of modules as a function of the parameters that Linen names so."""
    if front_end == "linen":
        stack = checkpoint_scan(Dense, N, **knobs)()
        return lambda params, x: stack.apply({"params": params}, x)
    graph, state = nnx.split(checkpoint_scan(NnxDense, N, **knobs)(rngs=nnx.Rngs(0)))

    def run(params, x):
        own = {"up": params["Dense_0"], "down": params["down"]}
        nested = jax.tree.map(lambda leaf: leaf, nnx.to_pure_dict(state))
        return nnx.merge(graph, filled(state, nested, own))(x)

    return run


def filled(state, nested, own):
    """The state with these parameters, wherever the stack keeps them."""

    def of(tree):
        return {key: own[key] if key in own else of(value) for key, value in tree.items()}

    nnx.replace_by_pure_dict(state, of(nested))
    return state


def main():
    jax.config.update("jax_enable_x64", True)
    assert jax.device_count() == 8
    warnings.filterwarnings("ignore", message=".*found nothing to slice")
    with mock.patch.object(tiles, "LEAST_ENTRIES", 1), mock.patch.object(slices_cost, "START", 0.0):
        print(json.dumps([found(**case) for case in json.loads(sys.argv[1])]))


if __name__ == "__main__":
    main()
