"""A block's jaxpr: made once, walked, and run in place of the Python function.

All knowledge of how JAX writes a jaxpr is here and in `numbering`, `inlining`, `tagging`, `flow` and `sources`. Only public
names of `jax` and `jax.extend` are used; what has no public name is recognised by its own: the primitive `io_callback`, the
error of a `custom_vjp` that closes over what is differentiated, and under `jax_remat3` the `call_hi_primitive` equation that
stands for a tag or a checkpoint.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxckpt._leaves import replaced
from jaxckpt.analysis.refs import put_aside, put_back

# Calls that return what their inner jaxpr returns, so that an output can be followed to an input. custom_jvp and
# custom_vjp are not among them: an identity with a gradient of its own is not a pass-through.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr")
_CHECKPOINTS = ("remat2", "checkpoint")


_NAMED_AXIS = "NamedAxisEffect"  # of collectives; nothing happens on the side


# ErrorEffect: `checkify.check`, a value once `checkify` has transformed the program; JAX refuses it where nothing does.
_HARMLESS = (_NAMED_AXIS, "DebugEffect", "OrderedDebugEffect", "ErrorEffect")


def trace(fn: Callable[..., Any], *args: Any) -> Any:
    """The closed jaxpr of `fn(*args)`; traced values that `fn` closes over become its constants, its own Refs values."""
    closed = jax.make_jaxpr(fn)(*args)
    has_own = any(type(effect).__name__ == "InternalMutableArrayEffect" for effect in closed.effects)
    return _without_refs(closed) if has_own and not closes_over_ref(closed) else closed


def _without_refs(closed: Any) -> Any:
    """The same computation without a `jax.Ref` that is born and dies in it: what is written is passed on as a value.

    Differentiated as they are, such Refs give wrong gradients in `lax.scan`, and in `jax.checkpoint` those or an error. The
    function is the one by which JAX compiles them, and has no public name; what it would drop is put aside.
    """
    from jax._src.state.discharge import discharge_state

    return put_back(discharge_state(put_aside(closed), lower=False))


def closes_over_ref(closed: Any) -> bool:
    """Whether a function closes over a `jax.Ref`, which it may read and write."""
    return any(isinstance(value, jax.Ref) for value in _constants(closed))


def as_function(closed: Any) -> Callable[..., list[Any]]:
    """A function of flat arguments that runs the jaxpr, under any transformation."""
    return core.jaxpr_as_fun(closed)


def closed(jaxpr: Any, constants: list[Any]) -> Any:
    """A jaxpr with values for its constants."""
    return core.ClosedJaxpr(jaxpr, constants)


def variables(given: Iterable[Any]) -> list[Any]:
    """Of what an equation is given, or a jaxpr returns, all that are no literals."""
    return [var for var in given if not isinstance(var, core.Literal)]


def nbytes(aval: Any) -> int:
    """Bytes of a value, as JAX counts them: without padding.

    Raises:
        TypeError: a size is a symbol (`jax.export.symbolic_shape`), for which there is no number.
    """
    if not all(isinstance(size, int) for size in aval.shape):
        raise TypeError(
            f"{aval.dtype}[{','.join(map(str, aval.shape))}] has a size that is a symbol, and bytes are compared here: the "
            "policies cheap and budget:, stages, tiles, explain and plan need numbers. Find a plan for a typical size and "
            "export under it by a policy that counts nothing, such as 'dots' or 'save:NAMES', or export for that size"
        )
    return math.prod(aval.shape) * aval.dtype.itemsize


def varying(aval: Any) -> frozenset[str]:
    """The mesh axes along which a value differs under `shard_map`."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", None) or getattr(aval, "vma", None) or ())


def slice_types(tree: Any) -> Any:
    """`tree` as shapes, dtypes and shardings without its leading axis: what one block is given."""
    return jax.eval_shape(lambda t: jax.tree.map(lambda leaf: leaf[0], t), tree)


def vjp_of_inexact(fn: Callable[..., list[Any]], inputs: Sequence[Any]) -> tuple[list[Any], Callable[..., Any]]:
    """`jax.vjp` of the outputs that have gradients, for the inputs that can have."""
    types = list(map(jax.typeof, inputs))
    try:
        return _vjp(fn, inputs, inexact(types))
    except Exception as error:
        if not _is_closed_over(error):
            raise
    return _vjp(fn, inputs, differentiable(fn, types))


def differentiable(fn: Callable[..., list[Any]], types: Sequence[Any]) -> list[int]:
    """The inputs that `fn` can be differentiated by: inexact ones, but for what a `custom_vjp` inside closes over."""

    def can_be(where: list[int]) -> bool:
        try:
            jax.eval_shape(lambda *inputs: _vjp(fn, inputs, where)[0], *types)
        except Exception as error:
            if not _is_closed_over(error):
                raise
            return False
        return True

    def among(where: list[int]) -> list[int]:  # by halves: most can be, and all at once
        if can_be(where):
            return where
        half = len(where) // 2
        return among(where[:half]) + among(where[half:]) if half else []

    return among(inexact(types))


