"""What a plan says of a stack, or of what `checkpoint` is given, when it is run; and who looks on for one."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax

from jaxckpt._plan import Knobs, StackPlan, active, under
from jaxckpt._setting import Setting, with_knobs
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine import check
from jaxckpt.engine.run import Run

# Where a function is set, it is called with each run of a stack, while that is traced; with runs inside a block it is not.
observed: ContextVar[Callable[[Run], None] | None] = ContextVar("observed", default=None)


def under_plan(setting: Setting, initializes: bool = False) -> tuple[Setting, StackPlan | Knobs | None]:
    """The setting under the plan that is active for the stack, and that plan."""
    if initializes and setting.plan is not None:  # which is for a stack that has its parameters
        setting = by_default(setting)
    if not isinstance(setting.plan, str):
        return setting, setting.plan
    planned = active(setting.plan)
    if planned is not None:
        setting = with_knobs(setting, planned.knobs if isinstance(planned, StackPlan) else planned)
    return setting, planned


def by_default(setting: Setting) -> Setting:
    """`setting` with default knobs in place of a plan's."""
    return dataclasses.replace(with_knobs(setting, Knobs()), plan=None)


def pinned(
    setting: Setting, planned: StackPlan, closed: Any, given: Sequence[Any], length: int, names: check.Names
) -> tuple[Setting, ValueError | None]:
    """The setting of a pinned plan; where it is for another stack, default knobs, and why nothing may be differentiated.

    Arguments:
        given: the first carry of a stack, or the arrays that a function is given.
    """
    refusal = planned.refusal(block=names.block, **_described(closed, given, length))
    return (setting, None) if refusal is None else (by_default(setting), refusal)


def described(run: Run) -> dict[str, Any]:
    """What a plan remembers of a run beside the block's name."""
    _, carry, arrays = run.leaves
    return _described(run.closed, carry if run.is_stack else arrays, run.length)


def _described(closed: Any, given: Sequence[Any], length: int) -> dict[str, Any]:
    mesh = next((mesh for leaf in given if not (mesh := jax.typeof(leaf).sharding.mesh).empty), None)
    axes = None if mesh is None else ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return {"length": length, "carry": check.shape_of(tuple(given)), "program": jx.digest(closed), "mesh": axes}


@contextlib.contextmanager
def as_one() -> Iterator[None]:
    """Of what is run inside only stacks, and what is to be planned, are looked at: the rest is part of one function."""
    see = observed.get()

    def part(run: Run) -> None:
        if see is not None and (run.is_stack or isinstance(run.setting.plan, str)):
            see(run)

    token = observed.set(see and part)
    try:
        yield
    finally:
        observed.reset(token)


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Stacks inside the block are no part of a plan for this one, and are not looked at with it."""
    token = observed.set(None)
    try:
        with under({}):
            yield
    finally:
        observed.reset(token)
