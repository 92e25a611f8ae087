"""The order in which the reversal engine runs, keeps and reverses blocks: tables of chunks, made in plain Python.

Which inputs to store is the business of `jaxckpt.engine.schedule`, whose steps are chunks.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxckpt._setting import Setting
from jaxckpt.engine.schedule import reversal_schedule
from jaxckpt.policies.grammar import JaxPolicy, nothing


class Head(NamedTuple):
    """A part of the forward pass: a snapshot is taken, and the blocks behind it are run."""

    start: Any
    count: Any


class Advance(NamedTuple):
    """A part of the way to a chunk's input: the carry is stored in a slot of snapshots, and the blocks behind it are run."""

    snap: Any
    start: Any
    count: Any


class Chunk(NamedTuple):
    """How a chunk is reversed.

    Fields:
        start, count: its blocks.
        again: how many of them are run again, to keep what their reversals want.
        snap: the slot of the snapshot that is restored.
        begin, end: which advances lead from there to the input of the chunk.
    """

    start: Any
    count: Any
    again: Any
    snap: Any
    begin: Any
    end: Any


class Order(NamedTuple):
    """Which blocks are run when.

    Fields:
        start, stop: the first block, and the one behind the last.
        on_host: whether snapshots lie in host memory.
        by_input: chunks are of one block, and what its reversal wants is its input: there are no slots.
        kept_from: the first block of the last chunk, where the forward pass begins to keep; `stop` if `by_input`.
        heads, chunks, advances: tables with a row for each, in the order in which they are run.
    """

    start: int
    stop: int
    keep: JaxPolicy
    on_host: bool
    by_input: bool
    kept_from: int
    heads: Head
    chunks: Chunk
    advances: Advance


def order_of(start: int, count: int, setting: Setting, keep: JaxPolicy) -> Order:
    """The order of `count` blocks from `start` on."""
    size = setting.blocks_per_ckpt or (1 if setting.snapshots or keep is nothing else count)
    if setting.blocks_per_ckpt == 1 or (setting.snapshots and size == 1):
        keep = nothing  # one block at a time is alive anyway
    by_input = size == 1 and keep is nothing
    counts = [count % size] * (count % size > 0) + [size] * (count // size)
    starts = [*itertools.accumulate(counts, initial=start)]
    forward, *others = reversal_schedule(len(counts), setting.snapshots or len(counts)).reversals
    last = starts[-2]
    kept_from = starts[-1] if by_input else last
    snaps = [start, *(starts[chunk] for chunk, _ in forward.stores)] if forward.step else []
    snaps += [last] * by_input
    chunks = [Chunk(last, counts[-1], 0, len(snaps) - 1, 0, 0)]
    advances: list[Advance] = []
    for chunk, restored, slot, stores in others:
        stops = [(restored, slot), *stores, (chunk, -1)]
        begin = len(advances)
        advances += [
            Advance(snap, starts[a], starts[b] - starts[a]) for (a, snap), (b, _) in itertools.pairwise(stops) if a < b
        ]
        again = 0 if by_input else counts[chunk]
        chunks.append(Chunk(starts[chunk], counts[chunk], again, slot, begin, len(advances)))
    return Order(
        start=start,
        stop=starts[-1],
        keep=keep,
        on_host=setting.offload_carry,
        by_input=by_input,
        kept_from=kept_from,
        heads=_table(Head, [Head(a, b - a) for a, b in itertools.pairwise([*snaps, kept_from])]),
        chunks=_table(Chunk, chunks),
        advances=_table(Advance, advances),
    )


def _table(kind: Any, rows: Sequence[tuple[int, ...]]) -> Any:
    """Rows of one kind as one of that kind, whose fields are columns."""
    return kind(*np.array(rows, np.int32).reshape(-1, len(kind._fields)).T)
