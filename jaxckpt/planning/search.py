"""`plan`: the fastest setting of a step's stacks whose compiled peak fits into a budget.

The model (`jaxckpt.planning.model`) ranks all settings by time and knows what they store. What they need beside that is
asked of the compiler, of the fastest setting that should fit: first what differentiating one of its blocks takes, which is
soon compiled and holds for all settings with such blocks, then the peak of the whole step. The difference corrects the model
for its likes, and so on, until the fastest that should fit is one that was compiled and does. What was compiled for a step
once is known to later plans for it, so that in one process more memory never gives a slower plan.
"""

import itertools
import math
import os
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
from tqdm import tqdm

from jaxckpt._leaves import split_arrays
from jaxckpt._plan import Candidate, Knobs, Plan, StackPlan, under
from jaxckpt._sizes import size_of, size_text
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.stack import Run, described
from jaxckpt.memory import targets
from jaxckpt.memory.calibrate import calibrate as calibrated
from jaxckpt.memory.calibrate import rates_of
from jaxckpt.memory.explain import runs_of
from jaxckpt.memory.measure import measure, seconds_in_turns
from jaxckpt.planning.model import Option, Stack

_HOPED = 0.5  # of what autodiff wants of a block, what XLA may have alive at once: 0.35 to 0.76 in the benchmarks
_HOPED_THEN, _HOPED_BEFORE = 0.75, 0.95  # of what a block takes that keeps less, or more
_WORTH = 0.998  # of the seconds of the best so far; what is not faster is not worth compiling
_IN_DOUBT = 1.02  # of what the model says, what the compiler may still do with less
_MOST = 8  # compilations of the whole step for one plan
_SECONDS = 38  # after which nothing is compiled any more, once something fits
_SECONDS_OF_BLOCKS = 25  # after which no block is compiled alone
_TIMED = 6  # settings that are run for real
_WIDEST = 20_000  # combinations of several stacks that are looked at


class Combination(NamedTuple):
    """A setting of each stack."""

    options: tuple[Option, ...]

    @property
    def seconds(self) -> float:
        return sum(option.seconds for option in self.options)

    @property
    def stored_bytes(self) -> int:
        return sum(option.stored_bytes for option in self.options)

    @property
    def family(self) -> tuple[Any, ...]:
        return tuple(option.family for option in self.options)


class _Compiled(NamedTuple):
    """What the compiler said of a combination, and what the model had said before."""

    peak_bytes: int
    predicted_bytes: int


@dataclass
class _Known:
    """What the compiler said of one step.

    Fields:
        compiled: of the whole step under a combination.
        transients: what a block keeps, and what differentiating it takes, by the stack and `Option.of_block`.
    """

    compiled: dict[Combination, _Compiled] = field(default_factory=dict)
    transients: dict[tuple[int, Knobs], tuple[int, int]] = field(default_factory=dict)


