"""Does `plan` keep every budget, and does it beat fixed policies and other systems in their own memory?

Plans one training step (the loss of a stack and its parameters' gradients) for GPUs that need not be in the machine, at
twelve budgets from the least possible to what no checkpointing needs; and at the peak of each row that `memory_vs_peers.py`
has. Compiled, nothing is run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/plan_under_budgets.py                                 # all of it, in several calls
    JAX_PLATFORMS=cpu python benchmarks/plan_under_budgets.py --workloads transformer-2048 --targets h200

Plans of one workload and target run in one process and know what was compiled for the ones before, but for the columns
"alone": those began with nothing known.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _results import RESULTS, load, save, write_section
from _systems import Stack, as_tuple, loss_and_gradients, workloads
from tqdm import tqdm

from jaxckpt import checkpoint_scan, explain, plan
from jaxckpt.planning import search

GIB = 2**30
WORKLOADS = ("transformer-2048", "pairformer-384", "pairformer-768")
TARGETS = ("h200", "a100-80gb")
BUDGETS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads(), default=WORKLOADS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--alone", type=int, default=3, help="of how many budgets the plan is made with nothing known, too")
    parser.add_argument("--again", action="store_true", help="also what was planned with this version of JAX before")
    parser.add_argument("--minutes", type=float, default=8, help="start no workload after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "plan_under_budgets.json"
    found = {(entry["workload"], entry["target"], entry["jax"]): entry for entry in load(path, "workloads")}
    begin = time.monotonic()
    for name in options.workloads:
        for target in options.targets:
            key = name, target, jax.__version__
            if (key in found and not options.again) or time.monotonic() > begin + 60 * options.minutes:
                continue
            found[key] = {"workload": name, "target": target, "jax": jax.__version__, **planned(name, target, options.alone)}
            entries = [found[k] for k in sorted(found)]
            save(path, "workloads", entries)
            write_section("plan_under_budgets", "\n\n".join([INTRODUCTION, *map(table, entries)]), options.out)
    print("\n\n".join(table(found[key]) for key in sorted(found)))


def step_of(stack: Stack) -> Any:
    run = checkpoint_scan(stack.apply, plan="auto")

    def step(params: Any, carry: Any, shared: Any) -> Any:
        return loss_and_gradients(lambda p, c, s: as_tuple(run(p, *c, **s)), params, carry, shared)

    return step


def planned(name: str, target: str, alone: int) -> dict[str, Any]:
    """Plans at twelve budgets, and at the peaks of other systems."""
    stack = workloads()[name]
    step, arguments = step_of(stack), stack.arguments()
    search.forget()
    least = plan(step, *arguments, objective="memory", budget="9999GiB", target=target, progress=False)
    everything = [row["peak_bytes"] for row in peers(name, target) if row["setting"].endswith("everything")]
    most = max([least.most_bytes, *everything])
    rows = []
    budgets = np.geomspace(least.peak_bytes, most, BUDGETS).astype(int).tolist()
    for budget in tqdm(budgets, desc=f"{name} for {target}"):
        rows.append(row_of(step, arguments, budget, target))
    against = []
    for row in tqdm(peers(name, target), desc="at the memory of others"):
        own = row_of(step, arguments, row["peak_bytes"], target)
        against.append(
            {**own, "system": row["system"], "setting_of_system": row["setting"], "system_runs": row["forward_runs"]}
        )
    for i in np.linspace(0, BUDGETS - 1, alone).astype(int):
        search.forget()
        jax.clear_caches()
        rows[i]["seconds_alone"] = row_of(step, arguments, budgets[i], target)["seconds"]
    return {"title": stack.title, "least_bytes": least.peak_bytes, "most_bytes": most, "budgets": rows, "against": against}


def row_of(step: Any, arguments: Any, budget: int, target: str) -> dict[str, Any]:
    begin = time.monotonic()
    found = plan(step, *arguments, budget=budget, target=target, progress=False)
    seconds = round(time.monotonic() - begin, 1)
    chosen = found.chosen
    fields = {"setting": chosen.setting, "peak_bytes": found.peak_bytes, "predicted_bytes": chosen.predicted_bytes}
    return {
        "budget_bytes": budget,
        **fields,
        "runs": chosen.forward_runs,
        "model_seconds": chosen.seconds,
        "seconds": seconds,
    }


def peers(name: str, target: str) -> list[dict[str, Any]]:
    """The rows of `memory_vs_peers.py`: other systems', and ours with one fixed policy."""
    found = []
    for row in load(RESULTS / "memory_vs_peers.json", "rows"):
        ours = row["system"] == "jaxckpt"
        is_fixed = not any(word in row["setting"] for word in ("stages", "snapshots", "offload", "reversal", "cheap"))
        if (row["workload"], row["target"], row["jax"]) == (name, target, jax.__version__) and "peak_bytes" in row:
            if ours and not is_fixed:
                continue
            runs = row["forward_runs"] or runs_of_policy(name, target, row["setting"])
            if runs is not None:
                found.append({**row, "forward_runs": runs})
    return found


