"""What only a GPU can tell: real peaks, gradients, seconds, the largest crop, and rates, in one call of nine minutes.

For a machine with one GPU that `jaxckpt.targets` knows, JAX, Flax, and torch if it is to be compared. Measurements are made
in order of their worth, each in a process of its own, and written to the folder as soon as they are made; after `--minutes`
nothing new begins, and the next call with the same folder goes on, with all that was compiled so far.

    PYTHONPATH=. python benchmarks/on_gpu.py --out benchmarks/results                  # on the machine with the GPU
    PYTHONPATH=. python benchmarks/on_gpu.py --out FOLDER --dry-run                     # all of it, small, on a CPU
    PYTHONPATH=. python benchmarks/on_gpu.py --out benchmarks/results --beforehand h200 # compiles the programs without a GPU
    PYTHONPATH=. python benchmarks/on_gpu.py --out benchmarks/results --table           # writes the tables again

(a) the peak that is compiled for the GPU by its name against that of a run; (b) gradients of what offloads; (c) seconds of a
step, and torch's; (d) the time model against them; (e) the largest crop that trains; (f) the link to the host and rates.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _gpu_cache
import _gpu_report
from _gpu_job import OUT_OF_TIME, Job, Row, row_of
from _gpu_list import CROPS, Measurement, crop_guess, measurements, next_crop, programs
from _journal import Journal, read
from _race import NOT_INSTALLED
from _results import RESULTS, write_section

_PATIENCE = {"about": 60, "peak": 150, "gradients": 240, "rates": 60, "race": 600, "torch": 300, "crop": 180, "compile": 900}
_GRACE = 40  # seconds after the last minute in which what has begun may end
_SHARE = {"peak": "0.9", "race": "0.95", "crop": "0.95"}  # of the GPU, which JAX takes at once
_DRY_LIMIT = 8 * 2**20  # stands for the memory of a GPU
_SAME = ("device", "driver", "machine", "target")  # of all calls that share a folder, beside versions


def main() -> int:
    options = parse()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.table:
        return write_tables(out)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another call works in {out}: wait for it, or name another folder with --out", file=sys.stderr)
        return 2
    try:
        call = Beforehand(options) if options.beforehand else OnDevice(options)
    except (ValueError, RuntimeError) as error:
        print(f"on_gpu: {error}", file=sys.stderr)
        return 2
    try:
        call.run()
    except KeyboardInterrupt:
        print("stopped; the next call with this folder goes on", file=sys.stderr)
    left = _gpu_cache.pack(out)
    if left:
        print(f"{left} compiled files had no room in the packed cache", file=sys.stderr)
    return write_tables(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of results and what was compiled")
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing after them (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dry-run", action="store_true", help="small sizes, on the CPU")
    which.add_argument(
        "--beforehand", metavar="TARGET", help="compile for a GPU that is not there, such as h200; run nothing"
    )
    which.add_argument("--table", action="store_true", help="only make the tables of what is in the folder")
    return parser.parse_args()


def write_tables(out: Path) -> int:
    """The tables of a folder, printed, beside its results, and in the README of the benchmarks where it is theirs."""
    text = _gpu_report.section(out)
    if out.resolve() == RESULTS:
        write_section("on_gpu", text, RESULTS.parent / "README.md")
    else:
        (out / "on_gpu.md").write_text(text + "\n")
    print(text)
    return 0


class OnDevice:
    """A call that measures."""

    def __init__(self, options: argparse.Namespace):
        """Looks at the machine, and opens the folder.

        Raises:
            RuntimeError: there is no GPU that `jaxckpt.targets` knows.
            ValueError: the folder is from another device or other versions.
        """
        self.out, self.dry = options.out, options.dry_run
        self.until = time.time() + 60 * options.minutes
        _gpu_cache.unpack(self.out)
        self.beforehand: dict[str, Row] = {}
        asked = Job("about", "", ("about",), self.dry, "", self.until, "", {})
        found: Row = next(iter(self._process(asked)), {"error": "no answer"})
        if "error" in found:
            raise RuntimeError(f"JAX does not start: {found['error']}; see {self.out / 'on_gpu.log'}")
        if not self.dry and found["platform"] != "gpu":
            raise RuntimeError(
                f"no GPU: JAX finds {found['device']!r} only. --dry-run makes small ones of all measurements on the CPU; "
                "--beforehand h200 compiles for a GPU that is not there"
            )
        self.target = "cpu" if self.dry else found["target"]
        if self.target is None:
            raise RuntimeError(f"{found['device']!r} is no GPU that jaxckpt.targets knows: add a file of facts about it")
        about = {name: found[name] for name in _SAME if name in found} | found["versions"]
        self.journal = Journal(self.out / "on_gpu.jsonl", {**about, "dry_run": self.dry})
        self.memory_bytes = found["limit"]
        self.left: set[str] = set()  # for the next call
        if not self.dry:
            compiled_with, rows = read(RESULTS / "on_gpu_beforehand.jsonl")
            same = compiled_with.get("target") == self.target and compiled_with.get("jax") == found["versions"]["jax"]
            self.beforehand = rows if same else {}
        for row in [row for row in self.journal.rows.values() if row.get("error") == NOT_INSTALLED]:
            del self.journal.rows[row["key"]]  # perhaps it is now

    def run(self) -> None:
        for measurement in measurements(self.dry):
            while (settings := self._owed(measurement)) and time.time() < self.until:
                print(
                    f"{self._left():4.0f} s left: {measurement.kind}, {measurement.workload}: {'; '.join(settings)}",
                    flush=True,
                )
                self._measure(measurement, settings)

    def _left(self) -> float:
        return self.until - time.time()

    def _owed(self, m: Measurement) -> tuple[str, ...]:
        """The rows of a measurement that are still to be made, by its next process."""
        if m.kind != "crop":
            return tuple(s for s in m.settings if m.key(s) not in self.journal.rows and m.key(s) not in self.left)
        (name,) = m.settings
        tried = {row["tokens"]: row["trains"] for key, row in self.journal.rows.items() if key.startswith(m.key(name) + "/")}
        tokens = next_crop(tried, crop_guess(CROPS[name], self.beforehand, self.memory_bytes))
        return () if tokens is None else (f"{name}/{tokens}",)

    def _measure(self, m: Measurement, settings: tuple[str, ...]) -> None:
        limit = _DRY_LIMIT if self.dry and m.kind == "crop" else None
        folder = str(self.out / "cache")
        job = Job(m.kind, m.workload, settings, self.dry, self.target, self.until, folder, self.beforehand, limit)
        begin = time.time()
        for row in self._process(job):
            if row.items() >= OUT_OF_TIME.items():
                self.left.add(m.key(row["setting"]))
                continue
            clock = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **_gpu_clock(self.dry)}
            self.journal.add({"key": m.key(row.pop("setting")), **row, **clock})
        missing = [s for s in settings if m.key(s) not in self.journal.rows and m.key(s) not in self.left]
        # What the end of the call cut short is made by the next; what ended by itself, or took too long, is a row.
        if time.time() < self.until:
            for setting in missing:
                row = {"error": f"the process ended after {time.time() - begin:.0f} s without a result"}
                if m.kind == "crop":
                    row |= {"tokens": int(setting.partition("/")[2]), "trains": False}
                self.journal.add({"key": m.key(setting), **row})

    def _process(self, job: Job) -> Iterator[Row]:
        return run_process(job, self.out, self.until + _GRACE)


class Beforehand:
    """A call that compiles for a GPU that is not there."""

    def __init__(self, options: argparse.Namespace):
        self.out, self.target = options.out, options.beforehand
        self.until = time.time() + 60 * options.minutes
        job = Job("about", "", ("about",), True, "", self.until, "", {})
        found = next(iter(run_process(job, self.out, self.until)))
        about = {"target": self.target, "jax": found["versions"]["jax"], "flax": found["versions"]["flax"]}
        self.journal = Journal(self.out / "on_gpu_beforehand.jsonl", about)

    def run(self) -> None:
        for workload, setting in programs():
            key = f"compile/{workload}/{setting}"
            if key in self.journal.rows or time.time() > self.until:
                continue
            print(f"{self.until - time.time():4.0f} s left: {workload}: {setting}", flush=True)
            job = Job(
                "compile", workload, (setting,), False, self.target, self.until, str(self.out / "cache"), self.journal.rows
            )
            for row in run_process(job, self.out, time.time() + _PATIENCE["compile"], on_cpu=True):
                del row["setting"]
                self.journal.add({"key": key, **row})


def run_process(job: Job, out: Path, end: float, on_cpu: bool = False) -> Iterator[Row]:
    """The rows of a process, each as it is printed; the process is ended when it takes too long, or at the time `end`."""
    here = Path(__file__).parent
    variables = {**os.environ, **_gpu_cache.variables(out)}
    paths = [str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables |= {"PYTHONPATH": os.pathsep.join(paths)}
    if job.dry or on_cpu or job.kind == "torch":
        variables["JAX_PLATFORMS"] = "cpu"
    if job.dry:
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    share = _SHARE.get(job.kind)
    variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false" if share is None else "true"
    variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = share or "0.95"
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((out / "on_gpu.log").open("a"))
        command = [sys.executable, str(here / "_gpu_process.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = stack.enter_context(subprocess.Popen(command, **pipes, env=variables, text=True))
        timer = threading.Timer(max(1.0, min(_PATIENCE[job.kind], end - time.time())), process.kill)
        timer.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if (row := row_of(line)) is not None:
                    yield row
        except BrokenPipeError:
            pass  # it ended before it was asked
        finally:
            timer.cancel()
            process.kill()


def _gpu_clock(dry: bool) -> dict[str, Any]:
    """The GPU's clocks, as its driver says, just after a measurement."""
    if dry:
        return {}
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split(",")
        return dict(zip(("sm_mhz", "memory_mhz", "celsius"), map(int, said), strict=True))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}


if __name__ == "__main__":
    sys.exit(main())
