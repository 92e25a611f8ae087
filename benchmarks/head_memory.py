"""How much memory does a language model's head with its loss need: plain, and under `jaxckpt.checkpoint` in slices?

Compiles loss and gradients of 16,384 tokens of 4,096 channels and 128,256 words for a GPU that need not be in the machine,
with Optax's cross-entropy as it is: the plain head, `jax.checkpoint` of it, and `jaxckpt.checkpoint(tiles="auto")`. Values
and gradients of each must first equal the plain head's on a small one. No number is of a run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/head_memory.py
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _results import RESULTS, load, save, write_section
from _systems import checked_error

from jaxckpt import checkpoint, measure

TOKENS, CHANNELS, WORDS = 16_384, 4096, 128_256
GIB = 2**30
WAYS: dict[str, Callable[..., Any]] = {
    "plain": lambda head: head,
    "`jax.checkpoint`": jax.checkpoint,
    '`checkpoint(tiles="auto")`': functools.partial(checkpoint, tiles="auto"),
    "`checkpoint(tiles=16)`": functools.partial(checkpoint, tiles=16),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of parameters; products are of bfloat16
KEYS = ("way", "parameters", "masked", "target", "jax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--again", action="store_true", help="also what was compiled with this version of JAX before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "head_memory.json"
    rows = {tuple(row[key] for key in KEYS): row for row in load(path, "rows")}
    for masked in (False, True):
        for parameters in DTYPES:
            for way in WAYS:
                key = way, parameters, masked, options.target, jax.__version__
                if key in rows and not options.again:
                    continue
                rows[key] = {**dict(zip(KEYS, key, strict=True)), **row_of(way, parameters, masked, options.target)}
                print(*key, rows[key])
                save(path, "rows", [rows[key] for key in sorted(rows, key=str)])
    write_section("head_memory", "\n\n".join([INTRODUCTION, *tables(list(rows.values()))]), options.out)


def head(kernel: jax.Array, x: jax.Array, labels: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mean loss of tokens, those of `mask` where there is one; `x` `[tokens, channels]`."""
    losses = optax.softmax_cross_entropy_with_integer_labels((x @ kernel.astype(x.dtype)).astype(jnp.float32), labels)
    return losses.mean() if mask is None else jnp.where(mask, losses, 0).sum() / mask.sum()


def step(way: str) -> Callable[..., Any]:
    """The loss, and its gradients by the kernel and by what enters the head."""
    return jax.value_and_grad(WAYS[way](head), argnums=(0, 1))


def arguments(tokens: int, channels: int, words: int, parameters: Any, products: Any, masked: bool) -> tuple[Any, ...]:
    shape = jax.ShapeDtypeStruct
    mask = shape((tokens,), bool) if masked else None
    return shape((channels, words), parameters), shape((tokens, channels), products), shape((tokens,), jnp.int32), mask


def row_of(way: str, parameters: str, masked: bool, target: str) -> dict[str, Any]:
    try:
        error = gradient_error(way, masked)
        found = measure(
            step(way), *arguments(TOKENS, CHANNELS, WORDS, DTYPES[parameters], jnp.bfloat16, masked), target=target
        )
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    sizes = {name: getattr(found, name) for name in ("peak_bytes", "temp_bytes", "compile_seconds")}
    return {**sizes, "device": found.device, "gradient_error": error}


def gradient_error(way: str, masked: bool) -> float:
    """Of a small head in float32; what "auto" would not slice is sliced in four."""
    keys = jax.random.split(jax.random.key(0), 4)
    labels, mask = jax.random.randint(keys[2], (64,), 0, 100), jax.random.bernoulli(keys[3], 0.8, (64,)) if masked else None
    given = jax.random.normal(keys[0], (16, 100)), jax.random.normal(keys[1], (64, 16)), labels, mask
    small = jax.value_and_grad(checkpoint(head, tiles=4), argnums=(0, 1)) if "auto" in way else step(way)
    return checked_error(jax.jit(small)(*given), jax.jit(step("plain"))(*given))


INTRODUCTION = f"""## Memory of a head with its loss

`head_memory.py`: the loss of {TOKENS:,} tokens of {CHANNELS:,} channels and {WORDS:,} words (Optax's cross-entropy with
integer labels, of products in bfloat16), and its gradients by the kernel and the tokens, compiled for the GPU that is named;
nothing was run on one. Gradients that slices share are summed in float32."""


def tables(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for target, version in sorted({(row["target"], row["jax"]) for row in rows}):
        own = [row for row in rows if (row["target"], row["jax"]) == (target, version)]
        lines = [
            f"### Compiled for {target} with JAX {version}",
            "",
            "| parameters | mask | way | peak GiB | temp GiB | of plain |",
        ]
        lines.append("|---|---|---|--:|--:|--:|")
        plain = {(row["parameters"], row["masked"]): row for row in own if row["way"] == "plain"}
        for row in sorted(own, key=lambda row: (row["parameters"], row["masked"], list(WAYS).index(row["way"]))):
            cells = [row["parameters"], "yes" if row["masked"] else "no", row["way"]]
            of_plain = plain.get((row["parameters"], row["masked"]), row)
            if "error" in row:
                cells += [row["error"].replace("|", "/"), "", ""]
            else:
                cells += [f"{row['peak_bytes'] / GIB:.2f}", f"{row['temp_bytes'] / GIB:.2f}"]
                cells.append(f"{row['temp_bytes'] / of_plain['temp_bytes']:.0%}" if "temp_bytes" in of_plain else "")
            lines.append("| " + " | ".join(cells) + " |")
        found.append("\n".join(lines))
    return found


if __name__ == "__main__":
    main()
