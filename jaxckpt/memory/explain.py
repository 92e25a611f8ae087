"""What a block of a stack, or what is no stack, keeps for the backward pass and re-runs, value by value, from the jaxpr.

The numbers are those of JAX: what autodiff stores, before XLA, which may fuse a value away or keep a copy. `measure` tells
what the compiled program needs.
"""

import contextlib
import dataclasses
import html
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx
from jax.core import Tracer
from jax.extend.core import Literal

from jaxckpt._leaves import replaced, split_arrays
from jaxckpt._sizes import size_text
from jaxckpt._table import aligned
from jaxckpt.analysis import flow, inlining, numbering, sources, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import Cost, cost
from jaxckpt.analysis.stages import run_before_pieces
from jaxckpt.analysis.tradeoff import tradeoff_of
from jaxckpt.engine import single
from jaxckpt.engine.planned import observed
from jaxckpt.engine.run import Run
from jaxckpt.engine.schedule import whole_runs
from jaxckpt.memory import targets
from jaxckpt.memory.slices import SlicedPiece, sliced_pieces
from jaxckpt.policies.grammar import everything

T = TypeVar("T")


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

    @property
    def bytes(self) -> int:
        return self.bytes_per_block * self.times


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
    """What a setting stores for a stack of `N` blocks, in bytes, and what one block is made of.

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
    whole_runs: float = 1.0
    slices: tuple[SlicedPiece, ...] = ()
    parts: "tuple[Explanation, ...]" = ()
    is_stack: bool = True

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
        """All fields and the forward runs, as JSON has them."""
        parts = [part.to_json() for part in self.parts]
        return {**dataclasses.asdict(self), "forward_runs": self.forward_runs, "parts": parts}

    def __str__(self) -> str:
        if self.parts:
            return "\n\n".join([self._title(), *map(str, self.parts), "\n".join(self._totals())])
        lines = aligned([_COLUMNS, *map(_cells, self.values)], right=(4, 5, 6))
        return "\n".join([self._title(), "", *lines, "", *self._totals()])

    def to_html(self) -> str:
        """The table as a page that needs nothing else."""
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        most = max((v.bytes for v in self.values), default=1) or 1
        title = lambda part: f'<tr><th colspan="{len(_COLUMNS) + 1}">{html.escape(part._title())}</th></tr>\n'  # noqa: E731
        rows = "\n".join(title(part) + part._rows(most) for part in self.parts) or self._rows(most)
        totals = "".join(f"<li>{html.escape(line.strip())}</li>" for line in self._totals())
        return _PAGE.format(title=html.escape(self._title()), head=head, rows=rows, totals=totals)

    def _rows(self, most: int) -> str:
        """The rows of a page, with bars beside them; `most` bytes are the longest."""
        return "\n".join(
            f'<tr class="{v.fate.split()[0]}">'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(v))
            + f'<td><div style="width:{200 * v.bytes / most:.0f}px"></div></td></tr>'
            for v in self.values
        )

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


@dataclass(frozen=True)
class _Residual:
    """A value in the jaxpr of a stack's forward pass that its backward pass is given."""

    aval: Any
    origin: sources.Origin

    @property
    def stacked(self) -> bool:
        return self.origin.stacked

    @property
    def bytes(self) -> int:
        return jx.nbytes(self.aval)

    @property
    def is_host(self) -> bool:
        return self.aval.memory_space == jax.memory.Space.Host

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one block's."""
        return self.aval.shape[1:] if self.stacked else self.aval.shape

    @property
    def key(self) -> Any:
        """What it comes of, what computes it, and its type: equal in two traces for the same value."""
        return self.origin.number, self.origin.input, self.origin.op, self.shape, self.aval.dtype


