"""A race: programs that take turns, one step each per round, so that a noisy machine is noisy for all."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NOT_INSTALLED = "not installed"


@dataclasses.dataclass
class Entry:
    """A program in a race: `step` runs one training step to its end and returns what it computed.

    Fields:
        start: makes it ready, where the race does not.
        row: what is known of it; an "error" there takes it out of the race.
        seconds: of its steps, one for each round.
    """

    system: str
    setting: str
    start: Callable[["Entry"], None] | None = None
    step: Callable[[], Any] | None = None
    row: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: list[float] = dataclasses.field(default_factory=list)


def attempt(entry: Entry, action: Callable[[], Any]) -> None:
    """Runs `action`; where it fails the entry leaves the race, with the reason."""
    try:
        action()
    except importlib.metadata.PackageNotFoundError:
        entry.row["error"], entry.step = NOT_INSTALLED, None
    except Exception as error:
        entry.row["error"], entry.step = in_a_line(error), None


def in_a_line(error: BaseException) -> str:
    """An exception as a cell of a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def timed(entry: Entry) -> float:
    """Seconds of one step."""
    assert entry.step is not None
    begin = time.perf_counter()
    entry.step()
    return time.perf_counter() - begin


def rounds(field: Sequence[Entry], most: int) -> Iterator[int]:
    """Runs at most so many rounds, each beginning with another entry, and yields the number of each when it is over."""
    for i in range(most):
        running = [entry for entry in field if entry.step]
        if not running:
            return
        for entry in running[i % len(running) :] + running[: i % len(running)]:
            attempt(entry, lambda entry=entry: entry.seconds.append(timed(entry)))
        yield i
