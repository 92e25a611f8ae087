"""A traced block under its knobs: what it is cut into, what it keeps, what goes through the loop; and its execution."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax

from jaxckpt._leaves import replaced
from jaxckpt._setting import Setting
from jaxckpt.analysis import flow, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.numbering import Scope, as_function
from jaxckpt.analysis.stages import Piece
from jaxckpt.analysis.tradeoff import Choice, Tradeoff
from jaxckpt.engine import check
from jaxckpt.engine.choice import with_choice
from jaxckpt.engine.cutting import cut
from jaxckpt.engine.kernels import masks_of_its_own
from jaxckpt.engine.offload import guard_offload, loop_that_offloads
from jaxckpt.engine.pieces import in_pieces
from jaxckpt.engine.reversal import Part, reverse_blocks
from jaxckpt.engine.reversed_block import Inputs, Step
from jaxckpt.engine.scan import scan_blocks
from jaxckpt.engine.trace import Traced
from jaxckpt.policies.grammar import JaxPolicy


@dataclass(frozen=True)
class Run:
    """A run of a stack, ready to be executed: one block's jaxpr and how its inputs and outputs go through the loop."""

    setting: Setting
    length: int
    names: check.Names
    closed: Any  # of one block: slices of `xs`, carry and shared arrays in, carry and the rest out
    pieces: Sequence[Piece]  # into which the block is cut, if it is; then `closed` is inlined
    keep: JaxPolicy
    chosen: tuple[Tradeoff, Choice] | None  # where the policy chooses what is kept
    carry_to_host: JaxPolicy
    parameters: list[int]  # which of the block's inputs are
    moving: list[int]  # the carry's leaves that the blocks change
    computed: list[int]  # the other outputs that are no slices of `xs`
    own: dict[int, int]  # those that are, parameters above all, and which: they are `xs` itself and not a copy of it
    leaves: tuple[list[Any], list[Any], list[Any]]  # of `xs`, the first carry, the shared arrays
    carry_names: list[str]
    first: "Run | None" = None  # of the first blocks, if they run under a setting of their own
    is_stack: bool = True  # and not what `checkpoint` was given, which is planned as a stack of one block is
    refusal: ValueError | None = None  # of derivatives, of what `checkpoint` was given with the plan of something else

    @property
    def constants(self) -> list[Any]:
        """Of the block's jaxpr, then of the first blocks', if they have one of their own."""
        return [*self.closed.consts, *([] if self.first is None else self.first.closed.consts)]

    @property
    def carried(self) -> range:
        """Which of the block's inputs are the carry."""
        return range(len(self.leaves[0]), len(self.leaves[0]) + len(self.leaves[1]))

    def under(self, setting: Setting) -> "Run":
        """This run under other knobs, `offload:` aside; for one with default knobs, whose `closed` is the block's own."""
        closed, keep, chosen = resolve(setting, self.closed, self.names, self.parameters)
        closed, pieces = cut(setting, closed, self.carried, self.names, keep, any(map(jx.is_batched, self.leaves[1])))
        return dataclasses.replace(self, setting=setting, closed=closed, pieces=pieces, keep=keep, chosen=chosen)

    def execute(
        self,
        constants: list[Any],
        xs: list[Any],
        carry: list[Any],
        arrays: list[Any],
        mark: Callable[[list[Any]], list[Any]] = list,
        scope: Scope | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """The last carry, all its leaves, and what `computed` says, stacked.

        Arguments:
            constants: see `constants`.
            scope: of each equation of the block, by its number.
        """
        passed = [leaf for i, leaf in enumerate(carry) if i not in self.moving]
        inputs = Inputs(constants, mark([carry[i] for i in self.moving]), xs, [*passed, *arrays])
        step = self._step(len(carry), scope)
        if self.setting.engine == "reversal":
            last, ys = reverse_blocks(self._parts(len(carry), scope), inputs)
            # All that a `custom_vjp` returns has tangents, and what follows the stack may have no derivative.
            fixed = flow.constant_in_derivatives(self.closed.jaxpr)
            last = [lax.stop_gradient(leaf) if fixed[i] else leaf for i, leaf in zip(self.moving, last, strict=True)]
            ys = [lax.stop_gradient(leaf) if fixed[i] else leaf for i, leaf in zip(self.computed, ys, strict=True)]
        else:
            scanned = lambda moved, x: step(inputs._replace(xs=x, carry=moved))  # noqa: E731
            last, ys = scan_blocks(scanned, inputs.carry, xs, self.length, self.setting, self.keep, self.carry_to_host)
        return replaced(carry, self.moving, mark(last)), ys

    def rest(self, ys: list[Any]) -> list[Any]:
        """All outputs beside the carry, stacked; `ys` are those that are computed."""
        stacked = {i: self.leaves[0][source] for i, source in self.own.items()} | dict(zip(self.computed, ys, strict=True))
        return [stacked[i] for i in sorted(stacked)]

    def _parts(self, carried: int, scope: Scope | None) -> list[Part]:
        """The blocks as the reversal engine runs them."""
        own = slice(0, len(self.closed.consts))
        if self.first is None:
            return [self._part(self.length, carried, scope, own)]
        theirs, others = slice(own.stop, None), self.length - self.first.length
        return [self.first._part(self.first.length, carried, scope, theirs), self._part(others, carried, scope, own)]

    def _part(self, count: int, carried: int, scope: Scope | None, constants: slice) -> Part:
        step = self._step(carried, scope)
        of_own = lambda inputs: step(inputs._replace(constants=inputs.constants[constants]))  # noqa: E731
        return Part(of_own, count, self.setting, self.keep)

    def _step(self, carried: int, scope: Scope | None) -> Step:
        """One block, for either engine; it closes over no traced value, and so not over `self`."""
        jaxpr, pieces, keep, moving, computed = self.closed.jaxpr, self.pieces, self.keep, self.moving, self.computed

        def step(inputs: Inputs) -> tuple[list[Any], list[Any]]:
            closed = jx.closed(jaxpr, inputs.constants)
            block = in_pieces(closed, pieces, keep, scope) if pieces else as_function(closed, itertools.count(), scope)
            moved, shared = iter(inputs.carry), iter(masks_of_its_own(inputs.shared, keep))
            given = [next(moved if i in moving else shared) for i in range(carried)]
            out = block(*inputs.xs, *given, *shared)
            return [out[i] for i in moving], [out[i] for i in computed]

        return step


def resolved(
    setting: Setting, length: int, traced: Traced, names: check.Names
) -> tuple[Run, Callable[[list[Any]], list[Any]]]:
    """The run of a traced block under `setting`, and how its carry is marked where something is offloaded."""
    through_scan = setting.offload_carry and setting.engine == "scan"
    closed, keep, chosen = resolve(setting, traced.closed, names, traced.parameters)
    loop = loop_that_offloads(closed.jaxpr, keep) if setting.policy.may_offload else None
    guarded = guard_offload(keep, setting.policy.may_offload or through_scan, loop=loop)

    first = None
    if setting.first is not None:
        first, _ = resolved(setting.first[1], setting.first[0], traced, names)
    slices, sources = len(traced.x_leaves), flow.forwarded(closed.jaxpr)
    of_carry, of_rest = sources[: len(traced.carry)], dict(enumerate(sources[len(traced.carry) :], len(traced.carry)))
    own = {i: source for i, source in of_rest.items() if source is not None and source < slices}
    closed, pieces = cut(setting, closed, traced.carried, names, keep, any(map(jx.is_batched, traced.carry)))
    run = Run(
        setting=setting,
        length=length,
        names=names,
        closed=closed,
        pieces=pieces,
        keep=guarded.keep,
        chosen=chosen,
        carry_to_host=guarded.carry_to_host,
        parameters=traced.parameters,
        # A carry that all blocks pass through unchanged is shared: it stays out of the scan, which would store it per block.
        moving=[i for i, source in enumerate(of_carry) if source != slices + i],
        computed=[i for i in of_rest if i not in own],
        own=own,
        leaves=(traced.x_leaves, traced.carry, traced.arrays),
        carry_names=traced.carry_names,
        first=first,
    )
    return run, guarded.mark


def resolve(
    setting: Setting, closed: Any, names: check.Names, parameters: Sequence[int] = ()
) -> tuple[Any, JaxPolicy, tuple[Tradeoff, Choice] | None]:
    """The block's jaxpr, with what the policy chooses tagged if it does, the `jax.checkpoint` policy, and the choice.

    Arguments:
        parameters: which of the block's inputs are.
    """
    policy = setting.policy
    tags = tagging.tags(closed) if policy.reads_tags else ()
    found: tuple[str, ...] = ()
    chosen = None
    # One block at a time is alive anyway, and nothing of it is kept for later.
    is_single = setting.blocks_per_ckpt == 1 or (setting.snapshots is not None and setting.blocks_per_ckpt is None)
    if policy.chooses is not None and not is_single:
        closed, found, chosen = with_choice(closed, policy.chooses, parameters)
    try:
        return closed, policy.for_tags(tags, found), chosen
    except ValueError as error:
        raise ValueError(f"{names.block}: {error}") from None
