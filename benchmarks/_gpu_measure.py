"""What `on_gpu.py` measures of one program: bytes, gradients, rates, whether a crop trains. Races: `_gpu_race.py`."""

import contextlib
import functools
import hashlib
import json
import statistics
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from _gpu_job import Job, Row, begins
from _gpu_list import CROPS, LONG_STEP, OFFLOADS, PLAN
from _gpu_programs import knobs_of, small_in_float64, stack_named, step_of
from _race import in_a_line
from _results import environment
from _systems import Stack, largest, loop, loss_and_gradients, our_stack, values

import jaxckpt
from jaxckpt import checkpoint_scan, explain, measure, targets
from jaxckpt._sizes import size_text
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import step_seconds
from jaxckpt.memory.calibrate import calibrate, rates_of

# --- about the machine ----------------------------------------------------------------------------------------------------


def about(job: Job) -> Iterator[tuple[str, Row]]:
    device = jax.devices()[0]
    found = environment()
    if job.target:
        described = targets.get(job.target)
        _ = described.devices  # raises what is wrong with it
        found["memory_bytes"] = described.memory_bytes
    found["versions"]["jaxckpt"] = jaxckpt.__version__
    limit = (device.memory_stats() or {}).get("bytes_limit")
    yield "about", {**found, "platform": device.platform, "target": targets.name_of(device.device_kind), "limit": limit}


def rates(job: Job) -> Iterator[tuple[str, Row]]:
    """(f) The link to the host, and what the time model wants to know, beside what is published."""
    where = targets.get("attached")
    published = None if where.gpu is None else where.gpu
    if "link to the host" in job.settings:
        yield "link to the host", {**_link(job.dry), "published_bandwidth": published and published.host_bandwidth}
    if "calibrated" in job.settings:
        found = calibrate(where, again=True)
        yield (
            "calibrated",
            {
                "found": found._asdict(),
                "published": published
                and {
                    "memory_bandwidth": published.memory_bandwidth,
                    "matmul_rate": dict(published.matmul_rate),
                    "vector_rate": dict(published.vector_rate),
                },
            },
        )


def _link(dry: bool) -> Row:
    """Bytes per second in both directions, to and from pinned memory."""
    device = jax.devices()[0]
    here = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    x = jnp.ones(2**18 if dry else 2**28, jnp.float32)
    on_device, on_host = (jax.block_until_ready(jax.device_put(x, place)) for place in (here, host))

    def bandwidth(value: Any, place: Any) -> float:
        move = jax.jit(lambda x: x, out_shardings=place)  # a program's own copy, as offloading makes it
        seconds = []
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(move(value))
            seconds.append(time.perf_counter() - begin)
        return value.nbytes / statistics.median(seconds[1:])

    return {"to_host": bandwidth(on_device, host), "from_host": bandwidth(on_host, here), "bytes": x.nbytes}


# --- programs -------------------------------------------------------------------------------------------------------------


def digest_of(traced: Any) -> str:
    """What identifies a traced step, in another process too."""
    return jx.digest(traced.jaxpr)


def peak_of(compiled: Any) -> Row:
    sizes = compiled.memory_analysis()
    arguments, outputs = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    peak = sizes.temp_size_in_bytes + arguments + outputs - sizes.alias_size_in_bytes
    return {"temp_bytes": sizes.temp_size_in_bytes, "compiled_peak_bytes": peak}


def compile_for_target(job: Job) -> Iterator[tuple[str, Row]]:
    """Beforehand: bytes, seconds of compiling, seconds by the time model, and plans, for a GPU that need not be there."""
    if job.workload == "small":
        yield from _small_for_target(job)
        return
    stack = stack_named(job.workload, job.dry)
    for setting in job.settings:
        try:
            yield setting, _compiled_for_target(job, stack, setting)
        except Exception as error:  # XLA can fail on one program, which is a row that says so
            yield setting, {"error": in_a_line(error)}


def _compiled_for_target(job: Job, stack: Stack, setting: str) -> Row:
    row: Row = {}
    plan = None
    if setting == PLAN:
        row = planned(job, stack)
        plan = written(job, row["plan"])
    step = jax.jit(step_of(setting, stack, plan))  # which is traced once for all
    found = measure(step, *stack.arguments(), target=job.target)
    row |= {"predicted_bytes": found.peak_bytes, "temp_bytes": found.temp_bytes, "compile_seconds": found.compile_seconds}
    seconds = row.get("model_seconds") or model_seconds(stack, setting, job.rates_of)
    return {**row, "model_seconds": seconds, "digest": digest_of(step.trace(*stack.arguments()))}


def _small_for_target(job: Job) -> Iterator[tuple[str, Row]]:
    """The programs whose gradients are compared."""
    jax.config.update("jax_enable_x64", True)
    stack = small_in_float64()
    for setting in job.settings:
        name, _, engine = setting.rpartition(", ")
        step = functools.partial(loss_and_gradients, our_stack(**OFFLOADS[name], engine=engine)(stack))
        found = measure(step, *stack.arguments(), target=job.target)
        yield setting, {"predicted_bytes": found.peak_bytes, "compile_seconds": found.compile_seconds, "model_seconds": 0.0}


def planned(job: Job, stack: Stack) -> Row:
    """A plan at half the memory of no checkpointing, or of the GPU where that is less."""
    where = targets.get(job.target)
    whole = job.known(job.workload, "no checkpointing").get("predicted_bytes")
    if whole is None:
        whole = measure(step_of("no checkpointing", stack), *stack.arguments(), target=where).peak_bytes
    budget = int(min(whole / 2, 0.95 * (where.memory_bytes or whole)))
    begin = time.monotonic()
    found = jaxckpt.plan(step_of(PLAN, stack, "auto"), *stack.arguments(), budget=budget, target=where, progress=False)
    return {
        "plan": found.to_json(),
        "plan_text": found.chosen.setting,
        "budget_bytes": budget,
        "plan_seconds": time.monotonic() - begin,
        "model_seconds": found.chosen.seconds,
    }


