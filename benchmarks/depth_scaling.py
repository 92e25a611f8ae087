"""How do memory and compile time grow with the number of blocks?

Compiles the loss of a stack and its gradients by the stacked parameters, for a GPU that need not be in the machine, at
depths from 12 to 768 blocks: `checkpoint_scan` per block, in chunks of about the square root, with everything kept, in
stages, with few snapshots, with carries on the host; and a Python loop of `jax.checkpoint`, as far as `--minutes` go; the
next call goes on where this one stopped, as long as JAX's version is the same. No number is of a run on a GPU.

    JAX_PLATFORMS=cpu PYTHONPATH=. python benchmarks/depth_scaling.py
"""

import argparse
import dataclasses
import functools
import time
import warnings
from pathlib import Path
from typing import Any

from _results import RESULTS, environment, load, save, write_section
from _systems import Stack, System, checkpointed_loop, loss_and_gradients, our_stack, pairformer, transformer
from tqdm import tqdm

from jaxckpt import measure, targets
from jaxckpt.cli._stacks import chunk_near_sqrt

DEPTHS = (12, 24, 48, 96, 192, 384, 768)
STACKS = {"transformer": transformer(12, 4, 1024, 512, 3), "pairformer": pairformer(12, 128, 3)}
GIB = 2**30


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    path = options.out / "depth_scaling.json"
    where = {"target": options.target, "compiled_for": targets.get(options.target).devices[0].device_kind}
    new = {**environment(), **where}
    runs = load(path, "runs")
    old = next((run["rows"] for run in runs if key(run) == key(new)), [])
    is_kept = lambda row: row["stack"] not in options.stacks or not (options.again or "error" in row)  # noqa: E731
    run = {**new, "rows": [row for row in old if is_kept(row)]}
    done = [name_of(row) for row in run["rows"]]
    runs = [other for other in runs if key(other) != key(run)] + [run]
    begin = time.monotonic()
    for i, name in enumerate(options.stacks):
        end = begin + 60 * options.minutes * (i + 1) / len(options.stacks)
        jobs = [(depth, system) for depth in options.depths for system in systems(depth)]
        jobs.sort(key=lambda job: (job[1].is_slow, spread(job[0])))
        for depth, system in (bar := tqdm(jobs, unit="row", dynamic_ncols=True)):
            bar.set_description(f"{depth} {name} blocks: {system.name}, {system.setting}")
            row = {"stack": name, "blocks": depth, "system": system.name, "setting": system.setting}
            if name_of(row) in done:
                continue
            stack = dataclasses.replace(STACKS[name], length=depth, chunk=chunk_near_sqrt(depth))
            if time.monotonic() + expected_seconds(row, run["rows"]) > end:
                run["rows"].append({**row, "error": "not compiled: out of time"})
            else:
                run["rows"].append({**row, "title": stack.title, **compiled(system, stack, options.target)})
            save(path, "runs", sorted(runs, key=key))
    text = "\n\n".join([INTRODUCTION, *map(table, sorted(runs, key=key))])
    write_section("depth_scaling", text, options.out)
    print(table(run))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--target", default="h200", help="a name or a file, see jaxckpt.targets")
    parser.add_argument("--again", action="store_true", help="also what was compiled with this version of JAX before")
    parser.add_argument("--minutes", type=float, default=7, help="start nothing that would end after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def key(run: dict[str, Any]) -> tuple[str, ...]:
    return run["target"], run["versions"]["jax"]


def name_of(row: dict[str, Any]) -> tuple[str, int, str, str]:
    return row["stack"], row["blocks"], row["system"], row["setting"]


def spread(depth: int) -> int:
    """The order in which depths are compiled: if time is out, those in the middle are left out."""
    order = (12, 48, 768, 24, 192, 96, 384)
    return order.index(depth) if depth in order else len(order)


def expected_seconds(row: dict[str, Any], before: list[dict[str, Any]]) -> float:
    """How long compiling a loop in Python will take: it grows with nearly the square of the number of blocks."""
    of_loops = [r for r in before if r["stack"] == row["stack"] and r["system"] == row["system"] == "Python loop"]
    return max((r.get("compile_seconds", 0) * (row["blocks"] / r["blocks"]) ** 2 for r in of_loops), default=0)


def systems(depth: int) -> list[System]:
    chunk = chunk_near_sqrt(depth)
    return [
        System("jaxckpt", "blocks_per_ckpt=None, everything", our_stack(None, policy="everything"), "jaxckpt"),
        System("jaxckpt", "blocks_per_ckpt=None, nothing", our_stack(None, policy="nothing"), "jaxckpt"),
        System("jaxckpt", "blocks_per_ckpt near the root, nothing", our_stack(chunk, policy="nothing"), "jaxckpt"),
        System("jaxckpt", 'stages="auto"', our_stack(stages="auto"), "jaxckpt"),
        System("jaxckpt", 'snapshots=9, stages="auto"', our_stack(snapshots=9, stages="auto"), "jaxckpt"),
        System(
            "jaxckpt",
            'offload_carry, stages="auto", engine="reversal"',
            our_stack(offload_carry=True, stages="auto", engine="reversal"),
            "jaxckpt",
        ),
        System("Python loop", "jax.checkpoint of each block", checkpointed_loop, is_slow=True),
    ]


def compiled(system: System, stack: Stack, target: str) -> dict[str, Any]:
    begin = time.perf_counter()
    found = measure(functools.partial(loss_and_gradients, system.build(stack)), *stack.arguments(), target=target)
    return {
        "temp_bytes": found.temp_bytes,
        "peak_bytes": found.peak_bytes,
        "compile_seconds": round(found.compile_seconds, 2),
        "trace_seconds": round(time.perf_counter() - begin - found.compile_seconds, 2),
        "hlo_instructions": found.hlo_instructions,
    }


INTRODUCTION = """## Depth

`depth_scaling.py`: temporaries, time to trace and compile, and size of the program of one loss with gradients by the
parameters, compiled for the GPU that is named; nothing was run on one. Times are of one noisy machine."""


def table(run: dict[str, Any]) -> str:
    """For each stack a row per system and a column per depth: temp GiB, seconds, thousands of instructions."""
    depths = sorted({row["blocks"] for row in run["rows"]})
    parts = []
    for name in dict.fromkeys(row["stack"] for row in run["rows"]):
        rows = {(r["system"], r["setting"], r["blocks"]): r for r in run["rows"] if r["stack"] == name}
        title = STACKS[name].title.replace(", 12 blocks", "")
        lines = [f"### {title}; compiled for {run['compiled_for']} with JAX {run['versions']['jax']}", ""]
        lines.append(f"| system | setting | {' | '.join(f'{depth} blocks' for depth in depths)} |")
        lines.append("|---|---|" + "--:|" * len(depths))
        for system, setting in dict.fromkeys(k[:2] for k in rows):
            cells = [cell(rows.get((system, setting, depth), {})) for depth in depths]
            lines.append(f"| {system} | {setting} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cell(row: dict[str, Any]) -> str:
    if "temp_bytes" not in row:
        return row.get("error", "")
    seconds = row["trace_seconds"] + row["compile_seconds"]
    return f"{row['temp_bytes'] / GIB:.2f} GiB, {seconds:.0f} s, {row['hlo_instructions'] / 1000:.1f}k"


if __name__ == "__main__":
    main()
