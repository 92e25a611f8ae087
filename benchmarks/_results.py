"""Where and with what a benchmark was run, its results, and its section in the README of the benchmarks."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def environment(*packages: str) -> dict[str, Any]:
    """The device that JAX picks, its driver where it has one, the machine, and versions of JAX, Flax and `packages`."""
    import jax  # not by a process that only leads others

    device = jax.devices()[0]
    found = {"device": device.device_kind, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    if device.platform == "gpu":
        said = Path("/proc/driver/nvidia/version")
        number = re.search(r"Kernel Module.*?(\d+\.\d+[\d.]*)", said.read_text()) if said.exists() else None
        found["driver"] = number[1] if number else "unknown"
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {**found, "versions": versions}


def load(path: Path, what: str) -> list[dict[str, Any]]:
    """The list called `what` in a file of results, empty where there is none."""
    return json.loads(path.read_text())[what] if path.exists() else []


def save(path: Path, what: str, items: list[dict[str, Any]]) -> None:
    """Writes the list that `load` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({what: items}, indent=1) + "\n")


def write_section(name: str, text: str, out: Path) -> None:
    """Writes the tables of the benchmark `name` where its results are.

    Those of this repository's results stand in the README of the benchmarks, between marks, at the end where they are new;
    those of another folder in a file there, `NAME.md`.
    """
    if out.resolve() != RESULTS.resolve():
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(f"{text.strip()}\n")
        return
    readme, begin, end = RESULTS.parent / "README.md", f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = readme.read_text().partition(begin)
    readme.write_text(f"{before.rstrip()}\n\n{begin}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2] or chr(10)}")


def in_a_child(script: str, *args: str, seconds: float, **variables: str) -> dict[str, Any]:
    """The JSON that `script --child args` prints last, or an "error"; `variables` are added to its environment."""
    command = [sys.executable, script, "--child", *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {seconds / 60:.0f} minutes"}
    said = done.stdout.strip().splitlines()
    return json.loads(said[-1]) if done.returncode == 0 and said else {"error": f"the process ended with {done.returncode}"}
