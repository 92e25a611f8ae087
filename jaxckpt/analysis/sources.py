"""Where something comes of: the user's line, and the value of the block that a program keeps."""

import contextlib
import functools
import importlib.util
import os
from typing import Any, NamedTuple

from jax.extend import core

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import numbering


def source_of(eqn: Any) -> tuple[str, int] | None:
    """The file and line of user code that an equation comes of: the innermost that is not of JAX, Flax or this library."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    return next(((frame.file_name, frame.line_num) for frame in frames if not is_in_library(frame.file_name)), None)


def is_in_library(path: str) -> bool:
    """Whether a file is of JAX, Flax, Python or this library, its models left out."""
    return path.startswith(_LIBRARIES) and not path.startswith(_MODELS)


def _folder_of(package: str, *inside: str) -> str:
    """Where a package lies. Names of folders tell nothing: a user's code may lie in one that is called `jax`."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return os.path.join(os.path.dirname(spec.origin), *inside, "")


_LIBRARIES = (*map(_folder_of, ("jax", "jaxlib", "flax", "jaxckpt")), contextlib.__file__, functools.__file__, "<")
_MODELS = _folder_of("jaxckpt", "models")


def is_of_library(jaxpr: Any) -> bool:
    """Whether a jaxpr is of a function of JAX or Flax, such as `jnp.where`."""
    return is_in_library(jaxpr.debug_info.func_filename or "")


class Origin(NamedTuple):
    """Where a value of a program that runs a numbered jaxpr in loops comes from.

    Fields:
        stacked: whether it is an output that `lax.scan` stacks, one slice per block.
        number: the equation of the numbered jaxpr that computes it; None for an input, or for what is not of the block.
        op: the primitive that computes it, inside that equation where it is a call or a loop; "" for inputs.
        source: the file and line of that operation, where there is one.
        input: for an input of the loop's body, "carry" or "x", and which of them; for one of the program, "program"; for
            what depends on no input at all, such as zeros, "constant".
    """

    stacked: bool
    number: int | None = None
    op: str = ""
    source: tuple[str, int] | None = None
    input: tuple[str, int] | None = None


# What checkpointing and our loops put around a value that they keep.
WRAPPERS = ("device_put", "reduce_precision", "name", "reshape", "call_hi_primitive")


def origin(jaxpr: Any, var: Any, stacked: bool = False) -> Origin:
    """Follows a variable through loops, calls and wrappers to the numbered equation, or the input, it comes of."""
    if var in jaxpr.invars:
        return Origin(stacked, input=("program", jaxpr.invars.index(var)))
    eqn = next((eqn for eqn in jaxpr.eqns if var in eqn.outvars), None)
    if eqn is None:
        return Origin(stacked)
    k = eqn.outvars.index(var)
    if (number := numbering.number_of(eqn)) is not None:
        inner = _innermost(eqn, k)
        is_of_user = eqn.primitive.name in _CONTROL_FLOW
        return Origin(stacked, number, inner.primitive.name, source_of(inner if is_of_user else eqn))
    name = eqn.primitive.name
    if name == "scan":
        body = eqn.params["jaxpr"].jaxpr
        constants, carried = _constants_and_carried(eqn, body)
        if k < carried:
            return Origin(stacked, op=name)
        found = origin(body, body.outvars[k], stacked=True)
        if found.input is None or found.input[0] != "program":
            return found
        i = found.input[1] - constants
        if i < 0:
            return origin(jaxpr, eqn.invars[i + constants], stacked)
        return Origin(True, input=("carry", i) if i < carried else ("x", i - carried))
    if name in WRAPPERS and not isinstance(eqn.invars[0], core.Literal):
        return origin(jaxpr, eqn.invars[0], stacked)
    inner = next(iter(jx.inner_jaxprs(eqn)), None) if name == "custom_jvp_call" else jx.transparent(eqn)
    if inner is not None and not isinstance(inner.outvars[k], core.Literal):
        found = origin(inner, inner.outvars[k], stacked)
        if found.input is None or found.input[0] != "program":
            return found
        return origin(jaxpr, eqn.invars[found.input[1]], stacked)
    given = [origin(jaxpr, v) for v in jx.variables(eqn.invars)]
    is_constant = all(o.input is not None and o.input[0] == "constant" for o in given)
    return Origin(stacked, op=name, input=("constant", 0) if is_constant else None)


def _constants_and_carried(eqn: Any, body: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants and how many are carried. The others have one axis more than in the body.

    (The equation's parameters say it too, in another way in each version of JAX.)
    """
    carried = sum(outer.aval.ndim == inner.aval.ndim for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
    sliced = sum(outer.aval.ndim > inner.aval.ndim for outer, inner in zip(eqn.invars, body.invars, strict=True))
    return len(body.invars) - carried - sliced, carried


def _innermost(eqn: Any, k: int) -> Any:
    """The equation that computes the `k`-th output of an equation, inside the calls, loops and branches that it may be."""
    looked_into = eqn.primitive.name in _CONTROL_FLOW or eqn.primitive.name.startswith(("custom_jvp", "custom_vjp"))
    inner = jx.transparent(eqn)
    if inner is None and looked_into:
        inner = next(iter(jx.inner_jaxprs(eqn)), None)
    if inner is None or len(inner.outvars) != len(eqn.outvars):
        return eqn
    found = next((e for e in inner.eqns if inner.outvars[k] in e.outvars), None)
    return eqn if found is None else _innermost(found, found.outvars.index(inner.outvars[k]))


_CONTROL_FLOW = ("scan", "cond")


def place_of(eqn: Any) -> str:
    """Where an equation comes from, as "file.py:12"; "" where that is not known."""
    source = source_of(eqn)
    return f"{os.path.basename(source[0])}:{source[1]}" if source else ""
