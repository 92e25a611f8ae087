"""One run of a stack: trace the block once, check it, hoist what it passes through, execute.

Everything that depends on the block is found out here, from one trace of one block, so that an error is raised at the
call, by us, and not by JAX from inside a scan. The jaxpr of that trace is what the executor runs: the block's Python
code is entered once per call of the stack (again where Python numbers in the carry change their type), and never where the
call is jitted and already compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt._leaves import is_array, replaced, stacked_length
from jaxckpt._plan import Knobs, StackPlan, active, under
from jaxckpt._setting import Setting, check_blocks_per_ckpt, check_snapshots, with_knobs
from jaxckpt.analysis import flow, inlining, numbering, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.stages import Piece, cuts_at_tags, find_cuts, in_pieces, pieces_between
from jaxckpt.analysis.tradeoff import Choice, Tradeoff
from jaxckpt.engine import check, refs
from jaxckpt.engine.choice import with_choice
from jaxckpt.engine.offload import guard_offload, loop_that_offloads
from jaxckpt.engine.once import not_differentiated
from jaxckpt.engine.reversal import Inputs, Step, reverse_blocks
from jaxckpt.engine.scan import scan_blocks
from jaxckpt.policies.grammar import JaxPolicy, everything, nothing

Block = Callable[[Any, tuple, dict[str, Any]], tuple[Any, Any]]


class Stacked(NamedTuple):
    """What a stack returns: the last carry as the block gave it, and `aux` and `extra` with a leading axis `N`."""

    carry: Any
    aux: Any
    extra: Any


def run_stack(
    block: Block,
    setting: Setting,
    length: int,
    xs: Any,
    carry: tuple,
    shared: dict[str, Any],
    names: check.Names,
    initializes: bool = False,
) -> Stacked:
    """Runs `length` blocks under `setting`.

    Arguments:
        block: `(x, carry, shared) -> (returned, extra)`, pure: `returned` is what the user's block returned (the carry,
            or `(carry, aux)`), `extra` a tree of arrays of the caller's own.
        xs: a tree of arrays `[N, ...]`, one slice per block: parameters, rng keys, per-block arguments.
        carry: the positional arguments of the first block.
        shared: keyword arguments that all blocks are given; those that are not arrays are static.
        names: what errors call the block and its arguments.
        initializes: parameters are made, and nothing is differentiated: the knobs are checked, and default ones used.
    Raises:
        TypeError, ValueError: see `jaxckpt.engine.check`.
    """
    if initializes and setting.plan is not None:  # which is for a stack that has its parameters
        setting = dataclasses.replace(with_knobs(setting, Knobs()), plan=None)
    planned = active(setting.plan) if isinstance(setting.plan, str) else setting.plan
    if isinstance(setting.plan, str) and planned is not None:
        setting = with_knobs(setting, planned.knobs if isinstance(planned, StackPlan) else planned)
    if setting.blocks_per_ckpt is not None and not isinstance(planned, StackPlan):  # whose length is looked at below
        check_blocks_per_ckpt(setting.blocks_per_ckpt, length)
    if setting.snapshots is not None and not isinstance(planned, StackPlan):
        check_snapshots(setting.snapshots, length, setting.blocks_per_ckpt)
    of_carry = [(names.leaf(i, ()), value) for i, value in enumerate(carry)]
    refs.check_given(names.block, [*of_carry, *shared.items(), ("the stacked parameters", xs)])
    check.carry_given(carry, names)
    check.layers_whole(xs, names)
    token = observed.set(None)
    try:
        with under({}):  # stacks inside the block are no part of a plan for this one
            traced = _trace(block, setting, xs, carry, shared, names)
    finally:
        observed.reset(token)
    refusal = None
    if isinstance(planned, StackPlan):
        refusal = planned.refusal(block=names.block, **described(traced.closed, traced.carry, length))
    if refusal is not None:
        if observed.get() is not None:  # by those who look at what is kept for derivatives
            raise refusal
        setting = dataclasses.replace(with_knobs(setting, Knobs()), plan=None)
    check.effects(traced.closed, setting, names)
    x_leaves = jax.tree.leaves(xs)
    carried = range(len(x_leaves), len(x_leaves) + len(traced.carry))
    if initializes:
        setting = _for_init(setting, traced.closed, carried, names)
    through_scan = setting.offload_carry and setting.engine == "scan"
    closed, keep, chosen = _resolve(setting, traced.closed, names)
    loop = loop_that_offloads(closed.jaxpr, keep) if setting.policy.may_offload else None
    guarded = guard_offload(keep, setting.policy.may_offload or through_scan, loop=loop)

    sources = flow.forwarded(closed.jaxpr)
    sources, rest_sources = sources[: len(traced.carry)], sources[len(traced.carry) :]
    # What a block returns of its own slice of `xs` unchanged, parameters above all, is `xs` and not a copy of it.
    own = {i: x_leaves[source] for i, source in enumerate(rest_sources) if source is not None and source < len(x_leaves)}
    closed, pieces = _cut(setting, closed, carried, names)
    run = Run(
        setting=setting,
        length=length,
        names=names,
        closed=closed,
        pieces=pieces,
        keep=guarded.keep,
        chosen=chosen,
        carry_to_host=guarded.carry_to_host,
        # A carry that all blocks pass through unchanged is shared: it stays out of the scan, which would store it per block.
        moving=[i for i, source in enumerate(sources) if source != len(x_leaves) + i],
        computed=[len(sources) + i for i in range(len(rest_sources)) if i not in own],
        leaves=(x_leaves, traced.carry, traced.arrays),
        carry_names=names.leaves(carry),
    )
    if (see := observed.get()) is not None:
        see(run)
    last, ys = run.execute(closed.consts, *run.leaves, mark=guarded.mark)
    if refusal is not None:
        last, ys = ([not_differentiated(leaf, refusal) for leaf in leaves] for leaves in (last, ys))
    stacked = own | {i - len(sources): y for i, y in zip(run.computed, ys, strict=True)}
    aux, extra = jax.tree.unflatten(traced.rest_tree, [stacked[i] for i in range(len(rest_sources))])
    return Stacked(jax.tree.unflatten(traced.carry_tree, last), aux, extra)


def described(closed: Any, carry: Sequence[Any], length: int) -> dict[str, Any]:
    """What a plan remembers of a stack beside the block's name."""
    return {"length": length, "carry": check.shape_of(tuple(carry)), "program": jx.digest(closed)}


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
    moving: list[int]  # the carry's leaves that the blocks change
    computed: list[int]  # the other outputs that are no slices of `xs`
    leaves: tuple[list[Any], list[Any], list[Any]]  # of `xs`, the first carry, the shared arrays
    carry_names: list[str]

    def under(self, setting: Setting) -> "Run":
        """This run under other knobs, `offload:` aside; for one with default knobs, whose `closed` is the block's own."""
        closed, keep, chosen = _resolve(setting, self.closed, self.names)
        slices, carried = len(self.leaves[0]), len(self.leaves[1])
        closed, pieces = _cut(setting, closed, range(slices, slices + carried), self.names)
        return dataclasses.replace(self, setting=setting, closed=closed, pieces=pieces, keep=keep, chosen=chosen)

    def execute(
        self,
        constants: list[Any],
        xs: list[Any],
        carry: list[Any],
        arrays: list[Any],
        mark: Callable[[list[Any]], list[Any]] = list,
        as_function: Callable[[Any, int], Callable[..., list[Any]]] = jx.as_function,
    ) -> tuple[list[Any], list[Any]]:
        """The last carry, all its leaves, and what `computed` says, stacked.

        Arguments:
            constants: of the block's jaxpr.
            as_function: makes a function of a jaxpr whose first equation is of that number in the block.
        """
        passed = [leaf for i, leaf in enumerate(carry) if i not in self.moving]
        inputs = Inputs(constants, mark([carry[i] for i in self.moving]), xs, [*passed, *arrays])
        step = self._step(len(carry), as_function)
        if self.setting.engine == "reversal":
            last, ys = reverse_blocks(step, inputs, self.length, self.setting, self.keep)
            # All that a `custom_vjp` returns has tangents, and what follows the stack may have no derivative.
            fixed = flow.constant_in_derivatives(self.closed.jaxpr)
            last = [lax.stop_gradient(leaf) if fixed[i] else leaf for i, leaf in zip(self.moving, last, strict=True)]
            ys = [lax.stop_gradient(leaf) if fixed[i] else leaf for i, leaf in zip(self.computed, ys, strict=True)]
        else:
            scanned = lambda moved, x: step(inputs._replace(xs=x, carry=moved))  # noqa: E731
            last, ys = scan_blocks(scanned, inputs.carry, xs, self.length, self.setting, self.keep, self.carry_to_host)
        return replaced(carry, self.moving, mark(last)), ys

    def _step(self, carried: int, as_function: Callable[[Any, int], Callable[..., list[Any]]]) -> Step:
        """One block, for either engine; it closes over no traced value, and so not over `self`."""
        jaxpr, pieces, moving, computed = self.closed.jaxpr, self.pieces, self.moving, self.computed
        piece = functools.partial(jax.checkpoint, policy=nothing if self.keep is everything else self.keep, prevent_cse=True)

        def step(inputs: Inputs) -> tuple[list[Any], list[Any]]:
            closed = jx.closed(jaxpr, inputs.constants)
            block = in_pieces(closed, pieces, piece, as_function) if pieces else as_function(closed, 0)
            moved, shared = iter(inputs.carry), iter(inputs.shared)
            given = [next(moved if i in moving else shared) for i in range(carried)]
            out = block(*inputs.xs, *given, *shared)
            return [out[i] for i in moving], [out[i] for i in computed]

        return step


