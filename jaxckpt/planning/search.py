"""`plan`: the fastest setting of a step's stacks whose compiled peak fits into a budget.

The model (`jaxckpt.planning.model`) ranks all settings by time and knows what they store. What they need beside that is
asked of the compiler (`_Search`): what differentiating a block takes, which is soon compiled and holds for all settings
with such blocks, and the peak of the whole step under a few settings, chosen by `jaxckpt.planning.rounds`. What was compiled
for a step once is kept: later plans for it get the same answers sooner, and find what they would have found without.
"""

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import jax
import numpy as np

from jaxckpt._leaves import split_arrays
from jaxckpt._plan import Candidate, Knobs, Plan, StackPlan, under
from jaxckpt._progress import Progress
from jaxckpt._setting import is_integer
from jaxckpt._sizes import size_of, size_text
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.planned import described
from jaxckpt.engine.run import Run
from jaxckpt.flax.steps import holds_objects, objects_are_arguments, split_objects, with_objects
from jaxckpt.memory import targets
from jaxckpt.memory.calibrate import calibrate as calibrated
from jaxckpt.memory.calibrate import rates_of
from jaxckpt.memory.measure import measure, place_of, seconds_in_turns
from jaxckpt.memory.meshes import mesh_on, on_set_mesh
from jaxckpt.memory.runs import observe
from jaxckpt.memory.split import share_of
from jaxckpt.planning import rounds
from jaxckpt.planning.model import Asked, Option, Stack
from jaxckpt.planning.peaks import Combination, Known, Peaks, kind
from jaxckpt.planning.rounds import COMPILATIONS
from jaxckpt.planning.shards import Split, split_of

T = TypeVar("T")

_TIMED = 6  # settings that are run for real
_WIDEST = 60_000  # combinations of a few stacks that are looked at
_FEW = 3


class TooLittle(ValueError):
    """The budget is less than the least that is possible, `least_bytes`."""

    def __init__(self, message: str, least_bytes: int):
        super().__init__(message)
        self.least_bytes = least_bytes


# By step, and by what else the compiler is told.
_answers: WeakKeyDictionary[Any, dict[Any, "_Answers"]] = WeakKeyDictionary()


