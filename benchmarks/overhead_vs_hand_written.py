"""Does `checkpoint_scan` cost anything over the `nn.scan(nn.remat(Block))` that one would write by hand?

Prints and writes ratios, ours to hand-written, measured side by side in one run on the device JAX picks:

- a transformer under per-block remat: compiled temporaries, compile time, step time (median of pairs);
- a carry `(a, s, z)` whose `s` and `z` pass through: temporaries against a version with `s` and `z` closed over;
- depth: compile time of 1,000 blocks to that of 10.

    python benchmarks/overhead_vs_hand_written.py
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from _results import RESULTS, environment

from jaxckpt import checkpoint_scan
from jaxckpt.models import TransformerBlock

MIB = 2**20
Step = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead_vs_hand_written.json")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of compilations, and of timed steps")
    options = parser.parse_args()
    report = {
        **environment(),
        "transformer": transformer(options.pairs),
        "pass_through": pass_through(),
        "depth": depth(options.pairs),
    }
    text = json.dumps(report, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    print(text)


class HandWrittenBody(nn.Module):
    """What `nn.scan` wants: a module that returns `(carry, output)`."""

    arguments: dict[str, Any]

    @nn.compact
    def __call__(self, x, _):
        return TransformerBlock(**self.arguments, name="block")(x), None


def transformer(pairs: int, blocks: int = 12, width: int = 256, batch: int = 4, tokens: int = 256) -> dict[str, Any]:
    """Per-block remat, ours and by hand, on the same parameters and input."""
    arguments = {"d_model": width, "num_heads": 8, "d_ff": 4 * width}
    hand = nn.scan(
        nn.remat(HandWrittenBody, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=blocks,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(arguments)
    ours = checkpoint_scan(TransformerBlock, blocks, policy="nothing")(**arguments)
    x = jax.random.normal(jax.random.key(0), (batch, tokens, width))
    params = jax.jit(ours.init)(jax.random.key(1), x)["params"]

    def by_hand(params, x):
        return jnp.mean(hand.apply({"params": {"block": params}}, x, None)[0] ** 2)

    def by_us(params, x):
        return jnp.mean(ours.apply({"params": params}, x) ** 2)

    steps = {"hand_written": jax.value_and_grad(by_hand, (0, 1)), "jaxckpt": jax.value_and_grad(by_us, (0, 1))}
    compiled = {name: jax.jit(step).lower(params, x).compile() for name, step in steps.items()}
    check_equal(*(program(params, x) for program in compiled.values()))
    seconds = paired_seconds({name: lambda p=p: jax.block_until_ready(p(params, x)) for name, p in compiled.items()}, pairs)
    return {
        "shape": {"blocks": blocks, "d_model": width, "batch": batch, "tokens": tokens},
        "temp_mib": (temp := {name: temp_mib(program) for name, program in compiled.items()}),
        "temp_ratio": temp["jaxckpt"] / temp["hand_written"],
        "compile_ratio": compile_ratio(steps["jaxckpt"], steps["hand_written"], (params, x), (params, x), pairs),
        "step_ratio": median_ratio(seconds["jaxckpt"], seconds["hand_written"]),
        "step_seconds": {name: statistics.median(times) for name, times in seconds.items()},
    }


def pass_through(blocks: int = 24, tokens: int = 128, width: int = 64) -> dict[str, Any]:
    """The carry of AlphaFold 3's diffusion transformer: `a` changes, the conditioning `s` and the pair bias `z` do not."""
    keys = jax.random.split(jax.random.key(0), 5)
    a, s = (jax.random.normal(key, (tokens, width)) for key in keys[:2])
    z = jax.random.normal(keys[2], (tokens, tokens, 8))
    params = {
        "mix": jax.random.normal(keys[3], (blocks, width, width)) / width**0.5,
        "bias": jax.random.normal(keys[4], (blocks, 8)),
    }

    def block(p, a, s, z):
        weights = jax.nn.softmax(a @ a.T / width**0.5 + z @ p["bias"])
        return a + jnp.tanh(weights @ (a @ p["mix"]) * jax.nn.sigmoid(s)), s, z

    def carried(params, a, s, z):
        return jnp.mean(checkpoint_scan(block)(params, a, s, z)[0] ** 2)

    def closed_over(params, a, s, z):
        def only_a(p, a):
            return block(p, a, s, z)[0]

        return jnp.mean(checkpoint_scan(only_a)(params, a) ** 2)

    programs = [
        jax.jit(jax.value_and_grad(f, (0, 1, 2, 3))).lower(params, a, s, z).compile() for f in (carried, closed_over)
    ]
    check_equal(*(program(params, a, s, z) for program in programs))
    ours, reference = map(temp_mib, programs)
    return {"temp_mib": {"carried": ours, "closed_over": reference}, "temp_ratio": ours / reference}


def depth(pairs: int, shallow: int = 10, deep: int = 1000, width: int = 32) -> dict[str, Any]:
    """Compile time of a deep stack to that of a shallow one, per-block remat and chunks."""

    def case(blocks, **knobs):
        stack = checkpoint_scan(TransformerBlock, blocks, **knobs)(d_model=width, num_heads=2, d_ff=4 * width)
        x = jax.ShapeDtypeStruct((1, 16, width), jnp.float32)
        variables = jax.eval_shape(stack.init, jax.random.key(0), x)
        return jax.grad(lambda v, x: jnp.sum(stack.apply(v, x) ** 2)), (variables, x)

    ratios = {}
    for name, knobs in {"per_block": {}, "chunks_of_5": {"blocks_per_ckpt": 5}}.items():
        (small, small_args), (large, large_args) = case(shallow, **knobs), case(deep, **knobs)
        ratios[name] = compile_ratio(large, small, large_args, small_args, pairs)
    return {"blocks": [shallow, deep], "compile_ratio": ratios}


def compile_ratio(step: Step, reference: Step, args: Any, reference_args: Any, pairs: int) -> float:
    """Tracing, lowering and compiling `step` to the same for `reference`: the median over pairs."""

    def compile_of(fn, args):
        # A new function each time, so that no cache of JAX's is hit.
        return lambda: jax.jit(lambda *a: fn(*a)).lower(*args).compile()

    seconds = paired_seconds({"step": compile_of(step, args), "reference": compile_of(reference, reference_args)}, pairs)
    return median_ratio(seconds["step"], seconds["reference"])


def paired_seconds(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each run, interleaved and in alternating order, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(pairs + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(ours: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, reference, strict=True))


def temp_mib(program: Any) -> float:
    return program.memory_analysis().temp_size_in_bytes / MIB


def check_equal(a: Any, b: Any) -> None:
    """Values and gradients agree, or there is nothing to compare."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = float(jnp.max(jnp.abs(y)))
        assert float(jnp.max(jnp.abs(x - y))) <= 1e-5 * scale + 1e-12, "the two programs compute different things"


if __name__ == "__main__":
    main()
