"""`largest_batch`: how large a batch fits into a budget of memory, and what throughput the time model expects of each.

Whether a size fits is asked of `plan`, which takes up to a minute, so that only a few sizes are: the largest that fits is
found by bisection, since what fits with more examples fits with fewer, and the plans that are left go to sizes below it, the
one that is farthest from those tried first.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxckpt._plan import Plan
from jaxckpt._setting import is_integer
from jaxckpt._sizes import size_text
from jaxckpt._table import aligned
from jaxckpt.memory import targets
from jaxckpt.planning.examples import with_batch
from jaxckpt.planning.rounds import COMPILATIONS
from jaxckpt.planning.search import TooLittle, plan

PLANS = 8
_FAILURES = 4  # sizes that the step cannot be run with, and none that fits, are taken for a bug
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # what XLA's error says where it cannot even compile so much
_ALIKE = 0.999  # throughputs that the time model does not tell apart

OfSize = Callable[[int], tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclass(frozen=True)
class Batch:
    """One size of the batch.

    Fields:
        plan: the fastest setting that fits; None where none does, or the step cannot be run with so many.
        reason: why there is none.
        is_too_large: whether that is because it does not fit, so that nothing larger does.
    """

    size: int
    plan: Plan | None
    reason: str = ""
    is_too_large: bool = False

    @property
    def seconds(self) -> float | None:
        """What the step's stacks take, by the time model of the target."""
        return None if self.plan is None else self.plan.chosen.seconds

    @property
    def examples_per_second(self) -> float | None:
        """The throughput that the time model expects of the stacks alone: what else the step does is not in it.

        None where they take no time, too.
        """
        return self.size / self.seconds if self.seconds else None


@dataclass(frozen=True)
class Batches:
    """What `largest_batch` found: some sizes, ascending, the largest that fits among them.

    Fields:
        not_tried: the sizes that no plan was made for.
    """

    tried: tuple[Batch, ...]
    not_tried: tuple[int, ...]

    @property
    def _fitting(self) -> list[Batch]:
        return [batch for batch in self.tried if batch.plan is not None]

    @property
    def largest(self) -> Batch:
        """The largest of those tried that fits, and of all if there are none in `may_fit`."""
        return self._fitting[-1]

    @property
    def may_fit(self) -> tuple[int, ...]:
        """The sizes not tried that may fit though they are larger than the largest that was found to."""
        too_large = min((batch.size for batch in self.tried if batch.is_too_large), default=math.inf)
        return tuple(size for size in self.not_tried if self.largest.size < size < too_large)

    @property
    def fastest(self) -> Batch:
        """Of those that were tried the one of the highest throughput, by the time model; the largest of several."""
        most = max(batch.examples_per_second or 0.0 for batch in self._fitting)
        return next(batch for batch in self._fitting[::-1] if (batch.examples_per_second or 0.0) >= most * _ALIKE)

    def __getitem__(self, size: int) -> Plan:
        """The plan of one size.

        Raises:
            KeyError: it was not tried, or does not fit.
        """
        found = next((batch for batch in self.tried if batch.size == size), None)
        if found is None or found.plan is None:
            fitting = ", ".join(str(batch.size) for batch in self._fitting)
            raise KeyError(f"there is no plan for a batch of {size}; there are plans for {fitting}")
        return found.plan

    def __str__(self) -> str:
        rows = [("", "batch", "peak", "forward runs", "model s", "examples per s", "setting")]
        for batch in self.tried:
            if batch.plan is None:
                rows.append(("", str(batch.size), "", "", "", "", batch.reason))
                continue
            chosen = batch.plan.chosen
            mark = "*" if batch is self.largest else ""
            numbers = size_text(batch.plan.peak_bytes), f"{chosen.forward_runs:.2f}", f"{chosen.seconds:.4g}"
            speed = "" if batch.examples_per_second is None else f"{batch.examples_per_second:.4g}"
            rows.append((mark, str(batch.size), *numbers, speed, chosen.setting))
        plan = self.largest.plan
        assert plan is not None
        budget = "" if plan.budget_bytes is None else f" in {size_text(plan.budget_bytes)}"
        lines = [f"a batch of {self.largest.size}{budget} on {plan.target}, JAX {plan.jax_version}"]
        lines += aligned(rows, right=range(1, 6))
        if self.fastest is not self.largest:
            lines.append(f"  the highest throughput by the time model: a batch of {self.fastest.size}")
        smaller = [size for size in self.not_tried if size < self.largest.size]
        for sizes, said in ((self.may_fit, "and may fit"), (smaller, "and smaller")):
            if sizes:
                listed = f"{sizes[0]}" if len(sizes) == 1 else f"{len(sizes)} sizes from {sizes[0]} to {sizes[-1]}"
                lines.append(f"  not tried, {said}: {listed}; plans={2 * len(self.tried)} tries more")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        tried = [
            {
                "size": batch.size,
                "examples_per_second": batch.examples_per_second,
                "plan": None if batch.plan is None else batch.plan.to_json(),
                "reason": batch.reason,
            }
            for batch in self.tried
        ]
        return {
            "largest": self.largest.size,
            "fastest": self.fastest.size,
            "tried": tried,
            "not_tried": list(self.not_tried),
            "may_fit": list(self.may_fit),
        }


