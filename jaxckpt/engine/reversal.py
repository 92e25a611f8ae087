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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal

from jaxckpt._leaves import replaced
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.layout import row_major
from jaxckpt.engine.offload import always, apart
from jaxckpt.engine.once import differentiated_once, reverse_only
from jaxckpt.engine.schedule import reversal_schedule
from jaxckpt.engine.types import zeros
from jaxckpt.policies.grammar import JaxPolicy, everything, nothing

Arrays = list[Any]


class Inputs(NamedTuple):
    """What one block is given, or all: constants of its jaxpr, a slice of `xs` (or all of it), the carry, what is shared."""

    constants: Arrays
    xs: Arrays
    carry: Arrays
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

    def pinned(inputs: Inputs) -> tuple[Arrays, Arrays]:
        carry, ys = step(inputs._replace(carry=list(map(row_major, inputs.carry))))
        return list(map(row_major, carry)), ys

    def forward(primals: Inputs, guard: Any) -> tuple[tuple[Arrays, Arrays], _Saved]:
        inputs = primals.like([primal.value for primal in primals.flat()])
        perturbed = primals.like([primal.perturbed for primal in primals.flat()])
        return _forward(_Block(pinned, plan.keep, length == 1, inputs, perturbed), plan, inputs)

    run.defvjp(forward, _backward, symbolic_zeros=True)
    return run(inputs, reverse_only(inputs.flat()))


# --- the order of things ------------------------------------------------------------------------------------------------


class _Heads(NamedTuple):
    """What the forward pass runs behind each snapshot: the first block, the number of blocks."""

    start: Any
    count: Any


class _Rows(NamedTuple):
    """Chunks in the order of their reversal.

    The first block and the number of blocks, how many of these are run again, the slot of the snapshot restored, and the
    segments advanced over, from `begin` to `end`.
    """

    start: Any
    count: Any
    again: Any
    snap: Any
    begin: Any
    end: Any


class _Segments(NamedTuple):
    """The slot in which the carry is stored first, the first block of the advance and the number of blocks."""

    snap: Any
    start: Any
    count: Any


class _Plan(NamedTuple):
    """Which blocks are run when.

    Fields:
        on_host: whether snapshots lie in host memory.
        by_input: chunks are of one block, and what its reversal wants is its input: there are no slots.
        rest: the first block of the last chunk, where the forward pass begins to keep; `length` if `by_input`.
    """

    length: int
    keep: JaxPolicy
    on_host: bool
    by_input: bool
    rest: int
    heads: _Heads
    rows: _Rows
    segments: _Segments


