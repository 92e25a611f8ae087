"""`plan`: the fastest setting of a step's stacks whose compiled peak fits into a budget.

The model (`jaxckpt.planning.model`) ranks all settings by time and knows what they store. What they need beside that is
learned: the fastest setting that should fit is compiled, the difference corrects the model for its likes, and so on, until
the fastest that should fit is one that was compiled and does. What was compiled for a step once is known to later plans for
it, so that in one process more memory never gives a slower plan.
"""

import itertools
import math
import os
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
from tqdm import tqdm

from jaxckpt._leaves import split_arrays
from jaxckpt._plan import Candidate, Plan, StackPlan, under
from jaxckpt._sizes import size_of, size_text
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.stack import Run, described
from jaxckpt.memory import targets
from jaxckpt.memory.calibrate import calibrate as calibrated
from jaxckpt.memory.calibrate import rates_of
from jaxckpt.memory.explain import runs_of
from jaxckpt.memory.measure import measure, seconds_in_turns
from jaxckpt.planning.model import Option, Stack

_FUSED = 0.75  # of what autodiff wants of a block, what XLA really has alive: 0.74 to 0.76 in the models of the benchmarks
_MOST = 8  # compilations of one plan
_SECONDS = 45  # after which none is begun, once something fits
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
    def block_bytes(self) -> int:
        return max(option.block_bytes for option in self.options)

    @property
    def family(self) -> tuple[Any, ...]:
        return tuple(option.family for option in self.options)


class _Compiled(NamedTuple):
    """What the compiler said of a combination, and what the model had said before."""

    peak_bytes: int
    predicted_bytes: int


class _Peaks:
    """What combinations need: as the compiler said, or as the model says, corrected by what the compiler said of others."""

    def __init__(self, fixed: int, known: dict[Combination, _Compiled]):
        self.fixed, self.known = fixed, known

    def predicted(self, c: Combination) -> float:
        """The peak by the model."""
        near = sorted(
            (other for other in self.known if other.family == c.family), key=lambda o: abs(o.stored_bytes - c.stored_bytes)
        )[:2]
        # Beside what is stored and what one block wants, those alike need about the same.
        rest = [self.known[other].peak_bytes - other.stored_bytes - self._fused * other.block_bytes for other in near]
        if not near:
            rest = [self.fixed]
        elif len(near) == 2 and near[0].stored_bytes != near[1].stored_bytes:
            # A line through the two nearest, and not beyond what they need.
            share = (c.stored_bytes - near[0].stored_bytes) / (near[1].stored_bytes - near[0].stored_bytes)
            rest[0] += min(1.0, max(0.0, share)) * (rest[1] - rest[0])
        return c.stored_bytes + self._fused * c.block_bytes + rest[0]

    def peak(self, c: Combination) -> float:
        """The compiled peak, if it is known, or the predicted one."""
        return self.known[c].peak_bytes if c in self.known else self.predicted(c)

    @property
    def _fused(self) -> float:
        shares = [
            (found.peak_bytes - c.stored_bytes - self.fixed) / c.block_bytes
            for c, found in self.known.items()
            if c.block_bytes > 0.2 * c.stored_bytes
        ]
        return min(1.5, max(0.2, sum(shares) / len(shares))) if shares else _FUSED


# By step, and by what else the compiler is told.
_known: WeakKeyDictionary[Any, dict[Any, dict[Combination, _Compiled]]] = WeakKeyDictionary()


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
    peaks = _Peaks(_fixed_bytes(step, args), known)
    bar = tqdm(desc="plan", unit="compilation", disable=not progress or None)
    begin = clock.monotonic()

    def compiled(c: Combination) -> int:
        if c not in known:
            bar.set_description(f"plan: compiling {_text(c)}")
            with under(dict(zip(stacks, (option.knobs for option in c.options), strict=True))):
                found = measure(step, *args, target=where)
            known[c] = _Compiled(found.peak_bytes, round(peaks.predicted(c)))
            bar.update()
        return known[c].peak_bytes

    def search(limit: float) -> Combination | None:
        for count in itertools.count():
            fitting = [c for c in combinations if peaks.peak(c) <= limit]
            is_late = count >= _MOST or clock.monotonic() - begin > _SECONDS
            if is_late and (there := [c for c in fitting if c in known]):
                return min(there, key=lambda c: c.seconds)
            if not fitting:
                return None
            best = min(fitting, key=lambda c: (c.seconds, peaks.peak(c)))
            if best in known:
                return best
            compiled(best)

    def least() -> Combination:
        while (best := min(combinations, key=peaks.peak)) not in known:
            compiled(best)
        return best

    with bar:
        if objective == "memory":
            chosen = least()
            chosen = chosen if known[chosen].peak_bytes <= limit else None
        else:
            chosen = search(limit)
        if chosen is None:
            best = least()
            if known[best].peak_bytes > limit:
                raise ValueError(_too_little(limit, known[best].peak_bytes, best, stacks, args))
            chosen = best
    everything = Combination(tuple(stack.everything() for stack in stacks.values()))

    def candidate(c: Combination) -> Candidate:
        runs = sum(option.forward_runs * option.seconds for option in c.options) / c.seconds
        return Candidate(_text(c), known[c].predicted_bytes, c.seconds, runs, known[c].peak_bytes)

    measured: dict[Combination, float] = {}
    if time:
        plain = Combination(tuple(stack.plain() for stack in stacks.values()))
        compiled(plain)
        for part in (2, 4, 8):  # settings of less memory, which may be faster in truth
            search(limit / part)
        fits = sorted((c for c in known if known[c].peak_bytes <= limit), key=lambda c: c.seconds)
        # Of those that fit some of all speeds by the model, the fastest and the slowest among them.
        fits = [fits[i * (len(fits) - 1) // (_TIMED - 1)] for i in range(_TIMED)] if len(fits) > _TIMED else fits
        fits = list(dict.fromkeys([*fits, *[plain] * (known[plain].peak_bytes <= limit)]))
        programs = []
        for c in fits:
            with under(dict(zip(stacks, (option.knobs for option in c.options), strict=True))):
                programs.append((step if hasattr(step, "lower") else jax.jit(step)).lower(*where.place(args)))
        measured = dict(zip(fits, seconds_in_turns(programs, args, where), strict=True))
        chosen = min(measured, key=measured.__getitem__)
    rows = {c: replace(candidate(c), measured_seconds=measured.get(c)) for c in known}
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
        least_bytes=round(min(map(peaks.peak, combinations))),
        most_bytes=round(peaks.peak(everything)),
    )


def forget() -> None:
    """Forgets what was compiled for plans before."""
    _known.clear()


def _known_of(step: Callable[..., Any], key: Any) -> dict[Combination, _Compiled]:
    try:
        return _known.setdefault(step, {}).setdefault(key, {})
    except TypeError:  # what cannot be referred to weakly is not remembered
        return {}


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
