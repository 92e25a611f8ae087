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
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import _gpu_cache
import _gpu_report
from _gpu_job import Job, Row, begun, row_of
from _gpu_list import CROPS, Measurement, crop_guess, measurements, next_crop, programs
from _journal import Journal, read
from _race import NOT_INSTALLED
from _results import RESULTS, write_section

_PATIENCE = {"about": 240, "compile": 900}  # seconds; other processes have until the end of the call
_GRACE = 25  # seconds after the last minute in which what has begun may end
_SHARE = {"peak": "0.9", "race": "0.95", "crop": "0.95"}  # of the GPU, taken at once: an allocator that grows is not exact
_DRY_LIMIT = 5_300_000  # bytes; stands for the memory of a GPU: the search for the largest crop then takes four steps
_SAME = ("device", "target")  # of all calls that share a folder, and these versions
_SAME_VERSIONS = ("jax", "jaxlib", "flax", "jaxckpt")
_TRIES = 2  # of what failed: in another call the compiler knows more, and a driver may have recovered
_LOG_BYTES = 2**20


def main() -> int:
    options = parse()
    out: Path = options.out
    if out.exists() and not out.is_dir():
        return _refused(f"--out {out} is a file: name a folder")
    out.mkdir(parents=True, exist_ok=True)
    if options.table:
        return write_tables(out)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _refused(f"another call works in {out}: wait for it, or name another folder with --out")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        call = Beforehand(options) if options.beforehand else OnDevice(options)
        call.run()
    except (ValueError, RuntimeError) as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        print("stopped; the next call with this folder goes on", file=sys.stderr)
    if not options.beforehand and (left := _gpu_cache.pack(out)):
        print(f"{left} compiled files had no room in the packed cache", file=sys.stderr)
    return write_tables(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of results and what was compiled")
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="begin nothing after them (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dry-run", action="store_true", help="small sizes, on the CPU")
    which.add_argument(
        "--beforehand", metavar="TARGET", help="compile for a GPU that is not there, such as h200; run nothing"
    )
    which.add_argument("--table", action="store_true", help="only make the tables of what is in the folder")
    return parser.parse_args()


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 <= minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes of at least 0")
    return minutes


def _refused(why: str) -> int:
    print(f"on_gpu: {why}", file=sys.stderr)
    return 2


def write_tables(out: Path) -> int:
    """The tables of a folder, printed, and where `write_section` writes them."""
    text = _gpu_report.section(out)
    write_section("on_gpu", text, out)
    print(text)
    return 0


def _about(out: Path, dry: bool, target: str) -> Row:
    """The machine, as a process of its own sees it.

    Raises:
        RuntimeError: JAX does not start, or knows no such target.
    """
    until = time.time() + _PATIENCE["about"]
    said = run_process(Job("about", "", ("about",), dry, target, until, "", {}), out, until)
    found = next((row for row in said if isinstance(row, dict)), {"error": "no answer"})
    if "error" in found:
        raise RuntimeError(f"{found['error']} (more in {out / 'on_gpu.log'})")
    return found


class OnDevice:
    """A call that measures.

    Attributes:
        left: rows that the next call is to make.
    """

    def __init__(self, options: argparse.Namespace):
        """Looks at the machine, and opens the folder.

        Raises:
            RuntimeError: there is no GPU that `jaxckpt.targets` knows.
            ValueError: the folder is from another device or other versions.
        """
        self.out, self.dry = options.out, options.dry_run
        self.until = time.time() + 60 * options.minutes
        _gpu_cache.unpack(self.out)
        found = _about(self.out, self.dry, "")
        if not self.dry and found["platform"] != "gpu":
            raise RuntimeError(
                f"no GPU: JAX finds {found['device']!r} only. --dry-run makes small ones of all measurements on the CPU; "
                "--beforehand h200 compiles for a GPU that is not there"
            )
        self.target = "cpu" if self.dry else found["target"]
        if self.target is None:
            raise RuntimeError(f"{found['device']!r} is no GPU that jaxckpt.targets knows: add a file of facts about it")
        versions = {name: found["versions"][name] for name in _SAME_VERSIONS}
        self.journal = Journal(self.out / "on_gpu.jsonl", {**{n: found[n] for n in _SAME}, **versions, "dry_run": self.dry})
        self.place = {"driver": found.get("driver"), "machine": found["machine"], "python": found["versions"]["python"]}
        self.memory_bytes = found["limit"]
        self.left: set[str] = set()
        self.beforehand: dict[str, Row] = {}
        if not self.dry:
            compiled_with, rows = read(RESULTS / "on_gpu_beforehand.jsonl")
            same = compiled_with.get("target") == self.target and compiled_with.get("jax") == versions["jax"]
            self.beforehand = rows if same else {}
        failed = {key: row for key, row in self.journal.rows.items() if "error" in row}
        self.tries = {key: row.get("tries", 1) for key, row in failed.items()}
        for key, row in failed.items():
            if row["error"] == NOT_INSTALLED or self.tries[key] < _TRIES:
                del self.journal.rows[key]

    def run(self) -> None:
        """Makes what is owed, in order, as long as there is time."""
        for measurement in measurements(self.dry):
            while (settings := self._owed(measurement)) and time.time() < self.until:
                seconds = f"{self.until - time.time():4.0f} s left"
                print(f"{seconds}: {measurement.kind}, {measurement.workload}: {'; '.join(settings)}", flush=True)
                self._measure(measurement, settings)

    def _owed(self, m: Measurement) -> tuple[str, ...]:
        """The rows of a measurement that are still to be made, by its next process."""
        if m.kind != "crop":
            return tuple(s for s in m.settings if m.key(s) not in self.journal.rows and m.key(s) not in self.left)
        (name,) = m.settings
        prefix = m.key(name) + "/"
        tried = {int(key.removeprefix(prefix)): row for key, row in self.journal.rows.items() if key.startswith(prefix)}
        if any("error" in row for row in tried.values()):
            return ()  # which says nothing about memory
        guess = crop_guess(CROPS[name], self.beforehand, self.memory_bytes)
        tokens = next_crop({tokens: row["trains"] for tokens, row in tried.items()}, guess)
        return () if tokens is None else (f"{name}/{tokens}",)

    def _measure(self, m: Measurement, settings: tuple[str, ...]) -> None:
        limit = _DRY_LIMIT if self.dry and m.kind == "crop" else None
        folder = str(self.out / "cache" / "live" / "plans")
        job = Job(m.kind, m.workload, settings, self.dry, self.target, self.until, folder, self.beforehand, limit)
        now, begin = settings, time.time()
        for said in run_process(job, self.out, self.until + _GRACE):
            if isinstance(said, list):
                now = tuple(said)
            elif "left" in said:
                self.left.add(m.key(said["setting"]))
            else:
                self._add(m.key(said.pop("setting")), said)
        missing = [s for s in settings if m.key(s) not in self.journal.rows and m.key(s) not in self.left]
        if missing and time.time() < self.until:  # what the end of the call cut short, the next call makes
            for setting in [s for s in missing if s in now] or missing:
                self._add(m.key(setting), {"error": f"its process ended after {time.time() - begin:.0f} s without a result"})

    def _add(self, key: str, row: Row) -> None:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        tries = {"tries": self.tries.get(key, 0) + 1} if "error" in row else {}
        self.journal.add({"key": key, **row, **tries, "at": at, **self.place, **_gpu_clock(self.dry)})


