"""What a block of a stack, or what is no stack, keeps for the backward pass and re-runs, value by value, from the jaxpr.

The numbers are those of JAX: what autodiff stores, before XLA, which may fuse a value away or keep a copy. `measure` tells
what the compiled program needs.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx
from jax.core import Tracer
from jax.extend.core import Literal

from jaxckpt._leaves import replaced
from jaxckpt.analysis import flow, inlining, numbering, sources, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import Cost, cost, sent_bytes
from jaxckpt.analysis.shares import Shares, tradeoff_of_one
from jaxckpt.analysis.stages import run_before_pieces
from jaxckpt.analysis.tradeoff import tradeoff_of
from jaxckpt.engine import single
from jaxckpt.engine.run import Run
from jaxckpt.engine.schedule import whole_runs
from jaxckpt.memory import targets
from jaxckpt.memory.explanation import Chosen, Explanation, Sent, Value
from jaxckpt.memory.runs import call_of, look_at_run
from jaxckpt.memory.slices import sliced_pieces
from jaxckpt.memory.split import NotTold, shares_in
from jaxckpt.policies.grammar import everything


@dataclass(frozen=True)
class _Residual:
    """A value in the jaxpr of a stack's forward pass that its backward pass is given; one device holds `share` of it."""

    aval: Any
    origin: sources.Origin
    share: float

    @property
    def stacked(self) -> bool:
        return self.origin.stacked

    @property
    def bytes(self) -> int:
        return round(jx.nbytes(self.aval) * self.share)

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
        target: the GPU for whose rates the time model speaks, such as "h200"; None for no times. With several devices, such
            as "h200:8", bytes and times are those of one, as the compiler splits the block: for that the call is compiled,
            with the shardings of its arguments, and the forward pass of one block.

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
    shares = _shares(stack, args, keywords, where) if where is not None and where.count > 1 else _WHOLE
    return look_at_run(stack, args, keywords, lambda run: _of_run(run, where, shares))


_WHOLE = (None, None)


def _shares(stack: Any, args: tuple, keywords: dict[str, Any], where: targets.Target) -> Sequence[Shares | None]:
    """What one device has of the block, if its values have the shapes of all; and of the first blocks', if they differ."""
    if jax.sharding.get_abstract_mesh().manual_axes:  # inside of `shard_map`
        return _WHOLE
    look_at_run(stack, args, keywords, lambda run: run)  # raises where there is nothing to explain
    call, arrays = call_of(stack, args, keywords)
    try:
        if any(isinstance(array, Tracer) for array in arrays):
            raise NotTold("explain is called inside of a function that is being traced")
        return shares_in(call, arrays, where)
    except NotTold as reason:
        warnings.warn(
            f"how values are split over {where.name!r} cannot be told ({reason}). Their bytes and times are those of all "
            "devices together",
            stacklevel=3,
        )
        return _WHOLE


def _of_run(run: Run, where: targets.Target | None, shares: Sequence[Shares | None]) -> Explanation:
    if run.first is None:
        return _explained(run, where, shares[0])
    others = replace(run, length=run.length - run.first.length, first=None)
    whole = _explained(replace(run, first=None), None, shares[0])
    return _of_parts(whole, _explained(run.first, where, shares[1]), _explained(others, where, shares[0]))


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


class _Block(NamedTuple):
    """What is known of the equations of a block, which are those of a run's inlined jaxpr.

    Fields:
        of_merged: the number of each in the merged jaxpr, whose equations shares are of.
        shares: what one device has of the block; None where that is what the jaxpr says.
        costs: None without a GPU's data. sent_bytes: by each device.
    """

    of_merged: list[int]
    shares: Shares | None
    costs: list[Cost] | None
    sent_bytes: list[int]

    def share(self, run: Run, origin: sources.Origin, shape: tuple[int, ...]) -> float:
        """Which part of a value one device holds, of this shape in one block."""
        if self.shares is None:
            return 1.0
        if origin.input is not None:
            kind, i = origin.input
            first = {"x": 0, "carry": len(run.leaves[0])}
            return self.shares.inputs[first[kind] + (run.moving[i] if kind == "carry" else i)] if kind in first else 1.0
        if origin.number is None:  # a carry on its way to the host, say
            like = [i for i in run.moving if jax.typeof(run.leaves[1][i]).shape == shape]
            return self.shares.inputs[len(run.leaves[0]) + like[0]] if like else 1.0
        shares = self.shares.outputs[self.of_merged[origin.number]]
        outputs = [var.aval.shape for var in run.closed.jaxpr.eqns[origin.number].outvars]
        return shares[outputs.index(shape)] if shape in outputs else shares[0]