def explain(
    stack: Callable[..., Any] | nn.Module | nnx.Module,
    *args: Any,
    target: "str | os.PathLike[str] | targets.Target | None" = None,
    **keywords: Any,
) -> Explanation:
    """What a stack keeps, re-runs and offloads, for gradients of its parameters, its carry and its shared arrays.

    What `checkpoint` made is explained as a stack of one block, for gradients of all arrays that it is given. Of a Linen
    module all collections count as parameters, of an NNX module all state; arrays that a block closes over do not.

    Arguments:
        stack: a stack that `checkpoint_scan` made (a function, a Linen or an NNX module), or what `checkpoint` made, or a
            function that runs one; where it runs a stack too, that is what is explained.
        args, keywords: what it is called with, of a Linen module the variables first, then `rngs=` and `mutable=` if
            needed. `jax.ShapeDtypeStruct`s do for arrays; nothing is computed.
        target: the GPU for whose rates the time model speaks, such as "h200"; None for no times.

    Raises:
        TypeError: nothing of the kind was run.
        ValueError: several were.

    >>> import jax, jax.numpy as jnp
    >>> from jaxckpt import checkpoint_scan
    >>> stack = checkpoint_scan(lambda w, x: jnp.tanh(x @ w), policy="dots")
    >>> found = explain(stack, jnp.ones((6, 8, 8)), jnp.ones((4, 8)))
    >>> [v.name for v in found.values if v.fate == "kept"]
    ['x', 'dot_general']
    >>> found.stored_bytes == 6 * 2 * (4 * 8 * 4)
    True
    """
    where = None if target is None else targets.get(target)
    return look_at_run(stack, args, keywords, lambda run: _of_run(run, where))


def _of_run(run: Run, where: targets.Target | None) -> Explanation:
    if run.first is None:
        return _explained(run, where)
    others = replace(run, length=run.length - run.first.length, first=None)
    whole = _explained(replace(run, first=None), None)
    return _of_parts(whole, _explained(run.first, where), _explained(others, where))