def _vjp(fn: Callable[..., list[Any]], inputs: Sequence[Any], where: Sequence[int]) -> tuple[list[Any], Callable[..., Any]]:
    def of_inexact(*values):
        out = fn(*replaced(inputs, where, values))
        return [out[k] for k in inexact(out)]

    return jax.vjp(of_inexact, *(inputs[i] for i in where))


def inexact(values: Sequence[Any]) -> list[int]:
    """Which values, or types, can have a gradient."""
    return [i for i, value in enumerate(values) if jnp.issubdtype(value.dtype, jnp.inexact)]


def _is_closed_over(error: Exception) -> bool:
    """Whether it is JAX's for the derivative by an array that the function of a `custom_vjp` closes over."""
    return type(error).__name__ == "CustomVJPException"


def effects(closed: Any) -> list[str]:
    """The side effects, debugging output included."""
    return sorted(map(_effect_name, (e for e in closed.effects if type(e).__name__ != _NAMED_AXIS)))


def impure_effects(closed: Any) -> list[str]:
    """The side effects that cannot be run again: all but debugging output. `io_callback`s by their function's name."""
    effects = [effect for effect in closed.effects if type(effect).__name__ not in _HARMLESS]
    if not effects:
        return []
    callbacks = [eqn.params["callback"] for eqn in equations(closed.jaxpr) if eqn.primitive.name == "io_callback"]
    if callbacks:
        return [f"io_callback({_callback_name(callback)})" for callback in callbacks]
    return sorted(set(map(_effect_name, effects)))


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of nested jaxprs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


def collective_axes(closed: Any) -> frozenset[Any]:
    """The named axes along which something is summed, gathered or the like."""
    return frozenset(effect.name for effect in closed.effects if type(effect).__name__ == _NAMED_AXIS)


def transparent(eqn: Any) -> Any:
    """The jaxpr that an equation only calls, nested jit or checkpoint, whose inputs and outputs are its own; else None."""
    closed = transparent_closed(eqn)
    return None if closed is None else closed.jaxpr


def transparent_closed(eqn: Any) -> Any:
    """As `transparent`, with its constants."""
    if eqn.primitive.name not in _CALLS and not is_checkpoint(eqn):
        return None
    (inner,) = _inner(eqn)
    closed = _closed(inner)
    return closed if len(closed.jaxpr.invars) == len(eqn.invars) else None


def is_checkpoint(eqn: Any) -> bool:
    """Whether an equation is a `jax.checkpoint`."""
    return eqn.primitive.name in _CHECKPOINTS or type(eqn.params.get("_prim")).__name__ == "RematTraced"


def is_batched(value: Any) -> bool:
    """Whether a traced value is one of many under `vmap`, whose axis its type does not show."""
    return type(value).__name__ == "BatchTracer"


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters: what it calls, a loop's body, branches."""
    return [getattr(inner, "jaxpr", inner) for inner in _inner(eqn)]


def inner_closed(eqn: Any) -> list[Any]:
    """As `inner_jaxprs`, with their constants."""
    return list(map(_closed, _inner(eqn)))


def _inner(eqn: Any) -> list[Any]:
    """As `inner_jaxprs`, with their constants, which `core.jaxprs_in_params` drops before JAX 0.11."""
    params = eqn.params["_prim"].params if "_prim" in eqn.params else eqn.params
    values = [v for value in params.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [value for value in values if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]


def is_dropped(var: Any) -> bool:
    """Whether an output of an equation is used nowhere."""
    return type(var).__name__ == "DropVar"


def _effect_name(effect: Any) -> str:
    return "a check of checkify" if type(effect).__name__ == "ErrorEffect" else str(effect)


def _callback_name(callback: Any) -> str:
    fn = getattr(callback, "callback_func", callback)
    return getattr(fn, "__name__", repr(fn))


def text(closed: Any) -> str:
    """A jaxpr as text, equal for equal programs: without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(closed.jaxpr))


def digest(closed: Any) -> str:
    """A hash of what a jaxpr computes, the values of constants aside; the same in another process."""
    return hashlib.sha256(text(closed).encode()).hexdigest()[:16]


def same_program(a: Any, b: Any) -> bool:
    """Whether two closed jaxprs compute the same: equal text, and equal constants, those of nested jaxprs too."""
    given, other = _constants(a), _constants(b)
    if text(a) != text(b) or len(given) != len(other):
        return False
    return all(x is y or np.array_equal(_numbers(x), _numbers(y)) for x, y in zip(given, other, strict=True))


def _numbers(value: Any) -> np.ndarray:
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def _constants(closed: Any) -> list[Any]:
    """The constants of a jaxpr and of those nested in it."""
    nested = [inner for eqn in closed.jaxpr.eqns for inner in _inner(eqn)]
    return [*closed.consts, *(value for inner in nested for value in _constants(_closed(inner)))]


def _closed(jaxpr: Any) -> Any:
    return jaxpr if hasattr(jaxpr, "jaxpr") else core.ClosedJaxpr(jaxpr, [])
