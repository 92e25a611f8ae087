"""What a block takes in pieces: bytes of the largest, and seconds for what enters each and for slices."""

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from jaxckpt._plan import Knobs
from jaxckpt._recent import Recent
from jaxckpt._setting import Tiles as Most
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import tagging
from jaxckpt.analysis.cost import cost
from jaxckpt.analysis.shares import Shares
from jaxckpt.analysis.slices_cost import slicing_seconds
from jaxckpt.analysis.stages import run_before_pieces
from jaxckpt.analysis.tiles import Tilings
from jaxckpt.engine import single
from jaxckpt.engine.cutting import pieces_of
from jaxckpt.engine.run import Run

STAGES = Knobs(stages="auto")
# "auto" weighs memory and time; with 64 slices at most it is the least memory, and with 16 and 4 less time.
TILES = (Knobs(tiles="auto"), Knobs(tiles=64), Knobs(tiles=16), Knobs(tiles=4))


class Cut(NamedTuple):
    """A block in pieces.

    Fields:
        knobs: that cut it so.
        bytes: that are wanted at once while its largest piece is differentiated.
        slicing_seconds: of one run of the block, what computing pieces in slices takes longer.
        entering_seconds: what is run once more for what enters the pieces, by the names of the values that are kept.
    """

    knobs: Knobs
    bytes: int
    slicing_seconds: float
    entering_seconds: dict[tuple[str, ...], float]


def cuts_of(
    run: Run,
    merged: Any,
    kept: Iterable[tuple[str, ...]],
    carry_bytes: int,
    rates: Any,
    shares: Shares | None = None,
    held: float = 1.0,
) -> dict[str | None, Cut]:
    """The block in stages and in tiles, by `Knobs.pieces`, each where there is something to cut or to slice.

    As it is cut where nothing is kept; the search for cuts does not know of what is.

    Arguments:
        merged: the block, inlined and merged. kept: names of its values that may be kept together, see `tagging.value_name`.
        rates: as in `jaxckpt.analysis.cost`.
        shares: what one device has of the block; all of it by default.
        held: which part of a piece's values one device holds, in the mean.
    """
    found = {}
    tilings: Recent[Tilings] = Recent(1)
    whole = [cost(eqn, rates).seconds for eqn in merged.jaxpr.eqns]
    of_one = whole if shares is None else shares.seconds(merged.jaxpr, run.parameters, rates)
    computing = sum(of_one) - (0.0 if shares is None else sum(shares.sending))
    # Pieces are of the same equations, in another order.
    seconds_of = {eqn.outvars[0]: seconds for eqn, seconds in zip(merged.jaxpr.eqns, of_one, strict=True)}
    for knobs in (STAGES, *TILES) if not jx.effects(merged) else ():
        flat, pieces = pieces_of(merged, run.carried, "auto", cast(Most, knobs.tiles), tilings=tilings)
        is_found = any(piece.tiles for piece in pieces) if knobs.tiles else len(pieces) > 1
        if not is_found:
            continue
        longer = sum(slicing_seconds(flat.jaxpr, piece.tiles, rates) for piece in pieces if piece.tiles)
        is_run_again = run.is_stack or single.is_run_again(flat, pieces, run.leaves[2])
        longer *= computing / (sum(whole) or 1.0)
        entering = {}
        for names in kept:
            outputs = filter(None, map(tagging.output_of, names))
            variables = {merged.jaxpr.eqns[i].outvars[k] for i, k in outputs}  # which are those of `flat`, as it was flat
            before = run_before_pieces(flat.jaxpr, pieces, variables) if is_run_again else ()
            entering[names] = sum(seconds_of[flat.jaxpr.eqns[i].outvars[0]] for i in sorted(before))
        largest = round(held * max(piece.bytes for piece in pieces))
        found[knobs.pieces] = Cut(knobs, largest + 2 * carry_bytes, longer, entering)
    return found