def runs_of_policy(name: str, target: str, setting: str) -> float | None:
    """Of a policy whose runs depend on the block, by the time model: our own stack with that policy."""
    policy = next((word for word in ("dots_no_batch", "dots") if word in setting), None)
    per_chunk = setting.partition("blocks_per_ckpt=")[2].partition(",")[0]
    if policy is None:
        return None
    stack = workloads()[name]
    run = checkpoint_scan(stack.apply, policy=policy, blocks_per_ckpt=int(per_chunk) if per_chunk.isdigit() else None)
    params, carry, shared = stack.arguments()
    return explain(run, params, *carry, target=target, **shared).forward_runs


def clear_and_text(row: dict[str, Any]) -> tuple[bool, str]:
    """Whether a plan is clearly better than a system, and what it saves."""
    again, own = row["system_runs"] - 1, row["runs"] - 1
    less_memory = 1 - row["peak_bytes"] / row["budget_bytes"]
    less_again = 1 - own / again if again > 0.005 else 0.0
    runs_more = own > again + 0.005
    is_clear = not runs_more and (again - own >= 0.15 * max(again, 0.005) or less_memory >= 0.15)
    return is_clear, "runs more again: " * runs_more + f"{less_again:.0%} less run again, {less_memory:.0%} less memory"


INTRODUCTION = """## Plans under budgets

`plan_under_budgets.py` asks `jaxckpt.plan` for the fastest setting of a training step at twelve budgets, from the least
possible to what no checkpointing needs, and then at the peak of every system of `memory_vs_peers.py`. Peaks are what the
compiler says for the GPU that is named; nothing was run on one. Used: of the budget. Model: what the model said before that
setting was compiled, to what the compiler said. Runs: forward runs of a block in one step, parts of it by the time model.
Seconds: of the plan, on two CPU cores that had other jobs too, knowing what the plans before it compiled; alone: with
nothing known."""


def table(entry: dict[str, Any]) -> str:
    lines = [f"### {entry['title']}; planned for {entry['target']} with JAX {entry['jax']}", ""]
    lines += [
        "| budget GiB | peak GiB | used | model | runs | seconds | alone | setting |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in entry["budgets"]:
        used, model = row["peak_bytes"] / row["budget_bytes"], row["predicted_bytes"] / row["peak_bytes"]
        cells = [f"{row['budget_bytes'] / GIB:.2f}", f"{row['peak_bytes'] / GIB:.2f}", f"{used:.0%}", f"{model:.3f}"]
        cells += [f"{row['runs']:.2f}", f"{row['seconds']:.0f}", f"{row.get('seconds_alone', '')}", row["setting"]]
        lines.append("| " + " | ".join(cells) + " |")
    rows = entry["budgets"]
    kept = sum(row["peak_bytes"] <= row["budget_bytes"] for row in rows)
    times = [row["model_seconds"] for row in rows]
    off = [abs(row["predicted_bytes"] / row["peak_bytes"] - 1) for row in rows]
    monotone = "monotone" if times == sorted(times, reverse=True) else "not monotone"
    lines += ["", f"{kept} of {len(rows)} budgets kept; the time model is {monotone};"]
    lines += [
        f"the model is within 5% of the compiler in {sum(o <= 0.05 for o in off)} of {len(off)}, at most {max(off):.0%} off."
    ]
    return "\n".join([*lines, "", *dominance(entry["against"])])


def dominance(rows: list[dict[str, Any]]) -> list[str]:
    """The plan at the memory of each system: less is run again, or less memory is needed."""
    lines = [
        "| system | its peak GiB | its runs | the plan's peak | the plan's runs | verdict |",
        "|---|--:|--:|--:|--:|---|",
    ]
    verdicts = [clear_and_text(row) for row in rows]
    for row, (is_clear, text) in sorted(zip(rows, verdicts, strict=True), key=lambda pair: pair[0]["budget_bytes"]):
        names = f"{row['system']}, {row['setting_of_system']}"
        cells = [f"{row['budget_bytes'] / GIB:.2f}", f"{row['system_runs']:.2f}"]
        cells += [f"{row['peak_bytes'] / GIB:.2f}", f"{row['runs']:.2f}", f"**{text}**" if is_clear else text]
        lines.append("| " + " | ".join([names, *cells]) + " |")
    clear = sum(is_clear for is_clear, _ in verdicts)
    more = sum(row["runs"] > row["system_runs"] + 0.005 for row in rows)
    lines += ["", f"Of {len(rows)} rows the plan runs at least 15% less again, or needs 15% less memory, in {clear};"]
    lines += [f"it runs more again in {more}."]
    others = [row for row, (is_clear, _) in zip(rows, verdicts, strict=True) if not is_clear]
    if idle := sum(row["system_runs"] < 1.005 for row in others):
        lines += [
            f"In {idle} of the others nothing is run again, by the system or by the plan, which stores less all the same."
        ]
    if close := len(others) - idle:
        lines += [f"In {close} the plan runs less again and needs less memory, each by less than 15%."]
    return lines if rows else []


if __name__ == "__main__":
    main()