# Where a function is set, it is called with each run of a stack, while that is traced; with runs inside a block it is not.
observed: ContextVar[Callable[[Run], None] | None] = ContextVar("observed", default=None)


def per_block_of(
    setting: Setting, length: int, keywords: dict[str, Any], names: check.Names
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`keywords` as those with a leading axis `N`, named in `per_block`, and those that all blocks share."""
    missing = [name for name in setting.per_block if name not in keywords]
    if missing:
        raise TypeError(f"{names.block}: {', '.join(missing)} is named in per_block but was not passed by keyword")
    per_block = {name: keywords[name] for name in setting.per_block}
    for name, value in per_block.items():
        stacked_length(value, length, f"{names.block}: the per-block argument {name!r}")
    return per_block, {name: value for name, value in keywords.items() if name not in per_block}


class _Traced(NamedTuple):
    closed: Any
    carry: list[Any]  # leaves as the blocks will be given them, Python numbers promoted
    carry_tree: Any
    arrays: list[Any]  # the array leaves of `shared`
    rest_tree: Any  # structure of (aux, extra)


def _trace(block: Block, setting: Setting, xs: Any, carry: tuple, shared: dict[str, Any], names: check.Names):
    # Python numbers become arrays here, weakly typed as before, so that a passed-through one comes back as an array.
    leaves, carry_in_tree = jax.tree.flatten(jax.tree.map(jnp.asarray, carry))
    x_leaves, x_tree = jax.tree.flatten(xs)
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    where = [i for i, leaf in enumerate(shared_leaves) if is_array(leaf)]
    arrays = [shared_leaves[i] for i in where]
    trees = {}

    def flat(*inputs):
        x = jax.tree.unflatten(x_tree, inputs[: len(x_leaves)])
        c = jax.tree.unflatten(carry_in_tree, inputs[len(x_leaves) : len(x_leaves) + len(leaves)])
        given = replaced(shared_leaves, where, inputs[len(x_leaves) + len(leaves) :])
        keywords = jax.tree.unflatten(shared_tree, given)
        returned, extra = block(x, c, keywords)
        check.unchanged(keywords, jax.tree.unflatten(shared_tree, given), names)
        out, aux = check.returned(returned, c, setting.has_aux, names)
        trees["carry"], trees["rest"] = jax.tree.structure(out), jax.tree.structure((aux, extra))
        return jax.tree.leaves(out) + jax.tree.leaves((aux, extra))

    slices = jx.slice_types(x_leaves)
    closed = jx.trace(flat, *slices, *leaves, *arrays)
    refs.check_closed_over(names.block, closed)
    while (promoted := check.settle_carry(carry, leaves, closed.out_avals[: len(leaves)], names)) is not None:
        leaves = promoted
        closed = jx.trace(flat, *slices, *leaves, *arrays)
    return _Traced(closed, leaves, trees["carry"], arrays, trees["rest"])


def _cut(setting: Setting, closed: Any, carried: Sequence[int], names: check.Names) -> tuple[Any, list[Piece]]:
    """The block's jaxpr, inlined where it is cut, and the pieces; `carried` are its inputs that are the carry."""
    if setting.stages is None:
        return closed, []
    if found := jx.effects(closed):
        raise ValueError(
            f"{names.block} has side effects ({', '.join(found)}), and stages cuts only blocks without: take debugging "
            "output out of the block, or leave stages away"
        )
    flat = inlining.inlined(closed, checkpoints=True)
    wanted = numbering.residual_bytes(flat)
    if isinstance(setting.stages, tuple):
        try:
            cuts = cuts_at_tags(flat, setting.stages)
        except ValueError as error:
            raise ValueError(f"{names.block}: {error}") from None
    else:
        most = None if setting.stages == "auto" else setting.stages
        cuts = find_cuts(flat, carried, wanted, most)
    if not cuts:
        asked = "tags:" + ",".join(setting.stages) if isinstance(setting.stages, tuple) else setting.stages
        check.warn(f"{names.block}: stages={asked!r} found nothing to cut; the block stays whole")
        return closed, []
    return flat, pieces_between(flat, cuts, wanted)


def _for_init(setting: Setting, closed: Any, carried: Sequence[int], names: check.Names) -> Setting:
    """The knobs for `init`, once those of `setting` have found the tags that they name.

    A plain loop: nothing is kept, and a lifted `init` around the stack, such as that of `nn.scan` over time, can tell that
    parameters depend on keys alone, which a `custom_vjp` hides.
    """
    _resolve(dataclasses.replace(setting, blocks_per_ckpt=1), closed, names)  # under which nothing is chosen
    if isinstance(setting.stages, tuple):
        _cut(setting, closed, carried, names)
    return with_knobs(setting, Knobs(policy="everything"))


def _resolve(setting: Setting, closed: Any, names: check.Names) -> tuple[Any, JaxPolicy, tuple[Tradeoff, Choice] | None]:
    """The block's jaxpr, with what the policy chooses tagged if it does, the `jax.checkpoint` policy, and the choice."""
    policy = setting.policy
    tags = tagging.tags(closed) if policy.reads_tags else ()
    found: tuple[str, ...] = ()
    chosen = None
    # One block at a time is alive anyway, and nothing of it is kept for later.
    is_single = setting.blocks_per_ckpt == 1 or (setting.snapshots is not None and setting.blocks_per_ckpt is None)
    if policy.chooses is not None and not is_single:
        closed, found, chosen = with_choice(closed, policy.chooses)
    try:
        return closed, policy.for_tags(tags, found), chosen
    except ValueError as error:
        raise ValueError(f"{names.block}: {error}") from None
