"""Stacks and plans of two processes that compute together."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_processes(tmp_path):
    """Gradients are those of one process, both make the same plan, and neither goes by a clock."""
    command = [sys.executable, "-m", "tests.engine.two_processes", str(free_port())]
    flags = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path)],
            cwd=ROOT,
            env={**flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    first, second = (json.loads(next(line for line in out.splitlines() if line.startswith("{"))) for out, _ in said)
    assert first == second
    assert len(first["errors"]) == 8 and max(first["errors"]) < 1e-12
    assert first["plan"]["chosen"]["peak_bytes"] <= 2**20
    assert len(first["refused"]) == 2 and all("each of 2 processes has its own" in error for error in first["refused"])
    assert json.loads((tmp_path / "plan.json").read_text())["stacks"] == first["plan"]["stacks"]
