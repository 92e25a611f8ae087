"""Is the peak that is compiled for a described GPU the peak of a run on that GPU?

For each setting: the peak that `measure` tells for the GPU by its name, as on a machine that has none, and the most memory
that JAX's allocator had in use while the step ran on the attached GPU of that name, in a process of its own. Without a GPU
there is nothing to compare, and the table says so.

    PYTHONPATH=. python benchmarks/predicted_vs_real.py
"""

import argparse
import functools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the parent must leave the GPU to its children

import jax
from _results import RESULTS, environment, in_a_child, load, save, write_section
from _systems import loss_and_gradients, our_stack, values, workloads
from tqdm import tqdm

from jaxckpt import measure, targets

WORKLOADS = ("transformer-2048", "pairformer-384")
CHUNK = -1  # stands for the workload's own chunk
SETTINGS = ((None, "nothing"), (None, "dots_no_batch"), (CHUNK, "nothing"), (CHUNK, "everything"), (2, "everything"))
GIB = 2**30


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if options.child:
        try:
            print(json.dumps(real_peak(*options.child)))
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}))
        return
    path = options.out / "predicted_vs_real.json"
    runs = load(path, "runs")
    device = jax.devices()[0]
    name = targets.name_of(device.device_kind)
    if device.platform == "gpu" and name:
        new = {**environment(), "target": name}
        run = next((other for other in runs if key(other) == key(new)), {**new, "rows": []})
        runs = [other for other in runs if other is not run] + [run]
        for row in rows(options, name):
            kept = [old for old in run["rows"] if (old["title"], old["setting"]) != (row["title"], row["setting"])]
            run["rows"] = [*kept, row]
            save(path, "runs", sorted(runs, key=key))
    else:
        print(f"{device.device_kind} is no GPU that jaxckpt.targets knows: nothing to compare", file=sys.stderr)
    shown = [*map(table, sorted(runs, key=key))] or ["**No run on a GPU has been made yet.**"]
    write_section("predicted_vs_real", "\n\n".join([INTRODUCTION, *shown]), options.out.parent / "README.md")
    print("\n\n".join(shown))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads(), default=WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("--minutes", type=float, default=7, help="start no setting after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def key(run: dict[str, Any]) -> tuple[str, ...]:
    return run["device"], run["versions"]["jax"]


def rows(options: argparse.Namespace, target: str) -> Iterator[dict[str, Any]]:
    end = time.monotonic() + 60 * options.minutes
    jobs = [(workload, count, policy) for workload in options.workloads for count, policy in SETTINGS]
    for workload, count, policy in (bar := tqdm(jobs, unit="setting", dynamic_ncols=True)):
        if time.monotonic() > end:
            bar.write(f"{options.minutes:g} minutes are over: {len(jobs) - bar.n} settings are left out")
            break
        stack = workloads()[workload]
        per_chunk = stack.chunk if count == CHUNK else count
        bar.set_description(f"{workload}: blocks_per_ckpt={per_chunk}, {policy}")
        step = functools.partial(loss_and_gradients, our_stack(per_chunk, policy=policy)(stack))
        predicted = measure(step, *stack.arguments(), target=target).peak_bytes
        row = {"title": stack.title, "setting": f"blocks_per_ckpt={per_chunk}, {policy}", "predicted_bytes": predicted}
        yield {**row, **in_a_process_of_its_own(workload, str(per_chunk), policy)}


def in_a_process_of_its_own(*child: str) -> dict[str, Any]:
    """What `real_peak` finds: the allocator's peak is of the whole process.

    The child takes nearly the whole GPU at once: an allocator that grows hands out larger pieces than were asked for.
    """
    taken_at_once = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}
    return in_a_child(__file__, *child, seconds=240, **taken_at_once)


def real_peak(workload: str, per_chunk: str, policy: str) -> dict[str, Any]:
    """In a process of its own, since the allocator's peak is of the whole process: runs three steps."""
    stack = workloads()[workload]
    step = functools.partial(
        loss_and_gradients, our_stack(None if per_chunk == "None" else int(per_chunk), policy=policy)(stack)
    )
    arguments = values_leaf_by_leaf(stack)
    before = peak_bytes_in_use()
    compiled = jax.jit(step).lower(*arguments).compile()
    for _ in range(3):
        out = jax.block_until_ready(compiled(*arguments))
        del out
    return {"real_bytes": peak_bytes_in_use(), "bytes_before_the_step": before}


def peak_bytes_in_use() -> int:
    stats = jax.devices()[0].memory_stats()
    if not stats:
        raise RuntimeError(f"the allocator of {jax.devices()[0]} does not count")
    return stats["peak_bytes_in_use"]


def values_leaf_by_leaf(stack: Any) -> Any:
    """Random arguments, made on the host so that making them does not raise the GPU's peak."""
    with jax.default_device(jax.devices("cpu")[0]):
        on_host = jax.block_until_ready(values(stack))
    return jax.block_until_ready(jax.device_put(on_host, jax.devices()[0]))


INTRODUCTION = """## Predicted and real peaks

`predicted_vs_real.py`: the peak compiled for a GPU by its name, as on a machine without one, beside the most memory that
JAX's allocator had in use while that step ran on such a GPU."""


def table(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    lines = [f"### {run['device']}, driver {run['driver']}; {versions}", ""]
    lines += ["| stack | setting | predicted GiB | real GiB | real / predicted |", "|---|---|--:|--:|--:|"]
    for row in run["rows"]:
        lines.append(f"| {row['title']} | {row['setting']} | {row['predicted_bytes'] / GIB:.2f} | {' | '.join(real(row))} |")
    return "\n".join(lines)


def real(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "/"), ""]
    return [f"{row['real_bytes'] / GIB:.2f}", f"{row['real_bytes'] / row['predicted_bytes']:.3f}"]


if __name__ == "__main__":
    main()
