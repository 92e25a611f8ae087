"""Which equation of a block something comes of: its number, in a name scope that survives derivatives and loops."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from jaxckpt.analysis import jaxpr as jx


def as_numbered_function(closed: Any, first: int = 0) -> Callable[..., list[Any]]:
    """As `as_function`, with everything that comes of an equation, derivatives too, in the name scope of `number_of`.

    Arguments:
        first: the number of the first equation.
    """

    def run(*inputs: Any) -> list[Any]:
        values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *inputs], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, core.Literal) else values[var]

        for i, eqn in enumerate(closed.jaxpr.eqns, first):
            with jax.named_scope(f"{_NUMBER}{i}"):
                out = eqn.primitive.bind(*map(read, eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
            values.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))
        return [read(var) for var in closed.jaxpr.outvars]

    return run


def residual_bytes(closed: Any) -> list[int]:
    """For each equation, the bytes that autodiff keeps of it where nothing is checkpointed."""
    run = as_numbered_function(closed)
    traced = jx.trace(lambda *inputs: jax.tree.leaves(jx.vjp_of_inexact(run, inputs)[1]), *closed.in_avals).jaxpr
    made_by = {var: eqn for eqn in traced.eqns for var in eqn.outvars}
    found = [0] * len(closed.jaxpr.eqns)
    for var in {var for var in traced.outvars if not isinstance(var, core.Literal)} & made_by.keys():
        if (number := number_of(made_by[var])) is not None:
            found[number] += jx.nbytes(var.aval)
    return found


_NUMBER = "jaxckpt_equation_"


def number_of(eqn: Any) -> int | None:
    """Which equation of a numbered jaxpr this one comes of."""
    found = re.search(rf"{_NUMBER}(\d+)", str(eqn.source_info.name_stack))
    return None if found is None else int(found[1])
