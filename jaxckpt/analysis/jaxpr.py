"""A block's jaxpr: made once, walked, and run in place of the Python function.

All knowledge of how JAX writes a jaxpr is in this file. Only public names of `jax` and `jax.extend` are used; two
things that have no public name are recognised by theirs: the primitive `io_callback`, and under `jax_remat3` the
`call_hi_primitive` equation that stands for a tag or a checkpoint.
"""

import hashlib
import math
import re
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxckpt._leaves import replaced

# Calls that return what their inner jaxpr returns, so that an output can be followed to an input. custom_jvp and
# custom_vjp are not among them: an identity with a gradient of its own is not a pass-through.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "eval_jaxpr")
_CHECKPOINTS = ("remat2", "checkpoint")

_NAMED_AXIS = "NamedAxisEffect"  # of collectives; nothing happens on the side

# ErrorEffect: `checkify.check`, a value once `checkify` has transformed the program; JAX refuses it where nothing does.
_HARMLESS = (_NAMED_AXIS, "DebugEffect", "OrderedDebugEffect", "ErrorEffect")


def trace(fn: Callable[..., Any], *args: Any) -> Any:
    """The closed jaxpr of `fn(*args)`; traced values that `fn` closes over become its constants."""
    return jax.make_jaxpr(fn)(*args)


def as_function(closed: Any, first: int = 0) -> Callable[..., list[Any]]:
    """A function of flat arguments that runs the jaxpr, under any transformation; `first` is for `as_numbered_function`."""
    return core.jaxpr_as_fun(closed)


def closed(jaxpr: Any, constants: list[Any]) -> Any:
    """A jaxpr with values for its constants."""
    return core.ClosedJaxpr(jaxpr, constants)


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


def inlined(closed: Any, checkpoints: bool = False) -> Any:
    """The same jaxpr with nested jit taken apart, so that it is a flat list of what is computed.

    What has a derivative of its own (`custom_jvp`, `custom_vjp`) and loops stay whole, and, unless they are asked for, so do
    checkpoints. Equations keep their source and name scope.
    """
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
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
            inner = None if is_checkpoint(eqn) and not checkpoints else _transparent_closed(eqn)
            if inner is None:
                # One jaxpr may be called twice: its variables are new in each call.
                out = [var if _is_dropped(var) or call is None else core.Var(var.aval) for var in eqn.outvars]
                eqns.append(eqn.replace(invars=list(map(now, eqn.invars)), outvars=out, source_info=source))
                renamed.update(zip(eqn.outvars, out, strict=True))
                continue
            for var, value in zip(inner.jaxpr.constvars, inner.consts, strict=True):
                renamed[var] = core.Var(var.aval)
                constants[renamed[var]] = value
            renamed.update(zip(inner.jaxpr.invars, list(map(now, eqn.invars)), strict=True))
            copy(inner.jaxpr, source, of_library or _is_of_library(inner.jaxpr))
            renamed.update(zip(eqn.outvars, list(map(now, inner.jaxpr.outvars)), strict=True))

    copy(closed.jaxpr)
    outvars = list(map(now, closed.jaxpr.outvars))
    jaxpr = closed.jaxpr.replace(constvars=list(constants), outvars=outvars, eqns=eqns)
    return core.ClosedJaxpr(jaxpr, list(constants.values()))


def merged(closed: Any) -> Any:
    """An inlined jaxpr in which nothing is computed twice from the same values in the same way.

    XLA merges such equations, and then keeps one value where the program says two: a carry of bfloat16 that is converted to
    float32 for a norm's mean and again for its variance, say. Loops, calls and side effects are left alone.
    """
    renamed: dict[Any, Any] = {}
    first: dict[Any, list[Any]] = {}
    eqns: list[Any] = []

    def now(var: Any) -> Any:
        return var if isinstance(var, core.Literal) else renamed.get(var, var)

    for eqn in closed.jaxpr.eqns:
        eqn = eqn.replace(invars=list(map(now, eqn.invars)))
        key = _computation(eqn)
        twin = None if key is None else first.setdefault(key, eqn.outvars)
        if twin is None or twin is eqn.outvars or any(map(_is_dropped, twin)):
            eqns.append(eqn)
        else:
            renamed.update(zip(eqn.outvars, twin, strict=True))
    return core.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns, outvars=list(map(now, closed.jaxpr.outvars))), closed.consts)


def _computation(eqn: Any) -> Any:
    """What an equation computes of which values, and how (on the host, say), as a key; None where that has none."""
    if eqn.effects or inner_jaxprs(eqn) or eqn.primitive.name == "rng_uniform":  # whose draws differ each time
        return None
    given = tuple((v.aval, np.asarray(v.val).tobytes()) if isinstance(v, core.Literal) else v for v in eqn.invars)
    key = eqn.primitive, given, tuple(sorted(eqn.params.items())), eqn.ctx
    try:
        hash(key)
    except TypeError:  # of parameters that have no hash
        return None
    return key


