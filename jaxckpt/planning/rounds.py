"""Which settings of a step are compiled for a plan, and in what order: by their number alone, never by a clock.

The fastest within a limit is searched in rounds. A round takes the front, the settings that no other beats in seconds and
predicted bytes, and lists a few that are spread over it. From the fastest of them on, those that should fit are compiled,
until one does (after a few that do not the leanest is: where that does not fit either, nothing should). The next round is
about what lies between that one and the listed one before it, with a model that was corrected by it; there is none where the
limit is nearly used up and nothing listed should be much faster.

More memory never gives a slower plan, however wrong the model is. Take a small and a large limit. As long as they settle on
the same, they have the same lists and the same predictions, which depend neither on the limit nor on what was compiled in
vain or for other plans. In the first list where they differ, what the small limit settles on is also tried for the large
one, and fits, unless a faster one did. From there on one searches above what the other searches below. Where the search for
the large limit ends with what both settled on, the small one is used up no less, and that for it ends too. A round may
compile all that it lists, half of the compilations that are left at most, so that no search ends in the middle of a list.

Three things are outside of this. Where a step turns out not to run under some kind of setting, the search begins again
without the like, and a limit that never came to such a setting does not. Where nothing listed fits, the setting of the least
memory is searched, which may be a fast one that the model was wrong about. And a limit near the least is given up after a
few, where the leanest by the model is not the leanest in truth, which a smaller one that compiled fewer in vain may not be.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from jaxckpt.planning.model import Asked, Option
from jaxckpt.planning.peaks import Combination, Known, Peaks, kind

# Of the whole step, for one plan: 1 to 3 by a model that is a few percent off, more where it misses much of the step.
COMPILATIONS = 96
# The first list, of a front of a hundred to a thousand. A longer one brings the first that is compiled closer, where the
# model is right; where it misses a part of the step it is walked through in small paces, since only what fits corrects it.
_FIRST = 24
OF_LEAST = 12  # of these, while the least memory is searched, where each is compiled
_IN_VAIN = 3  # compilations of a list, before its leanest is compiled, which says whether any can fit
_WORTH = 0.999  # of the seconds of the best so far; what is not faster is not worth compiling
_FULL = 0.97  # of the limit, of which there is little left
_HARDLY_FASTER = 0.99  # of the seconds of the best so far, for which what is left of the limit may stay
_IN_DOUBT = 1.02  # of what the model says, what the compiler may still do with less
_BLOCKS = 2  # blocks that are compiled alone for each compilation of the step, while the least memory is searched


class Compiler(Protocol):
    """What is asked for a plan. An answer depends on the question alone.

    Fields:
        refused: kinds of combinations that turned out not to run.
    """

    refused: set[object]

    def peak(self, c: Combination, predicted: float) -> float:
        """The peak of the whole step, infinite where it cannot be run so."""
        ...

    def block(self, i: int, option: Option) -> Asked | None:
        """What blocks of the `i`-th stack keep and take, None where that cannot be asked."""
        ...


def fastest(
    limit: float,
    combinations: Sequence[Combination],
    fixed: int,
    compiler: Compiler,
    compilations: int,
    known: Known | None = None,
) -> Combination | None:
    """The fastest combination that was found to be within the limit, None where none was.

    Arguments:
        fixed: see `Peaks`.
        compilations: of the whole step, at most; those that fail are not counted.
        known: before, whatever the limit.
    """
    found: dict[Combination, float] = {}
    learnt = known or Known()  # and from what the rounds before settled on

    def fits(c: Combination, peaks: Peaks) -> bool:
        if c not in found:
            # What was compiled in vain decides nothing, but whoever reads the prediction should have all that is known.
            compiled = {other: round(peak) for other, peak in found.items() if peak < math.inf}
            known = Known({**compiled, **peaks.known.compiled}, peaks.known.blocks)
            found[c] = compiler.peak(c, Peaks(fixed, known).predicted(c))
        return found[c] <= limit

    best, given_up, left = None, -math.inf, compilations
    while left:
        peaks = Peaks(fixed, learnt)
        slowest = math.inf if best is None else _WORTH * best.seconds
        between = [c for c in combinations if given_up < c.seconds <= slowest]
        number = min(-(-left // 2), _FIRST)
        listed = _spread(_front(between, peaks), peaks, number, with_ends=best is None)
        if not listed or (best is not None and _is_enough(best, found[best], listed, peaks, limit)):
            break
        left -= len(listed)
        for c in listed:
            informed = _asked(c, peaks, limit, compiler)
            if informed is not None and fits(c, informed):
                best, learnt = c, informed.known.with_compiled(c, round(found[c]))
                break
            if kind(c) in compiler.refused:  # begin again without the like
                rest = [other for other in combinations if kind(other) not in compiler.refused]
                return fastest(limit, rest, fixed, compiler, compilations, known)
            given_up, leanest = c.seconds, listed[-1]
            is_hopeless = best is None and len(found) >= _IN_VAIN and not fits(leanest, peaks)
            if is_hopeless and kind(leanest) not in compiler.refused:
                break
        if best is None:  # the leanest was listed too
            break
    return best


def least(
    combinations: Sequence[Combination], fixed: int, compiler: Compiler, compilations: int, learnt: Known
) -> Combination:
    """The combination of the least compiled peak, as far as the model can tell which to compile.

    Arguments:
        learnt: what is known before.
    """
    blocks = _BLOCKS * compilations
    while True:
        peaks = Peaks(fixed, learnt)
        combinations = [c for c in combinations if kind(c) not in compiler.refused]
        new = [c for c in combinations if c not in learnt.compiled]
        there = min(learnt.compiled, key=peaks.peak, default=None)
        if there is not None and not (new and compilations):
            return there
        best = min(new, key=peaks.predicted)
        # What the rest of the step needs was seen, and is in no doubt.
        in_doubt = (_IN_DOUBT - 1) * peaks.without_rest(best)
        if there is not None and peaks.predicted(best) - in_doubt > peaks.peak(there):
            return there
        informed = _informed(best, peaks, compiler) if blocks else peaks
        if informed is not peaks:  # that changes which should be the least
            learnt, blocks = informed.known, blocks - 1
            continue
        found = compiler.peak(best, peaks.predicted(best))
        if found < math.inf:
            learnt, compilations = learnt.with_compiled(best, round(found)), compilations - 1


def _is_enough(best: Combination, peak: float, listed: Iterable[Combination], peaks: Peaks, limit: float) -> bool:
    """Whether the limit is nearly used up, and nothing that is listed and should fit is much faster."""
    faster = [c for c in listed if c.seconds < _HARDLY_FASTER * best.seconds and peaks.predicted(c) <= limit]
    return _is_full(peak, limit) and not faster


def _is_full(peak: float, limit: float) -> bool:
    return peak >= _FULL * limit


def _asked(c: Combination, peaks: Peaks, limit: float, compiler: Compiler) -> Peaks | None:
    """The model that knows what the blocks of `c` take, if by it `c` is within the limit."""
    if peaks.predicted(c) > limit:  # with hopeful guesses; no need to ask
        return None
    informed = _informed(c, peaks, compiler)
    return informed if informed.predicted(c) <= limit else None


def _informed(c: Combination, peaks: Peaks, compiler: Compiler) -> Peaks:
    """The same model, if there is nothing to ask of the blocks of `c`, or another one that knows what they take."""
    known = peaks.known
    for i, whole in enumerate(c.options):
        for option in whole.of_equal_blocks:
            if not Peaks(peaks.fixed, known).is_told(i, option) and (said := compiler.block(i, option)) is not None:
                known = Known(known.compiled, {**known.blocks, (i, option.of_block): said})
    return peaks if known is peaks.known else Peaks(peaks.fixed, known)


def _front(combinations: Iterable[Combination], peaks: Peaks) -> list[Combination]:
    """Those that no other beats in seconds and in predicted bytes, the fastest first."""
    front: list[Combination] = []
    lowest = math.inf
    for _, size, c in sorted(((c.seconds, peaks.predicted(c), c) for c in combinations), key=lambda entry: entry[:2]):
        if size < 0.999 * lowest:
            front.append(c)
            lowest = size
    return front


def _spread(front: list[Combination], peaks: Peaks, number: int, with_ends: bool) -> list[Combination]:
    """So many of a front, at even factors of predicted bytes; with its leanest, and then its fastest, or inside of it."""
    if len(front) <= number:
        return front
    sizes = [math.log(max(1.0, peaks.predicted(c))) for c in front]
    parts = max(1, number - 1) if with_ends else number + 1
    steps = range(number) if with_ends else range(1, number + 1)
    wanted = [sizes[-1] + (sizes[0] - sizes[-1]) * step / parts for step in steps]
    nearest = {min(range(len(front)), key=lambda i, size=size: abs(sizes[i] - size)) for size in wanted}
    return [front[i] for i in sorted(nearest)]


def untried(limit: float, combinations: Iterable[Combination], best: Combination, peaks: Peaks) -> list[Combination]:
    """What should be worth it and fit, by all that is known, and was not compiled; the fastest first."""
    worth = _HARDLY_FASTER if _is_full(peaks.peak(best), limit) else _WORTH
    faster = [c for c in combinations if c.seconds <= worth * best.seconds and c not in peaks.known.compiled]
    return sorted((c for c in faster if peaks.predicted(c) <= limit), key=lambda c: c.seconds)
