"""What the settings of one stack cost, before anything is compiled: bytes that are stored, and seconds.

`N` blocks, `K` per chunk, `s` snapshots; of each block a choice of values is kept (`jaxckpt.analysis.tradeoff`), and of `r`
of its blocks at once: `r = N` without chunks, else `K`. Stored are `r` times what is kept and the inputs of all blocks or
chunks, or `s` of them. What one block takes while it is run again and differentiated is XLA's business: for that the
backward pass of the blocks alone is compiled (`Stack.asked`), for gradients of parameters and carry, once for all numbers of
chunks and snapshots, and its trace says what blocks keep (autodiff may want less than was chosen, and pieces keep twice what
two of them use). The rest of the step is left to `jaxckpt.planning.search`.

Between two settings of all blocks alike, neighbours on the convex hull of bytes and seconds, lie those under which the first
`m` blocks take the leaner one and the others the other. The others are differentiated first, and free what they keep before
the first blocks are.

Seconds are those of the time model (`jaxckpt.analysis.cost`): three times a forward pass for running and differentiating
each block, what is run again, what goes to the host and comes back, and on CPUs the making of fresh memory. (Reading and
writing what is kept is in the passes already, as it is without checkpointing.)
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.experimental.layout import Format, Layout

from jaxckpt._plan import Knobs
from jaxckpt._setting import with_knobs
from jaxckpt.analysis import flow, inlining, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import step_seconds
from jaxckpt.analysis.groups import in_groups, why_slices_send
from jaxckpt.analysis.mincut import lower_hull
from jaxckpt.analysis.shares import Shares, tradeoff_of_one
from jaxckpt.analysis.tradeoff import Choice, Tradeoff, tradeoff_of
from jaxckpt.engine import check
from jaxckpt.engine.planned import described
from jaxckpt.engine.run import Run
from jaxckpt.engine.schedule import whole_runs
from jaxckpt.engine.single import checkpointed
from jaxckpt.memory.targets import Target
from jaxckpt.planning.cuts import cuts_of

# How far options of which the first blocks differ from the others are apart at least: by 2% of bytes, and 0.1% of seconds.
_APART, _APART_IN_SECONDS = 0.02, 0.001
_SNAPSHOTS = (2, 3, 4, 5, 7, 9, 12, 16, 24)


class Option(NamedTuple):
    """A setting of one stack.

    Fields:
        stored_bytes: on the device, for all blocks.
        kept_bytes: of one block, beside its inputs.
        at_once: the blocks that keep that at once.
        block_bytes: what autodiff wants at once while a block, or its largest piece, is differentiated: a guess at what that
            takes, of which XLA fuses some away.
        seconds: of all blocks, forward and backward. forward_runs: of each block, parts of it by their time.
        family: options of one family take alike beside what they store: by pieces, by whether there are chunks or snapshots
            or first blocks that differ, and by whether carries are on the host.
        phases: where the first blocks differ from the others, those of the backward pass, in their order.
    """

    knobs: Knobs
    stored_bytes: int
    kept_bytes: int
    at_once: int
    block_bytes: int
    seconds: float
    forward_runs: float
    phases: "tuple[Phase, ...]" = ()

    @property
    def family(self) -> tuple[Any, bool, bool]:
        knobs = self.knobs
        pieces = knobs.pieces if knobs.first is None else (knobs.first[1].pieces, knobs.pieces)
        return pieces, bool(knobs.blocks_per_ckpt or knobs.snapshots), knobs.offload_carry

    @property
    def of_equal_blocks(self) -> "tuple[Option, ...]":
        """This option, or, where the first blocks differ from the others, those of stacks of either."""
        return tuple(phase.option for phase in self.phases) or (self,)

    @property
    def of_block(self) -> Knobs:
        """What is kept in a block and how it is cut: the knobs on which mostly depends what differentiating it takes."""
        return Knobs(policy=self.knobs.policy, kept=self.knobs.kept, stages=self.knobs.stages, tiles=self.knobs.tiles)


class Phase(NamedTuple):
    """Of the backward pass of a stack whose first blocks differ from the others.

    Fields:
        stored: what is still stored: of the first blocks, and before these of the others; each as their share of all blocks,
            and the option of a stack of blocks that are all like them.
        option: of a stack of blocks that are all like those that are differentiated.
    """

    stored: tuple[tuple[float, Option], ...]
    option: Option


class Asked(NamedTuple):
    """What the trace and the compiler say of blocks, differentiated by their parameters and the carry.

    Fields:
        kept_bytes: of one block, beside the carry; what is kept once for all blocks is shared out.
        taken_bytes: at once while a block is differentiated.
    """

    kept_bytes: float
    taken_bytes: int


class Stack:
    """One stack of a step that is planned: what its settings cost, in the bytes and seconds of one device.

    Made while the step is traced, when the axes are bound along which the blocks may compute together; what is traced then
    is not kept.

    Arguments:
        shares: what one device has of a block, where it is split over several by the compiler.
    Attributes:
        run: as it was found in the step, under default knobs, with types in place of values.
        described: see `jaxckpt.engine.planned.described`.
        trade: what one block can keep.
        can_be_alone: whether the stack can be compiled without the rest of the step, for one device.

    What `jaxckpt.checkpoint(plan="auto:NAME")` was given is a stack of one block, with fewer options.
    """

    def __init__(self, run: Run, rates: Any, shares: Shares | None = None):
        self.rates = rates
        self.described = described(run)
        merged = inlining.merged(inlining.inlined(run.closed, checkpoints=True))
        carry = [(jx.nbytes(jax.typeof(run.leaves[1][i])), len(run.leaves[0]) + i) for i in run.moving]
        self.trade: Tradeoff = tradeoff_of(merged, rates, run.parameters)
        if shares is None:
            self.carry_bytes, held = sum(size for size, _ in carry), 1.0
        else:
            whole = self.trade.wanted_bytes
            self.trade = tradeoff_of_one(merged, rates, run.parameters, shares)
            self.carry_bytes = sum(round(size * shares.inputs[i]) for size, i in carry)
            held = self.trade.wanted_bytes / (whole or 1)
        kept = [(), *(choice.names for choice in self.trade.choices)]
        self.cuts = cuts_of(run, merged, kept, self.carry_bytes, rates, shares, held)
        if shares is not None:
            self._leave_out_tiles(run, merged)
        is_batched = any(jx.is_batched(leaf) for part in run.leaves for leaf in part)
        self.can_be_alone = not is_batched and not jx.collective_axes(run.closed)
        xs, carried, arrays = [[_type(leaf) for leaf in part] for part in run.leaves]
        constants = [_type(value) if isinstance(value, Tracer) else value for value in run.closed.consts]
        self.run = replace(run, closed=jx.closed(run.closed.jaxpr, constants), leaves=(xs, carried, arrays))

    def _leave_out_tiles(self, run: Run, merged: Any) -> None:
        """Where the compiler splits the block over devices, unless slices send nothing of their own."""
        if not run.is_stack or all(cut.knobs.tiles is None for cut in self.cuts.values()):
            return
        if in_groups(merged, run.carried)[1] == 1 and (why := why_slices_send(merged, run.carried)) is not None:
            block = run.names.block
            check.warn(f"the plan leaves out tiles of {block}, each slice of which may send between devices: {why}")
            self.cuts = {pieces: cut for pieces, cut in self.cuts.items() if cut.knobs.tiles is None}

    def asked(self, of_block: Knobs, where: Target) -> Asked:
        """What blocks keep, and what their compiled backward pass takes beside what it is given and what it returns.

        Only that pass is compiled, of the scan engine without chunks, for gradients of `xs` and the carry (of all arrays
        that what is no stack is given), and with the layouts that XLA likes for what is stored, as inside a step.
        """
        run = self.run.under(with_knobs(self.run.setting, of_block))
        xs, carry, arrays = run.leaves

        def forward(inputs: list[Any], arrays: list[Any], constants: list[Any]) -> Any:
            def outputs(*inputs: Any) -> list[Any]:
                if not run.is_stack:
                    return checkpointed(jx.closed(run.closed.jaxpr, constants), run.keep, list(inputs), run.pieces)
                last, rest = run.execute(constants, list(inputs[: len(xs)]), list(inputs[len(xs) :]), arrays)
                return [*last, *rest]

            out, pull = jx.vjp_of_inexact(outputs, inputs)
            return pull, out

        given = ([*xs, *carry], arrays) if run.is_stack else (arrays, [])
        traced, (pull, cotangents) = jax.make_jaxpr(forward, return_shape=True)(*given, list(map(_type, run.closed.consts)))
        leaves, tree = jax.tree.flatten(pull)
        results = zip(traced.out_avals, flow.forwarded(traced.jaxpr), strict=True)
        kept = sum(jx.nbytes(aval) for aval, source in itertools.islice(results, len(leaves)) if source is None)
        placed = where.place((leaves, cotangents))
        backward = jax.jit(
            lambda leaves, cotangents: jax.tree.unflatten(tree, leaves)(cotangents),
            in_shardings=jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), placed),
        )
        sizes = where.compile(backward.lower(leaves, cotangents)).memory_analysis()
        if sizes is None:
            raise ValueError(f"the compiler for {where.name!r} does not say what memory its programs need")
        return Asked(kept / run.length - self.carry_bytes * run.is_stack, sizes.temp_size_in_bytes)

    def options(self, may_offload: bool) -> list[Option]:
        """Those that no other beats in bytes and seconds, the fastest first."""
        found = list(self._all(may_offload))
        found += self._between(found)
        best: list[Option] = []
        # What blocks take that are differentiated in turn is too rough a guess to tell more than what is stored does.
        size = lambda o: o.stored_bytes if o.phases else _bytes(o)  # noqa: E731
        for option in sorted(found, key=lambda o: (o.seconds, size(o))):
            # One of each family stays, since their bytes are not yet known for sure.
            rivals = [o for o in best if o.family == option.family]
            if all(size(option) < size(o) * 0.999 for o in rivals):
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
        if not self.run.is_stack:  # a choice of values for one block would save little, and multiply what is combined
            yield from (self._option(knobs, nothing) for knobs in (Knobs(), *(cut.knobs for cut in self.cuts.values())))
            return
        cuts = [Knobs(), *(cut.knobs for cut in self.cuts.values())]
        chunks = sorted({k for k in range(2, length) if length % k == 0 or k in (2, 3, 4, 6, 8, 12)})
        for cut, choice in itertools.product(cuts, (nothing, *choices[1:])):
            if cut.pieces and choice is choices[-1]:
                continue  # nothing of it is run again in pieces, or what depends on parameters alone
            if choice is not nothing and cut.tiles in ("auto", 64):
                continue  # who wants the least memory keeps nothing
            if cut.tiles and not all(map(tagging.output_of, choice.names)):
                continue  # what is kept of the inside of an equation makes it one that is not sliced
            keeping = replace(cut, policy="planned" if choice.names else "nothing", kept=choice.names)
            yield self._option(keeping, choice)
            for k in chunks:
                yield self._option(replace(keeping, blocks_per_ckpt=k, engine="reversal"), choice)
        for k in chunks:
            yield self._option(Knobs(blocks_per_ckpt=k, policy="everything", engine="reversal"), self._kept_all())
        for cut, k in itertools.product(cuts, [None, *chunks]):
            in_chunks = replace(cut, blocks_per_ckpt=k, engine="reversal")
            for snapshots in _SNAPSHOTS:
                if snapshots < -(-length // (k or 1)):
                    yield self._option(replace(in_chunks, snapshots=snapshots), nothing)
            if may_offload:
                yield self._option(replace(in_chunks, offload_carry=True), nothing)

    def _between(self, found: list[Option]) -> Iterator[Option]:
        """Options of which the first blocks take one setting without chunks and the others the next of the hull."""
        of_all = [o for o in found if not (o.knobs.blocks_per_ckpt or o.knobs.snapshots or o.knobs.offload_carry)]
        corners = lower_hull(of_all, lambda o: (_bytes(o), o.seconds))
        length = self.run.length
        for lean, fast in itertools.pairwise(corners):
            bytes_apart = math.log(_bytes(fast) / _bytes(lean)) / _APART
            seconds_apart = (lean.seconds / fast.seconds - 1) / _APART_IN_SECONDS
            steps = min(length, math.ceil(bytes_apart), math.ceil(seconds_apart))
            # One block is no loop, and takes something else than what the model knows of loops.
            for first in sorted({round(length * k / steps) for k in range(1, steps)}.intersection(range(2, length - 1))):
                yield self._of_two(first, lean, fast)

    def _of_two(self, first: int, lean: Option, fast: Option) -> Option:
        """The first blocks under one option, the others under another one."""
        share = first / self.run.length
        mean = lambda a, b: share * a + (1 - share) * b  # noqa: E731
        of_first = round(share * lean.stored_bytes)
        stored = of_first + round((1 - share) * fast.stored_bytes)
        phases = (Phase(((share, lean), (1 - share, fast)), fast), Phase(((share, lean),), lean))
        return Option(
            knobs=replace(fast.knobs, engine="reversal", first=(first, replace(lean.knobs, engine="reversal"))),
            stored_bytes=stored,
            kept_bytes=round(mean(lean.kept_bytes, fast.kept_bytes)),
            at_once=self.run.length,
            block_bytes=max(fast.block_bytes, lean.block_bytes - (stored - of_first)),
            seconds=mean(lean.seconds, fast.seconds),
            forward_runs=mean(lean.forward_runs, fast.forward_runs),
            phases=phases,
        )

    def _option(self, knobs: Knobs, choice: Choice) -> Option:
        length, carry, forward = self.run.length, self.carry_bytes, self.trade.forward_seconds
        per_chunk = knobs.blocks_per_ckpt
        chunks = -(-length // (per_chunk or 1))
        on_host, at_once = 0, per_chunk or 0
        if per_chunk is None and knobs.snapshots is None and not knobs.offload_carry:
            stored, at_once = length * (carry + choice.bytes), length
        else:
            inputs = knobs.snapshots or chunks
            on_host = carry * inputs if knobs.offload_carry else 0
            stored = (2 * carry if knobs.offload_carry else inputs * carry) + at_once * (carry + choice.bytes)
            stored += 0 if per_chunk else carry
        again = 0.0 if choice.bytes >= self.trade.wanted_bytes else choice.rerun_seconds - self.trade.floor_seconds
        again = max(0.0, again)
        block_bytes, longer = choice.largest_bytes, 0.0
        if (cut := self.cuts.get(knobs.pieces)) is not None:
            block_bytes, longer = min(block_bytes, cut.bytes), cut.slicing_seconds
            again += cut.entering_seconds[choice.names]
        runs = whole_runs(length, per_chunk, knobs.snapshots, knobs.engine) + again / (forward or 1.0)
        seconds = step_seconds(length, forward + longer, runs, self.rates, host_bytes=on_host, fresh_bytes=stored - on_host)
        return Option(knobs, stored, choice.bytes, at_once, block_bytes, seconds, runs)


def _type(leaf: Any) -> jax.ShapeDtypeStruct:
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _bytes(option: Option) -> int:
    return option.stored_bytes + option.block_bytes
