"""Rates of a present device, measured once and kept in the user's cache folder."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt.analysis.cost import CPU, REFERENCE, Rates
from jaxckpt.memory.targets import Target

_DTYPES = ("float32", "bfloat16")
_PUBLISHED = ("host", "link", "network")


def cache_file() -> Path:
    """Where the rates of this user's devices are: `$XDG_CACHE_HOME/jaxckpt/rates.json`, or under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxckpt" / "rates.json"


def rates_of(target: Target) -> Any:
    """What the time model is to know of a target: what was calibrated, or published facts, or a guess for CPUs."""
    if target.is_present and (found := _read().get(_key(target))) is not None:
        return _with_links(found, target)
    if target.gpu is not None:
        return target.gpu
    return CPU if target.is_present and target.devices[0].platform == "cpu" else REFERENCE


def calibrate(target: Target, again: bool = False) -> Rates:
    """The rates of a present device, measured in a few seconds, unless they were before.

    Raises:
        ValueError: the target is only described.
    """
    if not target.is_present:
        raise ValueError(f"calibrating measures a device, and {target.name!r} is only described; take target='attached'")
    known = _read()
    if again or _key(target) not in known:
        known[_key(target)] = _measured(target)
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({key: rates._asdict() for key, rates in known.items()}, indent=1) + "\n")
    return _with_links(known[_key(target)], target)


def _with_links(rates: Rates, target: Target) -> Rates:
    """What was measured, with published rates of links, which take another device to measure."""
    links = target.gpu or (CPU if target.devices[0].platform == "cpu" else REFERENCE)
    return rates._replace(**{f"{name}_bandwidth": getattr(links, f"{name}_bandwidth") for name in _PUBLISHED})


def _measured(target: Target) -> Rates:
    device = target.devices[0]
    is_cpu = device.platform == "cpu"
    size, length = (1024, 2**26) if is_cpu else (8192, 2**30)
    with jax.default_device(device):
        x = jnp.ones(length // 4, jnp.float32)
        bandwidth = 2 * x.nbytes / _seconds(jax.jit(lambda x: x + 1), x)
        vector = 100 * 2**20 / _seconds(jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: x * x, x)), jnp.ones(2**20))
        matmul = {}
        for dtype in _DTYPES:
            a = jnp.ones((size, size), dtype)
            matmul[dtype] = 2 * size**3 / _seconds(jax.jit(jnp.matmul), a, a)
    matmul["float16"] = matmul["bfloat16"]
    measured = REFERENCE._replace(
        memory_bandwidth=bandwidth,
        matmul_rate=matmul,
        vector_rate={"float32": vector},
        fresh_bandwidth=CPU.fresh_bandwidth if is_cpu else float("inf"),
    )
    return _with_links(measured, target)


def _seconds(fn: Any, *args: Any) -> float:
    """The least of a few calls."""
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - begin)
    return min(times)


def _key(target: Target) -> str:
    return f"{target.devices[0].device_kind}, {os.cpu_count()} cores, JAX {jax.__version__}"


def _read() -> dict[str, Rates]:
    """What was measured before; what is not in the file as `calibrate` writes it is not there."""
    try:
        found = json.loads(cache_file().read_text())
        links = dict.fromkeys([f"{name}_bandwidth" for name in _PUBLISHED], 0.0)  # an older file has not all of them
        return {key: Rates(**{**links, **fields}) for key, fields in found.items() if _is_whole(fields)}
    except (OSError, ValueError, AttributeError):  # none yet, or one that something else has written
        return {}


def _is_whole(fields: Any) -> bool:
    published = {f"{name}_bandwidth" for name in _PUBLISHED}
    if not isinstance(fields, dict) or fields.keys() | published != {*Rates._fields}:
        return False
    tables = [fields["matmul_rate"], fields["vector_rate"]]
    if not all(isinstance(table, dict) and "float32" in table for table in tables):
        return False
    links = [fields[f"{name}_bandwidth"] for name in ("memory", "fresh")]
    rates = [*links, *(rate for table in tables for rate in table.values())]
    return all(isinstance(rate, (int, float)) and rate > 0 for rate in rates)
