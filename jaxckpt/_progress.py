"""What is going on and for how long: a bar on stderr in a terminal, and elsewhere, as in a job's log, few lines."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_TICK = 1.0  # seconds after which a bar tells the time anew
_QUIET = 30.0  # seconds after which a line says that the same is still going on; then twice as many
_NEWS = 10.0  # seconds between two lines of news


class Progress:
    """Of one command or function, which has `total` parts if that is known.

    >>> with Progress("plan", unit="compilation", shown=False) as progress:
    ...     progress.doing("compiling dots")
    ...     progress.advance()
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "part", shown: bool = True):
        self._name, self._shown = name, shown and sys.stderr is not None
        self._what, self._since, self._said = "", time.monotonic(), float("-inf")
        disable = None if self._shown else True  # None: where stderr is no terminal
        self._bar = tqdm(total=total, unit=unit, desc=name, file=sys.stderr, disable=disable, dynamic_ncols=True)
        self._done, self._total = 0, total
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="jaxckpt progress", daemon=True)

    def __enter__(self) -> Self:
        if self._shown:
            self._ticker.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        if self._shown:
            self._ticker.join()
        self._bar.close()

    def doing(self, what: str) -> None:
        """`what` takes from now on until something else is done: "compiling dots", say."""
        self._what, self._since = what, time.monotonic()
        self._say(what)

    def news(self, what: str) -> None:
        """`what` is how far one of many short parts came: "step 3 of 10". Most of it is only seen in a bar."""
        self._what, self._since = what, time.monotonic()
        if not self._bar.disable or time.monotonic() - self._said > _NEWS or self._done == self._total:
            self._say(what)

    def advance(self) -> None:
        """One more part is done."""
        self._done += 1
        self._bar.update()

    def print(self, line: str) -> None:
        """A line of the result on stdout, which a bar in the same terminal does not overwrite."""
        self._bar.clear()
        print(line, flush=True)
        self._bar.refresh()

    def _say(self, what: str) -> None:
        self._said = time.monotonic()
        if not self._shown:
            return
        if self._bar.disable:
            print(f"{self._name}: {what}", file=sys.stderr, flush=True)
        else:
            self._bar.set_description(f"{self._name}: {what}")

    def _tick(self) -> None:
        """XLA holds up the one who asks for a program: that it still compiles is told from a thread of its own."""
        quiet = _QUIET
        while not self._over.wait(_TICK):
            spent = time.monotonic() - self._since
            if spent < _QUIET:
                quiet = _QUIET
            if not self._bar.disable:
                self._bar.set_description(f"{self._name}: {self._what}, {spent:.0f} s" if self._what else self._name)
            elif spent >= quiet:
                quiet *= 2
                self._say(f"{self._what}, for {spent:.0f} s")
