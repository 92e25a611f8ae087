"""The pieces that a block is cut into, each checkpointed by itself: what they are, and cuts where the user's tags stand.

While a block is differentiated, all that its backward pass wants is alive at once, and for a large block that is the peak
of the whole step. Cut into pieces, only what crosses the cuts and one piece's own values are. A cut stands between two
equations of the block's inlined jaxpr; `jaxckpt.analysis.cuts` finds good ones.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import tagging
from jaxckpt.analysis.tiles import Tiles


class Piece(NamedTuple):
    """The equations from `begin` to `end` of an inlined jaxpr.

    Fields:
        bytes: that autodiff wants of it at once.
        last: the equations whose values are the last that autodiff wants: it wants others only on the way to them.
        tiles: how it is computed in slices, if it is.
        strided: whether the entries of a slice are as far apart as there are slices, and not neighbours.
        obstacles: the equations that cannot be, although slices were asked of them.
        groups: where the block is written for groups of examples, their axis by equation and number of its output (of what
            the block returns, the axis of all examples); not of what comes of parameters alone. See
            `jaxckpt.analysis.groups`.
    """

    begin: int
    end: int
    bytes: int
    last: list[int]
    tiles: Tiles | None = None
    strided: bool = True
    obstacles: tuple[int, ...] = ()
    groups: Mapping[tuple[int, int], int] | None = None


def pieces_between(
    closed: Any, cuts: Sequence[int], wanted: Sequence[int], tiles: Sequence[Tiles | None] | None = None
) -> list[Piece]:
    """The pieces that cuts leave; `wanted` is what `numbering.residual_bytes` found, `tiles` how each is sliced."""
    pieces = []
    spans = itertools.pairwise([0, *cuts, len(closed.jaxpr.eqns)])
    for (begin, end), sliced in zip(spans, tiles or [None] * (len(cuts) + 1), strict=True):
        on_the_way: set[Any] = set()
        last = []
        for i in reversed(range(begin, end)):
            eqn = closed.jaxpr.eqns[i]
            if on_the_way.isdisjoint(eqn.outvars):
                if not wanted[i]:
                    continue
                last.append(i)
            on_the_way.update(jx.variables(eqn.invars))
        pieces.append(Piece(begin, end, sum(wanted[begin:end]), last[::-1], sliced))
    return pieces


def run_before_pieces(jaxpr: Any, pieces: Sequence[Piece], kept: Collection[Any] = frozenset()) -> set[int]:
    """The equations that a block's backward pass runs, before any piece of it, for what enters the pieces; by number.

    Arguments:
        kept: the variables that are kept.
    """
    made_by = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    left = [
        var
        for piece in pieces
        for eqn in jaxpr.eqns[piece.begin : piece.end]
        for var in jx.variables(eqn.invars)
        if made_by.get(var, piece.begin) < piece.begin
    ]
    run: set[int] = set()
    while left:
        var = left.pop()
        if var in made_by and var not in kept and made_by[var] not in run:
            run.add(made_by[var])
            left += jx.variables(jaxpr.eqns[made_by[var]].invars)
    return run


def cuts_at_tags(closed: Any, tags: Sequence[str]) -> list[int]:
    """Cuts right behind the equations that give these names.

    Raises:
        ValueError: a name that nothing in the block has, or only something inside of what is not cut.
    """
    found = [tagging.tag_of(eqn) for eqn in closed.jaxpr.eqns]
    missing = [tag for tag in tags if tag not in found]
    if inside := tagging.tags(closed).intersection(missing):
        raise ValueError(
            f"stages: {', '.join(map(repr, sorted(inside)))} tags a value inside of a loop, a branch or a function with a "
            "derivative of its own, and those are not cut: tag a value outside of it"
        )
    if missing:
        there = ", ".join(sorted({tag for tag in found if tag is not None and not tagging.is_value_name(tag)})) or "none"
        raise ValueError(f"stages: nothing in the block is tagged {', '.join(map(repr, missing))}; its tags are: {there}")
    last = len(found) - 1
    return [i + 1 for i, tag in enumerate(found) if tag in tags and i < last]
