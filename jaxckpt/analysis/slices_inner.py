"""Slices of equations with jaxprs of their own: what follows from the equations within.

Nested jit and checkpoints, loops, branches, and functions with a forward derivative of their own. How the equations within
are looked at and run is given by `slices`, which comes back here for those of them that have inner jaxprs too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxckpt._leaves import replaced
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices_table import Axes, Where, resized

Wanted = Mapping[int, int]  # by number of an output, its axis; no other output is asked for
Asked = dict[Any, int | None]  # by variable, its axis; None where it is needed whole; what is not needed is not there


class Within(NamedTuple):
    """What `slices` does with a jaxpr.

    Fields:
        asked: how its variables are needed for some of its outputs, see `slices`.
        evaluate: those outputs, of the inputs.
    """

    asked: Callable[[Any, Mapping[int, int | None], int], Asked | None]
    evaluate: Callable[[Any, Asked, Sequence[Any], Where], list[Any]]


class Kind(NamedTuple):
    """How a primitive with inner jaxprs is sliced.

    Fields:
        inputs: of an equation, the axes of its outputs and the number of derivatives, the axes of its inputs; None where it
            cannot be sliced.
        run: the outputs' slices, of the inputs.
    """

    inputs: Callable[[Within, Any, Wanted, int], Axes | None]
    run: Callable[[Within, Any, Wanted, Sequence[Any], Where], list[Any]]


def kind_of(eqn: Any) -> Kind | None:
    """How an equation with inner jaxprs is sliced; None for all others, and for what has no rule."""
    return _CALL if jx.transparent_closed(eqn) is not None else _KINDS.get(eqn.primitive.name)


def axes_of_inputs(jaxpr: Any, asked: Asked) -> Axes:
    """How a jaxpr's inputs are needed."""
    return tuple(map(asked.get, jaxpr.invars))


def _inputs_of_call(within: Within, eqn: Any, wanted: Wanted, orders: int) -> Axes | None:
    asked = within.asked(inner := jx.transparent(eqn), wanted, orders)
    return None if asked is None else axes_of_inputs(inner, asked)


def _run_call(within: Within, eqn: Any, wanted: Wanted, inputs: Sequence[Any], where: Where) -> list[Any]:
    closed = jx.transparent_closed(eqn)
    fn = _sliced(within, closed, wanted, where)
    if jx.is_checkpoint(eqn):
        params = eqn.params["_prim"].params if "_prim" in eqn.params else eqn.params
        fn = jax.checkpoint(fn, policy=params["policy"], prevent_cse=params.get("prevent_cse", True))
    return fn(where.first, *inputs)


def _sliced(within: Within, closed: Any, wanted: Wanted, where: Where) -> Callable[..., list[Any]]:
    """A function of the slice's first entry, which may be traced, and of a jaxpr's inputs."""
    asked: Any = within.asked(closed.jaxpr, wanted, where.orders)  # as when the rule was found
    return lambda first, *inputs: within.evaluate(closed, asked, inputs, where._replace(first=first))


def _with_tangents(eqn: Any, wanted: Wanted) -> Wanted:
    """The outputs of a `custom_jvp`'s derivative: those that are wanted, and their tangents."""
    tangents = enumerate(_inexact(eqn.outvars), len(eqn.outvars))
    return {**wanted, **{number: wanted[k] for number, k in tangents if k in wanted}}


def _inexact(variables: Sequence[Any]) -> list[int]:
    return jx.inexact([var.aval for var in variables])


def _inputs_of_custom_jvp(within: Within, eqn: Any, wanted: Wanted, orders: int) -> Axes | None:
    """What the function asks for and what its rule does, of tangents too: where they agree, it is a rule for slices."""
    (inner,) = jx.inner_jaxprs(eqn)
    if (of_value := within.asked(inner, wanted, orders)) is None:
        return None
    pairs = [(i, of_value[var]) for i, var in enumerate(inner.invars) if var in of_value]
    if orders > 0:
        derivative = None if eqn.params["symbolic_zeros"] else flow.derivative(eqn)
        if derivative is None:
            return None
        of_tangents = within.asked(derivative.jaxpr, _with_tangents(eqn, wanted), orders - 1)
        if of_tangents is None:
            return None
        places = zip([*range(len(eqn.invars)), *_inexact(eqn.invars)], derivative.jaxpr.invars, strict=True)
        pairs += [(i, of_tangents[var]) for i, var in places if var in of_tangents]
    return _agreed(len(eqn.invars), pairs)


def _agreed(count: int, pairs: Sequence[tuple[int, int | None]]) -> Axes | None:
    """The axis of each of `count` inputs, of which some are asked for several times; None where they are in two ways."""
    found: dict[int, int | None] = {}
    return tuple(map(found.get, range(count))) if all(found.setdefault(i, axis) == axis for i, axis in pairs) else None


