"""Where to cut a block into pieces that are checkpointed one by one, so that the largest of them needs little memory.

The peak while a piece is differentiated is modelled as the bytes that cross the cuts before it, each value once, plus the
bytes that autodiff wants of the piece, plus what crosses the cut behind it (the cotangents). The cuts that make the largest
of these peaks the least are found by dynamic programming. What XLA fuses away is not known here, so that the smaller pieces
may be the larger ones in truth: among all cuts that come within 2 percent of the least peak, those with the least sum of
squares are taken.

All pieces but the last are run once more than the block is, to know what enters the next. So a longer last piece saves time,
and where it costs little memory, and pieces are computed in slices, it is taken: a transformer's block of 2048 tokens, in
slices of tokens from its keys and values on, needs 0.9 percent more of what it takes whole than it does cut behind its
attention, and 1 percent of it is run a third time instead of 80. (Without slices a long last piece is much of the peak, and
XLA may keep it beside what it runs before: 20.1 instead of 13.0 GiB for 48 Pairformer blocks of 768 tokens with 5 snapshots,
JAX 0.12.)
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import REFERENCE, cost
from jaxckpt.analysis.flow import last_uses

SLACK = 1.02
_GAIN = 0.01  # of a run: for less the last piece stays where least crosses the cut before it
WORTH = 0.1  # of the memory that the block takes whole: what it may cost not to run all of it a third time


class Block:
    """What is alive at which cut of an inlined jaxpr.

    Attributes:
        whole: the peak where it is not cut. seconds: of a run. shares: of these, those before each cut.

    Arguments:
        carried: which inputs count where they are still needed behind a cut; all others are there anyway.
        wanted: for each equation the bytes that autodiff wants of it, see `numbering.residual_bytes`.
    """

    def __init__(self, closed: Any, carried: Sequence[int], wanted: Sequence[int]):
        self.count = n = len(closed.jaxpr.eqns)
        self.ends = ends = last_uses(closed.jaxpr)
        born = {var: i + 1 for i, eqn in enumerate(closed.jaxpr.eqns) for var in eqn.outvars}
        born |= {closed.jaxpr.invars[i]: 0 for i in carried}
        # Values by the cuts they cross: those after their birth, up to their last use.
        self.spans = [(b, ends[var], jx.nbytes(var.aval)) for var, b in born.items() if ends.get(var, -1) > b - 1]
        self.live = [0] * (n + 2)
        for birth, end, size in self.spans:
            self.live[birth] += size
            self.live[end + 1] -= size
        for i in range(1, n + 2):
            self.live[i] += self.live[i - 1]
        self.wanted = _prefix_sums(wanted)
        self.whole = self.wanted[n] + self.live[n]
        seconds = _prefix_sums([cost(eqn, REFERENCE).seconds for eqn in closed.jaxpr.eqns])
        self.seconds = seconds[-1]
        self.shares = [s / (self.seconds or 1.0) for s in seconds]

    def wants(self, begin: int, end: int) -> int:
        """The bytes that autodiff wants of a piece."""
        return self.wanted[end] - self.wanted[begin]

    def crossing(self, cut: int) -> list[int]:
        """The bytes that cross a cut, summed by birth: entry `i` is of those born before `i`."""
        found = [0] * (cut + 1)
        for birth, end, size in self.spans:
            if birth <= cut <= end and cut < self.count:
                found[birth] += size
        return _prefix_sums(found)

    def beside(self, cuts: Sequence[int]) -> list[int]:
        """For each piece the bytes that are alive beside what autodiff wants of it, by the model of a peak."""
        found, before = [], 0
        for a, b in itertools.pairwise([0, *cuts, self.count]):
            sums = self.crossing(b)
            found.append(before + self.live[b])
            before += sums[b + 1] - sums[a + 1]
        return found


def find_cuts(
    block: Block, most: int | None = None, wants: Callable[[int, int], int] | None = None, candidates: int = 200
) -> list[int]:
    """The best cuts, as numbers of the equations before which they stand; none where the block is best left whole.

    Arguments:
        most: the number of pieces at most.
        wants: the bytes that are wanted at once of the piece between two cuts, where it is not all that autodiff wants; then
            the fewest pieces are taken.
        candidates: the places at most that are looked at.
    """
    points = [0, *_places(block.live, block.count, candidates, before_sums=wants is not None), block.count]
    new, own = {}, {}
    for j, b in enumerate(points[1:], 1):
        sums = block.crossing(b)
        for i, a in enumerate(points[:j]):
            new[i, j] = sums[b + 1] - sums[a + 1]
            own[i, j] = (wants or block.wants)(a, b) + block.live[b]
    search = _Cutter(len(points) - 1, new, own, min(most or len(points) - 1, len(points) - 1))
    peak = int(search.least() * SLACK)
    if wants is None:
        found = search.cuts(peak, by_squares=True) or search.cuts(peak)
    else:
        found = search.with_long_last(peak, block.whole, [block.shares[point] for point in points])
    return [points[i] for i in found or []]


class _Cutter:
    """Cuts at points from 0 to `end`.

    Arguments:
        new, own: of the piece between two points, the bytes that cross its end and not its beginning, and its own peak.
        most: pieces.
    """

    def __init__(self, end: int, new: dict[tuple[int, int], int], own: dict[tuple[int, int], int], most: int):
        self.end, self.new, self.own, self.most = end, new, own, most

    def least(self) -> int:
        """The least peak, by bisection."""
        low, high = 0, self.own[0, self.end]
        while high - low > max(1, high // 1000):
            middle = (low + high) // 2
            if self.cuts(middle) is None:
                low = middle
            else:
                high = middle
        return high

    def with_long_last(self, peak: int, whole: int, shares: Sequence[float]) -> list[int] | None:
        """The fewest cuts of no more than this peak; or of a larger one, where the longer last piece is worth that.

        Arguments:
            whole: the peak of the block where it is not cut. shares: of its run, those before each point.
        """
        cuts = self.cuts(peak)
        price = WORTH * shares[cuts[-1]] if cuts else 0.0
        for percent in range(int(100 * WORTH)):
            more = peak + whole * percent // 100
            last = self.earliest_last(more)
            priced = percent / 100 + WORTH * shares[last]
            if priced < price - WORTH * _GAIN:
                price, cuts = priced, self.cuts(more, last)
        return cuts

    def earliest_last(self, peak: int) -> int:
        """Where the last piece begins at the earliest under this peak."""
        crossing = {0: 0}
        for _ in range(self.most - 1):
            before = dict(crossing)
            for (i, j), own in self.own.items():
                if i in before and before[i] + own <= peak:
                    crossing[j] = min(before[i] + self.new[i, j], crossing.get(j, peak))
            if crossing == before:
                break
        return min(i for i, more in crossing.items() if i < self.end and more + self.own[i, self.end] <= peak)

    def cuts(self, peak: int, last: int | None = None, by_squares: bool = False) -> list[int] | None:
        """Cuts under which no piece needs more than `peak`; None where there are none.

        Of several that end at a point the one of least crossing bytes is taken, which finds cuts wherever there are any, and
        of these the fewest.

        Arguments:
            last: where the last piece begins; by default anywhere.
            by_squares: takes the one of the least sum of squared pieces instead.
        """
        rank = operator.itemgetter(1 if by_squares else 0)
        before: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
        best: tuple[int, int, list[int]] | None = None
        for _ in range(self.most):
            after: dict[int, tuple[int, int, list[int]]] = {}
            for i, (crossing, squares, cuts) in before.items():
                for j in range(i + 1, self.end + 1):
                    is_elsewhere = j == self.end and last is not None and i != last
                    if is_elsewhere or crossing + self.own[i, j] > peak:
                        continue
                    label = (crossing + self.new[i, j], squares + self.own[i, j] ** 2, [*cuts, j])
                    if j not in after or rank(label) < rank(after[j]):
                        after[j] = label
            if self.end in after and (best is None or after[self.end][1] < best[1]):
                best = after[self.end]
                if not by_squares:
                    break
            before = after
        return None if best is None else best[2][:-1]


def _places(live: list[int], n: int, most: int, before_sums: bool) -> list[int]:
    """The places inside where fewest bytes are alive: the last of each local minimum.

    Arguments:
        before_sums: also on the way down to one, from where half of the bytes have gone: a loss of each token can be made
            in slices of tokens, and its sum over them cannot.
    """
    found, top = [], 0  # where the way down began
    for i in range(1, n):
        top = live[i] if live[i] > live[i - 1] else max(top, live[i])
        is_minimum = live[i] <= live[i - 1] and live[i] < live[i + 1]
        if is_minimum or (before_sums and live[i + 1] < live[i] <= top / 2):
            found.append(i)
    return sorted(sorted(found, key=live.__getitem__)[:most])


def _prefix_sums(numbers: Sequence[Any]) -> list[Any]:
    sums: list[Any] = [0]
    for number in numbers:
        sums.append(sums[-1] + number)
    return sums