def largest_batch(
    step: Callable[..., Any],
    *args: Any,
    in_axes: Sequence[Any],
    sizes: Iterable[int],
    plans: int = PLANS,
    budget: str | int | None = None,
    target: "str | os.PathLike[str] | targets.Target | None" = None,
    calibrate: bool = False,
    compilations: int = COMPILATIONS,
    progress: bool = True,
) -> Batches:
    """The largest batch for which a plan of `step` fits into `budget`, and what some sizes cost.

    Arguments:
        step, args: as for `jaxckpt.plan`, with a batch of any size.
        in_axes: for each argument the axis of its examples, or None where it has none (parameters, states), or a tree of
            these, as in `jax.vmap`.
        sizes: of the batch, that are allowed: `range(8, 129, 8)`, say. Those that the step cannot be run with are left out.
        plans: that are made at most, each of which takes as long as `jaxckpt.plan`.
        budget, target, calibrate, compilations, progress: as for `jaxckpt.plan`.

    Returns:
        `print` it; `.largest` and `.fastest` have a size and a plan, `found[size]` is the plan of one that fits, `.may_fit`
        are larger sizes that there were no plans left for.

    Raises:
        ValueError: `in_axes` names no axis of any argument, or axes of different sizes; `sizes` are no numbers of examples;
            or not even the smallest fits, with what `jaxckpt.plan` says of it.
        Exception: what the step raises, where it cannot be run with the first four sizes.

    >>> import jax, jax.numpy as jnp
    >>> from jaxckpt import checkpoint_scan
    >>> stack = checkpoint_scan(lambda w, x: x + jnp.tanh(x @ w), plan="auto")
    >>> step = jax.grad(lambda w, x: stack(w, x).sum())
    >>> args = jnp.ones((8, 64, 64)), jnp.ones((32, 64))
    >>> how = dict(budget="4MiB", target="cpu", progress=False)
    >>> found = largest_batch(step, *args, in_axes=(None, 0), sizes=[64, 256, 1024, 4096], **how)
    >>> found.largest.size
    1024
    """
    if not callable(step):
        raise TypeError(f"largest_batch takes a training step, a function, and then its arguments; got {step!r:.200}")
    batched = with_batch(args, in_axes)
    made = lambda size: (step, batched(size))  # noqa: E731
    how = dict(budget=budget, target=target, calibrate=calibrate, compilations=compilations, progress=progress)
    return batches(made, sizes, plans, **how)


