"""Is what `plan` finds as fast as the best named policy that needs as much memory? In real seconds.

For each named policy, with and without chunks, its peak is the budget of a plan that times its best few (`time=True`). The
plan then races against the fastest named policy whose peak is no larger: in turns, medians of the ratios of pairs.

    python benchmarks/plan_vs_policies.py

Small stacks, on the CPU; `on_gpu.py` races a plan on a GPU.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from _results import RESULTS, environment, load, save, write_section
from _systems import Stack, as_tuple, loss_and_gradients, values, workloads
from tqdm import tqdm

from jaxckpt import checkpoint_scan, measure, plan

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads(), default=["transformer-small", "pairformer-small"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "plan_vs_policies.json"
    about = environment()
    found = {(entry["workload"], entry["device"], entry["versions"]["jax"]): entry for entry in load(path, "workloads")}
    for name in options.workloads:
        entry = {"workload": name, **about, **raced(workloads()[name], options.pairs)}
        found[name, about["device"], about["versions"]["jax"]] = entry
        entries = [found[key] for key in sorted(found)]
        save(path, "workloads", entries)
        text = "\n\n".join([INTRODUCTION, *map(table, entries)])
        write_section("plan_vs_policies", text, options.out)
        print(table(entry))


def raced(stack: Stack, pairs: int) -> dict[str, Any]:
    arguments = values(stack)
    programs = {}
    for per_chunk in (None, stack.chunk):
        for policy in ("everything", "dots", "dots_no_batch", "nothing"):
            name = policy if per_chunk is None else f"{policy}, blocks_per_ckpt={per_chunk}"
            step = step_of(stack, blocks_per_ckpt=per_chunk, policy=policy)
            programs[name] = compiled(step, arguments), measure(step, *arguments, target="attached").peak_bytes
    seconds = {name: median_seconds(program, arguments) for name, (program, _) in tqdm(programs.items(), desc="named")}
    rows, plans = [], {}
    for name, (_, peak) in tqdm(sorted(programs.items(), key=lambda item: item[1][1]), desc="planned"):
        best = min((other for other, (_, needs) in programs.items() if needs <= peak), key=seconds.__getitem__)
        step = step_of(stack, plan="auto")
        found = plan(step, *arguments, budget=peak, target="attached", time=True, progress=False)
        setting = found.chosen.setting + str(next(iter(found.stacks.values())).knobs.kept)
        if setting not in plans:
            plans[setting] = compiled(found.around(step), arguments)
        ratios = []
        for _ in range(pairs):
            ratios.append(once(plans[setting], arguments) / once(programs[best][0], arguments))
        row = {"policy": name, "budget_bytes": peak, "best": best, "best_bytes": programs[best][1]}
        rows.append(
            {**row, "setting": found.chosen.setting, "peak_bytes": found.peak_bytes, "ratio": statistics.median(ratios)}
        )
    return {"title": stack.title, "rows": rows}


def step_of(stack: Stack, **knobs: Any) -> Any:
    run = checkpoint_scan(stack.apply, **knobs)

    def step(params: Any, carry: Any, shared: Any) -> Any:
        return loss_and_gradients(lambda p, c, s: as_tuple(run(p, *c, **s)), params, carry, shared)

    return step


def compiled(step: Any, arguments: Any) -> Any:
    return jax.jit(step).lower(*arguments).compile()


def once(program: Any, arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begin


def median_seconds(program: Any, arguments: Any) -> float:
    return statistics.median(once(program, arguments) for _ in range(7))


INTRODUCTION = """## Plans against named policies, in seconds

`plan_vs_policies.py` plans a training step for the peak of each named policy, timing the best few, and races what it found
against the fastest named policy that needs no more memory. Ratio: the plan's time to that policy's, the median of pairs run
in turns."""


def table(entry: dict[str, Any]) -> str:
    lines = [f"### {entry['title']}; run on {entry['device']} ({entry['machine']}) with JAX {entry['versions']['jax']}", ""]
    lines += [
        "| budget: the peak of | MiB | fastest policy within | its MiB | plan | its MiB | ratio |",
        "|---|--:|---|--:|---|--:|--:|",
    ]
    for row in entry["rows"]:
        cells = [row["policy"], f"{row['budget_bytes'] / MIB:.1f}", row["best"], f"{row['best_bytes'] / MIB:.1f}"]
        lines.append(
            "| " + " | ".join([*cells, row["setting"], f"{row['peak_bytes'] / MIB:.1f}", f"{row['ratio']:.2f}"]) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
