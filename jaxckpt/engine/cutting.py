"""The pieces that a setting cuts a block into, and which of them are computed in slices."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxckpt._recent import Recent
from jaxckpt._setting import Setting, Stages
from jaxckpt._setting import Tiles as Most
from jaxckpt.analysis import flow, inlining, numbering, sources
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import REFERENCE
from jaxckpt.analysis.cuts import SLACK, Block, find_cuts
from jaxckpt.analysis.groups import axes_of_groups, devices_of, in_groups, why_slices_send
from jaxckpt.analysis.slices_cost import slicing_seconds
from jaxckpt.analysis.stages import Piece, cuts_at_tags, pieces_between
from jaxckpt.analysis.tiles import Tiler, Tiles, Tilings
from jaxckpt.engine import check
from jaxckpt.engine.devices import may_be_several
from jaxckpt.engine.offload import is_offloaded
from jaxckpt.policies.grammar import JaxPolicy, nothing

_CANDIDATES_OF_TILES = 50  # with fewer dropout is in the way; more made the modelled peak less, and the compiled one more
# Of the memory that the block takes whole: what it may cost that slices take less time, as much as a run of it. Less than
# that run itself is worth (`cuts.WORTH`), since what starts cost is known to a factor of three only.
_WORTH_OF_SLICES = 0.02
_STEP, _STEPS = 1 / 400, 9  # more memory that is tried, of the same: two percent at most
_PASSES = 4  # of a block in a step: twice forward, and backward, which takes as long as two


def cut(
    setting: Setting,
    closed: Any,
    carried: Sequence[int],
    names: check.Names,
    keep: JaxPolicy = nothing,
    is_batched: bool = False,
) -> tuple[Any, list[Piece]]:
    """The block's jaxpr, inlined where it is cut, and the pieces.

    Arguments:
        carried: its inputs that are the carry.
        keep: what it offloads is not computed in slices: XLA compiles no offload in a loop within the stack's for a GPU.
        is_batched: it runs under `vmap`, where axis 0 of its carry is not the batch's.
    """
    stages, tiles = setting.stages or ("auto" if setting.tiles else None), setting.tiles
    if stages is None:
        return closed, []
    if found := jx.effects(closed):
        knob, verb = ("tiles", "slices") if tiles else ("stages", "cuts")
        raise ValueError(
            f"{names.block} has side effects ({', '.join(found)}), and {knob} {verb} only blocks without: take prints, "
            f"callbacks and checks out of it, or leave {knob} away"
        )
    whole, groups = (closed, 1) if is_batched or not carried else in_groups(closed, carried)
    try:
        keep = keep if setting.policy.may_offload else nothing
        flat, pieces = pieces_of(whole, carried, stages, tiles, keep, groups=groups)
    except ValueError as error:
        raise ValueError(f"{names.block}: {error}") from None
    is_whole = len(pieces) == 1 and pieces[0].tiles is None
    if tiles and all(piece.tiles is None for piece in pieces):
        check.warn(f"{names.block}: tiles={tiles!r} found nothing to slice{_reason(flat.jaxpr, pieces, tiles)}")
    elif tiles and groups == 1 and carried and not is_batched and setting.plan is None:
        _warn_of_traffic(closed, carried, names)
    elif is_whole:
        asked = "tags:" + ",".join(stages) if isinstance(stages, tuple) else stages
        check.warn(f"{names.block}: stages={asked!r} found nothing to cut; the block stays whole")
    if any(piece.tiles for piece in pieces):
        strided = devices_of(closed, range(len(closed.in_avals))) > 1 or may_be_several()
        pieces = [piece._replace(strided=strided) for piece in pieces]
    return (closed, []) if is_whole else (flat, pieces)


def _warn_of_traffic(closed: Any, carried: Sequence[int], names: check.Names) -> None:
    """Says that parameters are gathered, and gradients summed, for each slice, where that may be, and what to do."""
    devices = devices_of(closed, carried)
    if devices > 1 and (why := why_slices_send(closed, carried)) is not None:
        check.warn(
            f"{names.block}: tiles on a mesh of {devices} devices may gather parameters, and sum gradients over devices, "
            f"for each slice: {why}"
        )


def _reason(jaxpr: Any, pieces: Sequence[Piece], tiles: Most) -> str:
    """What is in the way of slices, for a sentence that says there are none."""
    found = [jaxpr.eqns[i] for piece in pieces for i in piece.obstacles]
    if not found:
        enough = " that are large enough to keep a GPU busy" if tiles == "auto" else ""
        return f": no piece of it would need much less memory in slices{enough}"
    largest = max(found, key=lambda eqn: sum(jx.nbytes(var.aval) for var in eqn.outvars))
    where = f", {place}" if (place := sources.place_of(largest)) else ""
    return f": {largest.primitive.name} ({largest.outvars[0].aval.str_short()}{where}) is computed whole"


def pieces_of(
    closed: Any,
    carried: Sequence[int],
    stages: Stages,
    tiles: Most,
    keep: JaxPolicy = nothing,
    tilings: Recent[Tilings] | None = None,
    groups: int = 1,
) -> tuple[Any, list[Piece]]:
    """The jaxpr of a block without side effects, inlined, and the pieces that it is cut into; arguments as of `cut`.

    Arguments:
        tilings: to share among calls for one block: ways to slice it are the same for all numbers of slices.
        groups: for how many groups of examples it is written, if it is.
    """
    flat = inlining.inlined(closed, checkpoints=True)
    flat = inlining.results_last(inlining.merged(flat)) if tiles else flat
    asked = enumerate(flat.jaxpr.eqns) if tiles and keep is not nothing else ()
    whole = frozenset(i for i, eqn in asked if is_offloaded(eqn, keep))
    axes = axes_of_groups(flat.jaxpr, groups) if groups > 1 else {}
    splits_more = groups > 1 and devices_of(closed, carried) > groups
    pieces = _pieces(flat, tuple(carried), stages, tiles, whole, tilings or Recent(1), axes, splits_more)
    if not axes:
        return flat, pieces
    of_carry = flow.dependent(flat.jaxpr, carried)
    of_examples = {var: axis for var, axis in axes.items() if var in of_carry}
    return flat, [_with_groups(flat.jaxpr, piece, of_examples) for piece in pieces]


def _with_groups(jaxpr: Any, piece: Piece, axes: Mapping[Any, int]) -> Piece:
    equations = enumerate(jaxpr.eqns[piece.begin : piece.end], piece.begin)
    own = {(i, k): axes[var] for i, eqn in equations for k, var in enumerate(eqn.outvars) if var in axes}
    return piece._replace(groups=own)


_recent: Recent[list[Piece]] = Recent()


def _pieces(
    flat: Any,
    carried: tuple[int, ...],
    stages: Stages,
    tiles: Most,
    whole: frozenset[int],
    shared: Recent[Tilings],
    groups: Mapping[Any, int],
    splits_more: bool,
) -> list[Piece]:
    """The pieces of a block; equal blocks are looked at once, since a search for slices takes seconds."""
    # A custom_jvp is sliced by its rule too, of which the text says nothing.
    customs = [eqn for eqn in jx.equations(flat.jaxpr) if eqn.primitive.name == "custom_jvp_call"] if tiles else []
    program = jx.text(flat), tuple(rule and jx.text(rule) for rule in map(flow.derivative, customs))

    def found() -> list[Piece]:
        if not tiles:
            return _found(flat, carried, stages, None)
        key = program, whole, bool(groups), splits_more
        tilings = shared.of(key, lambda: Tilings(flat.jaxpr, numbering.residual_bytes(flat), whole, groups, splits_more))
        return _found(flat, carried, stages, Tiler(tilings, None if tiles == "auto" else tiles))

    return _recent.of((program, carried, stages, tiles, whole, bool(groups), splits_more), found)


def _found(flat: Any, carried: tuple[int, ...], stages: Stages, tiler: Tiler | None) -> list[Piece]:
    wanted = numbering.residual_bytes(flat) if tiler is None else tiler.wanted
    block = Block(flat, carried, wanted)
    most = stages if isinstance(stages, int) else None
    if isinstance(stages, tuple):
        cuts = cuts_at_tags(flat, stages)
    else:
        cuts = find_cuts(block, most) if tiler is None else find_cuts(block, most, tiler.wants, _CANDIDATES_OF_TILES)
    if tiler is None:
        return pieces_between(flat, cuts, wanted)
    pieces = pieces_between(flat, cuts, wanted, _tiles(tiler, block, cuts))
    return [
        piece._replace(
            bytes=tiler.bytes(*piece.tiles) if piece.tiles else piece.bytes,
            obstacles=tuple(tiler.tilings.obstacles(piece.begin, piece.end)),
        )
        for piece in pieces
    ]


def _tiles(tiler: Tiler, block: Block, cuts: Sequence[int]) -> list[Tiles | None]:
    """Of each piece the fewest slices under which no piece needs more than the one that needs most.

    Or a little more, where the slices are fewer and larger then, and their time is worth it, unless a number is asked for.
    """
    spans = list(itertools.pairwise([0, *cuts, block.count]))
    beside = block.beside(cuts)
    least = SLACK * max(tiler.wants(*span) + more for span, more in zip(spans, beside, strict=True))
    best, cheapest = [], math.inf
    for step in range(_STEPS if tiler.given_most is None else 1):
        peak = least + step * _STEP * block.whole
        found = [tiler.fewest(*span, int(peak - more)) for span, more in zip(spans, beside, strict=True)]
        longer = sum(slicing_seconds(tiler.jaxpr, tiles, REFERENCE) for tiles in found if tiles) / (block.seconds or 1.0)
        if (price := step * _STEP + _WORTH_OF_SLICES * _PASSES * longer) < cheapest:
            best, cheapest = found, price
    return best
