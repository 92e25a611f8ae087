"""Values by name: the user's tags, given by `jax.ad_checkpoint.checkpoint_name`, and tags of our own."""

import re
from collections.abc import Callable, Container
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxckpt._leaves import replaced
from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx


def tags(closed: Any) -> frozenset[str]:
    """Every name given by `jax.ad_checkpoint.checkpoint_name`, in nested jaxprs and rules of `custom_vjp` too; not ours."""
    eqns = list(jx.equations(closed.jaxpr))
    if any(eqn.primitive.name.startswith("custom_vjp") for eqn in eqns):
        eqns += jx.equations(_differentiated(closed).jaxpr)
    return frozenset(tag for eqn in eqns if (tag := tag_of(eqn)) is not None and not is_value_name(tag))


def _differentiated(closed: Any) -> Any:
    """The jaxpr of a jaxpr's forward and backward pass: one of them runs the forward rules of `custom_vjp`.

    The backward pass does where the rule stands in a `jax.checkpoint` of the block's own.
    """
    fn = core.jaxpr_as_fun(closed)

    def forward_and_backward(*inputs):
        out, pullback = jx.vjp_of_inexact(fn, inputs)
        return pullback(out)

    return jax.make_jaxpr(forward_and_backward)(*closed.in_avals)


def aliases(jaxpr: Any) -> dict[int, int]:
    """For each equation that only passes a value on (a tag), the equation that computes it."""
    computed_by = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    found: dict[int, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        if tag_of(eqn) is not None and (source := computed_by.get(eqn.invars[0])) is not None:
            found[i] = found.get(source, source)
    return found


def tag_of(eqn: Any) -> str | None:
    """The name that an equation gives by `checkpoint_name`."""
    if eqn.primitive.name == "name":
        return eqn.params["name"]
    hi = eqn.params.get("_prim")
    return hi.name if type(hi).__name__ == "CheckpointName" else None


_VALUE = "jaxckpt_value_"


def value_name(equation: int, k: int, is_inside: bool = False) -> str:
    """The tag that `with_tags` gives the `k`-th output of an equation, or the `k`-th value that its derivative wants."""
    return f"{_VALUE}{equation}{'in' if is_inside else 'out'}{k}"


def equation_of(name: str) -> int:
    """The equation that a value of `value_name` is of."""
    return int(re.match(r"\d+", name.removeprefix(_VALUE))[0])  # pyright: ignore[reportOptionalSubscript]


def output_of(name: str) -> tuple[int, int] | None:
    """The equation that a value of `value_name` is of, and which of its outputs; None for a value inside of it."""
    found = re.fullmatch(r"(\d+)out(\d+)", name.removeprefix(_VALUE))
    return None if found is None else (int(found[1]), int(found[2]))


def is_value_name(tag: str) -> bool:
    """Whether a tag is one of `with_tags`, and not the user's."""
    return tag.startswith(_VALUE)


def with_tags(closed: Any, names: Container[str] | None = None) -> Any:
    """An inlined jaxpr with some values tagged by their `value_name`, or all that can be.

    What is wanted by the derivative of an equation that is run as a whole (a loop, a branch, a function with a derivative of
    its own) is inside of it, and no name at the block's own level could be kept of it: such an equation becomes a
    `custom_vjp` whose forward rule returns these values under their names. That one is differentiated in reverse only.
    """
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    eqns: list[Any] = []
    renamed: dict[Any, Any] = {}

    def now(var: Any) -> Any:
        return var if isinstance(var, core.Literal) else renamed.get(var, var)

    def add(fn: Callable[..., list[Any]], invars: list[Any], source: Any) -> list[Any]:
        """Adds the equations of `fn`; its outputs."""
        traced = jx.trace(fn, *(var.aval for var in invars))
        constants.update(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        given = dict(zip(traced.jaxpr.invars, invars, strict=True))
        for eqn in traced.jaxpr.eqns:
            inputs = [var if isinstance(var, core.Literal) else given.get(var, var) for var in eqn.invars]
            eqns.append(eqn.replace(invars=inputs, source_info=source))
        return [var if isinstance(var, core.Literal) else given.get(var, var) for var in traced.jaxpr.outvars]

    for i, eqn in enumerate(closed.jaxpr.eqns):
        eqn = eqn.replace(invars=list(map(now, eqn.invars)))
        opened = _opened(eqn, i, names) if is_whole(eqn) else None
        if opened is None:
            eqns.append(eqn)
            out = eqn.outvars
        else:
            out = add(opened, eqn.invars, eqn.source_info)
            renamed.update(zip(eqn.outvars, out, strict=True))
        for k, (var, value) in enumerate(zip(eqn.outvars, out, strict=True)):
            name = value_name(i, k)
            if (names is None or name in names) and not jx.is_dropped(var) and _can_be_tagged(var.aval):
                (renamed[var],) = add(lambda x, name=name: [checkpoint_name(x, name)], [value], eqn.source_info)
    jaxpr = closed.jaxpr.replace(constvars=list(constants), outvars=list(map(now, closed.jaxpr.outvars)), eqns=eqns)
    return core.ClosedJaxpr(jaxpr, list(constants.values()))


def is_whole(eqn: Any) -> bool:
    """Whether an equation is run as a whole and has a derivative that wants values inside of it."""
    name = eqn.primitive.name
    return name in ("scan", "cond") or name.startswith("custom_vjp")


def _opened(eqn: Any, number: int, names: Container[str] | None) -> Callable[..., list[Any]] | None:
    """A function that runs an equation, and whose derivative wants values by name; None if none of the names is of them."""
    params = eqn.primitive.get_bind_params(eqn.params)

    def run(*inputs: Any) -> list[Any]:
        return list(eqn.primitive.bind(*inputs, **params))

    def has_gradient(value: Any) -> bool:
        return jnp.issubdtype(value.dtype, jnp.inexact)

    types = [var.aval for var in eqn.invars]
    where = jx.differentiable(run, types)
    pull_tree: Any = None

    def differentiated(*inputs: Any) -> tuple[list[Any], list[Any]]:
        nonlocal pull_tree

        def of_inexact(*values: Any) -> tuple[list[Any], list[Any]]:
            out = run(*replaced(inputs, where, values))
            return [value for value in out if has_gradient(value)], out

        _, pull, out = jax.vjp(of_inexact, *(inputs[i] for i in where), has_aux=True)
        leaves, pull_tree = jax.tree.flatten(pull)
        return out, leaves

    if not where:
        return None
    traced = jx.trace(differentiated, *types)
    count, outvars = len(eqn.outvars), traced.jaxpr.outvars
    named = {}
    for k, (var, source) in enumerate(zip(outvars[count:], flow.forwarded(traced.jaxpr)[count:], strict=True)):
        name = value_name(number, k, is_inside=True)
        if source is None and not isinstance(var, core.Literal) and (names is None or name in names):
            named |= {var: name} if _can_be_tagged(var.aval) and var not in named else {}
    if not named:
        return None

    @jax.custom_vjp
    def call(*inputs: Any) -> list[Any]:
        return run(*inputs)

    def forward(*inputs: Any) -> tuple[list[Any], list[Any]]:
        values = dict(zip(map(id, outvars), core.jaxpr_as_fun(traced)(*inputs), strict=True))
        values |= {id(var): checkpoint_name(values[id(var)], name) for var, name in named.items()}
        out = [values[id(var)] for var in outvars]
        return out[:count], out[count:]

    def backward(leaves: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
        of_inexact = [ct for ct, var in zip(cotangents, eqn.outvars, strict=True) if has_gradient(var.aval)]
        gradients = iter(jax.tree.unflatten(pull_tree, leaves)(of_inexact))
        return tuple(next(gradients) if i in where else None for i in range(len(eqn.invars)))

    call.defvjp(forward, backward)
    fixed = [i for i, aval in enumerate(types) if i not in where and has_gradient(aval)]
    return lambda *inputs: call(*replaced(inputs, fixed, [_fixed(inputs[i]) for i in fixed]))


@jax.custom_jvp
def _fixed(x: Any) -> Any:
    """What a `custom_vjp` closes over: the tagged one takes it as an argument, and its gradient would be silently zero."""
    return x


@partial(_fixed.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    if not isinstance(tangents[0], SymbolicZero):
        raise TypeError(
            f"the function of a jax.custom_vjp in the block closes over {jax.typeof(primals[0]).str_short()}, or what is "
            "computed of it, which is differentiated, and its rules say nothing about that: pass it to the function as an "
            "argument"
        )
    return primals[0], tangents[0]


def _can_be_tagged(aval: Any) -> bool:
    if not isinstance(getattr(aval, "dtype", None), np.dtype) or jx.nbytes(aval) == 0:
        return False
    return not jnp.issubdtype(aval.dtype, jnp.complexfloating)  # JAX cannot keep those by name