def _block(run: Run, gpu: Any, shares: Shares | None) -> _Block:
    eqns = run.closed.jaxpr.eqns
    merged, of_merged = inlining.merge(run.closed)
    costs = None if gpu is None else [cost(eqn, gpu) for eqn in eqns]
    if shares is None:
        sizes = jax.sharding.get_abstract_mesh().shape
        return _Block(of_merged, None, costs, [sent_bytes(eqn, sizes) for eqn in eqns])
    if costs is not None:
        of_one = shares.seconds(merged.jaxpr, run.parameters, gpu)
        costs = [found._replace(seconds=of_one[i]) for i, found in zip(of_merged, costs, strict=True)]
    return _Block(of_merged, shares, costs, [shares.sent_bytes[i] for i in of_merged])


def _explained(run: Run, where: targets.Target | None, shares: Shares | None) -> Explanation:
    run = replace(run, closed=inlining.inlined(run.closed))
    gpu = None if where is None else where.gpu
    block = _block(run, gpu, shares)
    # What a block keeps does not depend on the engine, and the scan engine shows it.
    whole = replace(run.setting, blocks_per_ckpt=None, snapshots=None, offload_carry=False, engine="scan")
    per_chunk = run.setting.blocks_per_ckpt or (1 if run.setting.snapshots else None)
    alive = run.length if per_chunk is None else min(per_chunk, run.length)
    # In a chunk of one, the whole block is differentiated at once, whatever the policy.
    in_chunk = replace(run, setting=whole, length=alive, **({"keep": everything} if per_chunk == 1 else {}))
    kept = _residuals(in_chunk, block)
    if run.setting.engine == "reversal":  # but for parameters in another dtype, which it converts again
        made_again = _converted_parameters(run)
        kept = [r for r in kept if r.origin.number not in made_again]
    wanted = _residuals(replace(in_chunk, keep=everything, pieces=()), block)
    stored = kept if run.setting == whole else _residuals(run, block)
    without = wanted if alive == run.length else _residuals(replace(run, setting=whole, keep=everything, pieces=()), block)
    is_single = run.setting.snapshots is not None and run.setting.blocks_per_ckpt is None  # reversed from its input alone
    return Explanation(
        block=run.names.block,
        length=run.length,
        blocks_per_ckpt=per_chunk,
        policy=str(run.setting.policy),
        pieces=max(len(run.pieces), 1),
        values=tuple(_rows(run, kept, wanted, alive, block)),
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
        sends=_sends(run, block),
        whole_runs=whole_runs(run.length, run.setting.blocks_per_ckpt, run.setting.snapshots, run.setting.engine),
        **_seconds(in_chunk, [] if is_single else kept, wanted, gpu, block, _is_entered_again(run)),
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


def _seconds(
    run: Run, kept: list[_Residual], wanted: list[_Residual], rates: Any, block: _Block, is_cut: bool
) -> dict[str, Any]:
    """What one block costs to run, and to run again as far as the values that are wanted and not kept need it."""
    if block.costs is None:
        return {}
    eqns = run.closed.jaxpr.eqns
    missing = _without(wanted, kept)
    # Of a loop or a call that keeps some of its values, all is run again for the others.
    partly = {r.origin.number for r in missing if r.origin.number is not None and jx.inner_jaxprs(eqns[r.origin.number])}
    have = {r.origin.number for r in kept if r.origin.number is not None} - partly
    merged, number = inlining.merged(run.closed), block.of_merged
    if any(map(jx.is_checkpoint, eqns)):
        forward, rerun = _beside_checkpoints(run, have, wanted, block.costs)
        forward += 0.0 if block.shares is None else block.shares.gathering
    else:
        question = merged, rates, run.parameters
        trade = tradeoff_of(*question) if block.shares is None else tradeoff_of_one(*question, block.shares)
        forward, rerun = trade.forward_seconds, trade.again_seconds({number[i] for i in have}) if missing else 0.0
    if is_cut:  # and before that once for what enters the pieces
        before = run_before_pieces(run.closed.jaxpr, run.pieces, {var for i in have for var in eqns[i].outvars})
        rerun += sum({number[i]: block.costs[i].seconds for i in sorted(before)}.values())
    return {"forward_seconds": forward, "rerun_seconds": rerun}


def _beside_checkpoints(run: Run, have: set[int], wanted: list[_Residual], costs: list[Cost]) -> tuple[float, float]:
    """The same of a block with checkpoints of its own: they are run again when they are differentiated, whatever is kept."""
    eqns = run.closed.jaxpr.eqns
    seconds = [found.seconds for found in costs]
    computed_by = {var: i for i, eqn in enumerate(eqns) for var in eqn.outvars}
    again: set[int] = set()
    left = [r.origin.number for r in wanted]
    while left:
        i = left.pop()
        if i is None or i in have or i in again:
            continue
        again.add(i)
        left.extend(computed_by.get(v) for v in eqns[i].invars if not isinstance(v, Literal))
    own = sum(spent for spent, eqn in zip(seconds, eqns, strict=True) if jx.is_checkpoint(eqn))
    return sum(seconds), own + sum(seconds[i] for i in again)


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


def _residuals(run: Run, block: _Block) -> list[_Residual]:
    """The residuals of a run, without the inputs of the stack, which exist anyway, and constants."""
    xs, carry, arrays = ([jax.typeof(leaf) for leaf in leaves] for leaves in run.leaves)
    xs = [aval.update(shape=(run.length, *aval.shape[1:])) for aval in xs]
    constants = [jax.typeof(value) for value in run.closed.consts]

    def forward(*inputs: Any) -> list[Any]:
        rest = iter(inputs)
        given, *leaves = [[next(rest) for _ in part] for part in (constants, xs, carry, arrays)]
        if not run.is_stack:
            closed = jx.closed(run.closed.jaxpr, given)
            return single.checkpointed(closed, run.keep, leaves[2], run.pieces, numbering.scope)
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
            shape = aval.shape[1:] if origin.stacked else aval.shape
            found.append(_Residual(aval, origin, block.share(run, origin, shape)))
    return found


def _as_whole(run: Run, aval: Any, origin: sources.Origin) -> Any:
    """The type of a value that all slices of a piece have kept, in the shape in which the block computes it."""
    inside = {i for piece in run.pieces if piece.tiles is not None for i in piece.tiles.tiling.inside}
    if origin.number not in inside:
        return aval
    blocks = aval.shape[:1] if origin.stacked else ()
    shapes = [(*blocks, *var.aval.shape) for var in run.closed.jaxpr.eqns[origin.number].outvars]
    return next((aval.update(shape=shape) for shape in shapes if math.prod(shape) == aval.size), aval)


def _sends(run: Run, block: _Block) -> tuple[Sent, ...]:
    """What is sent in one run of the block; for what is computed twice once, as XLA merges it."""
    jaxpr, tags, found = run.closed.jaxpr, _own_tags(run), {}
    for number, (i, size) in enumerate(zip(block.of_merged, block.sent_bytes, strict=True)):
        if size and i not in found:
            eqn = jaxpr.eqns[number]
            found[i] = Sent(tags.get(number) or eqn.primitive.name, _line(sources.source_of(eqn)), size)
    return tuple(sorted(found.values(), key=lambda sent: -sent.bytes))


def _rows(run: Run, kept: list[_Residual], wanted: list[_Residual], alive: int, block: _Block) -> list[Value]:
    """What is kept, and what is wanted beside it, which is run again."""
    jaxpr, costs = run.closed.jaxpr, block.costs
    tags = _own_tags(run)

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
        source = r.origin.source or sources.source_of(jaxpr.eqns[number])
        return Value(
            name=tags.get(number) or op,
            op=op,
            source=_line(source),
            seconds=None if costs is None else costs[number].seconds,
            is_guess=costs is not None and costs[number].is_guess,
            sent_bytes=block.sent_bytes[number],
            **common,
        )

    fates = [(r, "offloaded" if r.is_host else "kept") for r in kept] + [(r, "re-run") for r in _without(wanted, kept)]
    fates.sort(key=lambda pair: -1 if pair[0].origin.number is None else pair[0].origin.number)
    chunks = []
    if run.setting.blocks_per_ckpt is not None:
        times = math.ceil(run.length / run.setting.blocks_per_ckpt)
        for i in run.moving:
            aval = jax.typeof(run.leaves[1][i])
            size = round(jx.nbytes(aval) * (1.0 if block.shares is None else block.shares.inputs[len(run.leaves[0]) + i]))
            chunks.append(Value(run.carry_names[i], "input", "", aval.shape, str(aval.dtype), times, "kept per chunk", size))
    return [*chunks, *(row(r, fate) for r, fate in fates)]


def _line(source: tuple[str, int] | None) -> str:
    return f"{os.path.basename(source[0])}:{source[1]}" if source else ""


def _own_tags(run: Run) -> dict[int, str]:
    """The user's names for values, by the number of the equation that computes one."""
    eqns, aliases = run.closed.jaxpr.eqns, tagging.aliases(run.closed.jaxpr)
    return {number: tag for i, number in aliases.items() if (tag := _own_tag(eqns[i])) is not None}


def _own_tag(eqn: Any) -> str | None:
    """The user's name for a value."""
    tag = tagging.tag_of(eqn)
    return None if tag is None or tagging.is_value_name(tag) else tag
