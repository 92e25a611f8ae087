"""How values flow through a jaxpr: which outputs are inputs, depend on them, or have a derivative in them."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxckpt._leaves import replaced
from jaxckpt.analysis import jaxpr as jx


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each output the index of the input that it is, unchanged; None where it is computed.

    Looks through nested jit and checkpoint, which hide a pass-through from `lax.scan`.
    """
    return [None if found is None or found[1] else found[0] for found in _from_inputs(jaxpr)]


def converted(jaxpr: Any) -> list[int | None]:
    """For each output the index of the input that it is in another dtype; None where it is anything else."""
    return [found[0] if found is not None and found[1] == 1 else None for found in _from_inputs(jaxpr)]


def _from_inputs(jaxpr: Any) -> list[tuple[int, int] | None]:
    """For each output that is an input, but for its dtype: which one, and how often it was converted."""
    source = {var: (i, 0) for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "convert_element_type":
            within: list[tuple[int, int] | None] = [(0, 1)]
        elif (inner := jx.transparent(eqn)) is not None:
            within = _from_inputs(inner)
        else:
            continue
        for var, found in zip(eqn.outvars, within, strict=True):
            if found is None or isinstance(given := eqn.invars[found[0]], core.Literal) or given not in source:
                continue
            source[var] = source[given][0], source[given][1] + found[1]
    return [None if isinstance(var, core.Literal) else source.get(var) for var in jaxpr.outvars]


def donated(jaxpr: Any) -> list[Any]:
    """The types of what a jitted function that is called in the jaxpr is given to write its results into."""
    return [
        var.aval
        for eqn in jaxpr.eqns
        for var, yes in zip(eqn.invars, eqn.params.get("donated_invars", ()), strict=False)
        if yes
    ]


def constant_in_derivatives(jaxpr: Any) -> list[bool]:
    """Which outputs have no tangent, whatever the inputs have: those of which all is behind a `stop_gradient`."""
    moving = {var for var in jaxpr.invars if _is_differentiable(var)}
    for eqn in jaxpr.eqns:
        given = [not isinstance(var, core.Literal) and var in moving for var in eqn.invars]
        if eqn.primitive.name == "stop_gradient" or not any(given):
            continue
        inner = jx.transparent(eqn)
        fixed = [False] * len(eqn.outvars) if inner is None else constant_in_derivatives(inner)
        moving.update(var for var, yes in zip(eqn.outvars, fixed, strict=True) if not yes and _is_differentiable(var))
    return [isinstance(var, core.Literal) or var not in moving for var in jaxpr.outvars]


def _is_differentiable(var: Any) -> bool:
    return hasattr(var.aval, "dtype") and jnp.issubdtype(var.aval.dtype, jnp.inexact)


def perturbed(fn: Callable[..., list[Any]], types: Sequence[Any], where: Sequence[int]) -> list[bool]:
    """Which outputs of `fn` have a tangent where the inputs `where` have one: those behind a `stop_gradient` do not."""
    found: list[bool] = []

    @jax.custom_jvp
    def noted(out):
        return out

    @partial(noted.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        found[:] = [not isinstance(tangent, SymbolicZero) for tangent in tangents[0]]
        return primals[0], tangents[0]

    def differentiated(*inputs):
        return jax.vjp(lambda *values: noted(fn(*replaced(inputs, where, values))), *(inputs[i] for i in where))[0]

    out = jax.eval_shape(differentiated, *types)
    return found or [False] * len(out)


_DERIVATIVES: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def derivative(eqn: Any) -> Any:
    """The jaxpr of a `custom_jvp` and its rule: of inputs, and tangents of the inexact ones, the outputs and theirs.

    None where the rule cannot be run, such as one that refuses to be differentiated. Traced once.
    """
    inner, rule = eqn.params["call_jaxpr"], eqn.params["jvp_jaxpr_fun"]
    known = _DERIVATIVES.get(inner)
    if known is None or known[0] is not rule:
        known = _DERIVATIVES[inner] = rule, _traced_derivative(eqn)
    return known[1]


def _traced_derivative(eqn: Any) -> Any:
    types = [var.aval for var in eqn.invars]
    where = jx.inexact(types)
    params = eqn.primitive.get_bind_params(eqn.params)

    def differentiated(*inputs: Any) -> list[Any]:
        primals, tangents = inputs[: len(types)], inputs[len(types) :]
        call = lambda *values: eqn.primitive.bind(*replaced(primals, where, values), **params)  # noqa: E731
        out, moved = jax.jvp(call, [primals[i] for i in where], list(tangents))
        return [*out, *(moved[k] for k in jx.inexact(out))]

    try:
        return jx.trace(differentiated, *types, *(types[i] for i in where))
    except Exception:  # of the user's rule
        return None


def dependent(jaxpr: Any, inputs: Sequence[int]) -> set[Any]:
    """The variables that depend on any of these inputs, or on a side effect."""
    found = {jaxpr.invars[i] for i in inputs}
    for eqn in jaxpr.eqns:
        if eqn.effects or not found.isdisjoint(jx.variables(eqn.invars)):
            found.update(eqn.outvars)
    return found


def dependent_alone(jaxpr: Any, inputs: Sequence[int], constants: Sequence[int] = ()) -> dict[Any, frozenset[int]]:
    """The variables that depend on some of these inputs and no others, nor on a side effect, and on which of them.

    Arguments:
        constants: which of the jaxpr's are the same in every run, and so in the way of nothing.
    """
    found: dict[Any, frozenset[int]] = {jaxpr.constvars[i]: frozenset() for i in constants}
    found |= {jaxpr.invars[i]: frozenset([i]) for i in inputs}
    for eqn in jaxpr.eqns:
        given = jx.variables(eqn.invars)
        if found.keys() >= set(given) and not jx.effects(eqn):
            found |= dict.fromkeys(eqn.outvars, frozenset().union(*(found[var] for var in given)))
    return {var: own for var, own in found.items() if own}


def selected(closed: Any, outputs: Sequence[int]) -> Any:
    """The jaxpr with only these outputs, and only the equations that they need."""
    outvars = [closed.jaxpr.outvars[i] for i in outputs]
    needed = set(jx.variables(outvars))
    eqns = []
    for eqn in reversed(closed.jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(jx.variables(eqn.invars))
    return core.ClosedJaxpr(closed.jaxpr.replace(outvars=outvars, eqns=eqns[::-1]), closed.consts)


def used(closed: Any) -> list[bool]:
    """Which inputs the outputs depend on."""
    jaxpr = selected(closed, range(len(closed.jaxpr.outvars))).jaxpr
    found = set(jx.variables([*jaxpr.outvars, *(var for eqn in jaxpr.eqns for var in eqn.invars)]))
    return [var in found for var in jaxpr.invars]


def last_uses(jaxpr: Any) -> dict[Any, int]:
    """For each variable the last equation that uses it; for outputs the number of equations."""
    found = {}
    for i, eqn in enumerate(jaxpr.eqns):
        found |= dict.fromkeys(jx.variables(eqn.invars), i)
    return found | dict.fromkeys(jx.variables(jaxpr.outvars), len(jaxpr.eqns))
