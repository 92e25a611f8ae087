"""What one device holds of the values of a stack, where the compiler splits them over a mesh.

A jaxpr has the shapes of whole arrays; how they are split over the devices the compiler decides, from the shardings of a
step's arguments and the constraints in it. It is asked twice: the step is compiled under its default knobs, with the inputs
of its stacks looked at, and the forward pass of one block is compiled with its inputs split so, all of its values looked at
(`jax.debug.inspect_array_sharding`), and what it sends for which equation. Inside `shard_map` along all axes, shapes are
those of one device already.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxckpt._plan import Knobs, under
from jaxckpt.analysis import inlining, numbering
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.shares import Shares
from jaxckpt.engine.run import Run
from jaxckpt.memory.collectives import calls
from jaxckpt.memory.explain import observing
from jaxckpt.memory.measure import measure
from jaxckpt.memory.meshes import mesh_on
from jaxckpt.memory.targets import Target


class Split(NamedTuple):
    """How a step under default knobs is split.

    Fields:
        shares: of a flat block of each stack that is to be planned, by its name, without those inside of `shard_map` and
            `vmap`.
        fixed_bytes: of arguments and results of the step, on one device. peak_bytes: the compiled peak.
    """

    shares: dict[str, Shares]
    fixed_bytes: int
    peak_bytes: int


def split_of(step: Callable[..., Any], args: Any, where: Target, rates: Any, as_given: bool, names: Iterable[str]) -> Split:
    """Compiles a step, in which stacks of these names are to be planned, under default knobs.

    Arguments:
        rates: see `jaxckpt.analysis.cost`.
        as_given: the arguments lie where they are to be.
    """
    seen: dict[str, _Inputs] = {}

    def see(run: Run) -> None:
        name, mesh = run.setting.plan, jax.sharding.get_abstract_mesh()
        if not isinstance(name, str) or name in seen:
            return
        if any(map(jx.is_batched, itertools.chain(*run.leaves))):
            _warn(run.names.block, where, "it runs under vmap, where it has the shapes of one example")
        elif mesh.manual_axes and set(mesh.manual_axes) != set(mesh.axis_names):
            _warn(run.names.block, where, "it runs in shard_map along some axes of the mesh only")
        elif not mesh.manual_axes:
            seen[name] = _Inputs(run)

    target = None if as_given else where
    with under(dict.fromkeys(names, Knobs())):
        try:
            with observing(see):
                found = measure(step, *args, target=target)
        except Exception as error:
            found = measure(step, *args, target=target)  # or it is the step itself that is wrong
            _warn("the stacks", where, str(error).splitlines()[0])
            seen = {}
    shares = {}
    for name, inputs in seen.items():
        try:
            shares[name] = _shares_of(inputs, where, rates)
        except Exception as error:
            _warn(inputs.block, where, str(error).splitlines()[0])
    return Split(shares, found.argument_bytes + found.output_bytes - found.aliased_bytes, found.peak_bytes)


def _warn(what: str, where: Target, why: str) -> None:
    warnings.warn(
        f"how the values of {what} are split over {where.name!r} cannot be told ({why}). The plan counts them whole, and "
        "may leave much of the budget unused",
        stacklevel=5,
    )


class _Inputs:
    """A block and what it is given, seen while the run is traced; with shardings, once the step is compiled."""

    def __init__(self, run: Run):
        self.block = run.names.block
        flat = inlining.merged(inlining.inlined(run.closed, checkpoints=True))
        self.jaxpr, self.constants, self.parameters = flat.jaxpr, list(map(jax.typeof, flat.consts)), run.parameters
        self.leaves = [(jax.typeof(leaf), part == 0) for part, leaves in enumerate(run.leaves) for leaf in leaves]
        self.shardings: dict[int, Any] = {}
        for i, leaf in enumerate(leaf for leaves in run.leaves for leaf in leaves):
            if _is_plain(leaf):
                saw: Any = functools.partial(self.shardings.setdefault, i)
                jax.debug.inspect_array_sharding(leaf, callback=saw)

    def types(self) -> list[Any]:
        """Of what one block is given."""
        return [_placed(aval, self.shardings.get(i), is_stacked) for i, (aval, is_stacked) in enumerate(self.leaves)]


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


def _shares_of(block: _Inputs, where: Target, rates: Any) -> Shares:
    """The shares of a block's values, as the compiler splits its forward pass."""
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
        return numbering.as_function(closed, itertools.count(), numbering.scope, look_at)(*inputs)

    constants = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in block.constants]
    with mesh_on(where):
        text = where.compile(jax.jit(forward).lower(constants, given), _ONE_BY_ONE).as_text()
    outputs = tuple(tuple(found.get((i, k), 1.0) for k in range(len(eqn.outvars))) for i, eqn in enumerate(jaxpr.eqns))
    sending, gathering = [0.0] * len(jaxpr.eqns), 0.0
    of_parameters = {f"inputs[{i}]" for i in block.parameters}
    for call in calls(text, where.count):
        if call.inputs and call.inputs <= of_parameters:
            gathering += call.seconds(rates)
        elif (number := numbering.number_in(call.scope)) is not None:
            sending[number] += call.seconds(rates)
    return Shares(tuple(share_of(leaf.sharding, leaf.shape) for leaf in given), outputs, tuple(sending), gathering)


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