def batches(made: OfSize, sizes: Iterable[int], plans: int = PLANS, **how: Any) -> Batches:
    """The same for a function of the size that makes the step and its arguments; `how` goes to `plan`."""
    ordered = _checked_sizes(sizes)
    if not is_integer(plans) or plans < 1:
        raise ValueError(f"plans, how many are made at most, is an integer of at least 1; got {plans!r}")
    tried: list[Batch] = []
    why: Exception | None = None  # none fits: of the smallest that is too large, or else of the first that cannot be run
    while (size := _next_size(ordered, tried, plans)) is not None:
        try:
            step, args = made(size)
            tried.append(Batch(size, plan(step, *args, **how)))
        except TooLittle as error:
            reason = f"does not fit: the least possible is {size_text(error.least_bytes)}"
            tried.append(Batch(size, None, reason, is_too_large=True))
            why = TooLittle(f"{error}. That is for a batch of {size}", error.least_bytes)
        except Exception as error:
            # A size that the step cannot be run with, by its own splits say, is none of the others' business.
            is_too_large = _OUT_OF_MEMORY in str(error)
            reason = f"{'does not fit' if is_too_large else 'cannot be run'}: {_line(error)}"
            tried.append(Batch(size, None, reason, is_too_large))
            why = error if is_too_large else why or error
    if why is not None and not any(batch.plan for batch in tried):
        raise why
    asked = {batch.size for batch in tried}
    return Batches(
        tried=tuple(sorted(tried, key=lambda batch: batch.size)),
        not_tried=tuple(size for size in ordered if size not in asked),
    )


def _next_size(sizes: Sequence[int], tried: Sequence[Batch], plans: int) -> int | None:
    """The size to try next: by bisection for the largest that fits, then the one below it farthest from those tried.

    The last plan goes to the smallest where none fits yet. What cannot be run fails soon, and is no plan. As a rule it lacks
    a divisor, of devices or micro-batches, so that rounder sizes go first, and alone after as many failures as plans.
    """
    asked = [batch.size for batch in tried]
    fitting = [batch.size for batch in tried if batch.plan is not None]
    too_large = [batch.size for batch in tried if batch.is_too_large]
    failed = [batch.size for batch in tried if batch.plan is None and not batch.is_too_large]
    left = [size for size in sizes if size < min(too_large, default=math.inf) and size not in asked]
    plans_left = plans - len(fitting) - len(too_large)
    if not left or not plans_left or (not fitting and len(failed) == _FAILURES):
        return None

    hopeful = functools.partial(_hopeful, failed=failed, most_failures=max(plans, _FAILURES))
    if not fitting and plans_left == 1:
        return hopeful(left)[0]
    if above := hopeful([size for size in left if size > max(fitting, default=0)]):
        return above[len(above) // 2]
    return max(hopeful(left), key=lambda size: min(abs(size - other) for other in asked), default=None)


def _hopeful(sizes: list[int], failed: Sequence[int], most_failures: int) -> list[int]:
    """Of some sizes those rounder than all that the step could not be run with, or all, up to so many failures."""
    rounder = [size for size in sizes if _roundness(size) > max(map(_roundness, failed), default=0)]
    return rounder or (sizes if len(failed) < most_failures else [])


def _roundness(size: int) -> int:
    """The largest power of two that divides it."""
    return size & -size


def _checked_sizes(sizes: Iterable[int]) -> list[int]:
    is_array = isinstance(sizes, (np.ndarray, jax.Array)) or not isinstance(sizes, Iterable)
    given: list[Any] = np.asarray(sizes).ravel().tolist() if is_array else list(sizes)
    if not given or not all(is_integer(size) and size >= 1 for size in given):
        raise ValueError(
            f"sizes are those that the batch may have, integers of at least 1, such as range(8, 129, 8); got {sizes!r:.200}"
        )
    return sorted({int(size) for size in given})


def _line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said[:200]}"
