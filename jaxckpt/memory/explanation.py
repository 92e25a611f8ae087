"""What `jaxckpt.explain` returns: a table of values, printed, as a page, or as JSON."""

import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxckpt._sizes import size_text
from jaxckpt._table import aligned
from jaxckpt.memory.slices import SlicedPiece


@dataclass(frozen=True)
class Value:
    """A value of a block that autodiff wants, or that the setting keeps to compute one from.

    Fields:
        name: its tag; or the primitive that computes it; or, for the block's input, the name of the argument.
        op: the primitive.
        source: "file.py:12", the line of the block's code; "" for inputs.
        shape, dtype: of one block's.
        times: of how many blocks it is stored at once: all `N`, the `K` of a chunk, or 1 where all blocks share it.
        fate: "kept", "re-run" or "offloaded"; "kept per chunk" for the input of a chunk.
        seconds: the time model's cost of the equation that is run again, for one block; None without a GPU's data, or
            where nothing is to be run (inputs). A `~` in the table: the model does not know the primitive.
        sent_bytes: by each device, whenever the equation is run.
    """

    name: str
    op: str
    source: str
    shape: tuple[int, ...]
    dtype: str
    times: int
    fate: str
    bytes_per_block: int
    seconds: float | None = None
    is_guess: bool = False
    sent_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.bytes_per_block * self.times


@dataclass(frozen=True)
class Sent:
    """What each device sends whenever an equation of a block is run; named as the equation's value is, see `Value`."""

    name: str
    source: str
    bytes: int