def plan(
    step: Callable[..., Any],
    *args: Any,
    budget: str | int | None = None,
    target: "str | os.PathLike[str] | targets.Target | None" = None,
    objective: str = "time",
    time: bool = False,
    calibrate: bool = False,
    compilations: int = COMPILATIONS,
    progress: bool = True,
) -> Plan:
    """The fastest setting of the stacks in `step` whose compiled peak is within `budget`.

    Arguments:
        step: the whole training step, jitted or not: loss, gradients, optimizer. Stacks in it that were built with
            `checkpoint_scan(..., plan="auto")`, or "auto:NAME" where there are several, are planned.
        args: arrays or `jax.ShapeDtypeStruct`s; as for `jaxckpt.measure`.
        budget: bytes on each device, or a size such as "40GiB"; by default the memory of the target.
        target: see `jaxckpt.targets.get`; by default JAX's default device.
        objective: "time", or "memory" for the setting of the least peak, whatever it costs.
        time: also runs some that fit, on a device that is present, and takes the fastest: the fastest by the model, some of
            less memory, and the default knobs. Not where several processes plan, which would each go by its own clock.
        calibrate: measures a present device's rates for the time model, once; they are kept in the user's cache folder and
            taken by later plans. Otherwise: published rates of GPUs, a guess for CPUs.
        compilations: of the whole step, at most, each of which takes as long as at the start of a training job. What is
            found depends on their number and not on how long they take; what they left untried is part of the plan. On
            several devices one more, under default knobs, says how the step is split.
        progress: whether stderr shows what is being compiled and for how long: a bar in a terminal, lines elsewhere.

    Returns:
        The plan: `print` it, `save` it, `checkpoint_scan(..., plan=...)` pins it, `plan.around(step)` runs the step with it.

    Raises:
        ValueError: no stack in `step` is to be planned, two different ones have one name, or the budget is less than the
            least that is possible, which the error names.
        RuntimeError: the target is a GPU for which JAX's CUDA plugin is missing.

    >>> import jax, jax.numpy as jnp
    >>> from jaxckpt import checkpoint_scan
    >>> stack = checkpoint_scan(lambda w, x: jnp.tanh(x @ w), plan="auto")
    >>> step = jax.grad(lambda w, x: stack(w, x).sum())
    >>> found = plan(step, jnp.ones((8, 64, 64)), jnp.ones((256, 64)), budget="2MiB", target="cpu", progress=False)
    >>> found.peak_bytes <= 2 * 2**20
    True
    """
    if not callable(step):
        raise TypeError(f"plan takes a training step, a function, and then its arguments; got {step!r:.200}")
    if objective not in ("time", "memory"):
        raise ValueError(f"objective must be 'time' or 'memory'; got {objective!r}")
    step, args = with_objects(step, args)
    where = place_of(args) if target is None else targets.get(target)
    limit = _limit(budget, objective, where)
    if (time or calibrate) and len({device.process_index for device in where.present}) > 1:
        raise ValueError(
            f"{'time' if time else 'calibrate'}=True goes by a clock, and each of {jax.process_count()} processes has its "
            "own: they would choose different settings. Leave it away; or plan in one process for a described target, save "
            "the plan, and pin it in all"
        )
    if time and not where.is_present:
        raise ValueError(f"time=True runs the step, and {where.name!r} is only described; take target='attached'")
    if time and (missing := [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.ShapeDtypeStruct)]):
        raise ValueError(f"time=True runs the step and needs arrays; among the arguments is {missing[0]}")
    if time and objective == "memory":
        raise ValueError("time=True chooses the fastest, and objective='memory' the least memory: leave one of them away")
    if not is_integer(compilations) or compilations < 1:
        raise ValueError(f"compilations is an integer of at least 1; got {compilations!r}")
    rates = calibrated(where) if calibrate else rates_of(where)
    _ = where.devices  # a missing plugin is said before anything is traced
    with Progress("plan", unit="compilation", shown=progress) as bar:
        split = _split(step, args, where, rates, target is None, bar) if where.count > 1 else None
        shares = {} if split is None else split.shares
        stacks, program, fixed = _stacks(step, args, lambda run: Stack(run, rates, shares.get(str(run.setting.plan))))
        answers = _answers_of(step, (program, str(where.devices[0]), where.count, str(rates)))
        combinations = _combinations([stack.options(may_offload=where.gpu is not None) for stack in stacks.values()])
        search = _Search(step, args, where, target is None, stacks, answers, bar)
        combinations = [c for c in combinations if kind(c) not in search.refused]
        if split is not None:
            fixed = split.fixed_bytes
            answers.compiled.setdefault(search.plain, split.peak_bytes)
            search.peak(search.plain, split.peak_bytes)
        how = combinations, fixed, search, compilations, search.known
        chosen = rounds.fastest(limit, *how) if objective == "time" else None
        if split is not None and objective == "time" and split.peak_bytes <= limit:  # known before, whatever the limit
            chosen = min(filter(None, [chosen, search.plain]), key=lambda c: c.seconds)
        if chosen is None:
            left = min(compilations - len(search.seen) + (split is not None), rounds.OF_LEAST)
            chosen = rounds.least(combinations, fixed, search, left, search.known)
            if search.seen[chosen].peak_bytes > limit:
                raise TooLittle(_too_little(limit, search, fixed, chosen), search.seen[chosen].peak_bytes)
        measured: dict[Combination, float] = {}
        if time:
            measured = search.timed(limit, *how)
            chosen = min(measured, key=measured.__getitem__, default=chosen)  # none, where none fits into the device
    everything = Combination(tuple(stack.everything() for stack in stacks.values()))
    peaks = Peaks(fixed, search.known)
    combinations = [c for c in combinations if kind(c) not in search.refused]
    missed = rounds.untried(limit, combinations, chosen, peaks) if objective == "time" and not time else []

    def candidate(c: Combination, peak: int | None = None, predicted: int = 0) -> Candidate:
        runs = sum(option.forward_runs * option.seconds for option in c.options) / (c.seconds or 1.0)
        return Candidate(_text(c), predicted or round(peaks.predicted(c)), c.seconds, runs, peak, measured.get(c))

    rows = {c: candidate(c, *found) for c, found in search.seen.items()}
    return Plan(
        stacks={
            name: StackPlan(block=stack.run.names.block, jax_version=jax.__version__, knobs=option.knobs, **stack.described)
            for (name, stack), option in zip(stacks.items(), chosen.options, strict=True)
        },
        target=where.name,
        objective=objective,
        budget_bytes=None if limit == math.inf else int(limit),
        chosen=rows[chosen],
        candidates=tuple(sorted(rows.values(), key=lambda row: row.seconds)),
        least_bytes=round(min(map(peaks.peak, combinations))),
        most_bytes=round(peaks.peak(everything)),
        compilations=int(compilations),
        untried=tuple(map(candidate, missed)),
    )