def _run_custom_jvp(within: Within, eqn: Any, wanted: Wanted, inputs: Sequence[Any], where: Where) -> list[Any]:
    """A `custom_jvp` of slices: JAX's own call holds the rule as a jaxpr, whose shapes are those of the whole."""
    (closed,) = jx.inner_closed(eqn)
    of_value = _sliced(within, closed, wanted, where)
    count, numbers, moving = len(eqn.outvars), sorted(wanted), _inexact(eqn.invars)

    @jax.custom_jvp
    def call(first: Any, *inputs: Any) -> list[Any]:
        out = of_value(first, *inputs)
        return [out[k] for k in numbers]

    @call.defjvp
    def _(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        both, of_both = _derivative(within, eqn, wanted, primals[1:], where)
        out = of_both(*primals, *(tangents[1 + i] for i in moving))
        values, found = [out[k] for k in numbers], [out[k] for k in sorted(both) if k >= count]
        still = [np.zeros(value.shape, jax.dtypes.float0) for value in values]
        return values, replaced(still, jx.inexact(values), found)

    out = dict(zip(numbers, call(where.first, *inputs), strict=True))
    return list(map(out.get, range(count)))


def _derivative(
    within: Within, eqn: Any, wanted: Wanted, inputs: Sequence[Any], where: Where
) -> tuple[Wanted, Callable[..., list[Any]]]:
    """The derivative of a `custom_jvp` in slices, and which of its outputs it gives."""
    orders = max(where.orders, 1)
    axes = _inputs_of_custom_jvp(within, eqn, wanted, orders)
    if axes is None or [x.shape for x in inputs] != [
        resized(var.aval.shape, axis, where.size) for var, axis in zip(eqn.invars, axes, strict=True)
    ]:
        name = jx.inner_jaxprs(eqn)[0].debug_info.func_name
        raise NotImplementedError(
            f"tiles: a second derivative through the jax.custom_jvp {name}, whose rule cannot be computed in slices though "
            "its function can: pass tiles=None"
        )
    closed, both = flow.derivative(eqn), _with_tangents(eqn, wanted)
    where = where._replace(orders=orders - 1)
    return both, _sliced(within, closed, both, where)


class _Loop(NamedTuple):
    """A `scan`: the number of its constants and of its carries; how its body is asked for carries and outputs."""

    constants: int
    carries: int
    of_outputs: dict[int, int | None]
    asked: Asked


def _loop(within: Within, eqn: Any, wanted: Wanted, orders: int) -> _Loop | None:
    """A carry that is asked for at the end of the body is asked for at its beginning, and the other way round."""
    body = jx.inner_jaxprs(eqn)[0]
    carries = sum(_rank(var) == _rank(inner) for var, inner in zip(eqn.outvars, body.outvars, strict=True))
    constants = sum(_rank(var) == _rank(inner) for var, inner in zip(eqn.invars, body.invars, strict=True)) - carries
    if any(k >= carries and axis == 0 for k, axis in wanted.items()):  # along which the loop runs
        return None
    of_outputs: dict[int, int | None] = {k: axis - (k >= carries) for k, axis in wanted.items()}
    while (asked := within.asked(body, of_outputs, orders)) is not None:
        begin = {k: asked[var] for k, var in enumerate(body.invars[constants : constants + carries]) if var in asked}
        if any(of_outputs.get(k, axis) != axis for k, axis in begin.items()):
            return None
        if begin.keys() <= of_outputs.keys():
            return _Loop(constants, carries, of_outputs, asked)
        of_outputs |= begin
    return None


def _rank(var: Any) -> int:
    return len(var.aval.shape)


def _inputs_of_scan(within: Within, eqn: Any, wanted: Wanted, orders: int) -> Axes | None:
    if (loop := _loop(within, eqn, wanted, orders)) is None:
        return None
    axes = axes_of_inputs(jx.inner_jaxprs(eqn)[0], loop.asked)
    carries = map(loop.of_outputs.get, range(loop.carries))  # asked for at the end, and perhaps not at the beginning
    steps = (None if axis is None else axis + 1 for axis in axes[loop.constants + loop.carries :])
    return (*axes[: loop.constants], *carries, *steps)


def _run_scan(within: Within, eqn: Any, wanted: Wanted, inputs: Sequence[Any], where: Where) -> list[Any]:
    (body,) = jx.inner_closed(eqn)
    loop: Any = _loop(within, eqn, wanted, where.orders)  # as when the rule was found
    constants, carries, of_outputs, asked = loop
    kept = sorted(of_outputs)
    stepped = [i for i, var in enumerate(body.jaxpr.invars) if i >= constants + carries and var in asked]
    carried = [constants + k for k in kept if k < carries]

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        given = replaced(replaced([*inputs], carried, carry), stepped, xs)
        out = within.evaluate(body, asked, given, where)
        return [out[k] for k in kept if k < carries], [out[k] for k in kept if k >= carries]

    knobs = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, [inputs[i] for i in carried], [inputs[i] for i in stepped], **knobs)
    out = dict(zip(kept, [*carry, *ys], strict=True))
    return list(map(out.get, range(len(eqn.outvars))))


def _inputs_of_cond(within: Within, eqn: Any, wanted: Wanted, orders: int) -> Axes | None:
    branches = [(jaxpr, within.asked(jaxpr, wanted, orders)) for jaxpr in jx.inner_jaxprs(eqn)]
    if any(asked is None for _, asked in branches):
        return None
    pairs = [(i, asked[var]) for jaxpr, asked in branches for i, var in enumerate(jaxpr.invars, 1) if asked and var in asked]
    return _agreed(len(eqn.invars), pairs)


def _run_cond(within: Within, eqn: Any, wanted: Wanted, inputs: Sequence[Any], where: Where) -> list[Any]:
    branches = [_sliced(within, closed, wanted, where) for closed in jx.inner_closed(eqn)]
    number, *operands = inputs
    return lax.switch(number, branches, where.first, *operands)


_CALL = Kind(_inputs_of_call, _run_call)
_KINDS = {
    "cond": Kind(_inputs_of_cond, _run_cond),
    "custom_jvp_call": Kind(_inputs_of_custom_jvp, _run_custom_jvp),
    "scan": Kind(_inputs_of_scan, _run_scan),
}