@dataclass(frozen=True)
class Chosen:
    """What a policy such as `cheap` or `budget:0.25` chose for a block, by the time model of its own reference GPU.

    Fields:
        bytes: kept of one block, beside its input. rerun: what is run again, as a share of the time of a forward pass; some
            of it is computed by derivatives only, and is run under any policy.
        corners: all (bytes, rerun) on the convex hull of what could be chosen.
    """

    bytes: int
    rerun: float
    corners: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Explanation:
    """What a setting stores for a stack of `N` blocks, in bytes, and what one block is made of; on one of several devices.

    Fields:
        block, length, blocks_per_ckpt, policy: of the stack. pieces: that each block is cut into, see `stages`.
        values: a row for each value, in the order in which the block computes them.
        stored_bytes: on the device from the forward to the backward pass: the residuals of the stack in its jaxpr, without
            the parameters and other inputs, which exist anyway.
        host_bytes: those of them that are in the host's memory.
        chunk_bytes: what the `K` blocks of the chunk that is being differentiated keep beside; 0 without chunks, and in the
            reversal engine, where the room for it is there from the last chunk's forward pass on.
        wanted_bytes: what no checkpointing would store for all `N` blocks.
        target: whose rates the seconds are for.
        forward_seconds, rerun_seconds: the time model's cost of one block's forward pass, and of what of it is run again to
            get at the values that are wanted and not kept. (Chunks are run once more before that, to get at their inputs.)
            What is computed twice counts once, as XLA merges it; what derivatives compute beside the block's own values
            does not count. Loops, calls with a derivative of their own, and the block's own checkpoints count as a whole.
        sends: what each device sends in one run of a block: for collectives that the block names inside of `shard_map`, or
            that the compiler puts in, where the target has several devices; what sends most first.
        whole_runs: how often all of a block is run, in the mean, see `jaxckpt.engine.schedule.whole_runs`.
        slices: of each piece that is computed in slices, in which, see `tiles`.
        chosen: where the policy chooses by itself, what, out of what.
        parts: where a plan runs the first blocks under another setting than the others, both, each explained as a stack of
            its own; then bytes are those of both, times their means, the values those of the one and then of the other, and
            what else is said of a setting stands in the parts.
        is_stack: and not what `checkpoint` made, of which there is one.
    """

    block: str
    length: int
    blocks_per_ckpt: int | None
    policy: str
    pieces: int
    values: tuple[Value, ...]
    stored_bytes: int
    host_bytes: int
    chunk_bytes: int
    wanted_bytes: int
    target: str | None = None
    forward_seconds: float | None = None
    rerun_seconds: float | None = None
    chosen: "Chosen | None" = None
    sends: tuple[Sent, ...] = ()
    whole_runs: float = 1.0
    slices: tuple[SlicedPiece, ...] = ()
    parts: "tuple[Explanation, ...]" = ()
    is_stack: bool = True

    @property
    def sent_bytes(self) -> int:
        """By each device in one run of a block."""
        return sum(sent.bytes for sent in self.sends)

    @property
    def forward_runs(self) -> float | None:
        """How often a block is run in one training step, parts of it by their share of the time; None without a target.

        1 without checkpointing, 2 where the whole block is run again; up to another 1 for restoring the inputs in a chunk.
        Plans count in the same way, without what checkpoints of the block's own run again.
        """
        if not self.forward_seconds or self.rerun_seconds is None:
            return None
        return self.whole_runs + self.rerun_seconds / self.forward_seconds

    def to_json(self) -> dict[str, Any]:
        """All fields, the forward runs and what is sent, as JSON has them."""
        parts = [part.to_json() for part in self.parts]
        of_run = {"forward_runs": self.forward_runs, "sent_bytes": self.sent_bytes}
        return {**dataclasses.asdict(self), **of_run, "parts": parts}

    def __str__(self) -> str:
        if self.parts:
            return "\n\n".join([self._title(), *map(str, self.parts), "\n".join(self._totals())])
        columns = self._columns()
        cells = [_cells(value)[: len(columns)] for value in self.values]
        lines = aligned([columns, *cells], right=(4, 5, 6))
        return "\n".join([self._title(), "", *lines, "", *self._totals()])

    def to_html(self) -> str:
        """The table as a page that needs nothing else."""
        head = "".join(f"<th>{name}</th>" for name in self._columns())
        most = max((v.bytes for v in self.values), default=1) or 1
        title = lambda part: f'<tr><th colspan="{len(self._columns()) + 1}">{html.escape(part._title())}</th></tr>\n'  # noqa: E731
        columns = self._columns()
        rows = "\n".join(title(part) + part._rows(most, columns) for part in self.parts) or self._rows(most, columns)
        totals = "".join(f"<li>{html.escape(line.strip())}</li>" for line in self._totals())
        return _PAGE.format(title=html.escape(self._title()), head=head, rows=rows, totals=totals)

    def _rows(self, most: int, columns: Sequence[str]) -> str:
        """The rows of a page, with bars beside them; `most` bytes are the longest."""
        return "\n".join(
            f'<tr class="{v.fate.split()[0]}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(v)[: len(columns)])
            + f'<td><div style="width:{200 * v.bytes / most:.0f}px"></div></td></tr>'
            for v in self.values
        )

    def _columns(self) -> tuple[str, ...]:
        """Without the last one where no value is sent for."""
        return _COLUMNS if any(value.sent_bytes for value in self.values) else _COLUMNS[:-1]

    def _title(self) -> str:
        chunks = "" if self.blocks_per_ckpt is None else f", blocks_per_ckpt={self.blocks_per_ckpt}"
        pieces = "" if self.pieces == 1 else f", each in {self.pieces} pieces"
        if self.parts:
            return f"{self.length} x {self.block}, the first {self.parts[0].length} under another setting than the others"
        blocks = f"{self.length} x " if self.is_stack else ""
        return f"{blocks}{self.block}{chunks}, policy={self.policy!r}{pieces}"

    def _totals(self) -> list[str]:
        lines = [f"stored from the forward to the backward pass: {size_text(self.stored_bytes)}"]
        if self.host_bytes:
            lines.append(f"in the host's memory: {size_text(self.host_bytes)}")
        if self.blocks_per_ckpt is not None:
            lines.append(f"and while a chunk of {self.blocks_per_ckpt} is differentiated: {size_text(self.chunk_bytes)}")
        lines.append(f"without checkpointing: {size_text(self.wanted_bytes)}")
        if self.sent_bytes:
            first = "; ".join(f"{sent.name} ({sent.source}) {size_text(sent.bytes)}" for sent in self.sends[:_NAMED])
            others = f"; {len(self.sends) - _NAMED} others" if len(self.sends) > _NAMED else ""
            lines.append(f"sent by each device in one run of a block: {size_text(self.sent_bytes)}: {first}{others}")
        if self.forward_seconds and self.rerun_seconds is not None:
            share = self.rerun_seconds / self.forward_seconds
            beside = "" if self.blocks_per_ckpt is None else ", beside the run that restores its chunk"
            lines.append(
                f"run again in each block{beside}, by the time model of {self.target}: {self.rerun_seconds * 1e3:.3g} of "
                f"{self.forward_seconds * 1e3:.3g} ms ({share:.0%}); forward runs of a block in a training step: "
                f"{self.forward_runs:.2f}"
            )
        lines += map(str, self.slices)
        if self.chosen is not None:
            corners = ", ".join(f"{size_text(size)} {rerun:.0%}" for size, rerun in self.chosen.corners)
            lines.append(
                f"chosen: {size_text(self.chosen.bytes)} per block beside its input, {self.chosen.rerun:.0%} run again; out "
                f"of: {corners}"
            )
        return lines


_NAMED = 4  # of what sends
_COLUMNS = ("value", "op", "source", "shape", "of one block", "blocks", "in all", "fate", "re-run", "sends")


def _cells(value: Value) -> tuple[str, ...]:
    shape = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    spent = "" if value.seconds is None else f"{'~' * value.is_guess}{value.seconds * 1e6:,.1f} us"
    sizes = size_text(value.bytes_per_block), str(value.times), size_text(value.bytes)
    sent = size_text(value.sent_bytes) if value.sent_bytes else ""
    return (value.name, value.op, value.source, shape, *sizes, value.fate, spent, sent)


_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: 2px 12px 2px 0; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }}
.kept {{ background: #fdecea; }} .offloaded {{ background: #e8f1fc; }} .re-run {{ background: #eef7ee; }}
td div {{ height: 10px; background: #888; }}
</style>
<h1>{title}</h1>
<ul>{totals}</ul>
<table>
<tr>{head}<th></th></tr>
{rows}
</table>
"""