def _plan(length: int, setting: Setting, keep: JaxPolicy) -> _Plan:
    size = setting.blocks_per_ckpt or (1 if setting.snapshots or keep is nothing else length)
    if setting.blocks_per_ckpt == 1 or (setting.snapshots and size == 1):
        keep = nothing  # one block at a time is alive anyway
    by_input = size == 1 and keep is nothing
    counts = [length % size] * (length % size > 0) + [size] * (length // size)
    starts = [0, *itertools.accumulate(counts)]
    first, *others = reversal_schedule(len(counts), setting.snapshots or len(counts)).reversals
    heads = [0, *(starts[step] for step, _ in first.stores)] if first.step else []
    heads += [starts[first.step]] * by_input
    rest = length if by_input else starts[first.step]
    rows = [(starts[first.step], counts[-1], 0, len(heads) - 1, 0, 0)]
    segments = []
    for reversal in others:
        stops = [(reversal.start, reversal.slot), *reversal.stores, (reversal.step, -1)]
        new = [(snap, starts[a], starts[b] - starts[a]) for (a, snap), (b, _) in itertools.pairwise(stops) if a < b]
        count = counts[reversal.step]
        again = 0 if by_input else count
        rows.append((starts[reversal.step], count, again, reversal.slot, len(segments), len(segments) + len(new)))
        segments += new
    return _Plan(
        length=length,
        keep=keep,
        on_host=setting.offload_carry,
        by_input=by_input,
        rest=rest,
        heads=_Heads(*_columns([(a, b - a) for a, b in itertools.pairwise([*heads, rest])], 2)),
        rows=_Rows(*_columns(rows, 6)),
        segments=_Segments(*_columns(segments, 3)),
    )


def _columns(rows: list[tuple[int, ...]], count: int) -> np.ndarray:
    return np.array(rows, np.int32).reshape(-1, count).T


# --- one block ----------------------------------------------------------------------------------------------------------


class _Block:
    """One block: its run, its run that keeps what its reversal wants, and its reversal.

    What the reversal wants is not kept where it is an input of the block, but for the carry. What depends on no slice and no
    carry is the same for all blocks, and kept once.
    """

    def __init__(self, step: Step, keep: JaxPolicy, straight: bool, inputs: Inputs, perturbed: Inputs):
        self.step = step
        types = inputs._replace(xs=jx.slice_types(inputs.xs))
        # A carry that has no tangent gets one on its way.
        asked = perturbed._replace(carry=[True] * len(inputs.carry))
        self.wanted = inputs.like([yes and _is_inexact(t) for yes, t in zip(asked.flat(), types.flat(), strict=True)])
        where = [i for i, yes in enumerate(self.wanted.flat()) if yes]

        def kept(*flat: Any) -> Arrays:
            def of_wanted(*values: Any) -> tuple[Arrays, Arrays]:
                return step(types.like(replaced(flat, where, values)))

            fn = of_wanted if keep is everything else jax.checkpoint(of_wanted, policy=keep, prevent_cse=straight)
            (carry, ys), pull = jax.vjp(fn, *(flat[i] for i in where))
            leaves, self._pull = jax.tree.flatten(pull)
            return [*carry, *ys, *leaves]

        closed = jx.trace(kept, *types.flat())
        self._kept = jx.as_function(closed)
        self._carried = len(inputs.carry)
        self._out_types = closed.out_avals[: len(closed.out_avals) - self._pull.num_leaves]
        self._find_sources(closed, inputs)

    def _find_sources(self, closed: Any, inputs: Inputs) -> None:
        """Where each leaf of the pullback comes from: an input, a slot, or what is the same for all blocks."""
        number = inputs.like(range(len(inputs.flat())))
        varying = jx.dependent(closed.jaxpr, [*number.xs, *number.carry])
        first = len(self._out_types)
        outvars, inputs_of = closed.jaxpr.outvars[first:], jx.forwarded(closed.jaxpr)[first:]
        self._sources: list[tuple[str, int]] = []
        kept: dict[str, list[Any]] = {"slot": [], "same": []}
        which: dict[str, list[int]] = {"slot": [], "same": []}
        for i, (var, source) in enumerate(zip(outvars, inputs_of, strict=True), first):
            if source is not None and source not in number.carry:
                self._sources.append(("input", source))
                continue
            is_literal = isinstance(var, Literal)
            kind = "slot" if source is not None or (not is_literal and var in varying) else "same"
            key = i if is_literal else var if source is None else source
            if key not in kept[kind]:
                kept[kind].append(key)
                which[kind].append(i)
            self._sources.append((kind, kept[kind].index(key)))
        self._slot = which["slot"]
        self._same = jx.as_function(jx.selected(closed, which["same"])) if which["same"] else None
        in_carry = [number.carry.index(key) if key in number.carry else None for key in kept["slot"]]
        self.keeps_only_carry = None not in in_carry
        self._slot_in_carry = in_carry

    @property
    def y_types(self) -> list[Any]:
        return self._out_types[self._carried :]

    def slot_of(self, carry: Arrays) -> Arrays:
        """What goes into a slot, where it is nothing but the carry."""
        return [carry[k] for k in self._slot_in_carry]

    def run_and_keep(self, inputs: Inputs) -> tuple[Arrays, Arrays, Arrays]:
        """The next carry, the `y`s, and what goes into a slot."""
        out = self._kept(*inputs.flat())
        end = len(self._out_types)
        return out[: self._carried], out[self._carried : end], [out[i] for i in self._slot]

    def same(self, inputs: Inputs) -> Arrays:
        """What the reversals of all blocks want alike."""
        if self._same is None:
            return []
        return self._same(*inputs._replace(xs=[x[0] for x in inputs.xs]).flat())

    def reverse(self, inputs: Inputs, slot: Arrays, same: Arrays, gradient: Arrays) -> Inputs:
        """Gradients of what is wanted; the carry of `inputs` is not looked at.

        Arguments:
            gradient: of the inexact outputs.
        """
        found = {"input": inputs.flat(), "slot": slot, "same": same}
        pull = jax.tree.unflatten(self._pull, [found[kind][i] for kind, i in self._sources])
        given = iter(gradient)
        # JAX wants zeros of this type for integers.
        ct = [next(given) if _is_inexact(t) else np.zeros(t.shape, jax.dtypes.float0) for t in self._out_types]
        gradients = iter(pull((ct[: self._carried], ct[self._carried :])))
        return Inputs(*([next(gradients) for yes in part if yes] for part in self.wanted))


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
    slots: Arrays  # `[size, ...]`
    same: Arrays


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
        carry, y, slot = block.run_and_keep(_inputs_at(inputs, i, carry))
        return (carry, _put(ys, i, y)), slot

    to_snap = _to_host if plan.on_host else list
    state = inputs.carry, [zeros(t, plan.length) for t in block.y_types]
    snaps, slots = [], []
    if plan.heads.start.size:
        state, snaps = lax.scan(head, state, plan.heads)
    if plan.rest < plan.length:
        state, slots = lax.scan(run_and_keep, state, np.arange(plan.rest, plan.length, dtype=np.int32))
    saved = _Saved(_Static(block, plan), inputs._replace(carry=[]), snaps, slots, block.same(inputs))
    return jax.tree.map(differentiated_once, state), saved


def _backward(saved: _Saved, cotangents: tuple[Arrays, Arrays]) -> tuple[Inputs, None]:
    block, plan = saved.static.block, saved.static.plan
    inputs, wanted = saved.inputs, block.wanted
    to_snap, from_snap, reverse_block, rows, segments = list, list, block.reverse, plan.rows, plan.segments
    if plan.on_host:
        # XLA of JAX 0.10.2 and 0.11.0 burns those offsets on the host into the program that it can follow, and wrongly.
        rows, segments = lax.optimization_barrier(jax.tree.map(jnp.asarray, (rows, segments)))
        to_snap, from_snap, reverse_block = _to_host, _to_device, functools.partial(apart, always(), block.reverse)
    # Nothing is done with those of integers.
    of_carry, of_ys = ([_instantiated(ct) for ct in part if _is_inexact(ct)] for part in cotangents)

    def reverse(i, slot, sums):
        here = _inputs_at(inputs, i, [None] * len(wanted.carry))
        new = reverse_block(here, slot, saved.same, [*sums.carry, *_at(of_ys, i)])
        return Inputs(
            constants=list(map(jnp.add, sums.constants, new.constants)),
            xs=_put(sums.xs, i, new.xs),
            carry=new.carry,
            shared=list(map(jnp.add, sums.shared, new.shared)),
        )

    def advance(p, state):
        carry, snaps = state
        segment = _Segments(*_at(segments, p))
        snaps = _put(snaps, segment.snap, to_snap(carry))
        return _loop(segment.start, segment.count, lambda i, carry: run(i, carry), carry), snaps

    def run(i, carry):
        return block.step(_inputs_at(inputs, i, carry))[0]

    def keep(row, carry, slots):
        """Slots for the chunk that begins with `carry`; those of the last chunk are kept from the forward pass."""
        if not block.keeps_only_carry:

            def run_and_keep(k, state):
                carry, slots = state
                carry, _, slot = block.run_and_keep(_inputs_at(inputs, row.start + k, carry))
                return carry, _put(slots, k, slot)

            return _loop(0, row.again, run_and_keep, (carry, slots))[1]

        def keep_and_run(k, state):
            carry, slots = state
            return run(row.start + k, carry), _put(slots, k, block.slot_of(carry))

        runs = jnp.maximum(row.again - 1, 0)  # for what the last block returns, nobody asks
        carry, slots = _loop(0, runs, keep_and_run, (carry, slots))
        return _loop(runs, row.again - runs, lambda k, slots: _put(slots, k, block.slot_of(carry)), slots)

    def chunk(state, row):
        sums, snaps, slots = state
        carry = from_snap(_at(snaps, row.snap))
        if plan.segments.start.size:
            carry, snaps = lax.fori_loop(row.begin, row.end, advance, (carry, snaps))
        if plan.by_input:
            return (reverse(row.start, block.slot_of(carry), sums), snaps, slots), None
        if plan.rows.again.any():
            slots = keep(row, carry, slots)
        end = row.count - 1
        count = _known(plan.rows.count, row.count)
        sums = _loop(0, count, lambda k, sums: reverse(row.start + end - k, _at(slots, end - k), sums), sums)
        return (sums, snaps, slots), None

    nothing_yet = Inputs(*([zeros(jax.typeof(leaf)) for leaf in part] for part in _selected(inputs, wanted)))
    state = nothing_yet._replace(carry=of_carry), saved.snaps, saved.slots
    (sums, _, _), _ = lax.scan(chunk, state, rows)
    rest = map(differentiated_once, sums.flat())
    return wanted.like([next(rest) if yes else None for yes in wanted.flat()]), None


def _selected(inputs: Inputs, wanted: Inputs) -> list[Arrays]:
    return [
        [leaf for leaf, yes in zip(part, which, strict=False) if yes] for part, which in zip(inputs, wanted, strict=True)
    ]


def _inputs_at(inputs: Inputs, i: Any, carry: Arrays) -> Inputs:
    return inputs._replace(xs=_at(inputs.xs, i), carry=carry)


def _at(arrays: Sequence[Any], i: Any) -> Arrays:
    return [lax.dynamic_index_in_dim(a, i, keepdims=False, allow_negative_indices=False) for a in arrays]


def _put(arrays: Arrays, i: Any, values: Arrays) -> Arrays:
    return [
        lax.dynamic_update_index_in_dim(a, value, i, 0, allow_negative_indices=False)
        for a, value in zip(arrays, values, strict=True)
    ]


def _loop(start: Any, count: Any, body: Callable[[Any, Any], Any], state: Any) -> Any:
    return lax.fori_loop(np.int32(0), count, lambda k, state: body(start + k, state), state)


def _known(column: np.ndarray, entry: Any) -> Any:
    """An entry of a column as a number, where all of it are equal: XLA knows more of a loop that it can count."""
    return column[0] if (column == column[0]).all() else entry


def _to_host(arrays: Arrays) -> Arrays:
    return jax.device_put(arrays, jax.memory.Space.Host)


def _to_device(arrays: Arrays) -> Arrays:
    return jax.device_put(arrays, jax.memory.Space.Device)


def _is_inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _instantiated(cotangent: Any) -> Any:
    return zeros(cotangent.aval) if isinstance(cotangent, SymbolicZero) else cotangent
