"""What one process of `on_gpu.py` is asked for, and how it says what it found."""

import dataclasses
import json
from typing import Any

Row = dict[str, Any]
OUT_OF_TIME: Row = {"left": "for the next call"}  # in place of what was found
_MARK, _BEGINS = "row ", "begins "


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process is asked for.

    Fields:
        settings: the rows that are wanted.
        target: the GPU by the name of `jaxckpt.targets`, or "cpu" in a dry run.
        until: nothing new begins after this time, in seconds of the epoch.
        folder: where files may be written.
        beforehand: what was compiled for this GPU before, `Journal` rows by key; for this version of JAX only.
        limit_bytes: stands for the GPU's memory in a dry run, else None.
    """

    kind: str
    workload: str
    settings: tuple[str, ...]
    dry: bool
    target: str
    until: float
    folder: str
    beforehand: dict[str, Row]
    limit_bytes: int | None = None

    @property
    def rates_of(self) -> str:
        """The GPU for whose rates the time model speaks; a CPU has none that are published."""
        return "h200" if self.dry else self.target

    def known(self, workload: str, setting: str) -> Row:
        """What was compiled of a program beforehand."""
        return self.beforehand.get(f"compile/{workload}/{setting}", {})


def line_of(setting: str, row: Row) -> str:
    """A row as a process prints it."""
    return _MARK + json.dumps({"setting": setting, **row})


def begins(*settings: str) -> None:
    """Says what is being measured now: where the process dies, these are to blame, and the others are asked for again."""
    print(f"{_BEGINS}{json.dumps(settings)}", flush=True)


def begun(line: str) -> list[str] | None:
    """The settings that a printed line says are begun, if it says so."""
    return json.loads(line.removeprefix(_BEGINS)) if line.startswith(_BEGINS) and line.endswith("\n") else None


def row_of(line: str) -> Row | None:
    """The row that a printed line holds, if it holds one and was not cut off."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) and line.endswith("\n") else None
