"""Which inputs to store when steps are reversed with few snapshots, so that the fewest are run again.

To differentiate step `k` of `l`, the input of step `k` is needed. With `s` snapshots, the input of the first step one of
them, the fewest advances (runs of a step whose values are not kept) that make all inputs, from the last to the first, are
`r * l - C(s + r, s + 1)` with `C(s + r - 1, s) < l <= C(s + r, s)`: binomial checkpointing (A. Griewank, A. Walther,
Algorithm 799: Revolve, ACM TOMS 26, 2000). A segment of steps whose first input is stored is split in two; the right part is
reversed with one snapshot less, then the left part with all of them.

Pure Python: nothing here knows JAX.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple


class Reversal(NamedTuple):
    """How the input of one step is made: from the snapshot of `start`, step by step, with some inputs stored on the way.

    Fields:
        step: the step that is reversed.
        start, slot: the step whose input is restored, and the slot of the snapshot.
        stores: pairs of a step and the slot in which its input is stored when the advance comes by.
    """

    step: int
    start: int
    slot: int
    stores: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Schedule:
    """Reverses `length` steps with `snapshots` slots; `reversals` are in order, from the last step to the first.

    The first of them is the forward pass: it starts at the input of the first step, which slot 0 holds.
    """

    length: int
    snapshots: int
    reversals: tuple[Reversal, ...]

    @property
    def advances(self) -> int:
        """Runs of a step whose values are not kept, those of the forward pass included."""
        return sum(r.step - r.start for r in self.reversals)

    def runs(self) -> list[int]:
        """How often each step advances."""
        found = [0] * self.length
        for reversal in self.reversals:
            for step in range(reversal.start, reversal.step):
                found[step] += 1
        return found

    def describe(self) -> str:
        """The schedule as text, a line for each reversal: what is stored, advanced over and reversed.

        >>> print(reversal_schedule(5, 2).describe())
        5 steps, 2 snapshots: 6 advances
        o-o-<
          o<
          <
        o<
        <
        """
        lines = [f"{self.length} steps, {self.snapshots} snapshots: {self.advances} advances"]
        for r in self.reversals:
            stored = {r.start} | {step for step, _ in r.stores}
            marks = ("o" if step in stored else "-" for step in range(r.start, r.step))
            lines.append(" " * r.start + "".join(marks) + "<")
        return "\n".join(lines)


@functools.lru_cache(maxsize=64)
def reversal_schedule(length: int, snapshots: int) -> Schedule:
    """The schedule of the fewest advances.

    Raises:
        ValueError: no steps, or `snapshots` not in `[1, length]`.
    """
    if not 1 <= snapshots <= length:
        raise ValueError(f"snapshots must be between 1 and the number of steps, {length}; got {snapshots}")
    reversals: list[Reversal] = []
    free = list(range(1, snapshots))[::-1]
    restored: tuple[int, int] | None = None  # the step and the slot that the advance began with
    stores: list[tuple[int, int]] = []
    # What is left to do, the next last: a segment (first step, end, slot of its first input), or a slot that is free again.
    todo: list[tuple[int, int, int] | int] = [(0, length, 0)]
    while todo:
        task = todo.pop()
        if isinstance(task, int):
            free.append(task)
            continue
        first, end, slot = task
        restored = restored or (first, slot)
        if end - first > 1 and free:
            middle = first + _split(end - first, len(free) + 1)
            new = free.pop()
            stores.append((middle, new))
            todo += [(first, middle, slot), new, (middle, end, new)]
            continue
        for step in range(end - 1, first - 1, -1):
            kept = tuple((at, where) for at, where in stores if at < step)  # a snapshot of `step` itself is used at once
            reversals.append(Reversal(step, *restored, kept))
            restored, stores = (first, slot), []
        restored = None
    return Schedule(length, snapshots, tuple(reversals))


def least_advances(length: int, snapshots: int) -> int:
    """The fewest advances, in closed form (Griewank and Walther, proposition 1).

    >>> least_advances(48, 9)
    85
    """
    r = repetitions(length, snapshots)
    return r * length - math.comb(snapshots + r, snapshots + 1)


def whole_runs(length: int, blocks_per_ckpt: int | None, snapshots: int | None, engine: str) -> float:
    """How often all of a block is run in one training step, in the mean: in the forward pass, and for what enters chunks.

    What is run again of a block to get at values that it does not keep comes beside that.

    >>> whole_runs(48, None, None, "scan"), whole_runs(48, 6, None, "scan"), whole_runs(48, 6, None, "reversal")
    (1.0, 2.0, 1.875)
    """
    if blocks_per_ckpt is None and snapshots is None:
        return 1.0
    if engine == "scan":
        return 2.0
    chunks = -(-length // (blocks_per_ckpt or 1))
    steps = least_advances(chunks, snapshots) if snapshots else chunks - 1
    # The last chunk is run once, by the forward pass; of single blocks nothing is run but to make the inputs.
    return (steps * (blocks_per_ckpt or 1) + (length if blocks_per_ckpt else 1)) / length


def repetitions(length: int, snapshots: int) -> int:
    """How often a step advances at most: the `r` with `C(s + r - 1, s) < l <= C(s + r, s)`."""
    r = 0
    while math.comb(snapshots + r, snapshots) < length:
        r += 1
    return r


def _split(length: int, snapshots: int) -> int:
    """How many steps stay left of the next snapshot: one of the best choices (Griewank and Walther, proposition 2)."""
    r = repetitions(length, snapshots)
    fewest = math.comb(snapshots + r - 2, snapshots) if r >= 2 else 0
    return max(1, fewest, length - math.comb(snapshots - 1 + r, snapshots - 1))