class Beforehand:
    """A call that compiles for a GPU that is not there."""

    def __init__(self, options: argparse.Namespace):
        """Opens the folder.

        Raises:
            RuntimeError: there is no such target, or JAX's CUDA plugin is missing.
            ValueError: the folder is from another target or other versions.
        """
        self.out, self.target = options.out, options.beforehand
        self.until = time.time() + 60 * options.minutes
        found = _about(self.out, True, self.target)
        about = {"target": self.target, "memory_bytes": found["memory_bytes"]}
        about |= {name: found["versions"][name] for name in _SAME_VERSIONS}
        self.journal = Journal(self.out / "on_gpu_beforehand.jsonl", about)

    def run(self) -> None:
        """Compiles one program after another."""
        folder = str(self.out / "cache" / "live" / "plans")
        for workload, setting in programs():
            key = f"compile/{workload}/{setting}"
            if key in self.journal.rows or time.time() > self.until:
                continue
            print(f"{self.until - time.time():4.0f} s left: {workload}: {setting}", flush=True)
            job = Job("compile", workload, (setting,), False, self.target, self.until, folder, self.journal.rows)
            said = run_process(job, self.out, time.time() + _PATIENCE["compile"])
            row = next((row for row in said if isinstance(row, dict)), {"error": "its process ended without a result"})
            self.journal.add({"key": key, **row})


def run_process(job: Job, out: Path, end: float) -> Iterator[Row | list[str]]:
    """What a process says, as it says it: rows, and which settings it begins. It is ended at the time `end`."""
    here = Path(__file__).parent
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_log(out / "on_gpu.log"))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        command = [sys.executable, str(here / "_gpu_process.py")]
        process = stack.enter_context(subprocess.Popen(command, **pipes, env=_variables(job, out), text=True))
        timer = threading.Timer(max(1.0, end - time.time()), process.kill)
        timer.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if (said := row_of(line) or begun(line)) is not None:
                    yield said
        except BrokenPipeError:
            pass  # it ended before it was asked
        finally:
            timer.cancel()
            process.kill()


def _variables(job: Job, out: Path) -> dict[str, str]:
    """The environment of a process."""
    found = {**os.environ, **_gpu_cache.variables(out)}
    found["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    if job.dry or job.kind in ("compile", "torch"):
        found["JAX_PLATFORMS"] = "cpu"
    elif job.kind != "about":
        found["JAX_PLATFORMS"] = "cuda,cpu"  # where CUDA fails, nothing is measured on the CPU under the GPU's name
    if job.dry:
        quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
    if job.kind == "compile":  # for a GPU that is not there: cannot be read back
        found["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    share = _SHARE.get(job.kind)
    found["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false" if share is None else "true"
    found.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    found["XLA_CLIENT_MEM_FRACTION"] = share or "0.95"
    return found


def _log(path: Path) -> TextIO:
    """The log to append to, of which only the end is kept: what a GPU says when its memory is full is long."""
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.write_bytes(path.read_bytes()[-_LOG_BYTES // 2 :])
    return path.open("a")


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
