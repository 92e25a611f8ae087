"""How much memory does one training step of the same stack need under each system that can checkpoint it?

Compiles the loss of a stack and its gradients by the stacked parameters for GPUs that need not be in the machine. Every
system gets the same pure function of one Flax block and the same parameters, checkpoints it in its own way, and must first
reproduce loss and gradients of a plain loop over a small stack (float32, on the CPU). No number is of a run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/memory_vs_peers.py                         # Pairformer of 768 tokens, for H200
    JAX_PLATFORMS=cpu python benchmarks/memory_vs_peers.py --workloads transformer-2048 --targets h200 a100-80gb
    JAX_PLATFORMS=cpu python benchmarks/memory_vs_peers.py --full                  # everything, in several calls

A call starts no compilation after `--minutes`; the next call goes on where it stopped, as long as JAX's version is the same.
With `--full` a Python loop over the blocks is compiled too, one in a call, as far as `PATIENCE` seconds go.
Peers: pip install dm-haiku equinox && pip install --pre haliax
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from _results import RESULTS, in_a_child, load, save, write_section
from _systems import Stack, System, gradient_error, loss_and_gradients, run_quickly, systems, version, workloads
from tqdm import tqdm

from jaxckpt import measure

PATIENCE = 480  # seconds for a system that is slow to compile
FULL = ["pairformer-384", "pairformer-512", "pairformer-768", "transformer-2048", "mlp-4096"]
SHOWN = [*FULL, "pairformer-768x192", "pairformer-2048", "evoformer-128x256", "evoformer-512x384", "mlp-128"]
GIB = 2**30


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if options.child:
        name, target, *which = options.child
        system = next(system for system in systems(workloads()[name]) if [system.name, system.setting] == which)
        print(json.dumps(measured(name, target, system, checks=())))
        return
    path = options.out / "memory_vs_peers.json"
    rows = {key(row): row for row in load(path, "rows")}
    wanted = [job for job in jobs(options) if options.again or is_missing(rows.get(key(identity(*job))))]
    begin = time.monotonic()
    for job in (bar := tqdm(wanted, unit="row", dynamic_ncols=True)):
        if time.monotonic() > begin + (30 if job[2].is_slow else 60 * options.minutes):
            bar.write(f"the time is over: call again for the other {len(wanted) - bar.n} rows")
            break
        bar.set_description(" ".join(identity(*job)[field] for field in ("workload", "target", "system", "setting")))
        row = measured_in_time(*job) if job[2].is_slow else measured(*job, checks=rows.values())
        rows[key(row)] = row
        write(path, [*rows.values()])
    asked = {(name, target) for name, target, _ in jobs(options)}
    print("\n\n".join(tables([row for row in rows.values() if (row["workload"], row["target"]) in asked])))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads(), default=["pairformer-768"])
    parser.add_argument("--targets", nargs="+", default=["h200"], help="names or files, see jaxckpt.targets")
    parser.add_argument("--systems", nargs="+", help="only those whose name or setting contains one of these")
    parser.add_argument("--full", action="store_true", help="all workloads, for H200 and A100 80 GB, slow systems too")
    parser.add_argument("--again", action="store_true", help="also what was measured with this version of JAX before")
    parser.add_argument("--minutes", type=float, default=6, help="start nothing after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full:
        options.workloads, options.targets = FULL, ["h200", "a100-80gb"]
    return options


def jobs(options: argparse.Namespace) -> list[tuple[str, str, System]]:
    """What is asked for, slow systems last."""
    return [
        (name, target, system)
        for slow in (False, True)
        for name in options.workloads
        for target in options.targets
        for system in systems(workloads()[name])
        if system.is_slow == slow <= options.full
        and any(part in f"{system.name} {system.setting}" for part in options.systems or [""])
    ]


# --- a row of the result ------------------------------------------------------------------------------------------------


def identity(name: str, target: str, system: System) -> dict[str, Any]:
    fields = {"workload": name, "target": target, "system": system.name, "setting": system.setting}
    return {**fields, "jax": jax.__version__}


def described(name: str, target: str, system: System) -> dict[str, Any]:
    stack = workloads()[name]
    about = {"title": stack.title, "block": type(stack.block).__name__, "length": stack.length}
    return {**identity(name, target, system), **about}


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[field] for field in ("workload", "target", "system", "setting", "jax"))


def is_missing(row: dict[str, Any] | None) -> bool:
    return row is None or row.get("error") == "not installed"


def measured(name: str, target: str, system: System, checks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    stack, row = workloads()[name], described(name, target, system)
    try:
        row["package"] = f"{system.package} {version(system.package)}"
        row |= checked(row, system, stack, checks)
        found = measure(functools.partial(loss_and_gradients, system.build(stack)), *stack.arguments(), target=target)
    except importlib.metadata.PackageNotFoundError:
        return {**row, "error": "not installed"}
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    sizes = found.to_json()
    fields = ("device", "peak_bytes", "temp_bytes", "argument_bytes", "output_bytes", "host_bytes", "memory_bytes")
    return {**row, **{field: sizes[field] for field in fields}, "compile_seconds": round(found.compile_seconds, 1)}


def measured_in_time(name: str, target: str, system: System) -> dict[str, Any]:
    """The row of a slow system, from a process that is given up after `PATIENCE` seconds."""
    found = in_a_child(__file__, name, target, system.name, system.setting, seconds=PATIENCE)
    return {**described(name, target, system), **found}


def checked(row: dict[str, Any], system: System, stack: Stack, checks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The gradients' error and the counted runs, from a row of the same system and block if there is one."""
    same = ("block", "length", "system", "setting", "jax", "package")
    for other in checks:
        if "forward_runs" in other and all(row[field] == other[field] for field in same):
            return {field: other[field] for field in ("gradient_error", "forward_runs")}
    error = gradient_error(system, stack)
    return {"gradient_error": error, "forward_runs": None if system.depends_on_block else forward_runs(system, stack)}


