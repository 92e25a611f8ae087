"""Races of `on_gpu.py`: seconds of one training step, in turns, one process for JAX and one for torch."""

import functools
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from _gpu_job import OUT_OF_TIME, Job, Row, begins
from _gpu_list import PLAN, REFERENCE, TORCH
from _gpu_measure import digest_of, made, model_seconds, peak_of, planned, too_large, written
from _gpu_programs import stack_named, step_of
from _race import Entry, attempt, rounds, timed
from _systems import Stack, values, version

_ROUNDS = 7
_LEAST_ROUNDS = 5
_PER_COMPILATION = 4  # cores


def race(job: Job) -> Iterator[tuple[str, Row]]:
    """Seconds of a step under each setting, in turns with the reference; what no time is left for has a row that says so."""
    stack = stack_named(job.workload, job.dry)
    arguments = made(stack)
    names = [REFERENCE, *(s for s in job.settings if s != REFERENCE)]
    field = [Entry("jaxckpt", name, row={"title": stack.title}) for name in names]
    workers = max(1, (os.cpu_count() or 1) // _PER_COMPILATION)
    ready, took = 0, 0.0
    while ready < len(field):
        batch = field[ready : ready + workers]
        if time.time() + _seconds_of(job, field[:ready], batch, took) > job.until:
            break
        begin = time.time()
        _make_ready(job, stack, arguments, batch, workers)
        ready, took = ready + len(batch), time.time() - begin
    raced = field[:ready]
    begins("rounds")
    for i in rounds(raced, _ROUNDS):
        if i + 1 >= _LEAST_ROUNDS and time.time() > job.until:
            break
    for entry in raced:
        if entry.setting in job.settings:
            yield entry.setting, _with_ratio(entry, raced[0])
    for entry in field[ready:]:
        yield entry.setting, OUT_OF_TIME


def _seconds_of(job: Job, ready: list[Entry], batch: list[Entry], took: float) -> float:
    """What compiling a batch and racing it with what is ready will take: as the batch before, or as known beforehand."""
    known = [job.known(job.workload, entry.setting) for entry in batch]
    compiling = took or sum(row.get("compile_seconds", 0.0) for row in known) / len(batch)
    steps = [entry.row.get("second_run", 0.0) for entry in ready] + [row.get("model_seconds") or 0.0 for row in known]
    return compiling + (_LEAST_ROUNDS + 2) * sum(steps)


def _make_ready(job: Job, stack: Stack, arguments: Any, batch: list[Entry], workers: int) -> None:
    """Traces programs one after another, compiles them side by side, and runs each twice."""
    begins(*(entry.setting for entry in batch))
    lowered: dict[str, Any] = {}
    for entry in batch:
        attempt(entry, lambda entry=entry: lowered.update({entry.setting: _lowered(job, stack, entry)}))
    with ThreadPoolExecutor(workers) as pool:
        waiting = {name: pool.submit(program.compile) for name, program in lowered.items()}
    for entry in (entry for entry in batch if entry.setting in waiting):
        begins(entry.setting)
        attempt(entry, lambda entry=entry: _first_runs(arguments, entry, waiting[entry.setting].result()))


def _lowered(job: Job, stack: Stack, entry: Entry) -> Any:
    known = job.known(job.workload, entry.setting)
    _check_size(known.get("predicted_bytes", 0))
    plan = None
    if entry.setting == PLAN:
        if "plan" not in known and not job.dry:
            raise ValueError("no plan was made for this GPU and this version of JAX: --beforehand makes it")
        found = known or planned(job, stack)
        entry.row |= {name: found[name] for name in ("plan_text", "budget_bytes", "model_seconds")}
        plan = written(job, found["plan"])
    traced = jax.jit(step_of(entry.setting, stack, plan)).trace(*stack.arguments())
    entry.row["digest"] = digest_of(traced)
    if "model_seconds" not in entry.row:
        is_known = known.get("digest") == entry.row["digest"]
        entry.row["model_seconds"] = (
            known["model_seconds"] if is_known else model_seconds(stack, entry.setting, job.rates_of)
        )
    return traced.lower()


def _first_runs(arguments: Any, entry: Entry, compiled: Any) -> None:
    entry.row |= peak_of(compiled)
    _check_size(entry.row["compiled_peak_bytes"])
    entry.step = lambda: jax.block_until_ready(compiled(*arguments))
    entry.row["loss"] = float(entry.step()[0])
    entry.row["second_run"] = timed(entry)


def _check_size(size: int) -> None:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and size > limit:
        raise MemoryError(too_large(size, limit))


def _with_ratio(entry: Entry, reference: Entry) -> Row:
    if "error" in entry.row or len(entry.seconds) < _LEAST_ROUNDS:
        return {"error": "fewer than five rounds", **entry.row}
    row = {**entry.row, "seconds": statistics.median(entry.seconds), "all_seconds": entry.seconds}
    if "error" in reference.row:
        return row
    pairs = zip(entry.seconds, reference.seconds, strict=True)
    return {**row, "ratio": statistics.median(a / b for a, b in pairs)}


def torch_race(job: Job) -> Iterator[tuple[str, Row]]:
    """The same in torch, which has this process and the GPU for itself: JAX only makes the values, on the CPU."""
    import torch
    from _torch_stack import TorchStep

    stack = stack_named(job.workload, job.dry)
    device = "cpu" if job.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    arguments = jax.jit(functools.partial(values, stack))()

    def start(entry: Entry) -> None:
        per_chunk, is_compiled = TORCH[entry.setting]
        size = stack.chunk if isinstance(per_chunk, str) else per_chunk
        backend = "aot_eager" if job.dry else "inductor"  # a C++ compiler would take most of a dry run
        step = TorchStep(stack, arguments, size, is_compiled, device, backend)
        begin = time.perf_counter()
        loss, _ = step()
        entry.row |= {"first_run": time.perf_counter() - begin, "loss": float(loss)}
        entry.row["real_bytes"] = step.peak_bytes()
        entry.step = step

    for setting in job.settings:
        if time.time() > job.until:
            yield setting, OUT_OF_TIME
            continue
        begins(setting)
        entry = Entry("torch", setting, row={"title": stack.title, "package": f"torch {version('torch')}"})
        attempt(entry, lambda entry=entry: start(entry))
        for _ in rounds([entry], _ROUNDS):
            pass
        row = _with_ratio(entry, entry)
        row.pop("ratio", None)  # to itself
        yield setting, row
        entry.step = None
        torch.compiler.reset()
