"""A block's jaxpr: made once, walked, and run in place of the Python function.

All knowledge of how JAX writes a jaxpr is in this file. Only public names of `jax` and `jax.extend` are used; two
things that have no public name are recognised by theirs: the primitive `io_callback`, and under `jax_remat3` the
`call_hi_primitive` equation that stands for a tag or a checkpoint.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxckpt._leaves import replaced

# Calls that return what their inner jaxpr returns, so that an output can be followed to an input. custom_jvp and
# custom_vjp are not among them: an identity with a gradient of its own is not a pass-through.
_TRANSPARENT = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")

# ErrorEffect: `checkify.check`, a value once `checkify` has transformed the program; JAX refuses it where nothing does.
_HARMLESS = ("NamedAxisEffect", "DebugEffect", "OrderedDebugEffect", "ErrorEffect")


def trace(fn: Callable[..., Any], *args: Any) -> Any:
    """The closed jaxpr of `fn(*args)`; traced values that `fn` closes over become its constants."""
    return jax.make_jaxpr(fn)(*args)


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A function of flat arguments that runs the jaxpr, under any transformation."""
    return core.jaxpr_as_fun(closed)


def slice_types(tree: Any) -> Any:
    """`tree` as shapes, dtypes and shardings without its leading axis: what one block is given."""
    return jax.eval_shape(lambda t: jax.tree.map(lambda leaf: leaf[0], t), tree)


def tags(closed: Any) -> frozenset[str]:
    """Every name given by `jax.ad_checkpoint.checkpoint_name`, in nested jaxprs and rules of `custom_vjp` too."""
    found = set()
    eqns = list(equations(closed.jaxpr))
    if any(eqn.primitive.name.startswith("custom_vjp") for eqn in eqns):
        eqns += equations(_differentiated(closed).jaxpr)
    for eqn in eqns:
        if eqn.primitive.name == "name":
            found.add(eqn.params["name"])
        elif type(hi := eqn.params.get("_prim")).__name__ == "CheckpointName":
            found.add(hi.name)
    return frozenset(found)


def _differentiated(closed: Any) -> Any:
    """The jaxpr of a jaxpr's forward and backward pass: one of them runs the forward rules of `custom_vjp`.

    The backward pass does where the rule stands in a `jax.checkpoint` of the block's own.
    """
    fn = core.jaxpr_as_fun(closed)
    inexact = [i for i, aval in enumerate(closed.in_avals) if jnp.issubdtype(aval.dtype, jnp.inexact)]

    def forward_and_backward(*inputs):
        def of_inexact(*values):
            out = fn(*replaced(inputs, inexact, values))
            return [value for value in out if jnp.issubdtype(value.dtype, jnp.inexact)]

        out, pullback = jax.vjp(of_inexact, *(inputs[i] for i in inexact))
        return pullback(out)

    return jax.make_jaxpr(forward_and_backward)(*closed.in_avals)


def impure_effects(closed: Any) -> list[str]:
    """The side effects that cannot be run again: all but debugging output. `io_callback`s by their function's name."""
    effects = [effect for effect in closed.effects if type(effect).__name__ not in _HARMLESS]
    if not effects:
        return []
    callbacks = [eqn.params["callback"] for eqn in equations(closed.jaxpr) if eqn.primitive.name == "io_callback"]
    if callbacks:
        return [f"io_callback({_callback_name(callback)})" for callback in callbacks]
    return sorted({str(effect) for effect in effects})


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from equations(inner)


def forwarded(jaxpr: Any) -> list[int | None]:
    """For each output the index of the input that it is, unchanged; None where it is computed.

    Looks through nested jit and checkpoint, which hide a pass-through from `lax.scan`.
    """
    source = {var: i for i, var in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        inner = _transparent(eqn)
        if inner is None:
            continue
        for var, i in zip(eqn.outvars, forwarded(inner), strict=True):
            if i is not None and not isinstance(eqn.invars[i], core.Literal) and eqn.invars[i] in source:
                source[var] = source[eqn.invars[i]]
    return [None if isinstance(var, core.Literal) else source.get(var) for var in jaxpr.outvars]


def _transparent(eqn: Any) -> Any:
    hi = eqn.params.get("_prim")
    if eqn.primitive.name not in _TRANSPARENT and type(hi).__name__ != "RematTraced":
        return None
    (inner,) = _inner(eqn)
    return inner if len(inner.invars) == len(eqn.invars) else None


def _inner(eqn: Any) -> list[Any]:
    params = eqn.params["_prim"].params if "_prim" in eqn.params else eqn.params
    return [getattr(inner, "jaxpr", inner) for inner in core.jaxprs_in_params(params)]


def _callback_name(callback: Any) -> str:
    fn = getattr(callback, "callback_func", callback)
    return getattr(fn, "__name__", repr(fn))


def same_program(a: Any, b: Any) -> bool:
    """Whether two closed jaxprs compute the same: equal text, but for addresses in memory, and equal constants."""
    texts = [re.sub(r" at 0x[0-9a-f]+", "", str(closed)) for closed in (a, b)]
    if texts[0] != texts[1] or len(a.consts) != len(b.consts):
        return False
    return all(x is y or np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a.consts, b.consts, strict=True))