def written(job: Job, plan: Row) -> Path:
    """The plan as a file, which is what `checkpoint_scan(plan=...)` takes."""
    text = json.dumps(plan)
    path = Path(job.folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def model_seconds(stack: Stack, setting: str, target: str) -> float | None:
    """What the time model says of a step."""
    run = checkpoint_scan(stack.apply, **knobs_of(setting, stack))
    params, carry, shared = stack.arguments()
    found = explain(run, params, *carry, target=target, **shared)
    if not found.forward_seconds or found.forward_runs is None:
        return None
    where = rates_of(targets.get(target))
    return step_seconds(found.length, found.forward_seconds, found.forward_runs, where, host_bytes=found.host_bytes)


# --- (a) peaks ------------------------------------------------------------------------------------------------------------


def peak(job: Job) -> Iterator[tuple[str, Row]]:
    """The peak that is compiled for the GPU by its name, and the allocator's in three steps of this process alone.

    Of long steps one is made. Seconds are of the last.
    """
    stack, (setting,) = stack_named(job.workload, job.dry), job.settings
    step, arguments = step_of(setting, stack), _made_on_host(stack)
    # From shapes, as in a race, so that both are one program of the compile cache.
    traced = jax.jit(step).trace(*stack.arguments())
    known = job.known(job.workload, setting)
    row: Row = {"title": stack.title, "digest": digest_of(traced)}
    begin = time.perf_counter()
    compiled = traced.lower().compile()
    row |= {"compile_seconds": time.perf_counter() - begin, **peak_of(compiled)}
    row["bytes_before_the_step"] = _peak_in_use()  # what XLA tried while it tuned the program is in it
    for _ in range(3):
        begin = time.perf_counter()
        out = jax.block_until_ready(compiled(*arguments))
        row["seconds"] = time.perf_counter() - begin
        del out
        if row["seconds"] > LONG_STEP:
            break
    row["real_bytes"] = _peak_in_use()
    if known.get("digest") == row["digest"]:
        row |= {"predicted_bytes": known["predicted_bytes"], "predicted": "beforehand"}
    else:
        row |= {"predicted_bytes": _predicted(step, stack, job.target), "predicted": "on this machine"}
    yield setting, row


def _predicted(step: Any, stack: Stack, target: str) -> int | None:
    """None where the compiler fails: what was measured must not be lost with it."""
    with _without_cache():
        try:
            return measure(step, *stack.arguments(), target=target).peak_bytes
        except Exception:
            traceback.print_exc()
            return None


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """What is compiled for a GPU that is only described cannot be read back, and would take room."""
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def too_large(size: int, limit: int) -> str:
    return f"not run: needs {size_text(size)} of {size_text(limit)}"


def _peak_in_use() -> int | None:
    """None where the allocator does not count, as on CPUs."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def made(stack: Stack) -> Any:
    """Random arguments on the default device, by one program."""
    return jax.block_until_ready(jax.jit(functools.partial(values, stack))())


def _made_on_host(stack: Stack) -> Any:
    """The same, made on the host so that making them does not raise the device's peak."""
    with jax.default_device(jax.devices("cpu")[0]):
        on_host = made(stack)
    return jax.block_until_ready(jax.device_put(on_host, jax.devices()[0]))


# --- (b) gradients --------------------------------------------------------------------------------------------------------


def gradients(job: Job) -> Iterator[tuple[str, Row]]:
    """The largest difference from the plain loop's gradients, relative to their largest entry, in float64."""
    jax.config.update("jax_enable_x64", True)
    stack = small_in_float64()
    arguments = made(stack)

    def run(forward: Any) -> Any:
        return jax.jit(functools.partial(loss_and_gradients, forward))(*arguments)

    want = run(functools.partial(loop, stack.step, stack.length))
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(want)), "a gradient is zero, and proves nothing"
    for setting in job.settings:
        name, _, engine = setting.rpartition(", ")
        begins(setting)
        try:
            got = run(our_stack(**OFFLOADS[name], engine=engine)(stack))
            errors = [largest(jax.tree.map(jnp.subtract, a, b)) / largest(b) for a, b in zip(got, want, strict=True)]
            yield setting, {"error_of_loss": errors[0], "error_of_gradients": errors[1]}
        except Exception as error:
            yield setting, {"error": in_a_line(error)}


# --- (e) crops ------------------------------------------------------------------------------------------------------------


def crop(job: Job) -> Iterator[tuple[str, Row]]:
    """Whether a Pairformer of so many tokens trains: "ours/1024". One step is made; in a dry run a limit is kept."""
    (setting,) = job.settings
    name, _, tokens = setting.partition("/")
    stack = stack_named(f"{job.workload}-{tokens}", job.dry)
    begin = time.perf_counter()
    try:
        traced = jax.jit(step_of(CROPS[name], stack)).trace(*stack.arguments())
        compiled = traced.lower().compile()
        row: Row = {"compile_seconds": time.perf_counter() - begin, **peak_of(compiled)}
        if job.limit_bytes and row["compiled_peak_bytes"] > job.limit_bytes:
            raise MemoryError(too_large(row["compiled_peak_bytes"], job.limit_bytes))
        arguments = _made_on_host(stack)
        begin = time.perf_counter()
        loss, _ = jax.block_until_ready(compiled(*arguments))
        yield setting, {**row, "trains": True, "seconds": time.perf_counter() - begin, "loss": float(loss)}
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise  # which says nothing about memory
        yield setting, {"trains": False, "why": in_a_line(error)}
