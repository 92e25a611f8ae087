"""What one device holds of a step that is to be planned, and of its stacks, where the compiler splits them over a mesh."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxckpt._plan import Knobs, under
from jaxckpt.analysis.shares import Shares
from jaxckpt.engine.run import Run
from jaxckpt.memory.measure import measure
from jaxckpt.memory.runs import observing
from jaxckpt.memory.split import Inputs, NotTold, inputs_of, reason_of, shares_of
from jaxckpt.memory.targets import Target


class Split(NamedTuple):
    """How a step under default knobs is split.

    Fields:
        shares: of a flat block of each stack that is to be planned, by its name, without those inside of `shard_map` and
            `vmap`.
        fixed_bytes: of arguments and results of the step, on one device. peak_bytes: the compiled peak.
    """

    shares: dict[str, Shares]
    fixed_bytes: int
    peak_bytes: int


def split_of(step: Callable[..., Any], args: Any, where: Target, rates: Any, as_given: bool, names: Iterable[str]) -> Split:
    """Compiles a step, in which stacks of these names are to be planned, under default knobs.

    Arguments:
        rates: see `jaxckpt.analysis.cost`.
        as_given: the arguments lie where they are to be.
    """
    seen: dict[str, Inputs] = {}

    def see(run: Run) -> None:
        name = run.setting.plan
        if not isinstance(name, str) or name in seen:
            return
        try:
            if (inputs := inputs_of(run, checkpoints=True)) is not None:
                seen[name] = inputs
        except NotTold as reason:
            _warn(run.names.block, where, reason)

    target = None if as_given else where
    with under(dict.fromkeys(names, Knobs())):
        try:
            with observing(see):
                found = measure(step, *args, target=target)
        except Exception as error:
            found = measure(step, *args, target=target)  # or it is the step itself that is wrong
            _warn("the stacks", where, error)
            seen = {}
    shares = {}
    for name, inputs in seen.items():
        try:
            shares[name] = shares_of(inputs, where, rates)
        except NotTold as reason:
            _warn(inputs.block, where, reason)
    return Split(shares, found.argument_bytes + found.output_bytes - found.aliased_bytes, found.peak_bytes)


def _warn(what: str, where: Target, why: Exception) -> None:
    warnings.warn(
        f"how the values of {what} are split over {where.name!r} cannot be told ({reason_of(why)}). The plan counts them "
        "whole, and may leave much of the budget unused",
        stacklevel=5,
    )