def residual_bytes(closed: Any) -> list[int]:
    """For each equation, the bytes that autodiff keeps of it where nothing is checkpointed."""
    run = as_numbered_function(closed)
    traced = trace(lambda *inputs: jax.tree.leaves(vjp_of_inexact(run, inputs)[1]), *closed.in_avals).jaxpr
    made_by = {var: eqn for eqn in traced.eqns for var in eqn.outvars}
    found = [0] * len(closed.jaxpr.eqns)
    for var in {var for var in traced.outvars if not isinstance(var, core.Literal)} & made_by.keys():
        if (number := number_of(made_by[var])) is not None:
            found[number] += nbytes(var.aval)
    return found


_NUMBER = "jaxckpt_equation_"


def number_of(eqn: Any) -> int | None:
    """Which equation of a numbered jaxpr this one comes of."""
    found = re.search(rf"{_NUMBER}(\d+)", str(eqn.source_info.name_stack))
    return None if found is None else int(found[1])


def source_of(eqn: Any) -> tuple[str, int] | None:
    """The file and line of user code that an equation comes of: the innermost that is not of JAX, Flax or this library."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    return next(((frame.file_name, frame.line_num) for frame in frames if not is_in_library(frame.file_name)), None)


def is_in_library(path: str) -> bool:
    """Whether a file is of JAX, Flax, Python or this library, its models left out."""
    return bool(_IN_LIBRARIES.search(path))


_IN_LIBRARIES = re.compile(
    r"[/\\](jax|jaxlib|flax)[/\\]|[/\\]jaxckpt[/\\](?!models[/\\])|^<|[/\\]contextlib\.py$|[/\\]functools\.py$"
)


def _is_of_library(jaxpr: Any) -> bool:
    """Whether a jaxpr is of a function of JAX or Flax, such as `jnp.where`."""
    return bool(_IN_LIBRARIES.search(str(jaxpr.debug_info.func_src_info)))


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
    if (number := number_of(eqn)) is not None:
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
    inner = next(iter(inner_jaxprs(eqn)), None) if name == "custom_jvp_call" else _transparent(eqn)
    if inner is not None and not isinstance(inner.outvars[k], core.Literal):
        found = origin(inner, inner.outvars[k], stacked)
        if found.input is None or found.input[0] != "program":
            return found
        return origin(jaxpr, eqn.invars[found.input[1]], stacked)
    given = [origin(jaxpr, v) for v in eqn.invars if not isinstance(v, core.Literal)]
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
    inner = _transparent(eqn)
    if inner is None and looked_into:
        inner = next(iter(inner_jaxprs(eqn)), None)
    if inner is None or len(inner.outvars) != len(eqn.outvars):
        return eqn
    found = next((e for e in inner.eqns if inner.outvars[k] in e.outvars), None)
    return eqn if found is None else _innermost(found, found.outvars.index(inner.outvars[k]))


_CONTROL_FLOW = ("scan", "cond")


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


# --- tags of our own -----------------------------------------------------------------------------------------------------

_VALUE = "jaxckpt_value_"


def value_name(equation: int, k: int, is_inside: bool = False) -> str:
    """The tag that `with_tags` gives the `k`-th output of an equation, or the `k`-th value that its derivative wants."""
    return f"{_VALUE}{equation}{'in' if is_inside else 'out'}{k}"


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
        traced = trace(fn, *(var.aval for var in invars))
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
            if (names is None or name in names) and not _is_dropped(var) and _can_be_tagged(var.aval):
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

    where = [i for i, var in enumerate(eqn.invars) if has_gradient(var.aval)]
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
    traced = trace(differentiated, *(var.aval for var in eqn.invars))
    count, outvars = len(eqn.outvars), traced.jaxpr.outvars
    named = {}
    for k, (var, source) in enumerate(zip(outvars[count:], forwarded(traced.jaxpr)[count:], strict=True)):
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
    return call


def _can_be_tagged(aval: Any) -> bool:
    if not isinstance(getattr(aval, "dtype", None), np.dtype) or nbytes(aval) == 0:
        return False
    return not jnp.issubdtype(aval.dtype, jnp.complexfloating)  # JAX cannot keep those by name


def nbytes(aval: Any) -> int:
    """Bytes of a value, as JAX counts them: without padding."""
    return math.prod(aval.shape) * aval.dtype.itemsize


def varying(aval: Any) -> frozenset[str]:
    """The mesh axes along which a value differs under `shard_map`."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(manual, "varying", None) or getattr(aval, "vma", None) or ())


def slice_types(tree: Any) -> Any:
    """`tree` as shapes, dtypes and shardings without its leading axis: what one block is given."""
    return jax.eval_shape(lambda t: jax.tree.map(lambda leaf: leaf[0], t), tree)


