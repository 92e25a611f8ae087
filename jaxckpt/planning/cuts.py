"""What a block takes in pieces: bytes of the largest, what is run a third time, and what slices take longer."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from jaxckpt._plan import Knobs
from jaxckpt._setting import Tiles as Most
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices_cost import slicing_seconds
from jaxckpt.analysis.stages import share_before_last
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
        share: of what is run again, what is run again twice, see `share_before_last`.
    """

    knobs: Knobs
    bytes: int
    slicing_seconds: float
    share: float


def cuts_of(run: Run, closed: Any, carry_bytes: int, rates: Any, wanted: Sequence[Knobs]) -> dict[str | None, Cut]:
    """The block in stages and in tiles, by `Knobs.pieces`, each where there is something to cut or to slice.

    Arguments:
        closed: of the block. rates: as in `jaxckpt.analysis.cost`.
    """
    slices, found = len(run.leaves[0]), {}
    carried = range(slices, slices + len(run.leaves[1]))
    for knobs in wanted if not jx.effects(closed) else ():
        flat, pieces = pieces_of(closed, carried, "auto", cast(Most, knobs.tiles))
        is_found = any(piece.tiles for piece in pieces) if knobs.tiles else len(pieces) > 1
        if not is_found:
            continue
        longer = sum(slicing_seconds(flat.jaxpr, piece.tiles, rates) for piece in pieces if piece.tiles)
        is_run_again = run.is_stack or single.is_run_again(flat, pieces, run.leaves[2])
        share = share_before_last(flat.jaxpr, pieces, rates) if is_run_again else 0.0
        largest = max(piece.bytes for piece in pieces)
        found[knobs.pieces] = Cut(knobs, largest + 2 * carry_bytes, longer, share)
    return found