def _of_parts(whole: Explanation, *parts: Explanation) -> Explanation:
    """The first blocks and the others as one stack; `whole` is one of which all blocks are like the others."""
    length = whole.length
    total = lambda name: sum(getattr(part, name) for part in parts)  # noqa: E731

    def mean(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if None in values else sum(v * part.length for v, part in zip(values, parts, strict=True)) / length

    return replace(
        whole,
        blocks_per_ckpt=None,
        pieces=1,
        chosen=None,
        target=parts[0].target,
        policy="; ".join(part.policy for part in parts),
        values=tuple(value for part in parts for value in part.values),
        stored_bytes=total("stored_bytes"),
        host_bytes=total("host_bytes"),
        chunk_bytes=total("chunk_bytes"),
        forward_seconds=mean("forward_seconds"),
        rerun_seconds=mean("rerun_seconds"),
        whole_runs=mean("whole_runs"),
        slices=tuple(piece for part in parts for piece in part.slices),
        parts=parts,
    )


def _explained(run: Run, where: targets.Target | None) -> Explanation:
    run = replace(run, closed=inlining.inlined(run.closed))
    gpu = None if where is None else where.gpu
    costs = None if gpu is None else [cost(eqn, gpu) for eqn in run.closed.jaxpr.eqns]
    # What a block keeps does not depend on the engine, and the scan engine shows it.
    whole = replace(run.setting, blocks_per_ckpt=None, snapshots=None, offload_carry=False, engine="scan")
    per_chunk = run.setting.blocks_per_ckpt or (1 if run.setting.snapshots else None)
    alive = run.length if per_chunk is None else min(per_chunk, run.length)
    # In a chunk of one, the whole block is differentiated at once, whatever the policy.
    in_chunk = replace(run, setting=whole, length=alive, **({"keep": everything} if per_chunk == 1 else {}))
    kept = _residuals(in_chunk)
    if run.setting.engine == "reversal":  # but for parameters in another dtype, which it converts again
        made_again = _converted_parameters(run)
        kept = [r for r in kept if r.origin.number not in made_again]
    wanted = _residuals(replace(in_chunk, keep=everything, pieces=()))
    stored = kept if run.setting == whole else _residuals(run)
    without = wanted if alive == run.length else _residuals(replace(run, setting=whole, keep=everything, pieces=()))
    is_single = run.setting.snapshots is not None and run.setting.blocks_per_ckpt is None  # reversed from its input alone
    return Explanation(
        block=run.names.block,
        length=run.length,
        blocks_per_ckpt=per_chunk,
        policy=str(run.setting.policy),
        pieces=max(len(run.pieces), 1),
        values=tuple(_rows(run, kept, wanted, alive, costs)),
        stored_bytes=sum(r.bytes for r in stored if not r.is_host),
        host_bytes=sum(r.bytes for r in stored if r.is_host),
        chunk_bytes=0
        if per_chunk is None or run.setting.engine == "reversal"
        else sum(r.bytes for r in kept if not r.is_host),
        wanted_bytes=sum(r.bytes for r in without),
        target=None if where is None else where.name,
        chosen=_choice_of(run),
        slices=sliced_pieces(run),
        is_stack=run.is_stack,
        whole_runs=whole_runs(run.length, run.setting.blocks_per_ckpt, run.setting.snapshots, run.setting.engine),
        **_seconds(in_chunk, [] if is_single else kept, wanted, gpu, _is_entered_again(run)),
    )


def _is_entered_again(run: Run) -> bool:
    """Whether what enters the pieces of a block is computed once more before they are."""
    if not run.pieces or run.keep is everything:
        return False
    return run.is_stack or single.is_run_again(run.closed, run.pieces, run.leaves[2])


def _choice_of(run: Run) -> Chosen | None:
    if run.chosen is None:
        return None
    trade, choice = run.chosen
    share = lambda found: found.rerun_seconds / (trade.forward_seconds or 1.0)  # noqa: E731
    return Chosen(choice.bytes, share(choice), tuple((corner.bytes, share(corner)) for corner in trade.corners))


def _converted_parameters(run: Run) -> set[int]:
    """The equations of the block that do nothing but convert what differs from block to block and enters it."""
    jaxpr = run.closed.jaxpr
    from_input = flow.converted(jaxpr.replace(outvars=[var for eqn in jaxpr.eqns for var in eqn.outvars[:1]]))
    return {i for i, k in enumerate(from_input) if k is not None and k < len(run.leaves[0])}


def _seconds(run: Run, kept: list[_Residual], wanted: list[_Residual], rates: Any, is_cut: bool) -> dict[str, Any]:
    """What one block costs to run, and to run again as far as the values that are wanted and not kept need it."""
    if rates is None:
        return {}
    eqns = run.closed.jaxpr.eqns
    missing = _without(wanted, kept)
    # Of a loop or a call that keeps some of its values, all is run again for the others.
    partly = {r.origin.number for r in missing if r.origin.number is not None and jx.inner_jaxprs(eqns[r.origin.number])}
    have = {r.origin.number for r in kept if r.origin.number is not None} - partly
    merged, number = inlining.merge(run.closed)
    if any(map(jx.is_checkpoint, eqns)):
        forward, rerun = _beside_checkpoints(run, have, wanted, rates)
    else:
        trade = tradeoff_of(merged, rates, run.parameters)
        forward, rerun = trade.forward_seconds, trade.again_seconds({number[i] for i in have}) if missing else 0.0
    if is_cut:  # and before that once for what enters the pieces
        before = run_before_pieces(run.closed.jaxpr, run.pieces, {var for i in have for var in eqns[i].outvars})
        rerun += sum(cost(merged.jaxpr.eqns[i], rates).seconds for i in sorted({number[i] for i in before}))
    return {"forward_seconds": forward, "rerun_seconds": rerun}


def _beside_checkpoints(run: Run, have: set[int], wanted: list[_Residual], rates: Any) -> tuple[float, float]:
    """The same of a block with checkpoints of its own: they are run again when they are differentiated, whatever is kept."""
    eqns = run.closed.jaxpr.eqns
    costs = [cost(eqn, rates).seconds for eqn in eqns]
    computed_by = {var: i for i, eqn in enumerate(eqns) for var in eqn.outvars}
    again: set[int] = set()
    left = [r.origin.number for r in wanted]
    while left:
        i = left.pop()
        if i is None or i in have or i in again:
            continue
        again.add(i)
        left.extend(computed_by.get(v) for v in eqns[i].invars if not isinstance(v, Literal))
    own = sum(seconds for seconds, eqn in zip(costs, eqns, strict=True) if jx.is_checkpoint(eqn))
    return sum(costs), own + sum(costs[i] for i in again)


def _without(wanted: list[_Residual], kept: list[_Residual]) -> list[_Residual]:
    """The residuals that are wanted and not kept."""
    left = Counter(r.key for r in kept)
    missing = []
    for r in wanted:
        if left[r.key]:
            left[r.key] -= 1
        else:
            missing.append(r)
    return missing


def observe(call: Callable[[list[Any]], Any], arrays: list[Any], see: Callable[[Run], None]) -> None:
    """Traces `call(arrays)` and calls `see` with each run of a stack as it is traced, those inside of blocks left out."""
    with observing(see):
        jax.eval_shape(call, arrays)


@contextlib.contextmanager
def observing(see: Callable[[Run], None]) -> Iterator[None]:
    """Calls `see` with each run of a stack that is traced meanwhile, those inside of blocks left out."""
    token = observed.set(see)
    try:
        with _untraced(object()):  # or what is jitted inside, and was traced before, would not run the stack again
            yield
    finally:
        observed.reset(token)


def look_at_run(stack: Any, args: tuple, keywords: dict[str, Any], look: Callable[[Run], T]) -> T:
    """What `look` finds of the one run of a stack when `stack` is called, while that is traced."""
    if isinstance(stack, nnx.Module):
        graph, state = nnx.split(stack)
        fn = lambda state, *args, **keywords: nnx.merge(graph, state)(*args, **keywords)  # noqa: E731
        return look_at_run(fn, (state, *args), keywords, look)
    if isinstance(stack, nn.Module) and not (args and isinstance(args[0], Mapping)):
        raise TypeError(
            f"a Linen module is explained with its variables first, explain(stack, variables, x); got {args!r:.200}"
        )
    fn = stack.apply if isinstance(stack, nn.Module) else stack
    if not callable(fn) or isinstance(fn, type):
        raise TypeError(f"explain takes a stack, what checkpoint made, or a function that runs one; got {stack!r}")
    arrays, with_arrays = split_arrays((args, keywords))

    def call(arrays: list[Any]) -> None:
        args, keywords = with_arrays(arrays)
        fn(*args, **keywords)

    told: list[tuple[Run, T | None]] = []

    def see(run: Run) -> None:
        # Here, where axes that have names, as in `shard_map`, are bound.
        can_be = run.refusal is None and not any(map(jx.is_batched, itertools.chain(*run.leaves)))
        told.append((run, look(run) if can_be else None))

    observe(call, arrays, see)
    told = [(run, found) for run, found in told if run.is_stack] or told
    seen = [run for run, _ in told]
    if not seen:
        name = getattr(stack, "__name__", type(stack).__name__)
        raise TypeError(f"{name} ran nothing that checkpoint_scan or checkpoint made, so there is nothing to explain")
    if len(seen) > 1:
        found = ", ".join(f"{run.length} x {run.names.block}" if run.is_stack else run.names.block for run in seen)
        what = "stacks" if seen[0].is_stack else "functions under checkpoint"
        raise ValueError(f"several {what} were run ({found}); explain one of them at a time, with what it is called with")
    if seen[0].refusal is not None:
        raise seen[0].refusal
    (_, found), *_ = told
    if found is None:
        what = "the stack of " if seen[0].is_stack else ""
        raise ValueError(
            f"{what}{seen[0].names.block} was run under vmap, where its bytes are those of one example; explain it by "
            "itself, called with the whole batch"
        )
    return found


_untraced = jax.make_user_context(None)


def _residuals(run: Run) -> list[_Residual]:
    """The residuals of a run, without the inputs of the stack, which exist anyway, and constants."""
    xs, carry, arrays = ([jax.typeof(leaf) for leaf in leaves] for leaves in run.leaves)
    xs = [aval.update(shape=(run.length, *aval.shape[1:])) for aval in xs]
    constants = [jax.typeof(value) for value in run.closed.consts]

    def forward(*inputs: Any) -> list[Any]:
        rest = iter(inputs)
        given, *leaves = [[next(rest) for _ in part] for part in (constants, xs, carry, arrays)]
        if not run.is_stack:
            block = jx.closed(run.closed.jaxpr, given)
            return single.checkpointed(block, run.keep, leaves[2], run.pieces, numbering.scope)
        last, ys = run.execute(given, leaves[0], leaves[1], leaves[2], scope=numbering.scope)
        return [*last, *ys]

    # Arrays that the block closes over are differentiated only where they are arguments of a function around the stack.
    is_fixed = [not isinstance(value, Tracer) for value in run.closed.consts]
    where = [i for i in range(len([*constants, *xs, *carry, *arrays])) if i >= len(is_fixed) or not is_fixed[i]]

    def residuals(*inputs: Any) -> list[Any]:
        of_wanted = lambda *values: forward(*replaced(inputs, where, values))  # noqa: E731
        return jax.tree.leaves(jx.vjp_of_inexact(of_wanted, [inputs[i] for i in where])[1])

    jaxpr = jx.trace(residuals, *constants, *xs, *carry, *arrays).jaxpr
    alias = tagging.aliases(run.closed.jaxpr)
    found = []
    for var in dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal)):
        origin = sources.origin(jaxpr, var)
        if origin.number is not None:
            number = alias.get(origin.number, origin.number)
            computes = run.closed.jaxpr.eqns[number].primitive.name
            origin = origin._replace(number=number, op=computes if origin.op in sources.WRAPPERS else origin.op)
        aval = _as_whole(run, var.aval, origin) if origin.number is not None else var.aval
        if origin.input is None or origin.input[0] in ("carry", "x"):
            found.append(_Residual(aval, origin))
    return found


