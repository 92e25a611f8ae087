"""A block whose batch is split over devices, written as one block for each group of examples.

Under an Auto mesh the compiler splits the batch, and a jaxpr does not say so. A gradient that is summed over the batch is
summed over devices wherever it stands: for each slice of a piece, with its parameters gathered for each (of a transformer
under FSDP over eight GPUs, that sends eleven times as much). Written for groups of examples, `[groups, examples, ...]` under
`vmap`, with what they share as a copy for each, `[groups, ...]`, each group's gradient stays its own as far as the copies,
which are made once for each block; the compiler gathers there, and sums there. What is told of one group, such as that all
its values are there, is told on the device that has it.

Axis 0 of the carry is the batch. A block in which examples do not stay apart (a norm over the batch, a loss beside the
carry) is left as it is, and so is one whose mesh is not known: JAX shows it where the stack is called with what lies on one,
and under `jax.set_mesh`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.analysis import flow, inlining, slices
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.numbering import run_equation
from jaxckpt.analysis.slices import Rule, rule
from jaxckpt.analysis.slices_table import sharding_axes
from jaxckpt.analysis.tiles import Tiling, Tilings


class Groups(NamedTuple):
    """How many groups of examples there are, one or more on each device, and over which mesh they are split."""

    count: int
    mesh: Any


def in_groups(closed: Any, carried: Sequence[int]) -> tuple[Any, int]:
    """The same block, written for groups, and how many; `closed` itself and 1 where there is no mesh, or no way.

    The groups are those that a `with_sharding_constraint` in the block says. Without one it is not known which axes of the
    mesh split the batch: there is a group for each device, or as many as divide the batch.

    Arguments:
        carried: its inputs that are the carry.
    """
    mesh, size = _mesh_of(closed, carried), _batch_of(closed, carried)
    if mesh is None or math.gcd(mesh.size, size) == 1:
        return closed, 1
    flat = inlining.merged(inlining.inlined(closed, checkpoints=True))
    number = len(flat.jaxpr.eqns)
    tilings = Tilings(flat.jaxpr, [0] * number)
    made = tilings.outputs(0, number)
    tiling = tilings.tiling(0, number, tuple(0 if var.aval.shape[:1] == (size,) else None for var in made), size)
    if tiling is None or _needs_all(flat.jaxpr, tiling, carried):
        return closed, 1
    said = _axes_said(flat.jaxpr, tiling)
    count = math.gcd(size, mesh.size if said is None else math.prod(mesh.shape[name] for name in said))
    if count == 1:
        return closed, 1
    out = [var for var, axis in zip(made, tiling.axes, strict=True) if axis is not None]
    return jx.trace(_written_for(Groups(count, mesh), flat, tiling, out), *closed.in_avals), count


def _mesh_of(closed: Any, carried: Sequence[int]) -> Any:
    """The mesh that the carry lies on, or that constraints in the block name, if all of its axes are the compiler's."""
    named = [eqn.params["sharding"] for eqn in jx.equations(closed.jaxpr) if eqn.primitive.name == "sharding_constraint"]
    placed = [*(closed.in_avals[i].sharding for i in carried), *(x for x in named if isinstance(x, NamedSharding))]
    found = [x.mesh for x in placed if not x.mesh.empty]
    return found[0] if found and all(set(mesh.axis_types) == {AxisType.Auto} for mesh in found) else None


def _batch_of(closed: Any, carried: Sequence[int]) -> int:
    """The size of axis 0 of all leaves of the carry; 1 where they differ."""
    sizes = {closed.in_avals[i].shape[:1] for i in carried}
    (size,) = sizes.pop() if len(sizes) == 1 and () not in sizes else (1,)
    return size if isinstance(size, int) else 1


def _needs_all(jaxpr: Any, tiling: Tiling, carried: Sequence[int]) -> bool:
    """Whether anything needs all examples at once."""
    whole = {var for i in tiling.before for var in jx.variables(jaxpr.eqns[i].invars)}
    return not flow.dependent(jaxpr, carried).isdisjoint([*whole, *(place.of(jaxpr) for place in tiling.shared)])


def _axes_said(jaxpr: Any, tiling: Tiling) -> tuple[str, ...] | None:
    """The mesh axes along which a `with_sharding_constraint` in the block splits the batch; None where none says."""
    constraints = [i for i in tiling.inside if jaxpr.eqns[i].primitive.name == "sharding_constraint"]
    rules = [(jaxpr.eqns[i], tiling.inside[i]) for i in constraints]
    said = [sharding_axes(eqn, found.outputs[0]) for eqn, found in rules if found and found.outputs[0] is not None]
    return next((axes for axes in said if axes is not None), None)