def tags(closed: Any) -> frozenset[str]:
    """Every name given by `jax.ad_checkpoint.checkpoint_name`, in nested jaxprs and rules of `custom_vjp` too; not ours."""
    eqns = list(equations(closed.jaxpr))
    if any(eqn.primitive.name.startswith("custom_vjp") for eqn in eqns):
        eqns += equations(_differentiated(closed).jaxpr)
    return frozenset(tag for eqn in eqns if (tag := tag_of(eqn)) is not None and not is_value_name(tag))


def _differentiated(closed: Any) -> Any:
    """The jaxpr of a jaxpr's forward and backward pass: one of them runs the forward rules of `custom_vjp`.

    The backward pass does where the rule stands in a `jax.checkpoint` of the block's own.
    """
    fn = core.jaxpr_as_fun(closed)

    def forward_and_backward(*inputs):
        out, pullback = vjp_of_inexact(fn, inputs)
        return pullback(out)

    return jax.make_jaxpr(forward_and_backward)(*closed.in_avals)


def vjp_of_inexact(fn: Callable[..., list[Any]], inputs: Sequence[Any]) -> tuple[list[Any], Callable[..., Any]]:
    """`jax.vjp` of the outputs that have gradients, for the inputs that have."""
    inexact = [i for i, value in enumerate(inputs) if jnp.issubdtype(value.dtype, jnp.inexact)]

    def of_inexact(*values):
        return [value for value in fn(*replaced(inputs, inexact, values)) if jnp.issubdtype(value.dtype, jnp.inexact)]

    return jax.vjp(of_inexact, *(inputs[i] for i in inexact))


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


def effects(closed: Any) -> list[str]:
    """The side effects, debugging output included."""
    return sorted(str(effect) for effect in closed.effects if type(effect).__name__ != _NAMED_AXIS)


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
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


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
        elif (inner := _transparent(eqn)) is not None:
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
        inner = _transparent(eqn)
        fixed = [False] * len(eqn.outvars) if inner is None else constant_in_derivatives(inner)
        moving.update(var for var, yes in zip(eqn.outvars, fixed, strict=True) if not yes and _is_differentiable(var))
    return [isinstance(var, core.Literal) or var not in moving for var in jaxpr.outvars]


def _is_differentiable(var: Any) -> bool:
    return hasattr(var.aval, "dtype") and jnp.issubdtype(var.aval.dtype, jnp.inexact)


def collective_axes(closed: Any) -> frozenset[Any]:
    """The named axes along which something is summed, gathered or the like."""
    return frozenset(effect.name for effect in closed.effects if type(effect).__name__ == _NAMED_AXIS)


def dependent(jaxpr: Any, inputs: Sequence[int]) -> set[Any]:
    """The variables that depend on any of these inputs, or on a side effect."""
    found = {jaxpr.invars[i] for i in inputs}
    for eqn in jaxpr.eqns:
        if eqn.effects or any(not isinstance(var, core.Literal) and var in found for var in eqn.invars):
            found.update(eqn.outvars)
    return found


def selected(closed: Any, outputs: Sequence[int]) -> Any:
    """The jaxpr with only these outputs, and only the equations that they need."""
    outvars = [closed.jaxpr.outvars[i] for i in outputs]
    needed = {var for var in outvars if not isinstance(var, core.Literal)}
    eqns = []
    for eqn in reversed(closed.jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            eqns.append(eqn)
            needed.update(var for var in eqn.invars if not isinstance(var, core.Literal))
    return core.ClosedJaxpr(closed.jaxpr.replace(outvars=outvars, eqns=eqns[::-1]), closed.consts)


def used(closed: Any) -> list[bool]:
    """Which inputs the outputs depend on."""
    jaxpr = selected(closed, range(len(closed.jaxpr.outvars))).jaxpr
    found = {
        var for vars in [jaxpr.outvars, *(e.invars for e in jaxpr.eqns)] for var in vars if not isinstance(var, core.Literal)
    }
    return [var in found for var in jaxpr.invars]


def _transparent(eqn: Any) -> Any:
    closed = _transparent_closed(eqn)
    return None if closed is None else closed.jaxpr


def _transparent_closed(eqn: Any) -> Any:
    if eqn.primitive.name not in _CALLS and not is_checkpoint(eqn):
        return None
    (inner,) = _inner(eqn)
    closed = inner if hasattr(inner, "jaxpr") else core.ClosedJaxpr(inner, [])
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


def _inner(eqn: Any) -> list[Any]:
    params = eqn.params["_prim"].params if "_prim" in eqn.params else eqn.params
    return list(core.jaxprs_in_params(params))


def _is_dropped(var: Any) -> bool:
    return type(var).__name__ == "DropVar"


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
    """Whether two closed jaxprs compute the same: equal text, and equal constants."""
    if text(a) != text(b) or len(a.consts) != len(b.consts):
        return False
    return all(x is y or np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a.consts, b.consts, strict=True))