def _as_whole(run: Run, aval: Any, origin: sources.Origin) -> Any:
    """The type of a value that all slices of a piece have kept, in the shape in which the block computes it."""
    inside = {i for piece in run.pieces if piece.tiles is not None for i in piece.tiles.tiling.inside}
    if origin.number not in inside:
        return aval
    blocks = aval.shape[:1] if origin.stacked else ()
    shapes = [(*blocks, *var.aval.shape) for var in run.closed.jaxpr.eqns[origin.number].outvars]
    return next((aval.update(shape=shape) for shape in shapes if math.prod(shape) == aval.size), aval)


def _rows(run: Run, kept: list[_Residual], wanted: list[_Residual], alive: int, costs: list[Cost] | None) -> list[Value]:
    """What is kept, and what is wanted beside it, which is run again."""
    block = run.closed.jaxpr
    tags = {number: tag for i, number in tagging.aliases(block).items() if (tag := _own_tag(block.eqns[i])) is not None}

    def row(r: _Residual, fate: str) -> Value:
        number, given, op = r.origin.number, r.origin.input, r.origin.op
        times = alive if r.stacked else 1
        size = r.bytes // times
        common: Any = dict(shape=r.shape, dtype=str(r.aval.dtype), times=times, fate=fate, bytes_per_block=size)
        if given is not None:
            kind, i = given
            name = run.carry_names[run.moving[i]] if kind == "carry" else "a copy of what enters"
            return Value(name=name, op="input", source="", **common)
        if number is None:
            return Value(name=op, op=op, source="", **common)
        source = r.origin.source or sources.source_of(block.eqns[number])
        return Value(
            name=tags.get(number) or op,
            op=op,
            source=f"{os.path.basename(source[0])}:{source[1]}" if source else "",
            seconds=None if costs is None else costs[number].seconds,
            is_guess=costs is not None and costs[number].is_guess,
            **common,
        )

    fates = [(r, "offloaded" if r.is_host else "kept") for r in kept] + [(r, "re-run") for r in _without(wanted, kept)]
    fates.sort(key=lambda pair: -1 if pair[0].origin.number is None else pair[0].origin.number)
    chunks = []
    if run.setting.blocks_per_ckpt is not None:
        times = math.ceil(run.length / run.setting.blocks_per_ckpt)
        for i in run.moving:
            aval = jax.typeof(run.leaves[1][i])
            size = jx.nbytes(aval)
            chunks.append(Value(run.carry_names[i], "input", "", aval.shape, str(aval.dtype), times, "kept per chunk", size))
    return [*chunks, *(row(r, fate) for r, fate in fates)]


def _own_tag(eqn: Any) -> str | None:
    """The user's name for a value."""
    tag = tagging.tag_of(eqn)
    return None if tag is None or tagging.is_value_name(tag) else tag


_COLUMNS = ("value", "op", "source", "shape", "of one block", "blocks", "in all", "fate", "re-run")


def _cells(value: Value) -> tuple[str, ...]:
    shape = f"{value.dtype}[{','.join(map(str, value.shape))}]"
    spent = "" if value.seconds is None else f"{'~' * value.is_guess}{value.seconds * 1e6:,.1f} us"
    sizes = size_text(value.bytes_per_block), str(value.times), size_text(value.bytes)
    return (value.name, value.op, value.source, shape, *sizes, value.fate, spent)


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