def _written_for(groups: Groups, flat: Any, tiling: Tiling, out: Sequence[Any]) -> Callable[..., list[Any]]:
    """A function of a block's inputs that computes `out` for groups along axis 0, as the tiling does for slices."""
    jaxpr, size = flat.jaxpr, tiling.size // groups.count
    entering = [(place.of(jaxpr), axis) for place, axis in tiling.entering]
    shared: list[tuple[Any, int | None]] = [(place.of(jaxpr), None) for place in tiling.shared]
    has_gradient = [jnp.issubdtype(var.aval.dtype, jnp.inexact) for var, _ in shared]

    def one(group: Any, own: list[Any], copies: list[Any]) -> list[Any]:
        given: dict[tuple[Any, int | None], Any] = dict(zip([*entering, *shared], [*own, *copies], strict=True))
        values: dict[Any, Any] = {}

        def read(var: Any, axis: int | None) -> Any:
            if isinstance(var, core.Literal):
                return var.val
            return values[var] if var in values else given[var, axis]

        for i, found in tiling.inside.items():
            assert isinstance(found, Rule)
            inputs = [read(var, axis) for var, axis in zip(jaxpr.eqns[i].invars, found.inputs, strict=True)]
            made = slices.run(jaxpr.eqns[i], found, inputs, size, 0, 1, start=group * size)
            values.update(zip(jaxpr.eqns[i].outvars, made, strict=True))
        return [values[var] for var in out]

    def run(*inputs: Any) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*flat.consts, *inputs], strict=True))
        read = lambda var: var.val if isinstance(var, core.Literal) else values[var]  # noqa: E731
        for eqn in map(jaxpr.eqns.__getitem__, tiling.before):
            values.update(zip(eqn.outvars, run_equation(eqn, map(read, eqn.invars)), strict=True))
        own = [_split(values[var], axis, groups.count) for var, axis in entering]
        copies = [
            _copies(values[v], groups) if each else values[v] for (v, _), each in zip(shared, has_gradient, strict=True)
        ]
        of_each = [axis for _, axis in entering], [0 if each else None for each in has_gradient]
        found = jax.vmap(one, in_axes=(0, *of_each))(jnp.arange(groups.count), own, copies)
        values.update({var: _joined(x) for var, x in zip(out, found, strict=True)})
        return list(map(read, jaxpr.outvars))

    return run


def _copies(x: Any, groups: Groups) -> Any:
    """`x` for each group.

    A vector, such as a norm's scale, is whole there: XLA would leave it split as the parameter is, and gather it in each
    slice. How else a matrix is split, along heads say, is left to the compiler.
    """
    copies = lax.broadcast(x, (groups.count,))
    if x.size > max(x.shape, default=1):
        return copies
    return lax.with_sharding_constraint(copies, NamedSharding(groups.mesh, P(P.UNCONSTRAINED, *[None] * x.ndim)))


def _split(x: Any, axis: int, count: int) -> Any:
    """`[..., count, x.shape[axis] / count, ...]`: neighbours in one group, as on one device."""
    return x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])


def _joined(x: Any) -> Any:
    """The opposite, along axis 0; a `reshape` too where a group is one example, and jnp's would be a `squeeze`."""
    return lax.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def axes_of_groups(jaxpr: Any, count: int) -> dict[Any, int]:
    """Of an inlined jaxpr that was written for so many groups, the axis that they are of each variable that has it.

    Of what it returns, the axis on which the groups and the examples in each are.
    """
    found: dict[Any, int] = {}
    used = {var for eqn in jaxpr.eqns for var in jx.variables(eqn.invars)} | set(jx.variables(jaxpr.outvars))
    for eqn in reversed(jaxpr.eqns):
        wanted = [(k, found[var]) for k, var in enumerate(eqn.outvars) if var in found]
        if not wanted and eqn.outvars[0] in jaxpr.outvars and _joins(eqn, count):
            found[eqn.outvars[0]] = found[eqn.invars[0]] = 0
        elif wanted and (at := rule(eqn, *wanted[0], used=[k for k, v in enumerate(eqn.outvars) if v in used])) is not None:
            for var, axis in zip(eqn.invars, at.inputs, strict=True):
                if axis is not None and not isinstance(var, core.Literal):
                    found.setdefault(var, axis)
    return found


def _joins(eqn: Any, count: int) -> bool:
    """Whether an equation is the reshape that joins groups and the examples in each."""
    return eqn.primitive.name == "reshape" and _shape_of_joined(eqn.invars[0], count) == eqn.params["new_sizes"]


def _shape_of_joined(var: Any, count: int) -> tuple[int, ...] | None:
    shape = var.aval.shape
    return (count * shape[1], *shape[2:]) if len(shape) > 1 and shape[0] == count else None
