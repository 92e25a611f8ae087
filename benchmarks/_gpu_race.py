"""Races of `on_gpu.py`: seconds of one training step, in turns, one process for JAX and one for torch."""

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from _gpu_job import OUT_OF_TIME, Job, Row
from _gpu_list import PLAN, REFERENCE, TORCH
from _gpu_measure import digest_of, model_seconds, peak_of, planned, too_large, written
from _gpu_programs import stack_named, step_of
from _race import Entry, attempt, rounds, timed
from _systems import Stack, values, version

_ROUNDS = 7
_LEAST_ROUNDS = 5
_PER_COMPILATION = 4  # cores


def race(job: Job) -> Iterator[tuple[str, Row]]:
    """Seconds of a step under each setting, in turns with the reference; what no time is left for has a row that says so."""
    stack = stack_named(job.workload, job.dry)
    arguments = jax.block_until_ready(values(stack))
    names = [REFERENCE, *(s for s in job.settings if s != REFERENCE)]
    field = [Entry("jaxckpt", name, lambda _: None, row={"title": stack.title}) for name in names]
    workers = max(1, (os.cpu_count() or 1) // _PER_COMPILATION)
    ready, took = 0, 0.0
    while ready < len(field) and (not ready or time.time() + took + _seconds_of_rounds(field, ready, workers) < job.until):
        begin = time.time()
        _make_ready(job, stack, arguments, field[ready : ready + workers], workers)
        ready, took = ready + workers, time.time() - begin
    raced = field[:ready]
    for i in rounds(raced, _ROUNDS):
        if i + 1 >= _LEAST_ROUNDS and time.time() > job.until:
            break
    for entry in raced:
        if entry.setting in job.settings:
            yield entry.setting, _with_ratio(entry, raced[0])
    for entry in field[ready:]:
        yield entry.setting, OUT_OF_TIME


def _seconds_of_rounds(field: list[Entry], ready: int, more: int) -> float:
    """What the least number of rounds will take with what is ready, and a few more."""
    of_each = [entry.row.get("first_seconds", 0.0) for entry in field[:ready]]
    return (_LEAST_ROUNDS + 1) * sum(of_each) * (1 + more / ready)


def _make_ready(job: Job, stack: Stack, arguments: Any, batch: list[Entry], workers: int) -> None:
    """Traces programs one after another, compiles them side by side, and runs each once."""
    lowered: dict[str, Any] = {}
    for entry in batch:
        attempt(entry, lambda entry=entry: lowered.update({entry.setting: _lowered(job, stack, arguments, entry)}))
    with ThreadPoolExecutor(workers) as pool:
        waiting = {name: pool.submit(_timed_compile, program) for name, program in lowered.items()}
    for entry in (entry for entry in batch if entry.setting in waiting):
        attempt(entry, lambda entry=entry: _first_run(job, arguments, entry, *waiting[entry.setting].result()))


def _lowered(job: Job, stack: Stack, arguments: Any, entry: Entry) -> Any:
    known = job.known(job.workload, entry.setting)
    limit = job.limit_bytes or (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and known.get("predicted_bytes", 0) > limit:
        raise MemoryError(too_large(known["predicted_bytes"], limit))
    plan = None
    if entry.setting == PLAN:
        found = known if "plan" in known else planned(job, stack)
        entry.row |= {name: found[name] for name in ("plan_text", "budget_bytes", "model_seconds")}
        plan = written(job, found["plan"])
    traced = jax.jit(step_of(entry.setting, stack, plan)).trace(*arguments)
    entry.row["digest"] = digest_of(traced)
    if "model_seconds" not in entry.row:
        is_known = known.get("digest") == entry.row["digest"]
        entry.row["model_seconds"] = (
            known["model_seconds"] if is_known else model_seconds(stack, entry.setting, job.rates_of)
        )
    return traced.lower()


def _timed_compile(lowered: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return lowered.compile(), time.perf_counter() - begin


def _first_run(job: Job, arguments: Any, entry: Entry, compiled: Any, seconds: float) -> None:
    entry.row |= {"compile_seconds": seconds, **peak_of(compiled)}
    limit = job.limit_bytes or (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and (size := entry.row["compiled_peak_bytes"]) > limit:
        raise MemoryError(too_large(size, limit))
    entry.step = lambda: jax.block_until_ready(compiled(*arguments))
    entry.row["loss"] = float(entry.step()[0])
    entry.row["first_seconds"] = timed(entry)


def _with_ratio(entry: Entry, reference: Entry) -> Row:
    if "error" in entry.row or len(entry.seconds) < _LEAST_ROUNDS:
        return {"error": "fewer than five rounds", **entry.row}
    row = {**entry.row, "seconds": statistics.median(entry.seconds), "all_seconds": entry.seconds}
    pairs = list(zip(entry.seconds, reference.seconds, strict=False))
    return {**row, "ratio": statistics.median(a / b for a, b in pairs)} if "error" not in reference.row else row


def torch_race(job: Job) -> Iterator[tuple[str, Row]]:
    """The same in torch, which has this process and the GPU for itself: JAX only makes the values, on the CPU."""
    import torch
    from _torch_stack import TorchStep

    stack = stack_named(job.workload, job.dry)
    device = "cpu" if job.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} finds no GPU")
    arguments = values(stack)
    for setting in job.settings:
        if time.time() > job.until:
            yield setting, OUT_OF_TIME
            continue
        per_chunk, is_compiled = TORCH[setting]
        entry = Entry("torch", setting, lambda _: None, row={"title": stack.title, "package": f"torch {version('torch')}"})

        def start(entry: Entry = entry, per_chunk: Any = per_chunk, is_compiled: bool = is_compiled) -> None:
            size = stack.chunk if isinstance(per_chunk, str) else per_chunk
            step = TorchStep(stack, arguments, size, is_compiled, device)
            begin = time.perf_counter()
            loss, _ = step()
            entry.row |= {"compile_seconds": time.perf_counter() - begin, "loss": float(loss)}
            entry.row["real_bytes"] = step.peak_bytes()
            entry.step = step

        attempt(entry, start)
        for _ in rounds([entry], _ROUNDS):
            pass
        yield setting, _with_ratio(entry, entry)
        entry.step = None
        torch.compiler.reset()