class CountedBlock(nn.Module):
    """A scalar block that counts its runs, through a value so that no run is left out or hoisted."""

    count: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        @jax.custom_jvp
        def counted(x):
            return jax.pure_callback(self.count, jax.ShapeDtypeStruct((), jnp.float32), x)

        counted.defjvp(lambda primals, tangents: (counted(*primals), *tangents))
        return jnp.sin(self.param("w", nn.initializers.ones, ()) * counted(x))


def forward_runs(system: System, stack: Stack) -> float:
    """How often the schedule runs a block in one training step, counted in a stack of the same length."""
    runs = []

    def count(x):
        runs.append(x)
        return x

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    counted = dataclasses.replace(stack, block=CountedBlock(count), carry=(scalar,), shared={})
    jax.block_until_ready(run_quickly(functools.partial(loss_and_gradients, system.build(counted)), counted))
    return round(len(runs) / stack.length, 2)


# --- tables -------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the JSON and the tables."""
    save(path, "rows", sorted(rows, key=key))
    shown = [row for row in rows if row["workload"] in SHOWN]
    write_section("memory_vs_peers", "\n\n".join([INTRODUCTION, *tables(shown)]), path.parent)


INTRODUCTION = """## Memory of one training step, by system

`memory_vs_peers.py` gives every system the same block and the same stacked parameters. Loss and gradients of each equal
those of a plain loop on a small stack. Bytes are what the compiler allocates for the loss and the parameters' gradients,
compiled for the GPU that is named; nothing was run on one. Peak: temporaries, arguments and outputs; "too large" where that
is more than the GPU's memory, though XLA itself then tried to recompute. Forward runs: how often each block is run in one
step, counted; blank where that depends on the block. Policies: of `jax.checkpoint`, by the names of this package. Compile
times are of one noisy machine."""


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One table per workload, target and version of JAX, rows sorted by peak."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["workload"], row["target"], row["jax"])):
        groups.setdefault((row["title"], row["target"], row["jax"]), []).append(row)
    return [table(*group, rows) for group, rows in groups.items()]


def table(title: str, target: str, jax_version: str, rows: list[dict[str, Any]]) -> str:
    device = next((row["device"] for row in rows if "device" in row), target)
    lines = [f"### {title}; compiled for {device} with JAX {jax_version}", ""]
    lines += ["| system | setting | peak GiB | temp GiB | forward runs | compile s |", "|---|---|--:|--:|--:|--:|"]
    ordered = sorted(rows, key=lambda row: (row.get("peak_bytes", float("inf")), row["system"], row["setting"]))
    lines += ["| " + " | ".join([row["system"], row["setting"], *cells(row)]) + " |" for row in ordered]
    return "\n".join([*lines, "", said] if (said := engines(rows)) else lines)


def engines(rows: list[dict[str, Any]]) -> str:
    """The reversal engine's peak to the scan engine's, for the same settings."""
    ours = {row["setting"]: row["peak_bytes"] for row in rows if row["system"] == "jaxckpt" and "peak_bytes" in row}
    pairs = {setting: setting.removesuffix(', engine="reversal"') for setting in ours}
    found = [f"`{a}` {ours[b] / ours[a]:.3f}" for b, a in pairs.items() if a != b and a in ours]
    return f"Peak of the reversal engine to that of the scan engine: {', '.join(sorted(found))}." if found else ""


def cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "/"), "", "", ""]
    too_large = ", too large" if row["memory_bytes"] and row["peak_bytes"] > row["memory_bytes"] else ""
    runs = "" if row["forward_runs"] is None else f"{row['forward_runs']:.2f}"
    sizes = [f"{row['peak_bytes'] / GIB:.2f}{too_large}", f"{row['temp_bytes'] / GIB:.2f}"]
    return [*sizes, runs, f"{row['compile_seconds']:.0f}"]


if __name__ == "__main__":
    main()
