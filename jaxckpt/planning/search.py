"""`plan`: the fastest setting of a step's stacks whose compiled peak fits into a budget.

The model (`jaxckpt.planning.model`) ranks all settings by time and knows what they store. What they need beside that is
asked of the compiler, of the fastest setting that should fit: first what differentiating one of its blocks takes, which is
soon compiled and holds for all settings with such blocks, then the peak of the whole step. The difference corrects the model
for its likes, and so on, until the fastest that should fit is one that was compiled and does. What was compiled for a step
once is known to later plans for it, so that in one process more memory never gives a slower plan.
"""

import functools
import itertools
import math
import os
import time as clock
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

from jaxckpt._leaves import split_arrays
from jaxckpt._plan import Candidate, Plan, StackPlan, under
from jaxckpt._progress import Progress
from jaxckpt._setting import is_integer
from jaxckpt._sizes import size_of, size_text
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.stack import Run, described
from jaxckpt.memory import targets
from jaxckpt.memory.calibrate import calibrate as calibrated
from jaxckpt.memory.calibrate import rates_of
from jaxckpt.memory.explain import observe
from jaxckpt.memory.measure import measure, place_of, seconds_in_turns
from jaxckpt.planning.model import Option, Stack
from jaxckpt.planning.peaks import Combination, Compiled, Known, Peaks, kind

_WORTH = 0.998  # of the seconds of the best so far; what is not faster is not worth compiling
_IN_DOUBT = 1.02  # of what the model says, what the compiler may still do with less
_MOST = 8  # compilations of the whole step for one plan
_MISSES = 4  # of them that do not fit, before the least that is possible is looked for
_SECONDS = 38  # after which nothing is compiled any more, once something fits
_SECONDS_OF_BLOCKS = 25  # after which no block is compiled alone
_TIMED = 6  # settings that are run for real
_WIDEST = 20_000  # combinations of a few stacks that are looked at
_FEW = 3


# By step, and by what else the compiler is told.
_known: WeakKeyDictionary[Any, dict[Any, Known]] = WeakKeyDictionary()


def plan(
    step: Callable[..., Any],
    *args: Any,
    budget: str | int | None = None,
    target: "str | os.PathLike[str] | targets.Target | None" = None,
    objective: str = "time",
    time: bool = False,
    calibrate: bool = False,
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
            less memory, and the default knobs.
        calibrate: measures a present device's rates for the time model, once; they are kept in the user's cache folder and
            taken by later plans. Otherwise: published rates of GPUs, a guess for CPUs.
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
    where = place_of(args) if target is None else targets.get(target)
    limit = _limit(budget, objective, where)
    if time and not where.is_present:
        raise ValueError(f"time=True runs the step, and {where.name!r} is only described; take target='attached'")
    if time and (missing := [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.ShapeDtypeStruct)]):
        raise ValueError(f"time=True runs the step and needs arrays; among the arguments is {missing[0]}")
    if time and objective == "memory":
        raise ValueError("time=True chooses the fastest, and objective='memory' the least memory: leave one of them away")
    _ = where.devices  # a missing plugin is said before anything is traced
    rates = calibrated(where) if calibrate else rates_of(where)
    stacks, program, fixed = _stacks(step, args, rates)
    combinations = _combinations([stack.options(may_offload=where.gpu is not None) for stack in stacks.values()])
    known = _known_of(step, (program, str(where.devices[0]), where.count, str(rates)))
    with Progress("plan", unit="compilation", shown=progress) as bar:
        search = _Search(step, args, where, target is None, stacks, combinations, Peaks(fixed, known), bar)
        chosen = search.fastest(limit) if objective == "time" else None
        if chosen is None:
            chosen = search.least()
            if search.compiled(chosen) > limit:
                raise ValueError(_too_little(limit, search, chosen))
            if objective == "time":  # which the model refused, and knows better now
                chosen = search.fastest(limit) or chosen
        measured: dict[Combination, float] = {}
        if time:
            measured = search.timed(limit)
            chosen = min(measured, key=measured.__getitem__, default=chosen)  # none, where none fits into the device
    everything = Combination(tuple(stack.everything() for stack in stacks.values()))

    def candidate(c: Combination) -> Candidate:
        runs = sum(option.forward_runs * option.seconds for option in c.options) / (c.seconds or 1.0)
        peak, predicted = known.compiled[c]
        return Candidate(_text(c), predicted, c.seconds, runs, peak, measured.get(c))

    rows = {c: candidate(c) for c in known.compiled}
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
        least_bytes=round(min(map(search.peaks.peak, search.combinations))),
        most_bytes=round(search.peaks.peak(everything)),
    )


