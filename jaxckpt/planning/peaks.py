"""The peak of a step by the model, corrected by what the compiler said of the step under other settings."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxckpt._plan import Knobs
from jaxckpt.planning.model import Asked, Option, Phase

_HOPED = 0.5  # of what autodiff wants of a block, what XLA may have alive at once: 0.35 to 0.76 in the benchmarks
_HOPED_THEN, _HOPED_BEFORE = 0.75, 0.95  # of what a block takes that keeps less, or more


class Combination(NamedTuple):
    """A setting of each stack."""

    options: tuple[Option, ...]

    @property
    def seconds(self) -> float:
        return sum(option.seconds for option in self.options)

    @property
    def family(self) -> tuple[Any, ...]:
        return tuple(option.family for option in self.options)


@dataclass(frozen=True)
class Known:
    """What the compiler said of one step.

    Fields:
        compiled: peaks of the whole step under a combination.
        blocks: what was asked of blocks, by the stack and `Option.of_block`.
    """

    compiled: Mapping[Combination, int] = field(default_factory=dict)
    blocks: Mapping[tuple[int, Knobs], Asked] = field(default_factory=dict)

    def with_compiled(self, c: Combination, peak: int) -> "Known":
        return Known({**self.compiled, c: peak}, self.blocks)


class Peaks:
    """What combinations need: as the compiler said, or as the model says.

    By the model that is: `fixed`, the arguments and results of the step; what the stacks store; what differentiating a block
    takes, of the stack where that is most; and what was needed beside that where settings alike were compiled.
    """

    def __init__(self, fixed: int, known: Known):
        self.fixed, self.known = fixed, known

    def predicted(self, c: Combination) -> float:
        """The peak by the model."""
        return self.without_rest(c) + self._rest(c)

    def peak(self, c: Combination) -> float:
        """The compiled peak, if it is known, or the predicted one."""
        found = self.known.compiled.get(c)
        return self.predicted(c) if found is None else found

    def without_rest(self, c: Combination) -> float:
        return self.fixed + self.stored(c) + max(self.transient(i, option) for i, option in enumerate(c.options))

    def stored(self, c: Combination) -> float:
        return sum(self.stored_of(i, option) for i, option in enumerate(c.options))

    def stored_of(self, i: int, option: Option) -> float:
        """What is stored for the `i`-th stack."""
        if option.phases:
            return self._still_stored(i, option.phases[0])
        found = self.known.blocks.get((i, option.of_block))
        return option.stored_bytes + (0 if found is None else option.at_once * (found.kept_bytes - option.kept_bytes))

    def _still_stored(self, i: int, phase: Phase) -> float:
        return sum(share * self.stored_of(i, option) for share, option in phase.stored)

    def _rest(self, c: Combination) -> float:
        # The model of a scan without chunks is exact: what it misses there, the rest of the step needs under any setting.
        scans = tuple((None, False, False) for _ in c.options)
        near = self._families.get(c.family) or self._families.get(scans)
        if near is None:
            return min([0.0, *map(self._missed, self.known.compiled)])
        stored = self.stored(c)
        near = sorted(near, key=lambda other: _distance(self.stored(other), stored))[:2]
        rest = [self._missed(other) for other in near]
        (first, *others) = map(self.stored, near)
        if not others or first == others[0]:
            return rest[0]
        # A line through the two nearest, and not beyond what they need.
        share = (stored - first) / (others[0] - first)
        return rest[0] + min(1.0, max(0.0, share)) * (rest[1] - rest[0])

    def _missed(self, c: Combination) -> float:
        """What the model misses of a step that was compiled."""
        return self.known.compiled[c] - self.without_rest(c)

    @functools.cached_property
    def _families(self) -> dict[Any, list[Combination]]:
        """What was compiled, by family."""
        groups: dict[Any, list[Combination]] = {}
        for other in self.known.compiled:
            groups.setdefault(other.family, []).append(other)
        return groups

    def transient(self, i: int, option: Option) -> float:
        """What differentiating a block of the `i`-th stack takes; a hopeful guess where the compiler was not asked.

        Where blocks differ, what is needed at most beside all that is stored.
        """
        if option.phases:
            needs = [self._still_stored(i, phase) + self.transient(i, phase.option) for phase in option.phases]
            return max(needs) - self.stored_of(i, option)
        if (found := self.known.blocks.get((i, option.of_block))) is not None:
            return found.taken_bytes
        sizes = sorted(self._alike(i, option))
        # What keeps more takes less as a rule, sometimes by a quarter from one choice to the next; pieces do not.
        then, before = (1.0, 1.0) if option.knobs.pieces else (_HOPED_THEN, _HOPED_BEFORE)
        fewer = [then * taken for kept, taken in sizes if kept <= option.kept_bytes][-1:]
        more = [before * taken for kept, taken in sizes if kept > option.kept_bytes][:1]
        return max([*fewer, *more], default=_HOPED * option.block_bytes)

    def is_told(self, i: int, option: Option) -> bool:
        """Whether there is no need to ask for what `transient` says.

        The compiler was asked, or was of blocks in the same pieces that keep as much, give or take what they take: 5.2 to
        5.8 GiB for those of a Pairformer in 4 slices, whatever is kept of them, and 2.8 to 3.0 in 16.
        """
        if (i, option.of_block) in self.known.blocks:
            return True
        near = [abs(kept - option.kept_bytes) <= taken for kept, taken in self._alike(i, option)]
        return option.knobs.pieces is not None and any(near)

    def _alike(self, i: int, option: Option) -> list[Asked]:
        """What was asked of blocks of the `i`-th stack that are cut alike."""
        pieces = option.knobs.pieces
        return [said for (stack, knobs), said in self.known.blocks.items() if stack == i and knobs.pieces == pieces]


def kind(c: Combination) -> Any:
    """What of a combination decides whether a step can be run under it."""
    said = lambda knobs: (knobs.engine, knobs.offload_carry, knobs.pieces, knobs.policy)  # noqa: E731
    return tuple((*said(knobs), knobs.first and said(knobs.first[1])) for knobs, *_ in c.options)


def _distance(a: float, b: float) -> float:
    return abs(math.log((a + 1) / (b + 1)))
