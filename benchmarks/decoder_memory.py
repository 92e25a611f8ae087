"""How much memory do 28 layers of Qwen3-0.6B's shape need: in a Python loop of `nnx.remat`, and in a stack?

Compiles a loss of what the layers return and its gradients by their parameters, 4 sequences of 2,048 tokens in bfloat16, for
a GPU that need not be in the machine. Gradients of each way must first equal those of a plain loop over small layers. No
number is of a run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/decoder_memory.py
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import flax.nnx as nnx
import jax
import jax.numpy as jnp
from _results import RESULTS, load, save, write_section
from _systems import checked_error

from jaxckpt import checkpoint_scan, measure, stack_params
from jaxckpt.models import DecoderConfig, DecoderLayer

LAYERS, SEQUENCES, TOKENS = 28, 4, 2048
GIB = 2**30
SMALL = DecoderConfig(width=16, heads=4, kv_heads=2, head_width=8, hidden=32, longest=16)
LARGE = DecoderConfig(param_dtype=jnp.bfloat16)
KNOBS: dict[str, dict[str, Any]] = {
    "`checkpoint_scan(layers)`": {},
    '`engine="reversal"`': {"engine": "reversal"},
    '`tiles="auto"`': {"tiles": "auto"},
    '`snapshots=5, tiles="auto"`': {"snapshots": 5, "tiles": "auto"},
}
WAYS = ["plain loop", "loop of `nnx.remat`", *KNOBS]
KEYS = ("way", "target", "jax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--again", action="store_true", help="also what was compiled with this version of JAX before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "decoder_memory.json"
    rows = {tuple(row[key] for key in KEYS): row for row in load(path, "rows")}
    for way in WAYS:
        key = way, options.target, jax.__version__
        if key in rows and not options.again:
            continue
        rows[key] = {**dict(zip(KEYS, key, strict=True)), **row_of(way, options.target)}
        print(*key, rows[key])
        save(path, "rows", [rows[key] for key in sorted(rows)])
    write_section("decoder_memory", "\n\n".join([INTRODUCTION, *tables(list(rows.values()))]), options.out)


def call(layer: DecoderLayer, x: jax.Array, *, positions: jax.Array, mask: jax.Array) -> jax.Array:
    return layer(x, positions, None, mask)[1]


class Decoder(nnx.Module):
    """The layers, and how they are run."""

    def __init__(self, way: str, config: DecoderConfig, length: int):
        layers = [DecoderLayer(config, rngs=nnx.Rngs(i)) for i in range(length)]
        self.layers = checkpoint_scan(layers, call=call, **KNOBS[way]) if way in KNOBS else nnx.List(layers)
        self.run = nnx.remat(run) if "remat" in way else run

    def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
        if not isinstance(self.layers, nnx.List):
            return self.layers(x, positions=positions, mask=mask)
        for layer in self.layers:
            x = self.run(layer, x, positions, mask)
        return x


def run(layer: DecoderLayer, x: jax.Array, positions: jax.Array, mask: jax.Array) -> jax.Array:
    return call(layer, x, positions=positions, mask=mask)


def arguments(config: DecoderConfig, sequences: int, tokens: int, dtype: Any) -> tuple[Any, ...]:
    shape = jax.ShapeDtypeStruct
    x = shape((sequences, tokens, config.width), dtype)
    return x, shape((sequences, tokens), jnp.int32), shape((sequences, tokens, tokens), bool)


def loss_and_gradients(graph: Any, state: Any, *arguments: jax.Array) -> tuple[jax.Array, Any]:
    def loss(state: Any) -> jax.Array:
        return jnp.mean(jnp.square(nnx.merge(graph, state)(*arguments).astype(jnp.float32)))

    return jax.value_and_grad(loss)(state)


def row_of(way: str, target: str) -> dict[str, Any]:
    try:
        error = checked_error(small(way), small("plain loop"))
        graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(way, LARGE, LAYERS)))
        given = arguments(LARGE, SEQUENCES, TOKENS, jnp.bfloat16)
        found = measure(functools.partial(loss_and_gradients, graph), state, *given, target=target)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    sizes = {name: getattr(found, name) for name in ("peak_bytes", "temp_bytes", "compile_seconds")}
    return {**sizes, "device": found.device, "gradient_error": error}


def small(way: str) -> tuple[Any, Any]:
    """Loss and gradients of six small layers in float32, the layers' stacked."""
    graph, state = nnx.split(Decoder(way, SMALL, 6))
    shapes = arguments(SMALL, 2, 16, jnp.float32)
    x, positions = jax.random.normal(jax.random.key(0), shapes[0].shape), jnp.broadcast_to(jnp.arange(16), (2, 16))
    step = jax.jit(functools.partial(loss_and_gradients, graph))
    loss, gradients = step(state, x, positions, jnp.broadcast_to(jnp.tri(16, dtype=bool), shapes[2].shape))
    gradients = nnx.to_pure_dict(gradients)["layers"]
    if way in KNOBS:
        return loss, gradients
    return loss, stack_params([gradients[i] for i in range(6)])


INTRODUCTION = f"""## Memory of a decoder's layers, beside a Python loop

`decoder_memory.py`: {LAYERS} layers of Qwen3-0.6B's shape in Flax NNX (`jaxckpt.models.DecoderLayer`), {SEQUENCES} sequences
of {TOKENS:,} tokens, parameters and products in bfloat16, gradients by the parameters; compiled for the GPU that is named,
nothing was run on one. A loop's compile time grows with its layers."""


def tables(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for target, version in sorted({(row["target"], row["jax"]) for row in rows}):
        own = [row for row in rows if (row["target"], row["jax"]) == (target, version)]
        lines = [f"### Compiled for {target} with JAX {version}", "", "| way | peak GiB | temp GiB | compile s |"]
        lines.append("|---|--:|--:|--:|")
        for row in sorted(own, key=lambda row: WAYS.index(row["way"])):
            sizes = [f"{row[name] / GIB:.2f}" for name in ("peak_bytes", "temp_bytes") if name in row]
            cells = [*sizes, f"{row['compile_seconds']:.0f}"] if sizes else [row["error"].replace("|", "/"), "", ""]
            lines.append("| " + " | ".join([row["way"], *cells]) + " |")
        found.append("\n".join(lines))
    return found


if __name__ == "__main__":
    main()
