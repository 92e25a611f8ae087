"""The reversal engine: one `jax.custom_vjp` whose backward pass is a loop over chunks of blocks, from the last to the first.

The forward pass stores the inputs of chunks (snapshots) and, of the last chunk, what its reversal wants. The backward pass
restores a snapshot, advances from there to the chunk that is next, runs that chunk once more and keeps what the policy says
of each of its blocks in slots, which all chunks share, and reverses it block by block. A parameter's gradient is written
into its place once. There is one loop body for a block's run, one for a run that keeps and one for a reversal, so that
neither program nor compile time depend on the depth; the last chunk is not run again. The price: no forward mode and no
second derivatives through the stack.

Parts of the stack may be run under settings of their own: each part has its loops, in turn, on the same parameters and
gradients, which are fetched and written by the number of the block, so that nothing is copied.

What is run when stands in `jaxckpt.engine.order`, one block in `jaxckpt.engine.reversed_block`.
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

from jaxckpt._setting import Setting
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.apart import always, apart
from jaxckpt.engine.kernels import by_kernels, to_be_written
from jaxckpt.engine.layout import copies_carries, row_major
from jaxckpt.engine.offload import to_device, to_host
from jaxckpt.engine.once import differentiated_once, reverse_only
from jaxckpt.engine.order import Order, order_of
from jaxckpt.engine.reversed_block import Arrays, Inputs, ReversedBlock, Slot, Step, is_inexact, wanted_inputs
from jaxckpt.engine.types import zeros
from jaxckpt.policies.grammar import JaxPolicy


class Part(NamedTuple):
    """Consecutive blocks that are run under one setting.

    Fields:
        step: one block, `carry, y = step(inputs)`; it closes over no traced value.
        count: how many they are.
        keep: the `jax.checkpoint` policy that `setting.policy` is for this block.
    """

    step: Step
    count: int
    setting: Setting
    keep: JaxPolicy


def reverse_blocks(parts: Sequence[Part], inputs: Inputs) -> tuple[Arrays, Arrays]:
    """Runs a block for each of the `N` slices of `inputs.xs`, part by part; the gradients are this engine's.

    Returns:
        The last carry, and the `y`s stacked to `[N, ...]`.
    """
    *starts, length = itertools.accumulate((part.count for part in parts), initial=0)
    orders = [order_of(at, part.count, part.setting, part.keep) for at, part in zip(starts, parts, strict=True)]

    @jax.custom_vjp
    def run(inputs: Inputs, guard: jax.Array) -> tuple[Arrays, Arrays]:
        step = parts[0].step  # of any part: where nothing is differentiated they compute the same
        return lax.scan(lambda carry, x: step(inputs._replace(xs=x, carry=carry)), inputs.carry, inputs.xs, length=length)

    def forward(primals: Inputs, guard: Any) -> tuple[tuple[Arrays, Arrays], _Saved]:
        inputs = primals.like([primal.value for primal in primals.flat()])
        perturbed = primals.like([primal.perturbed for primal in primals.flat()])
        wanted = wanted_inputs([part.step for part in parts], inputs, perturbed)
        blocks = [_block(part, order, inputs, wanted) for part, order in zip(parts, orders, strict=True)]
        state, saved = (inputs.carry, [zeros(t, length) for t in blocks[0].y_types]), []
        for block, order in zip(blocks, orders, strict=True):
            state, kept = _forward(block, order, inputs, state, is_only=len(parts) == 1)
            saved.append(kept)
        return jax.tree.map(differentiated_once, state), _Saved(inputs._replace(carry=[]), saved)

    run.defvjp(forward, _backward, symbolic_zeros=True)
    return run(inputs, reverse_only(inputs.flat()))


def _block(part: Part, order: Order, inputs: Inputs, wanted: Inputs) -> ReversedBlock:
    # Where chunks share slots, several loops have to agree on layouts. Without, these are the loops of the scan engine.
    shares_slots = order.chunks.start.size > 1 and not order.by_input
    pin = row_major if shares_slots or order.on_host or copies_carries(part.setting) else lambda x: x

    def pinned(inputs: Inputs) -> tuple[Arrays, Arrays]:
        carry, ys = part.step(inputs._replace(carry=list(map(pin, inputs.carry))))
        return list(map(pin, carry)), ys

    return ReversedBlock(pinned, order.keep, pin, order.stop - order.start == 1, inputs, wanted)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Static:
    """What the forward pass hands to the backward pass and is no array."""

    block: ReversedBlock
    order: Order


class _Kept(NamedTuple):
    """What the forward pass of a part keeps."""

    static: _Static
    snaps: Arrays  # the carry's leaves, `[snapshots, ...]`
    slots: Slot  # `[size, ...]`
    same: Slot


class _Saved(NamedTuple):
    inputs: Inputs  # without carry
    parts: list[_Kept]


def _forward(
    block: ReversedBlock, order: Order, inputs: Inputs, state: tuple[Arrays, Arrays], is_only: bool
) -> tuple[tuple[Arrays, Arrays], _Kept]:
    """Runs a part, from the carry and the `y`s before it to those behind it."""

    def head(state, bounds):
        start, count = bounds
        return _loop(start, _known(order.heads.count, count), run, state), to_snap(state[0])

    def run(i, state):
        carry, ys = state
        carry, y = block.step(_inputs_at(inputs, i, carry))
        return carry, _put(ys, i, y)

    def run_and_keep(state, i):
        carry, ys = state
        carry, y, slot = block.run_and_keep(_inputs_at(inputs, i, carry), kept)
        return (carry, _put(ys, i, y)), slot

    # With one chunk of all blocks, what is kept of it and returned too is stored once.
    returned = block.in_ys if is_only and order.kept_from == order.start else {}
    kept = [i for i in block.slot if i not in returned]
    to_snap = to_host if order.on_host else list
    snaps, slots = [], {}
    if order.heads.start.size:
        state, snaps = lax.scan(head, state, order.heads)
    if order.kept_from < order.stop:
        state, slots = lax.scan(run_and_keep, state, np.arange(order.kept_from, order.stop, dtype=np.int32))
        slots |= {i: state[1][k] for i, k in returned.items()}
    return state, _Kept(_Static(block, order), snaps, slots, block.same(inputs))


def _backward(saved: _Saved, cotangents: tuple[Arrays, Arrays]) -> tuple[Inputs, None]:
    inputs, wanted = saved.inputs, saved.parts[0].static.block.wanted
    of_carry = [
        zeros(ct.aval) if isinstance(ct, SymbolicZero) else ct
        for ct, yes in zip(cotangents[0], wanted.carry, strict=True)
        if yes
    ]
    of_ys = [None if isinstance(ct, SymbolicZero) or not is_inexact(ct) else ct for ct in cotangents[1]]

    nothing_yet = Inputs(*([zeros(jax.typeof(leaf)) for leaf in part] for part in _selected(inputs, wanted)))
    sums = nothing_yet._replace(carry=of_carry)
    for part in reversed(saved.parts):
        sums = _reversed(part, inputs, sums, of_ys)
    rest = map(differentiated_once, sums.flat())
    return wanted.like([next(rest) if yes else None for yes in wanted.flat()]), None


def _reversed(kept: _Kept, inputs: Inputs, sums: Inputs, of_ys: Arrays) -> Inputs:
    """The gradients once a part is reversed, given those of what is behind it.

    Arguments:
        sums: of what is wanted; of the carry, that which leaves the part.
        of_ys: the gradients of all `y`s; None for zeros.
    """
    block, order = kept.static.block, kept.static.order
    _check_axes(block.axes)
    to_snap, from_snap, chunks, advances = list, list, order.chunks, order.advances
    if order.on_host:
        # XLA of JAX 0.10.2 and 0.11.0 burns those offsets on the host into the program that it can follow, and wrongly.
        chunks, advances = lax.optimization_barrier(jax.tree.map(jnp.asarray, (chunks, advances)))
        to_snap, from_snap = to_host, to_device
    reverse_block = block.reverse
    if order.on_host:
        # Transfers are asynchronous, and XLA orders the whole computation in which they stand by latency, not by memory:
        # 18.2 instead of 12.6 GiB for the Pairformer of 768 tokens, compiled for H200 with JAX 0.10.2.
        reverse_block = functools.partial(apart, always(), block.reverse)

    def reverse(i, slot, sums):
        here = _inputs_at(inputs, i, [None] * len(block.wanted.carry))
        here = here._replace(xs=by_kernels(here.xs))
        new = reverse_block(here, slot, kept.same, sums.carry, _at(of_ys, i))
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
        if order.advances.start.size:
            carry, snaps = lax.fori_loop(chunk.begin, chunk.end, advance, (carry, snaps))
        if order.by_input:
            return (reverse(chunk.start, block.slot_of(carry, block.slot), sums), snaps, slots), None
        if order.chunks.again.any():
            slots = keep(chunk, carry, slots)
        end = chunk.count - 1
        count = _known(order.chunks.count, chunk.count)
        slot_at = lambda k: jax.tree.map(block.pin, _at(slots, k))  # noqa: E731
        sums = _loop(0, count, lambda k, sums: reverse(chunk.start + end - k, slot_at(end - k), sums), sums)
        return (sums, snaps, slots), None

    slots = kept.slots
    if None in of_ys and order.chunks.again.any():  # then less is asked for, and room for the rest would be made in vain
        asked = flow.used(jx.trace(lambda slot: reverse(0, slot, sums).flat(), _at(slots, 0)))
        slots = {i: slots[i] for i, yes in zip(sorted(slots), asked, strict=True) if yes}
    (sums, _, _), _ = lax.scan(reverse_chunk, (sums, kept.snaps, slots), chunks)
    return sums


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
