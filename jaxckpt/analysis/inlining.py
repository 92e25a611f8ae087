"""A block as a flat list of what it computes: nested jit taken apart, and nothing twice."""

import math
from typing import Any

import numpy as np
from jax.extend import core

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import sources

_SMALL = 1 / 20  # of the largest value


def inlined(closed: Any, checkpoints: bool = False) -> Any:
    """The same jaxpr with nested jit taken apart, so that it is a flat list of what is computed.

    What has a derivative of its own (`custom_jvp`, `custom_vjp`) and loops stay whole, and, unless they are asked for, so do
    checkpoints. Equations keep their source and name scope.
    """
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known = {id(value): var for var, value in constants.items()}
    eqns: list[Any] = []
    renamed: dict[Any, Any] = {}

    def now(var: Any) -> Any:
        return var if isinstance(var, core.Literal) else renamed.get(var, var)

    def copy(jaxpr: Any, call: Any = None, of_library: bool = False) -> None:
        for eqn in jaxpr.eqns:
            source = eqn.source_info
            if call is not None:
                source = source.replace(name_stack=call.name_stack + source.name_stack)
            if call is not None and of_library:  # traced once for all who call it: its own frames may be another caller's
                source = source.replace(traceback=call.traceback)
            inner = None if jx.is_checkpoint(eqn) and not checkpoints else jx.transparent_closed(eqn)
            if inner is None:
                # One jaxpr may be called twice: its variables are new in each call.
                out = [var if jx.is_dropped(var) or call is None else core.Var(var.aval) for var in eqn.outvars]
                eqns.append(eqn.replace(invars=list(map(now, eqn.invars)), outvars=out, source_info=source))
                renamed.update(zip(eqn.outvars, out, strict=True))
                continue
            for var, value in zip(inner.jaxpr.constvars, inner.consts, strict=True):
                renamed[var] = known.setdefault(id(value), core.Var(var.aval))
                constants[renamed[var]] = value
            renamed.update(zip(inner.jaxpr.invars, list(map(now, eqn.invars)), strict=True))
            copy(inner.jaxpr, source, of_library or sources.is_of_library(inner.jaxpr))
            renamed.update(zip(eqn.outvars, list(map(now, inner.jaxpr.outvars)), strict=True))

    copy(closed.jaxpr)
    outvars = list(map(now, closed.jaxpr.outvars))
    jaxpr = closed.jaxpr.replace(constvars=list(constants), outvars=outvars, eqns=eqns)
    return core.ClosedJaxpr(jaxpr, list(constants.values()))


def merged(closed: Any) -> Any:
    """`merge`, without the numbers."""
    return merge(closed)[0]


def merge(closed: Any) -> tuple[Any, list[int]]:
    """An inlined jaxpr in which nothing is computed twice from the same values in the same way.

    XLA merges such equations, and then keeps one value where the program says two: a carry of bfloat16 that is converted to
    float32 for a norm's mean and again for its variance, say. Loops, calls and side effects are left alone.

    Returns:
        The jaxpr, and for each equation of the one that was given the number of the one that stands for it.
    """
    renamed: dict[Any, Any] = {}
    first: dict[Any, tuple[int, list[Any]]] = {}
    eqns: list[Any] = []
    numbers: list[int] = []

    def now(var: Any) -> Any:
        return var if isinstance(var, core.Literal) else renamed.get(var, var)

    for eqn in closed.jaxpr.eqns:
        eqn = eqn.replace(invars=list(map(now, eqn.invars)))
        key = _computation(eqn)
        number, twin = (len(eqns), eqn.outvars) if key is None else first.setdefault(key, (len(eqns), eqn.outvars))
        if twin is eqn.outvars or any(map(jx.is_dropped, twin)):
            numbers.append(len(eqns))
            eqns.append(eqn)
        else:
            numbers.append(number)
            renamed.update(zip(eqn.outvars, twin, strict=True))
    found = core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns, outvars=list(map(now, closed.jaxpr.outvars))), closed.consts)
    return found, numbers


def results_last(closed: Any) -> Any:
    """An inlined jaxpr in which what only small results need is computed behind all else, and sums of it last.

    The mean of a loss over tokens, say, that stands before an accuracy of the same logits: no cut between the logits' last
    use and that mean would be possible otherwise.
    """
    sizes = [jx.nbytes(var.aval) for eqn in closed.jaxpr.eqns for var in eqn.outvars]
    limit = max(sizes, default=0) * _SMALL
    needed: set[Any] = set()
    first: list[Any] = []
    results: list[Any] = []
    for eqn in reversed(closed.jaxpr.eqns):
        given = jx.variables(eqn.invars)
        is_small = all(jx.nbytes(var.aval) <= limit for var in [*given, *eqn.outvars])
        if is_small and not eqn.effects and needed.isdisjoint(eqn.outvars):
            results.append(eqn)
        else:
            first.append(eqn)
            needed.update(given)
    entries = lambda variables: max((math.prod(var.aval.shape) for var in variables), default=0)  # noqa: E731
    of_sums: set[Any] = set()
    between: list[Any] = []
    last: list[Any] = []
    for eqn in reversed(results):
        given = jx.variables(eqn.invars)
        if of_sums.isdisjoint(given) and entries(given) <= entries(eqn.outvars):
            between.append(eqn)
        else:
            last.append(eqn)
            of_sums.update(eqn.outvars)
    return core.ClosedJaxpr(closed.jaxpr.replace(eqns=[*reversed(first), *between, *last]), closed.consts)


def _computation(eqn: Any) -> Any:
    """What an equation computes of which values, and how (on the host, say), as a key; None where that has none."""
    if eqn.effects or jx.inner_jaxprs(eqn) or eqn.primitive.name == "rng_uniform":  # whose draws differ each time
        return None
    given = tuple((v.aval, np.asarray(v.val).tobytes()) if isinstance(v, core.Literal) else v for v in eqn.invars)
    key = eqn.primitive, given, tuple(sorted(eqn.params.items())), eqn.ctx
    try:
        hash(key)
    except TypeError:  # of parameters that have no hash
        return None
    return key