class _Search:
    """Asks the compiler for what one plan needs to know."""

    def __init__(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        where: targets.Target,
        as_given: bool,
        stacks: dict[str, Stack],
        combinations: list[Combination],
        peaks: Peaks,
        bar: Progress,
    ):
        self.step, self.args, self.where, self.stacks, self.bar = step, args, where, stacks, bar
        self.as_given = as_given  # the arguments lie where they are to be
        self.known, self.peaks = peaks.known, peaks
        self.combinations = [c for c in combinations if kind(c) not in peaks.known.refused]
        self.plain = Combination(tuple(stack.plain() for stack in stacks.values()))
        self.begin, self.count = clock.monotonic(), 0

    def fastest(self, limit: float) -> Combination | None:
        """The fastest combination whose compiled peak is within the limit, or None if the model finds none.

        Time only counts once something fits; until then what the model refuses by a little is tried too, a few times.
        """
        while True:
            fitting = [c for c in self._considered() if self.peaks.peak(c) <= limit]
            there = min((c for c in fitting if c in self.known.compiled), key=lambda c: c.seconds, default=None)
            if not fitting:
                new = [c for c in self.combinations if c not in self.known.compiled]
                fitting = [c for c in new if self.peaks.predicted(c) <= _IN_DOUBT * limit]
            if not fitting or (there is None and self.count >= _MISSES):
                return None
            best = min(fitting, key=lambda c: (c.seconds, self.peaks.peak(c)))
            if there is not None and (best == there or best.seconds > _WORTH * there.seconds or self.is_late):
                return there
            self._ask(best)

    def least(self) -> Combination:
        """The combination of the least compiled peak, as far as the model can tell which to compile."""
        self.begin, self.count = clock.monotonic(), 0
        while True:
            new = [c for c in self._considered() if c not in self.known.compiled]
            there = min(self.known.compiled, key=self.peaks.peak, default=None)
            if there is not None and (not new or self.is_late):
                return there
            best = min(new, key=self.peaks.predicted)
            if there is not None and self.peaks.predicted(best) > _IN_DOUBT * self.peaks.peak(there):
                return there
            self._ask(best)

    def timed(self, limit: float) -> dict[Combination, float]:
        """The seconds of some combinations within the limit, the default knobs among them if these are."""
        limit = min(limit, self.where.memory_bytes or math.inf)
        peaks = self.known.compiled
        least = min(self.compiled(self.plain), *(found.peak_bytes for found in peaks.values()))
        for part in (2, 4, 8):  # settings of less memory, which may be faster in truth
            if limit / part >= least:
                self.fastest(limit / part)
        fits = sorted((c for c in peaks if peaks[c].peak_bytes <= limit), key=lambda c: c.seconds)
        # Of those that fit some of all speeds by the model, the fastest and the slowest among them.
        fits = [fits[i * (len(fits) - 1) // (_TIMED - 1)] for i in range(_TIMED)] if len(fits) > _TIMED else fits
        fits = list(dict.fromkeys([*fits, *[self.plain] * (peaks[self.plain].peak_bytes <= limit)]))
        jitted = self.step if hasattr(self.step, "lower") else jax.jit(self.step)
        contexts = [functools.partial(self._under, c) for c in fits]
        return dict(zip(fits, seconds_in_turns(jitted, contexts, self.args, self.where), strict=True))

    def compiled(self, c: Combination) -> float:
        """The peak of the whole step; infinite where it cannot be run so.

        Not every step can be run under every knob: second derivatives want the scan engine, say. What cannot is taken out of
        the combinations, with its kind, unless it is the default knobs that fail too.
        """
        if c not in self.known.compiled:
            self.bar.doing(f"compiling {_text(c)}")
            try:
                with self._under(c):
                    found = measure(self.step, *self.args, target=None if self.as_given else self.where)
            except Exception:
                if kind(c) == kind(self.plain):
                    raise
                self.compiled(self.plain)  # raises what is wrong with the step itself
                self.count += 1
                self.known.refused.add(kind(c))
                self.combinations = [other for other in self.combinations if kind(other) != kind(c)]
                return math.inf
            self.known.compiled[c] = Compiled(found.peak_bytes, round(self.peaks.predicted(c)))
            self.count += 1
            self.bar.advance()
        return self.known.compiled[c].peak_bytes

    @property
    def is_late(self) -> bool:
        """Whether this plan has compiled enough."""
        return self.count >= _MOST or clock.monotonic() - self.begin > _SECONDS

    def _considered(self) -> list[Combination]:
        """All combinations; once the time for blocks is over, those of which nothing is guessed."""
        if self._has_time_for_blocks:
            return self.combinations
        return [c for c in self.combinations if c in self.known.compiled or not self._unknown(c)] or self.combinations

    def _ask(self, c: Combination) -> None:
        """Learns what a block of one stack takes, where that can be asked in time, or else the peak of the step."""
        unknown = self._unknown(c)
        if not unknown or not self._has_time_for_blocks:
            self.compiled(c)
            return
        i, option = unknown[0], c.options[unknown[0]]
        self.bar.doing(f"compiling one block, {option.of_block}")
        try:
            found = list(self.stacks.values())[i].transient_bytes(option.of_block, self.where)
            self.known.transients[i, option.of_block] = option.kept_bytes, found
        except Exception:  # it can only be traced or compiled in its place in the step
            self.known.silent.add(i)
        self.bar.advance()

    def _unknown(self, c: Combination) -> list[int]:
        """The stacks of which it is not known what a block takes, and could be."""
        if self.where.count > 1:
            return []
        asked = [i for i, stack in enumerate(self.stacks.values()) if stack.can_be_alone and i not in self.known.silent]
        return [i for i in asked if (i, c.options[i].of_block) not in self.known.transients]

    @property
    def _has_time_for_blocks(self) -> bool:
        return clock.monotonic() - self.begin < _SECONDS_OF_BLOCKS

    def _under(self, c: Combination) -> Any:
        return under(dict(zip(self.stacks, (option.knobs for option in c.options), strict=True)))


def forget() -> None:
    """Forgets what was compiled for plans before."""
    _known.clear()


def _known_of(step: Callable[..., Any], key: Any) -> Known:
    try:
        return _known.setdefault(step, {}).setdefault(key, Known())
    except TypeError:  # what cannot be referred to weakly is not remembered
        return Known()


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


def _stacks(step: Callable[..., Any], args: Any, rates: Any) -> tuple[dict[str, Stack], Any, int]:
    """The stacks that are to be planned, by name, what identifies the program of the step, and `_fixed_bytes`."""
    arrays, with_arrays = split_arrays(args)
    found: dict[str, Stack] = {}
    digest, fixed = "", 0

    def see(run: Run) -> None:
        name = run.setting.plan
        if not isinstance(name, str):
            return
        if name not in found:
            found[name] = Stack(run, rates)
            return
        other, identity = found[name], described(run.closed, run.leaves[1], run.length)
        if run.names.block == other.run.names.block and identity == other.described:
            return
        written = f"auto:{name}" if name else "auto"
        if run.names.block == other.run.names.block and run.length == other.run.length:
            carries = f"with a carry of {other.described['carry']} and of {identity['carry']}"
            raise ValueError(
                f"{run.names.block}: a stack with plan={written!r} is run twice in the step, {carries}, or with other "
                "flags, and a plan is for one of them: build a stack for each and give it its name, plan='auto:NAME'"
            )
        both = " and ".join(f"{r.length} x {r.names.block}" for r in (other.run, run))
        raise ValueError(f"two stacks are built with plan={written!r}, {both}: give each its name, plan='auto:NAME'")

    def call(arrays: list[Any]) -> None:
        nonlocal digest, fixed
        program = jax.make_jaxpr(lambda arrays: step(*with_arrays(arrays)))(arrays)
        digest, fixed = jx.digest(program), _fixed_bytes(program)

    observe(call, arrays, see)
    if not found:
        raise ValueError(
            "no stack in the step is to be planned: build one with checkpoint_scan(..., plan='auto'), without other knobs"
        )
    return found, (digest, tuple(str(getattr(leaf, "sharding", None)) for leaf in arrays)), fixed


def _combinations(options: Sequence[Sequence[Option]]) -> list[Combination]:
    """All of them; of many stacks those where a byte is worth the same everywhere, for many prices of a byte."""
    if len(options) > _FEW:
        prices = [0.0, *(10.0**power for power in np.linspace(-15, 0, 300))]
        chosen = [[min(o, key=lambda o: o.seconds + p * (o.stored_bytes + o.block_bytes)) for o in options] for p in prices]
        return list(dict.fromkeys(Combination(tuple(c)) for c in chosen))
    each = max(2, int(_WIDEST ** (1 / len(options))))
    thinned = [[o[i * (len(o) - 1) // (each - 1)] for i in range(each)] if len(o) > each else o for o in options]
    return [Combination(tuple(c)) for c in itertools.product(*thinned)]


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


def _too_little(limit: float, search: _Search, best: Combination) -> str:
    """Names the least that is possible, and what is large."""
    least = search.known.compiled[best].peak_bytes
    sizes: dict[str, float] = {"the rest of the step": least - search.peaks.without_rest(best)}
    for i, ((name, stack), option) in enumerate(zip(search.stacks.items(), best.options, strict=True)):
        block = name or stack.run.names.block
        sizes[f"what {block} stores"] = option.stored_bytes
        sizes[f"what one {block} takes while it is differentiated"] = search.peaks.transient(i, option)
    for path, leaf in jax.tree_util.tree_leaves_with_path(search.args):
        if hasattr(leaf, "shape"):
            sizes[f"the argument {jax.tree_util.keystr(path)}"] = jx.nbytes(jax.typeof(leaf))
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    return (
        f"budget={size_text(limit)} ({int(limit)} bytes) is less than this step can do with: the least possible is "
        f"{size_text(least)} ({least} bytes), with {_text(best)}. The largest: {listed}"
    )
