"""How the compiler splits what a block computes over a mesh, and what it sends for it.

A jaxpr has the shapes of whole arrays; how they are split over the devices the compiler decides, from the shardings of a
program's arguments and the constraints in it. It is asked twice: the program that runs a stack is compiled with the inputs
of the stack looked at (`Inputs`), and the forward pass of one block is compiled with its inputs split so, all of its values
looked at (`jax.debug.inspect_array_sharding`), and what it sends for which equation read off its text (`shares_of`). Inside
of `shard_map` along all axes, shapes are those of one device already.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxckpt.analysis import inlining, numbering
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import REFERENCE, sent_bytes
from jaxckpt.analysis.shares import Shares
from jaxckpt.engine.run import Run
from jaxckpt.memory.collectives import calls
from jaxckpt.memory.meshes import lowered_on, mesh_on
from jaxckpt.memory.runs import observing
from jaxckpt.memory.targets import Target


class NotTold(ValueError):
    """How something is split cannot be told."""


class Inputs:
    """A block and what it is given, seen while the run is traced; with shardings, once the program is compiled."""

    def __init__(self, run: Run, checkpoints: bool):
        self.block = run.names.block
        flat = inlining.merged(inlining.inlined(run.closed, checkpoints=checkpoints))
        self.jaxpr, self.constants, self.parameters = flat.jaxpr, list(map(jax.typeof, flat.consts)), run.parameters
        self.carried = run.carried
        self.leaves = [(jax.typeof(leaf), part == 0) for part, leaves in enumerate(run.leaves) for leaf in leaves]
        self.shardings: dict[int, Any] = {}
        for i, leaf in enumerate(leaf for leaves in run.leaves for leaf in leaves):
            if _is_plain(leaf):
                saw: Any = functools.partial(self.shardings.setdefault, i)
                jax.debug.inspect_array_sharding(leaf, callback=saw)

    def types(self) -> list[Any]:
        """Of what one block is given."""
        return [_placed(aval, self.shardings.get(i), is_stacked) for i, (aval, is_stacked) in enumerate(self.leaves)]


def inputs_of(run: Run, checkpoints: bool) -> Inputs | None:
    """The inputs of a run that is being traced; None where they have the shapes of one device already.

    Arguments:
        checkpoints: of the block's own are inlined too.

    Raises:
        NotTold: it cannot be told how they are split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if any(map(jx.is_batched, itertools.chain(*run.leaves))):
        raise NotTold("it runs under vmap, where it has the shapes of one example")
    if mesh.manual_axes and set(mesh.manual_axes) != set(mesh.axis_names):
        raise NotTold("it runs in shard_map along some axes of the mesh only")
    return None if mesh.manual_axes else Inputs(run, checkpoints)


def shares_in(call: Callable[[list[Any]], Any], arrays: list[Any], where: Target) -> list[Shares | None]:
    """Those of the stack that a program runs, or of what is no stack; None where its values have the shapes of one device.

    Of the first blocks too, if they run under a setting of their own.

    Raises:
        NotTold: it cannot be told how they are split.
    """
    seen: list[tuple[bool, list[Inputs | None] | NotTold]] = []

    def see(run: Run) -> None:
        parts = [run, *([] if run.first is None else [run.first])]
        try:
            seen.append((run.is_stack, [inputs_of(part, checkpoints=False) for part in parts]))
        except NotTold as reason:
            seen.append((run.is_stack, reason))

    with observing(see):
        lowered, _ = lowered_on(where, jax.jit(call), "what is explained", (arrays,))
    _, found = max(seen, key=lambda found: found[0])
    if isinstance(found, NotTold):
        raise found
    _compiled(where, lambda: lowered)
    return [None if inputs is None else shares_of(inputs, where, where.gpu or REFERENCE) for inputs in found]