class _Peaks:
    """What combinations need: as the compiler said, or as the model says.

    By the model that is: `fixed`, the arguments and results of the step; what the stacks store; what differentiating a block
    takes, of the stack where that is most; and what was needed beside that where settings alike were compiled.
    """

    def __init__(self, fixed: int, known: _Known):
        self.fixed, self.known = fixed, known

    def predicted(self, c: Combination) -> float:
        """The peak by the model."""
        return self._without_rest(c) + self._rest(c)

    def peak(self, c: Combination) -> float:
        """The compiled peak, if it is known, or the predicted one."""
        found = self.known.compiled.get(c)
        return self.predicted(c) if found is None else found.peak_bytes

    def _without_rest(self, c: Combination) -> float:
        return self.fixed + c.stored_bytes + max(self._transient(i, option) for i, option in enumerate(c.options))

    def _rest(self, c: Combination) -> float:
        # The model of a scan without chunks is exact: what it misses there, the rest of the step needs under any setting.
        scans = tuple((False, False, False) for _ in c.options)
        alike = [[other for other in self.known.compiled if other.family == family] for family in (c.family, scans)]
        near = sorted(alike[0] or alike[1], key=lambda other: _distance(other.stored_bytes, c.stored_bytes))[:2]
        rest = [self.known.compiled[other].peak_bytes - self._without_rest(other) for other in near]
        if len(near) < 2 or near[0].stored_bytes == near[1].stored_bytes:
            return rest[0] if rest else 0.0
        # A line through the two nearest, and not beyond what they need.
        share = (c.stored_bytes - near[0].stored_bytes) / (near[1].stored_bytes - near[0].stored_bytes)
        return rest[0] + min(1.0, max(0.0, share)) * (rest[1] - rest[0])

    def _transient(self, i: int, option: Option) -> float:
        """What differentiating a block of the `i`-th stack takes; a hopeful guess where the compiler was not asked."""
        if (found := self.known.transients.get((i, option.of_block))) is not None:
            return found[1]
        sizes = sorted(
            found
            for (stack, knobs), found in self.known.transients.items()
            if stack == i and knobs.stages == option.knobs.stages
        )
        # What keeps more takes less as a rule, sometimes by a quarter from one choice to the next.
        fewer = [_HOPED_THEN * taken for kept, taken in sizes if kept <= option.kept_bytes][-1:]
        more = [_HOPED_BEFORE * taken for kept, taken in sizes if kept > option.kept_bytes][:1]
        return max([*fewer, *more], default=_HOPED * option.block_bytes)


def _distance(a: int, b: int) -> float:
    return abs(math.log((a + 1) / (b + 1)))


# By step, and by what else the compiler is told.
_known: WeakKeyDictionary[Any, dict[Any, _Known]] = WeakKeyDictionary()


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
        time: also runs the fastest few that fit, on a device that is present, and takes the one that is.
        calibrate: measures a present device's rates for the time model, once; they are kept in the user's cache folder and
            taken by later plans. Otherwise: published rates of GPUs, a guess for CPUs.
        progress: whether a bar on stderr shows what is being compiled.

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
    if objective not in ("time", "memory"):
        raise ValueError(f"objective must be 'time' or 'memory'; got {objective!r}")
    where = targets.get("attached" if target is None else target)
    limit = _limit(budget, objective, where)
    if time and not where.is_present:
        raise ValueError(f"time=True runs the step, and {where.name!r} is only described; take target='attached'")
    if time and (missing := [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.ShapeDtypeStruct)]):
        raise ValueError(f"time=True runs the step and needs arrays; among the arguments is {missing[0]}")
    _ = where.devices  # a missing plugin is said before anything is traced
    runs = _stacks(step, args)
    rates = calibrated(where) if calibrate else rates_of(where)
    stacks = {name: Stack(run, rates) for name, run in runs.items()}
    combinations = _combinations([stack.options(may_offload=where.gpu is not None) for stack in stacks.values()])
    signature = tuple((name, run.length, jx.digest(run.closed)) for name, run in runs.items())
    shapes = jax.tree.map(lambda leaf: str(jax.typeof(leaf)), split_arrays(args)[0])
    known = _known_of(step, (signature, str(shapes), str(where.devices[0]), where.count))
    with tqdm(desc="plan", unit="compilation", disable=not progress or None) as bar:
        search = _Search(step, args, where, stacks, combinations, known, bar)
        chosen = search.fastest(limit) if objective == "time" else None
        if chosen is None:
            chosen = search.least()
            if search.compiled(chosen) > limit:
                raise ValueError(_too_little(limit, search.compiled(chosen), chosen, stacks, args))
        measured: dict[Combination, float] = {}
        if time:
            measured = search.timed(limit)
            chosen = min(measured, key=measured.__getitem__)
    everything = Combination(tuple(stack.everything() for stack in stacks.values()))

    def candidate(c: Combination) -> Candidate:
        runs = sum(option.forward_runs * option.seconds for option in c.options) / c.seconds
        peak, predicted = known.compiled[c]
        return Candidate(_text(c), predicted, c.seconds, runs, peak, measured.get(c))

    rows = {c: candidate(c) for c in known.compiled}
    return Plan(
        stacks={
            name: StackPlan(
                block=run.names.block,
                jax_version=jax.__version__,
                knobs=option.knobs,
                **described(run.closed, run.leaves[1], run.length),
            )
            for (name, run), option in zip(runs.items(), chosen.options, strict=True)
        },
        target=where.name,
        objective=objective,
        budget_bytes=None if limit == math.inf else int(limit),
        chosen=rows[chosen],
        candidates=tuple(sorted(rows.values(), key=lambda row: row.seconds)),
        least_bytes=round(min(map(search.peaks.peak, combinations))),
        most_bytes=round(search.peaks.peak(everything)),
    )


