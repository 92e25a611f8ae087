"""The reversal engine: one `jax.custom_vjp` whose backward pass is a loop over chunks of blocks, from the last to the first.

The forward pass stores the inputs of chunks (snapshots) and, of the last chunk, what its reversal wants. The backward pass
restores a snapshot, advances from there to the chunk that is next, runs that chunk once more and keeps what the policy says
of each of its blocks in slots, which all chunks share, and reverses it block by block. A parameter's gradient is written
into its place once. There is one loop body for a block's run, one for a run that keeps and one for a reversal, so that
neither program nor compile time depend on the depth; the last chunk is not run again. The price: no forward mode and no
second derivatives through the stack.

Which inputs to store is the business of `jaxckpt.engine.schedule`, whose steps are chunks.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad

from jaxckpt._leaves import replaced
from jaxckpt._setting import Setting
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.apart import always, apart
from jaxckpt.engine.kernels import by_kernels, to_be_written
from jaxckpt.engine.layout import row_major
from jaxckpt.engine.offload import to_device, to_host
from jaxckpt.engine.once import differentiated_once, reverse_only
from jaxckpt.engine.schedule import reversal_schedule
from jaxckpt.engine.types import zeros
from jaxckpt.policies.grammar import JaxPolicy, everything, nothing

Arrays = list[Any]
Slot = dict[int, Any]  # what the reversal of a block wants, by number


class Inputs(NamedTuple):
    """What one block is given, or all: constants of its jaxpr, a slice of `xs` (or all of it), the carry, what is shared."""

    constants: Arrays
    carry: Arrays
    xs: Arrays
    shared: Arrays

    def flat(self) -> Arrays:
        return [leaf for part in self for leaf in part]

    def like(self, flat: Sequence[Any]) -> "Inputs":
        """`flat` as parts of the same lengths."""
        rest = iter(flat)
        return Inputs(*([next(rest) for _ in part] for part in self))


Step = Callable[[Inputs], tuple[Arrays, Arrays]]


def reverse_blocks(step: Step, inputs: Inputs, length: int, setting: Setting, keep: JaxPolicy) -> tuple[Arrays, Arrays]:
    """Runs `carry, y = step(inputs)` for each of `length` slices of `inputs.xs`; the gradients are this engine's.

    Arguments:
        step: one block; it closes over no traced value.
        keep: the `jax.checkpoint` policy that `setting.policy` is for this block.
    Returns:
        The last carry, and the `y`s stacked to `[N, ...]`.
    """
    plan = _plan(length, setting, keep)

    @jax.custom_vjp
    def run(inputs: Inputs, guard: jax.Array) -> tuple[Arrays, Arrays]:
        return lax.scan(lambda carry, x: step(inputs._replace(xs=x, carry=carry)), inputs.carry, inputs.xs, length=length)

    # Where chunks share slots, several loops have to agree on layouts. Without, these are the loops of the scan engine.
    shares_slots = plan.chunks.start.size > 1 and not plan.by_input
    pin = row_major if shares_slots or plan.on_host else lambda x: x

    def pinned(inputs: Inputs) -> tuple[Arrays, Arrays]:
        carry, ys = step(inputs._replace(carry=list(map(pin, inputs.carry))))
        return list(map(pin, carry)), ys

    def forward(primals: Inputs, guard: Any) -> tuple[tuple[Arrays, Arrays], _Saved]:
        inputs = primals.like([primal.value for primal in primals.flat()])
        perturbed = primals.like([primal.perturbed for primal in primals.flat()])
        return _forward(_Block(pinned, plan.keep, pin, length == 1, inputs, perturbed), plan, inputs)

    run.defvjp(forward, _backward, symbolic_zeros=True)
    return run(inputs, reverse_only(inputs.flat()))


# --- the order of things ------------------------------------------------------------------------------------------------


class _Head(NamedTuple):
    """A part of the forward pass: a snapshot is taken, and the blocks behind it are run."""

    start: Any
    count: Any


class _Advance(NamedTuple):
    """A part of the way to a chunk's input: the carry is stored in a slot of snapshots, and the blocks behind it are run."""

    snap: Any
    start: Any
    count: Any


class _Chunk(NamedTuple):
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