def _compiled(where: Target, lower: Callable[[], Any], options: dict[str, Any] | None = None) -> Any:
    try:
        return where.compile(lower(), options)
    except Exception as error:  # what the compiler says, or what JAX does where it cannot say how something is split
        raise NotTold(reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return f"{error}".partition("\n")[0] or type(error).__name__


def _placed(aval: Any, sharding: Any, is_stacked: bool) -> jax.ShapeDtypeStruct:
    shape = aval.shape[1:] if is_stacked else aval.shape
    if isinstance(sharding, NamedSharding):
        spec = [*sharding.spec, *[None] * (len(aval.shape) - len(sharding.spec))]
        mesh, known = sharding.mesh, aval.sharding.mesh
        if not known.empty:  # which axes are the compiler's, and which are in types
            mesh = Mesh(np.asarray(mesh.devices), mesh.axis_names, axis_types=known.axis_types)
        sharding = NamedSharding(mesh, PartitionSpec(*spec[is_stacked:]))
    else:
        sharding = None
    return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


# Or what is sent for several equations is sent at once, and named after the first.
_ONE_BY_ONE = {f"xla_gpu_{kind}_combine_threshold_bytes": 0 for kind in ("all_gather", "all_reduce", "reduce_scatter")}


def shares_of(block: Inputs, where: Target, rates: Any) -> Shares:
    """The shares of a block's values, as the compiler splits its forward pass, its carry as it is given.

    Raises:
        NotTold: the compiler fails.
    """
    jaxpr, given = block.jaxpr, block.types()
    found: dict[tuple[int, int], float] = {}

    def look_at(i: int, made: list[Any]) -> None:
        for k, value in enumerate(made):
            if _is_plain(value):
                jax.debug.inspect_array_sharding(value, callback=functools.partial(saw, (i, k), jax.typeof(value).shape))

    def saw(place: tuple[int, int], shape: Sequence[int], sharding: Any) -> None:
        found[place] = share_of(sharding, shape)

    def forward(constants: list[Any], inputs: list[Any]) -> list[Any]:
        closed = jx.closed(jaxpr, constants)
        out = numbering.as_function(closed, itertools.count(), numbering.scope, look_at)(*inputs)
        for k, i in enumerate(block.carried):
            if (number := made_by.get(id(jaxpr.outvars[k]))) is not None:
                out[k] = _as_given(out[k], given[i].sharding, number)
        return out

    made_by = {id(var): i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}
    constants = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in block.constants]
    with mesh_on(where):
        text = _compiled(where, lambda: jax.jit(forward).lower(constants, given), _ONE_BY_ONE).as_text()
    outputs = tuple(tuple(found.get((i, k), 1.0) for k in range(len(eqn.outvars))) for i, eqn in enumerate(jaxpr.eqns))
    sending, sent, gathering = [0.0] * len(jaxpr.eqns), [0.0] * len(jaxpr.eqns), 0.0
    of_parameters = {f"inputs[{i}]" for i in block.parameters}
    reads = {var: i for i, eqn in reversed([*enumerate(jaxpr.eqns)]) for var in jx.variables(eqn.invars)}
    reader = {f"inputs[{k}]": reads.get(var) for k, var in enumerate(jaxpr.invars)}  # the first
    for call in calls(text, where.count):
        number = numbering.number_in(call.scope)
        if number is None:
            number = reader.get(call.scope)
        if number is not None:
            sent[number] += call.sent_bytes
        if call.inputs and call.inputs <= of_parameters:
            gathering += call.seconds(rates)
        elif number is not None and not sent_bytes(jaxpr.eqns[number]):  # whose cost does not have them
            sending[number] += call.seconds(rates)
    shares = tuple(share_of(leaf.sharding, leaf.shape) for leaf in given)
    return Shares(shares, outputs, tuple(map(round, sent)), tuple(sending), gathering)


def _as_given(value: Any, sharding: Any, number: int) -> Any:
    """An output of a block, split as the next block is given it."""
    if not isinstance(sharding, NamedSharding) or AxisType.Explicit in sharding.mesh.axis_types:
        return value
    with numbering.scope(number):
        return jax.lax.with_sharding_constraint(value, sharding)


def share_of(sharding: Any, shape: Sequence[int]) -> float:
    """The part of an array that one device holds, where that is padded a little more than its share."""
    if not isinstance(sharding, NamedSharding) or not math.prod(shape):
        return 1.0
    share = 1.0
    for size, axes in zip(shape, sharding.spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        share *= -(-size // math.prod(sharding.mesh.shape[name] for name in names)) / size
    return share


def _is_plain(value: Any) -> bool:
    """Whether a value is an array of numbers that has any, and no keys."""
    return bool(value.size) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
