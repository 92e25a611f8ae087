"""What a slice of an equation's outputs along an axis asks for, and how it is computed.

A slice has entries of an axis that are evenly apart, `first, first + stride, first + 2 * stride, ...`. Each equation says
along which axes its inputs are sliced, or that they are needed whole: `slices_table` knows that by primitive, and
`slices_inner` where it follows from jaxprs within. Here is how one asks for it, and how it goes through the equations of a
jaxpr.

What is not known has no rule and is computed whole, which is never wrong, only larger: side effects, collectives, random
bits, kernels, `while`, values that an explicit mesh splits, and `custom_vjp`, whose backward rule may do anything along an
axis.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core, source_info_util

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import slices_table as table
from jaxckpt.analysis.numbering import run_equation
from jaxckpt.analysis.slices_inner import Asked, Wanted, Within, axes_of_inputs, kind_of
from jaxckpt.analysis.slices_table import Axes, Where


class Rule(NamedTuple):
    """Axes along which an equation is sliced, by position.

    Fields:
        inputs: for each input its axis; None where it is needed whole, or not at all.
        outputs: for each output its axis; None where it is used nowhere, and perhaps not computed.
    """

    inputs: Axes
    outputs: Axes


# For how many derivatives slices are known to do before they are run: the rule of a `custom_jvp` may call the function
# again, and so on without an end. Those of higher order are looked at where they are taken.
_ORDERS = 1


def rule(eqn: Any, output: int, axis: int, used: Collection[int] | None = None) -> Rule | None:
    """What a slice of `eqn.outvars[output]` along `axis` asks for; None where it cannot be computed in slices.

    All outputs that are used come of the same slice: where the equation does not say along which axis another one is sliced,
    it is the first that does not contradict the others.

    Arguments:
        used: the numbers of the outputs that something reads; without it, all that JAX did not drop. A loop's counter that
            nothing reads has no axis, and would keep the loop whole.
    """
    if used is None:
        used = [k for k, var in enumerate(eqn.outvars) if not jx.is_dropped(var)]
    size = eqn.outvars[output].aval.shape[axis]
    others = {k: [i for i, n in enumerate(eqn.outvars[k].aval.shape) if n == size] for k in used if k != output}
    if not all(others.values()):
        return None
    for axes in others.values():
        axes.sort(key=lambda i: abs(i - axis))
    first = _rule(eqn, {output: axis, **{k: axes[0] for k, axes in others.items()}}, _ORDERS)
    return _one_by_one(eqn, {output: axis}, others) if first is None else first


def _one_by_one(eqn: Any, wanted: Wanted, others: Mapping[int, Sequence[int]]) -> Rule | None:
    """As `rule`, for each other output the first of these axes that does not contradict those before it."""
    for k, axes in others.items():
        found = next((i for i in axes if _rule(eqn, {**wanted, k: i}, _ORDERS) is not None), None)
        if found is None:
            return None
        wanted = {**wanted, k: found}
    return _rule(eqn, wanted, _ORDERS) if others else None


def run(eqn: Any, rule: Rule, inputs: Sequence[Any], size: int, first: Any, stride: int) -> list[Any]:
    """The outputs' slices of an equation, of its inputs' slices and of those that are whole; None for what is not used.

    Arguments:
        size: the entries of the slices along their axes.
        first, stride: the entry `k` of the slices is the entry `first + k * stride` of the whole; `first` may be traced.
    """
    wanted = {k: axis for k, axis in enumerate(rule.outputs) if axis is not None}
    return _run(eqn, wanted, inputs, Where(size, first, stride, _ORDERS))


def through(jaxpr: Any, outputs: Axes) -> Axes | None:
    """For each input of a jaxpr the axis that slices of its outputs along `outputs` ask for.

    None where slices cannot be had: an equation has no rule, or a value is asked for along two axes, or both in slices and
    whole.
    """
    asked = _asked(jaxpr, dict(enumerate(outputs)), _ORDERS)
    return None if asked is None else axes_of_inputs(jaxpr, asked)


def _rule(eqn: Any, wanted: Wanted, orders: int) -> Rule | None:
    """As `rule`, for several outputs, of which the others need not be sliced."""
    sizes = {eqn.outvars[k].aval.shape[axis] for k, axis in wanted.items()}
    if len(sizes) > 1 or min(sizes) < 2 or eqn.effects or _is_split(eqn):
        return None
    if (row := table.row_of(eqn)) is not None:
        axis, *others = set(wanted.values())
        inputs = None if others else row.inputs(eqn, axis)
        return None if inputs is None else Rule(inputs, (axis,) * len(eqn.outvars))
    kind = kind_of(eqn)
    inputs = None if kind is None else kind.inputs(_WITHIN, eqn, wanted, orders)
    return None if inputs is None else Rule(inputs, tuple(map(wanted.get, range(len(eqn.outvars)))))


def _is_split(eqn: Any) -> bool:
    """Whether an explicit mesh splits an input or output, or a parameter says where the output is."""
    placed = [getattr(var.aval, "sharding", None) for var in [*eqn.invars, *eqn.outvars]]
    if eqn.primitive.name != "sharding_constraint":
        placed += [eqn.params.get("sharding"), eqn.params.get("out_sharding")]
    specs = [getattr(sharding, "spec", ["unknown"]) for sharding in placed if sharding is not None]
    return any(any(part is not None for part in spec) or getattr(spec, "unreduced", None) for spec in specs)


def _run(eqn: Any, wanted: Wanted, inputs: Sequence[Any], where: Where) -> list[Any]:
    with _context(eqn):
        if (kind := kind_of(eqn)) is not None:
            return kind.run(_WITHIN, eqn, wanted, inputs, where)
        return table.bind(eqn, next(iter(wanted.values())), inputs, where)


@contextlib.contextmanager
def _context(eqn: Any) -> Iterator[None]:
    """What JAX evaluates an equation of a jaxpr in."""
    source = eqn.source_info
    names = source_info_util.current_name_stack() + source.name_stack
    with source_info_util.user_context(source.traceback, name_stack=names), eqn.ctx.manager:
        yield


def _asked(jaxpr: Any, wanted: Mapping[int, int | None], orders: int) -> Asked | None:
    """How each variable is needed for these outputs; None where one is needed in two ways, or an equation has no rule."""
    asked: Asked = {}

    def ask(var: Any, axis: int | None) -> bool:
        return axis is None if isinstance(var, core.Literal) else asked.setdefault(var, axis) == axis

    if len({jaxpr.outvars[k].aval.shape[axis] for k, axis in wanted.items() if axis is not None}) > 1:
        return None
    if not all(ask(jaxpr.outvars[k], axis) for k, axis in wanted.items()):
        return None
    for eqn in reversed(jaxpr.eqns):
        of_outputs = {k: asked[var] for k, var in enumerate(eqn.outvars) if var in asked}
        axes = _axes_of_inputs(eqn, of_outputs, orders) if of_outputs else ()
        if axes is None or (of_outputs and not all(map(ask, eqn.invars, axes))):
            return None
    return None if any(asked.get(var) is not None for var in jaxpr.constvars) else asked


def _axes_of_inputs(eqn: Any, of_outputs: Mapping[int, int | None], orders: int) -> Axes | None:
    wanted = {k: axis for k, axis in of_outputs.items() if axis is not None}
    if not wanted:  # computed whole, of what is whole
        return (None,) * len(eqn.invars)
    found = _rule(eqn, wanted, orders) if len(wanted) == len(of_outputs) else None
    return None if found is None else found.inputs


def _evaluate(closed: Any, asked: Asked, inputs: Sequence[Any], where: Where) -> list[Any]:
    """The outputs of a jaxpr that are asked for, in slices or whole; None for the others."""
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *inputs], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var] if var in asked else None

    for eqn in jaxpr.eqns:
        of_outputs = {k: asked[var] for k, var in enumerate(eqn.outvars) if var in asked}
        wanted = {k: axis for k, axis in of_outputs.items() if axis is not None}
        if of_outputs:
            given = list(map(read, eqn.invars))
            values.update(
                zip(eqn.outvars, _run(eqn, wanted, given, where) if wanted else _run_whole(eqn, given), strict=True)
            )
    return list(map(read, jaxpr.outvars))


def _run_whole(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    with _context(eqn):
        return run_equation(eqn, inputs)


_WITHIN = Within(_asked, _evaluate)
