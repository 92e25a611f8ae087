"""How long does one training step of the same stack take under each system that can checkpoint it?

Computes the loss of a stack and its gradients by the stacked parameters, on the device that JAX picks: small stacks on a
CPU, those of `memory_vs_peers.py` on a GPU. Systems take turns, one step each per round, so that a noisy machine is noisy
for all; the ratio is the median over rounds of a system's seconds to those of per-block remat under `checkpoint_scan` in the
same round. Each must first reproduce loss and gradients of a plain loop over a small stack. With torch installed, its
`checkpoint_blocks` (`torch_ref`) runs the same blocks with the same parameters on the same device, eager and compiled.

    PYTHONPATH=. python benchmarks/time_vs_peers.py
    PYTHONPATH=. python benchmarks/time_vs_peers.py --workload pairformer-384 --systems jaxckpt torch    # on a GPU

JAX's allocator never gives memory back: where torch runs too, systems whose peak is over 45% of the GPU are left out.
Two thirds of `--minutes` are for compiling, the rest for rounds. The next call races what was left out, with the same
reference, as long as device and JAX's version are the same.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave torch its share of the GPU
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
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
OUT_OF_TIME, NOT_INSTALLED = "not compiled: out of time", "not installed"
GIB = 2**30


@dataclasses.dataclass
class Entry:
    """A system in the race: `start` compiles it, `step` runs one training step to its end."""

    system: str
    setting: str
    start: Callable[["Entry"], None]
    step: Callable[[], Any] | None = None
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    path = options.out / "time_vs_peers.json"
    races = load(path, "races")
    race = {"workload": options.workload, "title": workloads()[options.workload].title, **environment(*PACKAGES)}
    rows = {name_of(row): row for other in races if key(other) == key(race) for row in other["rows"]}

    def is_wanted(entry: Entry) -> bool:
        is_asked = any(part in f"{entry.system} {entry.setting}" for part in options.systems or [""])
        return is_asked and (options.again or is_missing(rows.get((entry.system, entry.setting))))

    called = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for row in run_race(options.workload, is_wanted, 60 * options.minutes, options.rounds):
        row["called"] = called
        if row.get("error") != OUT_OF_TIME or name_of(row) not in rows:
            rows[name_of(row)] = row
    race["rows"] = [*rows.values()]
    races = [other for other in races if key(other) != key(race)] + [race]
    save(path, "races", sorted(races, key=key))
    write_section("time_vs_peers", section(races), options.out.parent / "README.md")
    print(table(race))


def parse() -> argparse.Namespace:
    default = "transformer-2048" if jax.default_backend() == "gpu" else "transformer-small"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=workloads(), default=default)
    parser.add_argument("--systems", nargs="+", help="only those whose name or setting contains one of these")
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


def run_race(name: str, is_wanted: Callable[[Entry], bool], seconds: float, rounds: int) -> list[dict[str, Any]]:
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
            attempt(entry, lambda entry=entry: entry.start(entry))
    leave_out_the_large([e for e in field if e.step])
    # The allocator counts its peak from the start of the process, so what needs less runs first: a peak that has not
    # risen is another's.
    for entry in sorted((e for e in field if e.step), key=lambda e: e.row.get("compiled_peak_bytes", 0)):
        attempt(entry, lambda entry=entry: warm_up(entry))
    for i in tqdm(range(rounds), unit="round", desc=name, dynamic_ncols=True):
        running = [entry for entry in field if entry.step]
        if not field[0].step or (i >= 5 and time.monotonic() > begin + seconds):
            break
        for entry in running[i % len(running) :] + running[: i % len(running)]:
            attempt(entry, lambda entry=entry: entry.seconds.append(timed(entry)))
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


def leave_out_the_large(field: list[Entry]) -> None:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return
    limit *= 0.45 if any(entry.system.startswith("torch") for entry in field) else 0.95
    for entry in field:
        if (size := entry.row.get("compiled_peak_bytes", 0)) > limit:
            entry.row["error"], entry.step = f"not run: needs {size / GIB:.0f} GiB, more than its share", None


def attempt(entry: Entry, action: Callable[[], Any]) -> None:
    """Runs `action`; where it fails the entry leaves the race, with the reason."""
    try:
        action()
    except importlib.metadata.PackageNotFoundError:
        entry.row["error"], entry.step = NOT_INSTALLED, None
    except Exception as error:
        entry.row["error"], entry.step = f"{type(error).__name__}: {error}".splitlines()[0][:200], None


def start_jax(system: System, stack: Stack, arguments: Any, entry: Entry) -> None:
    entry.row["package"] = f"{system.package} {version(system.package)}"
    entry.row["gradient_error"] = gradient_error(system, stack)
    begin = time.perf_counter()
    compiled = jax.jit(functools.partial(loss_and_gradients, system.build(stack))).lower(*arguments).compile()
    sizes: Any = compiled.memory_analysis()
    entry.row["compile_seconds"] = time.perf_counter() - begin
    entry.row["temp_bytes"] = sizes.temp_size_in_bytes
    entry.row["compiled_peak_bytes"] = (
        sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )
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
    entry.row["runtime_peak_bytes"] = step.peak_bytes()
    entry.step = step


def warm_up(entry: Entry) -> None:
    assert entry.step is not None
    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("peak_bytes_in_use")
    timed(entry)
    after = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if "compiled_peak_bytes" in entry.row and before is not None and after > before:
        entry.row["runtime_peak_bytes"] = after


def timed(entry: Entry) -> float:
    assert entry.step is not None
    begin = time.perf_counter()
    entry.step()
    seconds = time.perf_counter() - begin
    if hasattr(entry.step, "release"):
        entry.step.release()  # pyright: ignore[reportFunctionMemberAccess]
    return seconds


def finished(entry: Entry, reference: Entry) -> dict[str, Any]:
    row = {"system": entry.system, "setting": entry.setting, **entry.row}
    if "error" in row or "error" in reference.row or not entry.seconds:
        return {"error": "no ratio: the reference failed", **row}
    ratios = [mine / other for mine, other in zip(entry.seconds, reference.seconds, strict=True)]
    return {**row, "seconds": statistics.median(entry.seconds), "ratio": statistics.median(ratios), "ratios": ratios}


# --- tables -------------------------------------------------------------------------------------------------------------


def section(races: list[dict[str, Any]]) -> str:
    on_gpu = any("driver" in race for race in races)
    said = "" if on_gpu else " **No run on a GPU has been made yet.**"
    return "\n\n".join([INTRODUCTION + said, *map(table, sorted(races, key=key))])


INTRODUCTION = """## Seconds of one training step, by system

`time_vs_peers.py`: one step of each system per round, in turns; ratio: the median over rounds of a system's seconds to those
of `checkpoint_scan` with per-block remat in the same round, and in brackets the smallest and the largest. Torch's blocks are
those of `torch_ref`, with the same parameters. Runtime peak: of JAX's allocator, and `torch.cuda.max_memory_allocated`; CPUs
count none."""


def table(race: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in race["versions"].items() if number != "not installed")
    driver = f", driver {race['driver']}" if "driver" in race else ""
    lines = [f"### {race['title']}; run on {race['device']} ({race['machine']}{driver})", "", versions, ""]
    lines += ["| system | setting | seconds | ratio | temp GiB | runtime peak GiB |", "|---|---|--:|--:|--:|--:|"]
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
        return [row["error"].replace("|", "/"), "", "", ""]
    ratio = f"{row['ratio']:.2f} ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"
    sizes = [f"{size / GIB:.2f}" if (size := row.get(field)) else "" for field in ("temp_bytes", "runtime_peak_bytes")]
    return [f"{row['seconds']:.3g}", ratio, *sizes]


if __name__ == "__main__":
    main()
