"""Does `plan` keep budgets of one device where a step is split over eight, use them, and beat fixed policies?

Plans one training step (the loss of a stack and its parameters' gradients) for eight GPUs that need not be in the machine,
at eight budgets from the least possible to what no checkpointing needs, at those that are named, and at the peaks of fixed
policies in `on_meshes.py`'s results. Compiled, nothing is run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/plan_on_meshes.py --workloads transformer --meshes "FSDP 8" --budgets 6GiB 12GiB
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _results import RESULTS, load, save, write_section
from _systems import as_tuple, loss_and_gradients
from on_meshes import MESHES, OF_WORKLOAD, on_mesh, stacks
from tqdm import tqdm

from jaxckpt import checkpoint_scan, explain, plan
from jaxckpt.planning import search

GIB = 2**30
BUDGETS = 8
POLICIES = ("nothing", "dots", "everything", "cheap")
KEYS = ("workload", "mesh", "target", "jax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=OF_WORKLOAD, default=["transformer"])
    parser.add_argument("--meshes", nargs="+", choices=MESHES, default=["FSDP 8"])
    parser.add_argument("--budgets", nargs="+", default=[], help="also these")
    parser.add_argument("--target", default="h200:8")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "plan_on_meshes.json"
    found = {tuple(entry[key] for key in KEYS): entry for entry in load(path, "entries")}
    for workload in options.workloads:
        for mesh in options.meshes:
            key = workload, mesh, options.target, jax.__version__
            found[key] = {**dict(zip(KEYS, key, strict=True)), **planned(*key[:3], options.budgets)}
            save(path, "entries", [found[k] for k in sorted(found)])
            write_section(
                "plan_on_meshes", "\n\n".join([INTRODUCTION, *(table(found[k]) for k in sorted(found))]), options.out
            )
            print(table(found[key]), flush=True)


def planned(workload: str, mesh: str, target: str, named: list[str]) -> dict[str, Any]:
    """Plans at budgets, and at the peaks of fixed policies."""
    stack, arguments, out = on_mesh(workload, mesh, target)
    run = checkpoint_scan(stack.apply, plan="auto")
    forward = lambda params, carry, shared: as_tuple(run(params, *carry, **shared))  # noqa: E731
    step = jax.jit(functools.partial(loss_and_gradients, forward), out_shardings=out)
    search.forget()
    least = plan(step, *arguments, objective="memory", budget="9999GiB", target=target, progress=False)
    policies = of_policies(workload, mesh, target)
    most = max([least.most_bytes, *(row["peak_bytes"] for row in policies)])
    budgets = [*np.geomspace(least.peak_bytes, most, BUDGETS).astype(int).tolist(), *named]
    rows = [row_of(step, arguments, budget, target) for budget in tqdm(budgets, desc=f"{workload}, {mesh}")]
    against = [{**row_of(step, arguments, row["peak_bytes"], target), **row} for row in tqdm(policies, desc="policies")]
    return {"budgets": rows, "against": against}


def row_of(step: Any, arguments: Any, budget: int | str, target: str) -> dict[str, Any]:
    begin = time.monotonic()
    found = plan(step, *arguments, budget=budget, target=target, progress=False)
    return {
        "budget_bytes": found.budget_bytes,
        "setting": found.chosen.setting,
        "plan_bytes": found.peak_bytes,
        "predicted_bytes": found.chosen.predicted_bytes,
        "runs": found.chosen.forward_runs,
        "model_seconds": found.chosen.seconds,
        "seconds": round(time.monotonic() - begin, 1),
    }


def of_policies(workload: str, mesh: str, target: str) -> list[dict[str, Any]]:
    """The peaks of fixed policies, from the results of `on_meshes.py`, and their runs."""
    stack, (params, carry, shared), _ = on_mesh(workload, mesh, target)
    found = []
    for policy in POLICIES:
        runs = explain(checkpoint_scan(stack.apply, policy=policy), params, *carry, target=target, **shared).forward_runs
        wanted = workload, mesh, target, jax.__version__, "jaxckpt", f"blocks_per_ckpt=None, {policy}"
        for row in load(RESULTS / "on_meshes.json", "rows"):
            if tuple(row[key] for key in (*KEYS, "system", "setting")) == wanted and "peak_bytes" in row:
                found.append({"policy": policy, "peak_bytes": row["peak_bytes"], "policy_runs": runs})
    return found


INTRODUCTION = """## Plans for eight GPUs

`plan_on_meshes.py` asks `jaxckpt.plan` for the fastest setting of a training step that is split over eight GPUs, at eight
budgets of one device, from the least possible to what no checkpointing needs, at some that are named, and at the peaks of
fixed policies. Peaks are what the compiler says for GPUs that are only described; nothing was run. Columns as in the plans
under budgets; seconds on two cores that had other jobs, knowing what the plans before compiled. Runs are by a time model
that did not count yet what devices send."""


def table(entry: dict[str, Any]) -> str:
    title = f"{stacks()[entry['workload']].title}; {entry['mesh']}; planned for {entry['target']} with JAX {entry['jax']}"
    lines = [f"### {title}", "", "| budget GiB | peak GiB | used | model | runs | seconds | setting |"]
    lines.append("|--:|--:|--:|--:|--:|--:|---|")
    for row in entry["budgets"]:
        lines.append(f"| {' | '.join(cells(row))} | {row['setting']} |")
    lines += ["", "| policy | its peak GiB | its runs | the plan's peak | the plan's runs |", "|---|--:|--:|--:|--:|"]
    for row in entry["against"]:
        sizes = [f"{row['peak_bytes'] / GIB:.2f}", f"{row['policy_runs']:.2f}", f"{row['plan_bytes'] / GIB:.2f}"]
        lines.append(f"| {' | '.join([row['policy'], *sizes])} | {row['runs']:.2f} |")
    rows = [*entry["budgets"], *entry["against"]]
    kept = sum(row["plan_bytes"] <= row["budget_bytes"] for row in rows)
    off = max(abs(row["predicted_bytes"] / row["plan_bytes"] - 1) for row in rows)
    more = sum(row["runs"] > row["policy_runs"] + 0.005 for row in entry["against"])
    said = (
        f"{kept} of {len(rows)} budgets kept; the model is at most {off:.0%} off; more is run again than by {more} policies."
    )
    return "\n".join([*lines, "", said])


def cells(row: dict[str, Any]) -> list[str]:
    used, model = row["plan_bytes"] / row["budget_bytes"], row["predicted_bytes"] / row["plan_bytes"]
    sizes = [f"{row['budget_bytes'] / GIB:.2f}", f"{row['plan_bytes'] / GIB:.2f}", f"{used:.0%}", f"{model:.3f}"]
    return [*sizes, f"{row['runs']:.2f}", f"{row['seconds']:.0f}"]


if __name__ == "__main__":
    main()