@dataclass
class _Answers:
    """What the compiler said of one step, to whatever plan.

    Fields:
        split: over several devices. compiled: the peaks of combinations.
        blocks: what was asked of blocks, by the stack and `Option.of_block`; None for those that cannot be compiled alone.
        refused: kinds of combinations that the step cannot be run under.
    """

    split: Split | None = None
    compiled: dict[Combination, int] = field(default_factory=dict)
    blocks: dict[tuple[int, Knobs], Asked | None] = field(default_factory=dict)
    refused: set[Any] = field(default_factory=set)


class _Seen(NamedTuple):
    """What the compiler said of a combination, and what the model had said before."""

    peak_bytes: int
    predicted_bytes: int


class _Search:
    """Asks the compiler for one plan: a `jaxckpt.planning.rounds.Compiler`.

    Attributes:
        seen: the answers of whole steps. blocks: those of blocks.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        where: targets.Target,
        as_given: bool,
        stacks: dict[str, Stack],
        answers: _Answers,
        bar: Progress,
    ):
        self.step, self.args, self.where, self.stacks, self.bar = step, args, where, stacks, bar
        self.as_given = as_given  # the arguments lie where they are to be
        self.answers, self.refused = answers, answers.refused
        self.plain = Combination(tuple(stack.plain() for stack in stacks.values()))
        self.seen: dict[Combination, _Seen] = {}
        self.blocks: dict[tuple[int, Knobs], Asked] = {}

    def peak(self, c: Combination, predicted: float) -> float:
        """The peak of the whole step; infinite where it cannot be run so.

        Not every step can be run under every knob: second derivatives want the scan engine, say. What cannot is refused with
        its kind, unless it is the default knobs that fail too.
        """
        if c not in self.answers.compiled:
            self.bar.doing(f"compiling {_text(c)}")
            try:
                with self._under(c):
                    found = measure(self.step, *self.args, target=None if self.as_given else self.where)
            except Exception:
                if kind(c) == kind(self.plain):
                    raise
                self.peak(self.plain, predicted)  # raises what is wrong with the step itself
                self.refused.add(kind(c))
                return math.inf
            self.answers.compiled[c] = found.peak_bytes
            self.bar.advance()
        self.seen.setdefault(c, _Seen(self.answers.compiled[c], round(predicted)))
        return self.seen[c].peak_bytes

    def block(self, i: int, option: Option) -> Asked | None:
        """What blocks of the `i`-th stack keep and take; None where they cannot be compiled alone."""
        stack, key = list(self.stacks.values())[i], (i, option.of_block)
        if self.where.count > 1 or not stack.can_be_alone:
            return None
        if key not in self.answers.blocks:
            self.bar.doing(f"compiling one block, {option.of_block}")
            try:
                with mesh_on(self.where):
                    self.answers.blocks[key] = stack.asked(option.of_block, self.where)
            except Exception:
                self.answers.blocks[key] = None
            self.bar.advance()
        if (found := self.answers.blocks[key]) is not None:
            self.blocks[key] = found
        return found

    @property
    def known(self) -> Known:
        """All that was asked for this plan."""
        return Known({c: found.peak_bytes for c, found in self.seen.items()}, dict(self.blocks))

    def timed(self, limit: float, combinations: list[Combination], fixed: int, *how: Any) -> dict[Combination, float]:
        """The seconds of some combinations within the limit, the default knobs among them if these are."""
        limit = min(limit, self.where.memory_bytes or math.inf)
        self.peak(self.plain, Peaks(fixed, self.known).predicted(self.plain))
        least = min(found.peak_bytes for found in self.seen.values())
        for part in (2, 4, 8):  # settings of less memory, which may be faster in truth
            if limit / part >= least:
                rounds.fastest(limit / part, combinations, fixed, *how)
        fits = sorted((c for c, found in self.seen.items() if found.peak_bytes <= limit), key=lambda c: c.seconds)
        # Of those that fit some of all speeds by the model, the fastest and the slowest among them.
        fits = [fits[i * (len(fits) - 1) // (_TIMED - 1)] for i in range(_TIMED)] if len(fits) > _TIMED else fits
        fits = list(dict.fromkeys([*fits, *[self.plain] * (self.seen[self.plain].peak_bytes <= limit)]))
        contexts = [functools.partial(self._under, c) for c in fits]
        return dict(zip(fits, seconds_in_turns(self.step, contexts, self.args, self.where), strict=True))

    def _under(self, c: Combination) -> Any:
        return under(dict(zip(self.stacks, (option.knobs for option in c.options), strict=True)))


def forget() -> None:
    """Forgets what was compiled for plans before."""
    _answers.clear()


def _answers_of(step: Callable[..., Any], key: Any) -> _Answers:
    try:
        return _answers.setdefault(step, {}).setdefault(key, _Answers())
    except TypeError:  # what cannot be referred to weakly is not remembered
        return _Answers()


def _limit(budget: str | int | None, objective: str, where: targets.Target) -> float:
    if budget is None:
        if where.memory_bytes is None and objective == "time":
            raise ValueError(f"budget is missing: the memory of {where.name!r} is not known; write budget='16GiB'")
        return where.memory_bytes or math.inf
    if isinstance(budget, str):
        try:
            return size_of(budget)
        except ValueError as error:
            raise ValueError(f"budget: {error}") from None
    if not is_integer(budget) or budget <= 0:
        raise ValueError(f"budget is a number of bytes, or a size such as '40GiB'; got {budget!r}")
    return int(budget)


def _split(step: Callable[..., Any], args: Any, where: targets.Target, rates: Any, as_given: bool, bar: Progress) -> Split:
    """How the step is split over the devices, which is asked once for each program."""
    names, program, _ = _stacks(step, args, lambda run: None)
    answers = _answers_of(step, ("split", program, str(where.devices[0]), where.count, str(rates)))
    if answers.split is None:
        bar.doing("compiling the step under default knobs, to see how it is split over the devices")
        answers.split = split_of(step, args, where, rates, as_given, names)
        bar.advance()
    return answers.split


def _stacks(step: Callable[..., Any], args: Any, make: Callable[[Run], T]) -> tuple[dict[str, T], Any, int]:
    """What `make` makes of each stack that is to be planned, what identifies the program of the step, and `_fixed_bytes`."""
    parts, whole = split_objects(args) if holds_objects(args) else (args, lambda args: args)
    arrays, with_arrays = split_arrays(parts)
    found: dict[str, T] = {}
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    digest, fixed = "", 0

    def see(run: Run) -> None:
        name = run.setting.plan
        if not isinstance(name, str):
            return
        if name not in found:
            found[name], seen[name] = make(run), (run.names.block, described(run))
            return
        (block, known), identity = seen[name], described(run)
        if run.names.block == block and identity == known:
            return
        written = f"auto:{name}" if name else "auto"
        if run.names.block == block and run.length == known["length"]:
            given = f"given {known['carry']} and {identity['carry']}"
            raise ValueError(
                f"{run.names.block}: what has plan={written!r} is run twice in the step, {given}, or with other flags, and "
                "a plan is for one of them: build one for each and give it its name, plan='auto:NAME'"
            )
        both = f"{known['length']} x {block} and {run.length} x {run.names.block}"
        raise ValueError(f"two stacks are built with plan={written!r}, {both}: give each its name, plan='auto:NAME'")

    def call(arrays: list[Any]) -> None:
        nonlocal digest, fixed

        def run(arrays: list[Any]) -> Any:
            args = whole(with_arrays(arrays))
            return step(*args), split_arrays(split_objects(args)[0])[0] if holds_objects(args) else []

        with objects_are_arguments(step, "plan"):
            program = jax.make_jaxpr(run)(arrays)
        digest, fixed = jx.digest(program), _fixed_bytes(program)

    observe(call, list(map(on_set_mesh, arrays)), see)
    if not found:
        raise ValueError(
            "no stack in the step is to be planned: build one with checkpoint_scan(..., plan='auto'), without other knobs, "
            "or what is no stack with checkpoint(fn, plan='auto'); inside of another stack's block neither is planned"
        )
    return found, (digest, tuple(str(getattr(leaf, "sharding", None)) for leaf in arrays)), fixed


def _combinations(options: Sequence[Sequence[Option]]) -> list[Combination]:
    """All of them; of many stacks those where a byte is worth the same everywhere, for many prices of a byte."""
    if len(options) > _FEW:
        prices = [0.0, *(10.0**power for power in np.linspace(-15, 0, 300))]
        chosen = [[min(o, key=lambda o: o.seconds + p * (o.stored_bytes + o.block_bytes)) for o in options] for p in prices]
        return list(dict.fromkeys(Combination(tuple(c)) for c in chosen))
    each = int(_WIDEST ** (1 / len(options)))
    return [Combination(tuple(c)) for c in itertools.product(*(_thinned(o, each) for o in options))]


def _thinned(options: Sequence[Option], number: int) -> Sequence[Option]:
    """So many, evenly; of those under which all blocks are alike, which are of many kinds, at least two thirds."""
    if len(options) <= number:
        return options
    alike, of_two = [o for o in options if not o.phases], [o for o in options if o.phases]
    least = min(len(alike), number * 2 // 3 + 1)
    kept = [*_evenly(alike, max(least, number - len(of_two))), *_evenly(of_two, number - least)]
    return sorted(kept, key=lambda o: o.seconds)


def _evenly(options: Sequence[Option], number: int) -> Sequence[Option]:
    return [options[i * (len(options) - 1) // (number - 1)] for i in range(number)] if 1 < number < len(options) else options


def _fixed_bytes(program: Any) -> int:
    """Arguments and results of a step, memory that is given from one to the other once."""
    results = Counter((aval.shape, aval.dtype) for aval in program.out_avals)
    total = sum(map(jx.nbytes, [*program.in_avals, *program.out_avals]))
    for aval in flow.donated(program.jaxpr):
        if results[aval.shape, aval.dtype]:
            results[aval.shape, aval.dtype] -= 1
            total -= jx.nbytes(aval)
    return total


def _text(c: Combination) -> str:
    return "; ".join(str(option.knobs) for option in c.options)


def _too_little(limit: float, search: _Search, fixed: int, best: Combination) -> str:
    """Names the least that is possible, and what is large."""
    least, peaks = search.seen[best].peak_bytes, Peaks(fixed, search.known)
    sizes: dict[str, float] = {"the rest of the step": least - peaks.without_rest(best)}
    for i, ((name, stack), option) in enumerate(zip(search.stacks.items(), best.options, strict=True)):
        block = name or stack.run.names.block
        sizes[f"what {block} stores"] = peaks.stored_of(i, option)
        sizes[f"what one {block} takes while it is differentiated"] = peaks.transient(i, option)
    for path, leaf in jax.tree_util.tree_leaves_with_path(search.args):
        if hasattr(leaf, "shape"):
            sizes[f"the argument {jax.tree_util.keystr(path)}"] = jx.nbytes(jax.typeof(leaf)) * share_of(
                getattr(leaf, "sharding", None), leaf.shape
            )
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    return (
        f"budget={size_text(limit)} ({int(limit)} bytes) is less than this step can do with: the least possible is "
        f"{size_text(least)} ({least} bytes), with {_text(best)}. The largest: {listed}"
    )
