"""What `explain` says of pieces that are computed in slices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxckpt._sizes import size_text
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import sources, tagging
from jaxckpt.analysis.flow import last_uses
from jaxckpt.analysis.stages import Piece
from jaxckpt.engine.run import Run


@dataclass(frozen=True)
class SlicedPiece:
    """A piece of a block, and in which slices it is computed.

    Fields:
        number: of the piece, from 1.
        value, source, shape: of its largest output that is sliced: its tag or primitive, "file.py:12", and its shape.
        axis: of that shape, which is sliced. size: of the axis. count: of slices, a shorter last one included.
        slice_bytes: of the largest value inside the piece, in one slice. whole_bytes: of the same value, whole.
        whole: what is computed whole although slices were asked of it, as "sort (file.py:12)".
    """

    number: int
    value: str
    source: str
    shape: tuple[int, ...]
    axis: int
    size: int
    count: int
    slice_bytes: int
    whole_bytes: int
    whole: tuple[str, ...]

    def __str__(self) -> str:
        value = f"{self.value}[{','.join(map(str, self.shape))}]{_place(self.source)}"
        sizes = f"{size_text(self.slice_bytes)} instead of {size_text(self.whole_bytes)}"
        whole = f"; whole: {', '.join(self.whole)}" if self.whole else ""
        return (
            f"piece {self.number}: {value} in {self.count} slices along axis {self.axis}, the largest value {sizes}{whole}"
        )


def sliced_pieces(run: Run) -> tuple[SlicedPiece, ...]:
    """The pieces of a run that are computed in slices."""
    jaxpr = run.closed.jaxpr
    found = enumerate(run.pieces, 1)
    return tuple(_sliced(jaxpr, number, piece) for number, piece in found if piece.tiles is not None)


def _sliced(jaxpr: Any, number: int, piece: Piece) -> SlicedPiece:
    assert piece.tiles is not None
    tiling, most = piece.tiles
    each = -(-tiling.size // most)
    axes = {
        var: axis
        for i, rule in tiling.inside.items()
        if rule is not None
        for var, axis in zip(jaxpr.eqns[i].outvars, rule.outputs, strict=True)
        if axis is not None
    }
    maker = {var: jaxpr.eqns[i] for i in tiling.inside for var in jaxpr.eqns[i].outvars}
    ends = last_uses(jaxpr)
    out = max((var for var in axes if ends.get(var, -1) >= piece.end), key=lambda var: jx.nbytes(var.aval))
    largest = max(axes, key=lambda var: jx.nbytes(var.aval))
    whole = jx.nbytes(largest.aval)
    return SlicedPiece(
        number=number,
        value=tagging.tag_of(maker[out]) or maker[out].primitive.name,
        source=sources.place_of(maker[out]),
        shape=out.aval.shape,
        axis=axes[out],
        size=tiling.size,
        count=-(-tiling.size // each),
        slice_bytes=whole // tiling.size * each,
        whole_bytes=whole,
        whole=_names([jaxpr.eqns[i] for i in piece.obstacles if i in tiling.before]),
    )


def _names(eqns: Sequence[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{eqn.primitive.name}{_place(sources.place_of(eqn))}" for eqn in eqns))


def _place(source: str) -> str:
    return f" ({source})" if source else ""