class _Search:
    """Asks the compiler for what one plan needs to know."""

    def __init__(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        where: targets.Target,
        stacks: dict[str, Stack],
        combinations: list[Combination],
        known: _Known,
        bar: Any,
    ):
        self.step, self.args, self.where, self.stacks, self.bar = step, args, where, stacks, bar
        self.combinations, self.known, self.peaks = combinations, known, _Peaks(_fixed_bytes(step, args), known)
        self.begin, self.count = clock.monotonic(), 0

    def fastest(self, limit: float) -> Combination | None:
        """The fastest combination whose compiled peak is within the limit, or None if the model finds none.

        Time only counts once something fits; until then what the model refuses by a little is tried too.
        """
        while True:
            fitting = [c for c in self._considered() if self.peaks.peak(c) <= limit]
            there = min((c for c in fitting if c in self.known.compiled), key=lambda c: c.seconds, default=None)
            if not fitting:
                new = [c for c in self.combinations if c not in self.known.compiled]
                fitting = [c for c in new if self.peaks.predicted(c) <= _IN_DOUBT * limit]
            if not fitting:
                return None
            best = min(fitting, key=lambda c: (c.seconds, self.peaks.peak(c)))
            if there is not None and (best.seconds > _WORTH * there.seconds or self.is_late):
                return there
            self._ask(best)

    def least(self) -> Combination:
        """The combination of the least compiled peak, as far as the model can tell which to compile."""
        self.begin = clock.monotonic()
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
        plain = Combination(tuple(stack.plain() for stack in self.stacks.values()))
        peaks = self.known.compiled
        least = min(self.compiled(plain), *(found.peak_bytes for found in peaks.values()))
        for part in (2, 4, 8):  # settings of less memory, which may be faster in truth
            if limit / part >= least:
                self.fastest(limit / part)
        fits = sorted((c for c in peaks if peaks[c].peak_bytes <= limit), key=lambda c: c.seconds)
        # Of those that fit some of all speeds by the model, the fastest and the slowest among them.
        fits = [fits[i * (len(fits) - 1) // (_TIMED - 1)] for i in range(_TIMED)] if len(fits) > _TIMED else fits
        fits = list(dict.fromkeys([*fits, *[plain] * (peaks[plain].peak_bytes <= limit)]))
        programs = []
        for c in fits:
            with self._under(c):
                programs.append(
                    (self.step if hasattr(self.step, "lower") else jax.jit(self.step)).lower(*self.where.place(self.args))
                )
        return dict(zip(fits, seconds_in_turns(programs, self.args, self.where), strict=True))

    def compiled(self, c: Combination) -> int:
        """The peak of the whole step."""
        if c not in self.known.compiled:
            self.bar.set_description(f"plan: compiling {_text(c)}")
            with self._under(c):
                found = measure(self.step, *self.args, target=self.where)
            self.known.compiled[c] = _Compiled(found.peak_bytes, round(self.peaks.predicted(c)))
            self.count += 1
            self.bar.update()
        return self.known.compiled[c].peak_bytes

    @property
    def is_late(self) -> bool:
        """Whether this plan has compiled enough."""
        return self.count >= _MOST or clock.monotonic() - self.begin > _SECONDS

    def _considered(self) -> list[Combination]:
        """All combinations; once the time for blocks is over, those of which nothing is guessed."""
        if clock.monotonic() - self.begin < _SECONDS_OF_BLOCKS:
            return self.combinations
        return [c for c in self.combinations if c in self.known.compiled or not self._unknown(c)] or self.combinations

    def _ask(self, c: Combination) -> None:
        """Learns what a block of one stack takes, where that is not known, or else the peak of the step."""
        for i in self._unknown(c) if self.where.count == 1 else []:
            stack, option = list(self.stacks.values())[i], c.options[i]
            if stack.can_be_alone:
                self.bar.set_description(f"plan: compiling one block, {option.of_block}")
                found = stack.transient_bytes(option.of_block, self.where)
                self.known.transients[i, option.of_block] = option.kept_bytes, found
                self.bar.update()
                return
        self.compiled(c)

    def _unknown(self, c: Combination) -> list[int]:
        """The stacks of which it is not known what a block takes."""
        return [i for i, option in enumerate(c.options) if (i, option.of_block) not in self.known.transients]

    def _under(self, c: Combination) -> Any:
        return under(dict(zip(self.stacks, (option.knobs for option in c.options), strict=True)))


def forget() -> None:
    """Forgets what was compiled for plans before."""
    _known.clear()


def _known_of(step: Callable[..., Any], key: Any) -> _Known:
    try:
        return _known.setdefault(step, {}).setdefault(key, _Known())
    except TypeError:  # what cannot be referred to weakly is not remembered
        return _Known()


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
    if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
        raise ValueError(f"budget is a number of bytes, or a size such as '40GiB'; got {budget!r}")
    return budget


def _stacks(step: Callable[..., Any], args: Any) -> dict[str, Run]:
    """The runs of the stacks that are to be planned, by name."""
    arrays, with_arrays = split_arrays(args)
    found: dict[str, Run] = {}
    for run in runs_of(lambda arrays: step(*with_arrays(arrays)), arrays):
        name = run.setting.plan
        if not isinstance(name, str):
            continue
        if name in found and _identity(run) != _identity(found[name]):
            both = " and ".join(f"{r.length} x {r.names.block}" for r in (found[name], run))
            written = f"auto:{name}" if name else "auto"
            raise ValueError(f"two stacks are built with plan={written!r}, {both}: give each its name, plan='auto:NAME'")
        found.setdefault(name, run)
    if not found:
        raise ValueError(
            "no stack in the step is to be planned: build one with checkpoint_scan(..., plan='auto'), without other knobs"
        )
    return found


def _identity(run: Run) -> Any:
    return run.names.block, run.length, jx.digest(run.closed)


def _combinations(options: Sequence[Sequence[Option]]) -> list[Combination]:
    """All of them, or, of many stacks, of the same number of options of each."""
    each = max(2, int(_WIDEST ** (1 / len(options))))
    thinned = [[o[i * (len(o) - 1) // (each - 1)] for i in range(each)] if len(o) > each else o for o in options]
    return [Combination(tuple(c)) for c in itertools.product(*thinned)]


def _fixed_bytes(step: Callable[..., Any], args: Any) -> int:
    """Arguments and results, as far as no memory is given from one to the other; a first guess."""
    arrays, with_arrays = split_arrays(args)
    results = jax.eval_shape(lambda arrays: step(*with_arrays(arrays)), arrays)
    return sum(jx.nbytes(jax.typeof(leaf)) for leaf in [*arrays, *jax.tree.leaves(results)])


def _text(c: Combination) -> str:
    return "; ".join(str(option.knobs) for option in c.options)


def _too_little(limit: float, least_bytes: int, best: Combination, stacks: dict[str, Stack], args: Any) -> str:
    """Names the least that is possible, and what is large."""
    sizes: dict[str, int] = {}
    for (name, stack), option in zip(stacks.items(), best.options, strict=True):
        block = name or stack.run.names.block
        sizes[f"what {block} stores"] = option.stored_bytes
        sizes[f"what one {block} wants at once"] = option.block_bytes
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if hasattr(leaf, "shape"):
            sizes[f"the argument {jax.tree_util.keystr(path)}"] = jx.nbytes(jax.typeof(leaf))
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in largest)
    return (
        f"budget={size_text(limit)} is less than this step can do with: the least possible is {size_text(least_bytes)} "
        f"({least_bytes} bytes), with {_text(best)}. The largest: {listed}"
    )
