"""Where to cut a block into pieces that are checkpointed one by one, so that the largest of them needs little memory.

The peak while a piece is differentiated is modelled as the bytes that cross the cuts before it, each value once, plus the
bytes that autodiff wants of the piece, plus what crosses the cut behind it (the cotangents). The cuts that make the largest
of these peaks the least are found by dynamic programming. What XLA fuses away is not known here, so that the smaller pieces
may be the larger ones in truth: among all cuts that come within 2 percent of the least peak, those with the least sum of
squares are taken.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.flow import last_uses

SLACK = 1.02


class Block:
    """What is alive at which cut of an inlined jaxpr.

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
    new, own = {}, {}  # of the piece between two points: bytes that cross its end and not its beginning; its own peak
    for j, b in enumerate(points[1:], 1):
        sums = block.crossing(b)
        for i, a in enumerate(points[:j]):
            new[i, j] = sums[b + 1] - sums[a + 1]
            own[i, j] = (wants or block.wants)(a, b) + block.live[b]
    most = min(most or len(points) - 1, len(points) - 1)
    best = _search(len(points), new, own, most, fewest=wants is not None)
    return [points[i] for i in best]


def _search(
    count: int, new: dict[tuple[int, int], int], own: dict[tuple[int, int], int], most: int, fewest: bool
) -> list[int]:
    """The points to cut at: the least peak by bisection, and within it the least sum of squares, or the fewest."""
    low, high = 0, own[0, count - 1]
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        if _within(middle, count, new, own, most, by_crossing=True) is None:
            low = middle
        else:
            high = middle
    found = [_within(int(high * SLACK), count, new, own, most, by_crossing) for by_crossing in (False, True)]
    return (found[1] if fewest or found[0] is None else found[0]) or []


def _within(
    peak: int, count: int, new: dict[tuple[int, int], int], own: dict[tuple[int, int], int], most: int, by_crossing: bool
) -> list[int] | None:
    """Cuts into at most `most` pieces under which no piece needs more than `peak`; None where there are none.

    Of several that end at a point the one of least crossing bytes is taken, which finds cuts wherever there are any; or the
    one of the least sum of squared pieces.
    """
    rank = operator.itemgetter(0 if by_crossing else 1)
    before: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    best: tuple[int, int, list[int]] | None = None
    for _ in range(most):
        after: dict[int, tuple[int, int, list[int]]] = {}
        for i, (crossing, squares, cuts) in before.items():
            for j in range(i + 1, count):
                if crossing + own[i, j] > peak:
                    continue
                label = (crossing + new[i, j], squares + own[i, j] ** 2, [*cuts, j])
                if j not in after or rank(label) < rank(after[j]):
                    after[j] = label
        if count - 1 in after and (best is None or after[count - 1][1] < best[1]):
            best = after[count - 1]
            if by_crossing:
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


def _prefix_sums(numbers: Sequence[int]) -> list[int]:
    sums = [0]
    for number in numbers:
        sums.append(sums[-1] + number)
    return sums
