"""What the settings of one stack cost, before anything is compiled: bytes that are stored, and seconds.

`N` blocks, `K` per chunk, `s` snapshots; of each block a choice of values is kept (`jaxckpt.analysis.tradeoff`), and of `r`
of its blocks at once: `r = N` without chunks, else `K`. Stored are `r` times what is kept and the inputs of all blocks or
chunks, or `s` of them. What XLA makes of what one block wants while it is differentiated, and the rest of the step, is left
to `jaxckpt.planning.search`, which learns it from the compiler.

Seconds are those of the time model (`jaxckpt.analysis.cost`): three times a forward pass for running and differentiating
each block, what is run again, what goes to the host and comes back, and on CPUs the making of fresh memory. (Reading and
writing what is kept is in the passes already, as it is without checkpointing.)
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from jaxckpt._plan import Knobs
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.stages import find_cuts, pieces_between
from jaxckpt.analysis.tradeoff import Choice, Tradeoff, tradeoff_of
from jaxckpt.engine.schedule import least_advances
from jaxckpt.engine.stack import Run

_OF_BACKWARD = 2.0  # forward passes that differentiating a block takes
_SNAPSHOTS = (2, 3, 4, 5, 7, 9, 12, 16, 24)


class Option(NamedTuple):
    """A setting of one stack.

    Fields:
        stored_bytes: on the device, for all blocks. block_bytes: what autodiff wants at once while a block, or its largest
            piece, is differentiated: an upper bound of what that takes, since XLA fuses some of it away.
        seconds: of all blocks, forward and backward. forward_runs: of each block, parts of it by their time.
        family: options of one family take alike beside what they store.
    """

    knobs: Knobs
    stored_bytes: int
    block_bytes: int
    seconds: float
    forward_runs: float

    @property
    def family(self) -> tuple[bool, bool, bool]:
        knobs = self.knobs
        return knobs.stages is not None, bool(knobs.blocks_per_ckpt or knobs.snapshots), knobs.offload_carry


class Stack:
    """One stack of a step that is planned: what its settings cost.

    Attributes:
        run: as it was found in the step, under default knobs.
        trade: what one block can keep.
    """

    def __init__(self, run: Run, rates: Any):
        self.run, self.rates = run, rates
        flat = jx.inlined(run.closed, checkpoints=True)
        self.trade: Tradeoff = tradeoff_of(jx.merged(flat), rates)
        carry = [jax.typeof(run.leaves[1][i]) for i in run.moving]
        self.carry_bytes = sum(map(jx.nbytes, carry))
        self.pieces_bytes = None if jx.effects(run.closed) else self._pieces(flat)

    def _pieces(self, flat: Any) -> int | None:
        """What is wanted at once in a block that is cut into stages; None where there is nothing to cut."""
        wanted = jx.residual_bytes(flat)
        slices = len(self.run.leaves[0])
        cuts = find_cuts(flat, range(slices, slices + len(self.run.leaves[1])), wanted)
        if not cuts:
            return None
        pieces = pieces_between(flat, cuts, wanted)
        return max(sum(wanted[piece.begin : piece.end]) for piece in pieces) + 2 * self.carry_bytes

    def options(self, may_offload: bool) -> list[Option]:
        """Those that no other beats in bytes and seconds, the fastest first."""
        found = list(self._all(may_offload))
        best: list[Option] = []
        for option in sorted(found, key=lambda o: (o.seconds, _bytes(o))):
            # One of each family stays, since their bytes are not yet known for sure.
            rivals = [o for o in best if o.family == option.family]
            if all(_bytes(option) < _bytes(o) * 0.999 for o in rivals):
                best.append(option)
        return best

    def everything(self) -> Option:
        """The stack without checkpointing."""
        return self._option(Knobs(policy="everything"), self._kept_all())

    def plain(self) -> Option:
        """The stack with its default knobs: per block, nothing kept."""
        return self._option(Knobs(), self._kept_none())

    def _kept_none(self) -> Choice:
        return Choice((), 0, self.trade.choices[0].rerun_seconds, self.trade.wanted_bytes)

    def _kept_all(self) -> Choice:
        return Choice((), self.trade.wanted_bytes, 0.0, 0)

    def _all(self, may_offload: bool) -> Iterator[Option]:
        length, choices = self.run.length, self.trade.choices
        nothing = self._kept_none()
        yield self.everything()
        all_stages = (None, "auto") if self.pieces_bytes else (None,)
        chunks = sorted({k for k in range(2, length) if length % k == 0 or k in (2, 3, 4, 6, 8, 12)})
        for stages, choice in itertools.product(all_stages, (nothing, *choices[1:])):
            keeping = Knobs(policy="planned" if choice.names else "nothing", kept=choice.names, stages=stages)
            yield self._option(keeping, choice)
            for k in chunks:
                yield self._option(replace(keeping, blocks_per_ckpt=k, engine="reversal"), choice)
        for k in chunks:
            yield self._option(Knobs(blocks_per_ckpt=k, policy="everything", engine="reversal"), self._kept_all())
        for stages, k in itertools.product(all_stages, [None, *chunks]):
            in_chunks = Knobs(blocks_per_ckpt=k, stages=stages, engine="reversal")
            for snapshots in _SNAPSHOTS:
                if snapshots < -(-length // (k or 1)):
                    yield self._option(replace(in_chunks, snapshots=snapshots), nothing)
            if may_offload:
                yield self._option(replace(in_chunks, offload_carry=True), nothing)

    def _option(self, knobs: Knobs, choice: Choice) -> Option:
        length, carry, forward = self.run.length, self.carry_bytes, self.trade.forward_seconds
        per_chunk = knobs.blocks_per_ckpt
        chunks = -(-length // (per_chunk or 1))
        on_host = 0
        if per_chunk is None and knobs.snapshots is None and not knobs.offload_carry:
            stored = length * (carry + choice.bytes)
            advances = length
        else:
            inputs = knobs.snapshots or chunks
            on_host = carry * inputs if knobs.offload_carry else 0
            stored = (2 * carry if knobs.offload_carry else inputs * carry) + (per_chunk or 0) * (carry + choice.bytes)
            # The last chunk is run once, by the forward pass; in chunks of one nothing is run but to make the inputs.
            steps = least_advances(chunks, knobs.snapshots) if knobs.snapshots else chunks - 1
            advances = steps * (per_chunk or 1) + (length if per_chunk else 1)
            stored += 0 if per_chunk else carry
        # What a derivative computes beside the block is run under any setting, also where all is kept.
        again = max(0.0, choice.rerun_seconds - (0.0 if choice.bytes >= self.trade.wanted_bytes else self._floor))
        again *= 2 if knobs.stages and knobs.policy != "everything" else 1
        runs = advances / length + again / (forward or 1.0)
        moved = (stored - on_host) / getattr(self.rates, "fresh_bandwidth", float("inf"))
        moved += 2 * on_host / getattr(self.rates, "host_bandwidth", float("inf"))
        seconds = length * forward * (runs + _OF_BACKWARD) + moved
        block_bytes = choice.largest_bytes
        if knobs.stages and self.pieces_bytes:
            block_bytes = min(block_bytes, self.pieces_bytes)
        return Option(knobs, stored, block_bytes, seconds, runs)

    @property
    def _floor(self) -> float:
        return self.trade.choices[-1].rerun_seconds


def _bytes(option: Option) -> int:
    return option.stored_bytes + option.block_bytes
