"""Which equation of a block something comes of: its number, in a name scope that survives derivatives and loops."""

import itertools
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.extend import core

from jaxckpt.analysis import jaxpr as jx

Scope = Callable[[int], AbstractContextManager[Any]]
_NUMBER = "jaxckpt_equation_"


def scope(number: int) -> AbstractContextManager[Any]:
    """The name scope in which `number_of` finds the number, for all that comes of an equation, derivatives too."""
    return jax.named_scope(f"{_NUMBER}{number}")


def as_function(
    closed: Any, numbers: Iterable[int], scope: Scope | None, look: Callable[[int, list[Any]], None] | None = None
) -> Callable[..., list[Any]]:
    """A function of flat arguments that runs the jaxpr, each equation in the scope of its number, if there is one.

    `look` is called with each number and the outputs of that equation.
    """
    if scope is None:
        return jx.as_function(closed)

    def run(*inputs: Any) -> list[Any]:
        values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *inputs], strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, core.Literal) else values[var]

        for i, eqn in zip(numbers, closed.jaxpr.eqns, strict=False):
            with scope(i):
                made = run_equation(eqn, map(read, eqn.invars))
            if look is not None:
                look(i, made)
            values.update(zip(eqn.outvars, made, strict=True))
        return [read(var) for var in closed.jaxpr.outvars]

    return run


def run_equation(eqn: Any, inputs: Iterable[Any]) -> list[Any]:
    """An equation's outputs."""
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def residual_bytes(closed: Any) -> list[int]:
    """For each equation, the bytes that autodiff keeps of it where nothing is checkpointed."""
    run = as_function(closed, itertools.count(), scope)
    traced = jx.trace(lambda *inputs: jax.tree.leaves(jx.vjp_of_inexact(run, inputs)[1]), *closed.in_avals).jaxpr
    made_by = {var: eqn for eqn in traced.eqns for var in eqn.outvars}
    found = [0] * len(closed.jaxpr.eqns)
    for var in set(jx.variables(traced.outvars)) & made_by.keys():
        if (number := number_of(made_by[var])) is not None:
            found[number] += jx.nbytes(var.aval)
    return found


def number_of(eqn: Any) -> int | None:
    """Which equation of a numbered jaxpr this one comes of."""
    return number_in(str(eqn.source_info.name_stack))


def number_in(name: str) -> int | None:
    """The number that a name holds, of JAX's stack of scopes or of a compiled instruction."""
    found = re.search(rf"{_NUMBER}(\d+)", name)
    return None if found is None else int(found[1])