class _Plan(NamedTuple):
    """Which blocks are run when.

    Fields:
        on_host: whether snapshots lie in host memory.
        by_input: chunks are of one block, and what its reversal wants is its input: there are no slots.
        kept_from: the first block of the last chunk, where the forward pass begins to keep; `length` if `by_input`.
        heads, chunks, advances: tables with a row for each, in the order in which they are run.
    """

    length: int
    keep: JaxPolicy
    on_host: bool
    by_input: bool
    kept_from: int
    heads: _Head
    chunks: _Chunk
    advances: _Advance


def _plan(length: int, setting: Setting, keep: JaxPolicy) -> _Plan:
    size = setting.blocks_per_ckpt or (1 if setting.snapshots or keep is nothing else length)
    if setting.blocks_per_ckpt == 1 or (setting.snapshots and size == 1):
        keep = nothing  # one block at a time is alive anyway
    by_input = size == 1 and keep is nothing
    counts = [length % size] * (length % size > 0) + [size] * (length // size)
    starts = [0, *itertools.accumulate(counts)]
    forward, *others = reversal_schedule(len(counts), setting.snapshots or len(counts)).reversals
    last = starts[-2]
    kept_from = length if by_input else last
    snaps = [0, *(starts[chunk] for chunk, _ in forward.stores)] if forward.step else []
    snaps += [last] * by_input
    chunks = [_Chunk(last, counts[-1], 0, len(snaps) - 1, 0, 0)]
    advances: list[_Advance] = []
    for chunk, restored, slot, stores in others:
        stops = [(restored, slot), *stores, (chunk, -1)]
        begin = len(advances)
        advances += [
            _Advance(snap, starts[a], starts[b] - starts[a]) for (a, snap), (b, _) in itertools.pairwise(stops) if a < b
        ]
        again = 0 if by_input else counts[chunk]
        chunks.append(_Chunk(starts[chunk], counts[chunk], again, slot, begin, len(advances)))
    return _Plan(
        length=length,
        keep=keep,
        on_host=setting.offload_carry,
        by_input=by_input,
        kept_from=kept_from,
        heads=_table(_Head, [_Head(a, b - a) for a, b in itertools.pairwise([*snaps, kept_from])]),
        chunks=_table(_Chunk, chunks),
        advances=_table(_Advance, advances),
    )


def _table(kind: Any, rows: Sequence[tuple[int, ...]]) -> Any:
    """Rows of one kind as one of that kind, whose fields are columns."""
    return kind(*np.array(rows, np.int32).reshape(-1, len(kind._fields)).T)


# --- one block ----------------------------------------------------------------------------------------------------------


class _Block:
    """One block: its run, its run that keeps what its reversal wants, and its reversal.

    What the reversal wants is not kept where it is an input of the block, but for the carry, nor where it is a parameter in
    another dtype. What depends on no slice and no carry is the same for all blocks, and kept once. Values that are kept go
    by their number among the outputs of `_kept`.

    Attributes:
        pin: the layout of what goes into slots and snapshots.
        wanted: the inputs that have gradients.
        slot: what goes into a slot.
        in_carry, in_ys: where that is a leaf of the carry, or a `y`, which of them.
        axes: the named axes along which blocks compute together.
    """

    def __init__(
        self,
        step: Step,
        keep: JaxPolicy,
        pin: Callable[[Any], Any],
        straight: bool,
        inputs: Inputs,
        perturbed: Inputs,
    ):
        types = inputs._replace(xs=jx.slice_types(inputs.xs))
        self.step, self.pin = step, pin
        self.wanted = _wanted(step, types, perturbed)
        where = _true(self.wanted.flat())
        pull_tree: Any = None

        def kept(*flat: Any) -> Arrays:
            nonlocal pull_tree

            def of_wanted(*values: Any) -> tuple[Arrays, Arrays]:
                return step(types.like(replaced(flat, where, values)))

            fn = of_wanted if keep is everything else jax.checkpoint(of_wanted, policy=keep, prevent_cse=straight)
            (carry, ys), pull = jax.vjp(fn, *(flat[i] for i in where))
            leaves, pull_tree = jax.tree.flatten(pull)
            return [*carry, *ys, *leaves]

        closed = jx.trace(kept, *types.flat())
        self._kept, self._types, self._pull_tree = jx.as_function(closed), closed.out_avals, pull_tree
        self._ys = slice(len(inputs.carry), len(closed.out_avals) - pull_tree.num_leaves)
        self.axes = jx.collective_axes(closed)
        self._find_sources(closed, types)

    def _find_sources(self, closed: Any, types: Inputs) -> None:
        """Where each leaf of the pullback is when a block is reversed: the part of what is given, and its number there."""
        invars, from_input, converted = closed.jaxpr.invars, flow.forwarded(closed.jaxpr), flow.converted(closed.jaxpr)
        values = [id(var if k is None else invars[k]) for var, k in zip(closed.jaxpr.outvars, from_input, strict=True)]
        number = types.like(range(len(invars)))
        varying = set(map(id, flow.dependent(closed.jaxpr, [*number.xs, *number.carry])))
        self._sources: list[tuple[str, int]] = []
        first: dict[int, int] = {}
        for i in range(self._ys.stop, len(values)):
            k = from_input[i]
            if k is not None and k not in number.carry:
                self._sources.append(("input", k))
            elif converted[i] in number.xs:
                self._sources.append(("converted", i))
            else:
                self._sources.append(("slot" if values[i] in varying else "same", first.setdefault(values[i], i)))
        self._converted: dict[int, Any] = {i: converted[i] for part, i in self._sources if part == "converted"}
        self.slot = list(dict.fromkeys(i for part, i in self._sources if part == "slot"))
        self._same = list(dict.fromkeys(i for part, i in self._sources if part == "same"))
        self._make_same = jx.as_function(flow.selected(closed, self._same))
        carry, ys = [id(invars[k]) for k in number.carry], values[self._ys]
        self.in_carry = {i: carry.index(values[i]) for i in self.slot if values[i] in carry}
        self.in_ys = {i: ys.index(values[i]) for i in self.slot if values[i] in ys}

    @property
    def y_types(self) -> Sequence[Any]:
        return self._types[self._ys]

    def slot_of(self, carry: Arrays, numbers: Iterable[int]) -> Slot:
        """These values of a slot, which are nothing but the carry."""
        return {i: carry[self.in_carry[i]] for i in numbers}

    def run_and_keep(self, inputs: Inputs, numbers: Iterable[int]) -> tuple[Arrays, Arrays, Slot]:
        """The next carry, the `y`s, and these values of a slot."""
        out = self._kept(*inputs.flat())
        return out[: self._ys.start], out[self._ys], {i: self.pin(out[i]) for i in numbers}

    def same(self, inputs: Inputs) -> Slot:
        """What the reversals of all blocks want alike."""
        values = self._make_same(*inputs._replace(xs=[x[0] for x in inputs.xs]).flat()) if self._same else []
        return dict(zip(self._same, values, strict=True))

    def reverse(self, inputs: Inputs, slot: Slot, same: Slot, of_carry: Arrays, of_ys: Arrays) -> Inputs:
        """Gradients of what is wanted; the carry of `inputs` is not looked at.

        Arguments:
            slot: without what nobody asks for where `of_ys` are zeros.
            of_carry: the gradients of the wanted leaves of the carry.
            of_ys: those of the `y`s; None for zeros.
        """
        slot = {i: slot[i] if i in slot else zeros(self._types[i]) for i in self.slot}
        flat = inputs.flat()
        converted = {i: lax.convert_element_type(flat[k], self._types[i].dtype) for i, k in self._converted.items()}
        given = {"input": flat, "converted": converted, "slot": slot, "same": same}
        pull = jax.tree.unflatten(self._pull_tree, [given[part][i] for part, i in self._sources])
        rest = iter(of_carry)
        cts = [*(next(rest) if yes else None for yes in self.wanted.carry), *of_ys]
        cts = [ad.Zero(t.to_tangent_aval()) if ct is None else ct for ct, t in zip(cts, self._types, strict=False)]
        gradients = iter(pull((cts[: self._ys.start], cts[self._ys])))
        return Inputs(*([next(gradients) for yes in part if yes] for part in self.wanted))


def _wanted(step: Step, types: Inputs, perturbed: Inputs) -> Inputs:
    """Which inputs have gradients. A leaf of the carry that has no tangent at first may get one on its way."""
    inexact = types.like([_is_inexact(t) for t in types.flat()])
    wanted = types.like([p and yes for p, yes in zip(perturbed.flat(), inexact.flat(), strict=True)])
    while wanted.carry != inexact.carry:
        moved = flow.perturbed(lambda *flat: step(types.like(flat))[0], types.flat(), _true(wanted.flat()))
        carry = [a or b for a, b in zip(wanted.carry, moved, strict=True)]
        if carry == wanted.carry:
            break
        wanted = wanted._replace(carry=carry)
    return wanted


# --- all blocks ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Static:
    """What the forward pass hands to the backward pass and is no array."""

    block: _Block
    plan: _Plan


class _Saved(NamedTuple):
    static: _Static
    inputs: Inputs  # without carry
    snaps: Arrays  # the carry's leaves, `[snapshots, ...]`
    slots: Slot  # `[size, ...]`
    same: Slot


def _forward(block: _Block, plan: _Plan, inputs: Inputs) -> tuple[tuple[Arrays, Arrays], _Saved]:
    def head(state, bounds):
        start, count = bounds
        return _loop(start, _known(plan.heads.count, count), run, state), to_snap(state[0])

    def run(i, state):
        carry, ys = state
        carry, y = block.step(_inputs_at(inputs, i, carry))
        return carry, _put(ys, i, y)

    def run_and_keep(state, i):
        carry, ys = state
        carry, y, slot = block.run_and_keep(_inputs_at(inputs, i, carry), kept)
        return (carry, _put(ys, i, y)), slot

    # With one chunk, what is kept of it and returned too is stored once.
    returned = {} if plan.kept_from else block.in_ys
    kept = [i for i in block.slot if i not in returned]
    to_snap = to_host if plan.on_host else list
    state = inputs.carry, [zeros(t, plan.length) for t in block.y_types]
    snaps, slots = [], {}
    if plan.heads.start.size:
        state, snaps = lax.scan(head, state, plan.heads)
    if plan.kept_from < plan.length:
        state, slots = lax.scan(run_and_keep, state, np.arange(plan.kept_from, plan.length, dtype=np.int32))
        slots |= {i: state[1][k] for i, k in returned.items()}
    saved = _Saved(_Static(block, plan), inputs._replace(carry=[]), snaps, slots, block.same(inputs))
    return jax.tree.map(differentiated_once, state), saved


def _backward(saved: _Saved, cotangents: tuple[Arrays, Arrays]) -> tuple[Inputs, None]:
    block, plan = saved.static.block, saved.static.plan
    _check_axes(block.axes)
    inputs, wanted = saved.inputs, block.wanted
    to_snap, from_snap, chunks, advances = list, list, plan.chunks, plan.advances
    if plan.on_host:
        # XLA of JAX 0.10.2 and 0.11.0 burns those offsets on the host into the program that it can follow, and wrongly.
        chunks, advances = lax.optimization_barrier(jax.tree.map(jnp.asarray, (chunks, advances)))
        to_snap, from_snap = to_host, to_device
    reverse_block = block.reverse
    if plan.on_host:
        # Transfers are asynchronous, and XLA orders the whole computation in which they stand by latency, not by memory:
        # 18.2 instead of 12.6 GiB for the Pairformer of 768 tokens, compiled for H200 with JAX 0.10.2.
        reverse_block = functools.partial(apart, always(), block.reverse)
    of_carry = [
        zeros(ct.aval) if isinstance(ct, SymbolicZero) else ct
        for ct, yes in zip(cotangents[0], wanted.carry, strict=True)
        if yes
    ]
    of_ys = [None if isinstance(ct, SymbolicZero) or not _is_inexact(ct) else ct for ct in cotangents[1]]

    def reverse(i, slot, sums):
        here = _inputs_at(inputs, i, [None] * len(wanted.carry))
        here = here._replace(xs=by_kernels(here.xs))
        new = reverse_block(here, slot, saved.same, sums.carry, _at(of_ys, i))
        return Inputs(
            constants=list(map(jnp.add, sums.constants, new.constants)),
            xs=_put(sums.xs, i, to_be_written(new.xs)),
            carry=new.carry,
            shared=list(map(jnp.add, sums.shared, new.shared)),
        )

    def advance(p, state):
        carry, snaps = state
        part = _at(advances, p)
        snaps = _put(snaps, part.snap, to_snap(carry))
        return _loop(part.start, part.count, run, carry), snaps

    def run(i, carry):
        return block.step(_inputs_at(inputs, i, carry))[0]

    def keep(chunk, carry, slots):
        """Slots for the chunk that begins with `carry`; those of the last chunk are kept from the forward pass."""
        if not slots.keys() <= block.in_carry.keys():

            def run_and_keep(k, state):
                carry, slots = state
                carry, _, slot = block.run_and_keep(_inputs_at(inputs, chunk.start + k, carry), slots)
                return carry, _put(slots, k, slot)

            return _loop(0, chunk.again, run_and_keep, (carry, slots))[1]

        def keep_and_run(k, state):
            carry, slots = state
            return run(chunk.start + k, carry), _put(slots, k, block.slot_of(carry, slots))

        runs = jnp.maximum(chunk.again - 1, 0)  # for what the last block returns, nobody asks
        carry, slots = _loop(0, runs, keep_and_run, (carry, slots))
        return _loop(runs, chunk.again - runs, lambda k, slots: _put(slots, k, block.slot_of(carry, slots)), slots)

    def reverse_chunk(state, chunk):
        sums, snaps, slots = state
        carry = by_kernels(from_snap(_at(snaps, chunk.snap)))
        if plan.advances.start.size:
            carry, snaps = lax.fori_loop(chunk.begin, chunk.end, advance, (carry, snaps))
        if plan.by_input:
            return (reverse(chunk.start, block.slot_of(carry, block.slot), sums), snaps, slots), None
        if plan.chunks.again.any():
            slots = keep(chunk, carry, slots)
        end = chunk.count - 1
        count = _known(plan.chunks.count, chunk.count)
        slot_at = lambda k: jax.tree.map(block.pin, _at(slots, k))  # noqa: E731
        sums = _loop(0, count, lambda k, sums: reverse(chunk.start + end - k, slot_at(end - k), sums), sums)
        return (sums, snaps, slots), None

    nothing_yet = Inputs(*([zeros(jax.typeof(leaf)) for leaf in part] for part in _selected(inputs, wanted)))
    sums, slots = nothing_yet._replace(carry=of_carry), saved.slots
    if None in of_ys and plan.chunks.again.any():  # then less is asked for, and room for the rest would be made in vain
        asked = flow.used(jx.trace(lambda slot: reverse(0, slot, sums).flat(), _at(slots, 0)))
        slots = {i: slots[i] for i, yes in zip(sorted(slots), asked, strict=True) if yes}
    state = sums, saved.snaps, slots
    (sums, _, _), _ = lax.scan(reverse_chunk, state, chunks)
    rest = map(differentiated_once, sums.flat())
    return wanted.like([next(rest) if yes else None for yes in wanted.flat()]), None


def _check_axes(axes: Iterable[Any]) -> None:
    """Refuses axes of a `vmap` that is differentiated: JAX does not bind them where a `custom_vjp` goes backwards."""
    for axis in axes:
        try:
            lax.axis_size(axis)
        except NameError:
            raise NotImplementedError(
                f"the reversal engine cannot go backwards through a block that computes along the axis {axis!r} of a "
                "jax.vmap around the stack: write engine='scan', or differentiate inside of the vmap, "
                f"jax.vmap(jax.grad(f), axis_name={axis!r})"
            ) from None


def _selected(inputs: Inputs, wanted: Inputs) -> list[Arrays]:
    return [
        [leaf for leaf, yes in zip(part, which, strict=False) if yes] for part, which in zip(inputs, wanted, strict=True)
    ]


def _inputs_at(inputs: Inputs, i: Any, carry: Arrays) -> Inputs:
    return inputs._replace(xs=_at(inputs.xs, i), carry=carry)


def _at(arrays: Any, i: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False, allow_negative_indices=False), arrays)


def _put(arrays: Any, i: Any, values: Any) -> Any:
    return jax.tree.map(
        lambda a, value: lax.dynamic_update_index_in_dim(a, value, i, 0, allow_negative_indices=False), arrays, values
    )


def _loop(start: Any, count: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
    return lax.fori_loop(np.int32(0), count, lambda k, state: body(start + k, state), state)


def _known(column: np.ndarray, entry: Any) -> Any:
    """An entry of a column as a number, where all of it are equal: XLA knows more of a loop that it can count."""
    return column[0] if (column == column[0]).all() else entry


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _true(flags: Sequence[bool]) -> list[int]:
    return [i for i, yes in enumerate(flags) if yes]
