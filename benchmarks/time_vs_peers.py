"""How long does one training step of the same stack take under each system that can checkpoint it?

Computes the loss of a small stack and its gradients by the stacked parameters, on the CPU (`on_gpu.py` is for GPUs).
Systems take turns, one step each per round, so that a noisy machine is noisy for all; the ratio is the median over rounds of
a system's seconds to those of per-block remat under `checkpoint_scan` in the same round. Each must first reproduce loss
and gradients of a plain loop over a small stack. With torch installed, its `checkpoint_blocks` (`torch_ref`) runs the same
blocks with the same parameters, eager and compiled.

    PYTHONPATH=. python benchmarks/time_vs_peers.py

Two thirds of `--minutes` are for compiling, the rest for rounds. The next call races what was left out, with the same
reference, as long as device and JAX's version are the same.
"""

import argparse
import datetime
import functools
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from _race import NOT_INSTALLED, Entry, attempt, rounds, timed
from _results import RESULTS, environment, load, save, write_section
from _systems import (
    Stack,
    System,
    checked_error,
    gradient_error,
    loss_and_gradients,
    plain_loop,
    small,
    systems,
    version,
    workloads,
)
from _systems import values as values_of
from tqdm import tqdm

REFERENCE = ("jaxckpt", "blocks_per_ckpt=None, nothing")
PACKAGES = ("dm-haiku", "equinox", "haliax", "torch")
OUT_OF_TIME = "not compiled: out of time"
GIB = 2**30


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    path = options.out / "time_vs_peers.json"
    races = load(path, "races")
    race = {"workload": options.workload, "title": workloads()[options.workload].title, **environment(*PACKAGES)}
    rows = {name_of(row): row for other in races if key(other) == key(race) for row in other["rows"]}

    def is_wanted(entry: Entry) -> bool:
        is_asked = any(re.search(part, f"{entry.system} {entry.setting}") for part in options.systems or [""])
        return is_asked and (options.again or is_missing(rows.get((entry.system, entry.setting))))

    called = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for row in run_race(options.workload, is_wanted, 60 * options.minutes, options.rounds):
        row["called"] = called
        if row.get("error") != OUT_OF_TIME or name_of(row) not in rows:
            rows[name_of(row)] = row
    race["rows"] = [*rows.values()]
    races = [other for other in races if key(other) != key(race)] + [race]
    save(path, "races", sorted(races, key=key))
    write_section("time_vs_peers", section(races), options.out)
    print(table(race))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=workloads(), default="transformer-small")
    parser.add_argument("--systems", nargs="+", help="only those whose name and setting match a pattern")
    parser.add_argument("--again", action="store_true", help="also what ran here with this version of JAX before")
    parser.add_argument("--rounds", type=int, default=30, help="at most")
    parser.add_argument("--minutes", type=float, default=8, help="at least five rounds are run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def key(race: dict[str, Any]) -> tuple[str, ...]:
    return race["workload"], race["device"], race["versions"]["jax"]


def name_of(row: dict[str, Any]) -> tuple[str, str]:
    return row["system"], row["setting"]


def is_missing(row: dict[str, Any] | None) -> bool:
    return row is None or row.get("error") in (OUT_OF_TIME, NOT_INSTALLED)


# --- a race -------------------------------------------------------------------------------------------------------------


def run_race(name: str, is_wanted: Callable[[Entry], bool], seconds: float, most: int) -> list[dict[str, Any]]:
    """Compiles the systems that are wanted, the reference and torch first, and runs them in turns; a row for each."""
    begin = time.monotonic()
    stack = workloads()[name]
    arguments = jax.block_until_ready(values_of(stack))
    field = entries(stack, arguments, is_wanted)
    if len(field) == 1:
        return []  # nothing to race against the reference
    for entry in (bar := tqdm(field, unit="system", dynamic_ncols=True)):
        bar.set_description(f"{name}: {entry.system}, {entry.setting}")
        if entry is not field[0] and time.monotonic() > begin + seconds * 2 / 3:
            entry.row["error"] = OUT_OF_TIME
        else:
            attempt(entry, lambda entry=entry: entry.start and entry.start(entry))
    for entry in [e for e in field if e.step]:
        attempt(entry, lambda entry=entry: timed(entry))
    for i in (bar := tqdm(rounds(field, most), total=most, unit="round", desc=name, dynamic_ncols=True)):
        if not field[0].step or (i >= 4 and time.monotonic() > begin + seconds):
            bar.close()
            break
    return [finished(entry, field[0]) for entry in field]


def entries(stack: Stack, arguments: Any, is_wanted: Callable[[Entry], bool]) -> list[Entry]:
    """The reference, torch, and all other systems that are wanted."""
    found = [
        Entry(system.name, system.setting, functools.partial(start_jax, system, stack, arguments))
        for system in systems(stack)
        if not system.is_slow
    ]
    for per_chunk in (None, 1, stack.chunk):
        for is_compiled in (False, True):
            setting = f"blocks_per_ckpt={per_chunk}{', torch.compile' * is_compiled}"
            start = functools.partial(start_torch, stack, arguments, per_chunk, is_compiled)
            found.append(Entry("torch checkpoint_blocks", setting, start))
    is_reference = lambda e: (e.system, e.setting) == REFERENCE  # noqa: E731
    found = [entry for entry in found if is_wanted(entry) or is_reference(entry)]
    return sorted(found, key=lambda e: (not is_reference(e), not e.system.startswith("torch")))


def start_jax(system: System, stack: Stack, arguments: Any, entry: Entry) -> None:
    entry.row["package"] = f"{system.package} {version(system.package)}"
    entry.row["gradient_error"] = gradient_error(system, stack)
    begin = time.perf_counter()
    compiled = jax.jit(functools.partial(loss_and_gradients, system.build(stack))).lower(*arguments).compile()
    sizes: Any = compiled.memory_analysis()
    entry.row["compile_seconds"] = time.perf_counter() - begin
    entry.row["temp_bytes"] = sizes.temp_size_in_bytes
    entry.step = lambda: jax.block_until_ready(compiled(*arguments))


def start_torch(stack: Stack, arguments: Any, blocks_per_ckpt: int | None, is_compiled: bool, entry: Entry) -> None:
    entry.row["package"] = f"torch {version('torch')}"
    from _torch_stack import TorchStep

    kind = type(stack.block).__name__
    tiny = small(kind)
    per_chunk = blocks_per_ckpt and min(blocks_per_ckpt, tiny.chunk)
    on_tiny = TorchStep(tiny, values_of(tiny), per_chunk, is_compiled=False)
    entry.row["gradient_error"] = checked_error(on_tiny.as_flax(on_tiny()), plain_loop(kind))
    step = TorchStep(stack, arguments, blocks_per_ckpt, is_compiled)
    begin = time.perf_counter()
    step()
    entry.row["compile_seconds"] = time.perf_counter() - begin
    entry.step = step


def finished(entry: Entry, reference: Entry) -> dict[str, Any]:
    row = {"system": entry.system, "setting": entry.setting, **entry.row}
    if "error" in row or "error" in reference.row or not entry.seconds:
        return {"error": "no ratio: the reference failed", **row}
    ratios = [mine / other for mine, other in zip(entry.seconds, reference.seconds, strict=True)]
    return {**row, "seconds": statistics.median(entry.seconds), "ratio": statistics.median(ratios), "ratios": ratios}


# --- tables -------------------------------------------------------------------------------------------------------------


def section(races: list[dict[str, Any]]) -> str:
    return "\n\n".join([INTRODUCTION, *map(table, sorted(races, key=key))])


INTRODUCTION = """## Seconds of one training step, by system

`time_vs_peers.py`: one step of each system per round, in turns; ratio: the median over rounds of a system's seconds to those
of `checkpoint_scan` with per-block remat in the same round, and in brackets the smallest and the largest. Torch's blocks are
those of `torch_ref`, with the same parameters. On GPUs `on_gpu.py` measures the like."""


def table(race: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in race["versions"].items() if number != "not installed")
    lines = [f"### {race['title']}; run on {race['device']} ({race['machine']})", "", versions, ""]
    lines += ["| system | setting | seconds | ratio | temp GiB |", "|---|---|--:|--:|--:|"]
    rows = sorted(race["rows"], key=lambda row: row.get("ratio", float("inf")))
    lines += ["| " + " | ".join([row["system"], row["setting"], *cells(row)]) + " |" for row in rows]
    return "\n".join([*lines, "", said]) if (said := engines(race["rows"])) else "\n".join(lines)


def engines(rows: list[dict[str, Any]]) -> str:
    """The reversal engine's seconds to the scan engine's in the same round, for settings that raced in one call."""
    ours = {row["setting"]: row for row in rows if row["system"] == "jaxckpt" and "ratios" in row}
    found = []
    for setting, row in ours.items():
        other = ours.get(setting.removesuffix(', engine="reversal"'))
        if other is None or other is row or other.get("called") != row.get("called"):
            continue
        paired = statistics.median(a / b for a, b in zip(row["ratios"], other["ratios"], strict=True))
        found.append(f"`{other['setting']}` {paired:.2f}")
    return f"Reversal engine to scan engine, median over rounds: {', '.join(sorted(found))}." if found else ""


def cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "/"), "", ""]
    ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
    return [f"{row['seconds']:.3g}", ratio, f"{row['temp_bytes'] / GIB:.2f}" if "temp_bytes" in row else ""]


if __name__ == "__main__":
    main()
