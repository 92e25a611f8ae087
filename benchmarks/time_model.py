"""Does the time model rank settings as a machine does, and what does it cost that a plan believes it?

Runs one training step of a small stack under named policies, with and without chunks, and under what plans choose in the
memory of each of them, in turns on the CPU; and compares the seconds with those of the time model, whose rates are measured
first (`plan(calibrate=True)`). The rank correlation is Spearman's. What a plan costs: its median seconds to those of
the fastest that was run and needs no more memory.

    python benchmarks/time_model.py

Small stacks, on the CPU; `on_gpu.py` does the same on a GPU.
"""

import argparse
import os
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from _race import Entry, attempt, rounds
from _results import RESULTS, environment, load, save, write_section
from _systems import Stack, values, workloads
from plan_vs_policies import compiled, step_of
from tqdm import tqdm

from jaxckpt import checkpoint_scan, measure, plan, targets
from jaxckpt.analysis.cost import step_seconds
from jaxckpt.memory.calibrate import calibrate
from jaxckpt.memory.explain import _explained
from jaxckpt.memory.runs import look_at_run

MIB = 2**20
MORE = {
    "cheap": {"policy": "cheap"},
    'stages="auto"': {"stages": "auto"},
    "snapshots=2": {"snapshots": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads(), default=["transformer-small", "pairformer-small"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "time_model.json"
    about = environment()
    found = {(entry["workload"], entry["device"], entry["versions"]["jax"]): entry for entry in load(path, "workloads")}
    for name in options.workloads:
        entry = {"workload": name, **about, **raced(workloads()[name], options.rounds)}
        found[name, about["device"], about["versions"]["jax"]] = entry
        entries = [found[key] for key in sorted(found)]
        save(path, "workloads", entries)
        write_section("time_model", "\n\n".join([INTRODUCTION, *map(table, entries)]), options.out)
        print(table(entry))


def raced(stack: Stack, most: int) -> dict[str, Any]:
    where = targets.get("attached")
    rates = calibrate(where)
    arguments = values(stack)
    field = [entry_of(stack, name, knobs, arguments, rates) for name, knobs in tqdm(named(stack).items(), desc="named")]
    choices: dict[str, Entry] = {}
    plans = []
    for budget in tqdm(sorted({entry.row["peak_bytes"] for entry in field}), desc="planned"):
        step = step_of(stack, plan="auto")
        found = plan(step, *arguments, budget=budget, target=where, calibrate=True, progress=False)
        setting = f"plan: {found.chosen.setting}"
        if setting not in choices:
            row = {"peak_bytes": found.peak_bytes, "model_seconds": found.chosen.seconds}
            choices[setting] = ready(Entry("jaxckpt", setting, row=row), found.around(step), arguments)
        plans.append({"budget_bytes": budget, "setting": setting})
    field += choices.values()
    for entry in field:
        attempt(entry, lambda entry=entry: entry.step and entry.step())
    for _ in tqdm(rounds(field, most), total=most, desc="rounds"):
        pass
    rows = [row_of(entry) for entry in field if entry.seconds]
    by_name = {row["setting"]: row for row in rows}
    for chosen in plans:
        within = [row for row in rows if row["peak_bytes"] <= chosen["budget_bytes"]]
        best = min(within, key=lambda row: row["seconds"])
        chosen |= {"best": best["setting"], "cost": by_name[chosen["setting"]]["seconds"] / best["seconds"]}
    order = correlation([row["model_seconds"] for row in rows], [row["seconds"] for row in rows])
    return {"title": stack.title, "rows": rows, "plans": plans, "rank_correlation": order}


def named(stack: Stack) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for per_chunk in (None, stack.chunk):
        for policy in ("everything", "dots", "dots_no_batch", "nothing"):
            name = policy if per_chunk is None else f"{policy}, blocks_per_ckpt={per_chunk}"
            found[name] = {"blocks_per_ckpt": per_chunk, "policy": policy}
    return found | MORE


def entry_of(stack: Stack, name: str, knobs: dict[str, Any], arguments: Any, rates: Any) -> Entry:
    step = step_of(stack, **knobs)
    params, carry, shared = arguments
    target: Any = SimpleNamespace(name="cpu", gpu=rates)
    run = checkpoint_scan(stack.apply, **knobs)
    found: Any = look_at_run(run, (params, *carry), shared, lambda run: _explained(run, target, None))
    # As a plan counts: what is stored is touched for the first time.
    stored = found.stored_bytes + found.chunk_bytes
    seconds = step_seconds(stack.length, found.forward_seconds, found.forward_runs, rates, fresh_bytes=stored)
    peak = measure(step, *arguments, target="attached").peak_bytes
    return ready(Entry("jaxckpt", name, row={"peak_bytes": peak, "model_seconds": seconds}), step, arguments)


def ready(entry: Entry, step: Any, arguments: Any) -> Entry:
    program = compiled(step, arguments)
    entry.step = lambda: jax.block_until_ready(program(*arguments))
    return entry


def row_of(entry: Entry) -> dict[str, Any]:
    return {"setting": entry.setting, **entry.row, "seconds": statistics.median(entry.seconds)}


def correlation(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""

    def ranks(values: list[float]) -> np.ndarray:
        given = np.asarray(values)
        return np.array([np.mean(np.flatnonzero(np.sort(given) == value)) for value in given])

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


INTRODUCTION = """## The time model against seconds

`time_model.py` runs settings of small stacks in turns, and compares their seconds with those of the time model, whose rates
were measured on the same machine. The model's seconds are of the stack alone, and rank settings; they predict nothing. What
a plan's choice costs: its seconds to those of the fastest setting that was run and needs no more memory."""


def table(entry: dict[str, Any]) -> str:
    order = f"rank correlation {entry['rank_correlation']:.2f}"
    lines = [
        f"### {entry['title']}; run on {entry['device']} ({entry['machine']}) with JAX {entry['versions']['jax']}: {order}"
    ]
    lines += ["", "| setting | MiB | model ms | measured ms |", "|---|--:|--:|--:|"]
    for row in sorted(entry["rows"], key=lambda row: row["seconds"]):
        cells = [f"{row['peak_bytes'] / MIB:.1f}", f"{row['model_seconds'] * 1e3:.1f}", f"{row['seconds'] * 1e3:.1f}"]
        lines.append("| " + " | ".join([row["setting"], *cells]) + " |")
    lines += ["", "| budget MiB | plan | fastest measured within | cost |", "|--:|---|---|--:|"]
    for row in entry["plans"]:
        setting = row["setting"].removeprefix("plan: ")
        lines.append(f"| {row['budget_bytes'] / MIB:.1f} | {setting} | {row['best']} | {row['cost']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
