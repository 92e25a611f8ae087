"""A block whose batch is split over devices, written as one block for each group of examples.

Under an Auto mesh the compiler splits the batch, and a jaxpr does not say so. A gradient that is summed over the batch is
summed over devices wherever it stands: for each slice of a piece, with its parameters gathered for each (of a transformer
under FSDP over eight GPUs, that sends eleven times as much). Written for groups of examples, `[groups, examples, ...]` under
`vmap`, with what they share as a copy for each, `[groups, ...]`, each group's gradient stays its own as far as the copies,
which are made once for each block; the compiler gathers there, and sums there. What is told of one group, such as that all
its values are there, is told on the device that has it.

Axis 0 of the carry is the batch, and a `with_sharding_constraint` in the block says that it is split: where it is not, or
something else is, copies would cost memory and traffic. A block in which examples do not stay apart (a norm over the batch,
a loss beside the carry) is left as it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.analysis import flow, inlining, slices
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.numbering import run_equation
from jaxckpt.analysis.slices import Rule, rule
from jaxckpt.analysis.slices_table import sharding_axes
from jaxckpt.analysis.tiles import Tiling, Tilings

# `vmap` makes other operations of these: a convolution in as many feature groups, which the compiler gathers for, and both
# branches.
_CHANGED_BY_VMAP = ("conv_general_dilated", "cond")


class Groups(NamedTuple):
    """How many groups of examples there are, one or more on each device, and over which mesh they are split."""

    count: int
    mesh: Any


def in_groups(closed: Any, carried: Sequence[int]) -> tuple[Any, int]:
    """The same block, written for groups, and how many; `closed` itself and 1 where it says of no mesh, or there is no way.

    Arguments:
        carried: its inputs that are the carry.
    """
    sizes = {closed.in_avals[i].shape[:1] for i in carried}
    if len(sizes) != 1 or sizes == {()} or not _constraints(closed.jaxpr):
        return closed, 1
    ((size,),) = sizes
    flat = inlining.merged(inlining.inlined(closed, checkpoints=True))
    number = len(flat.jaxpr.eqns)
    tilings = Tilings(flat.jaxpr, [0] * number)
    made = tilings.outputs(0, number)
    tiling = tilings.tiling(0, number, tuple(0 if var.aval.shape[:1] == (size,) else None for var in made), size)
    if tiling is None or not _is_apart(flat.jaxpr, tiling, carried):
        return closed, 1
    groups = _said(flat.jaxpr, tiling)
    if groups is None or groups.count == 1:
        return closed, 1
    out = [var for var, axis in zip(made, tiling.axes, strict=True) if axis is not None]
    return jx.trace(_written_for(groups, flat, tiling, out), *closed.in_avals), groups.count


def devices_of(closed: Any, inputs: Sequence[int]) -> int:
    """How many devices the mesh has that these inputs lie on, or constraints in the block name; 1 where none is known."""
    placed = [closed.in_avals[i].sharding.mesh for i in inputs]
    named = [eqn.params["sharding"] for eqn in _constraints(closed.jaxpr)]
    return max((mesh.size for mesh in [*placed, *(sharding.mesh for sharding in named)] if not mesh.empty), default=1)


def why_slices_send(closed: Any, carried: Sequence[int]) -> str | None:
    """Why slices of a block on several devices, which is not in groups, may send for each; None where they send nothing."""
    jaxpr = inlining.inlined(closed).jaxpr
    batch = {aval.shape[0] for i in carried if (aval := closed.in_avals[i]).shape}
    of_carry = flow.dependent(jaxpr, carried)
    computed = jaxpr.replace(eqns=[eqn for eqn in jaxpr.eqns if not of_carry.isdisjoint(eqn.outvars)])
    constraints = [eqn for eqn in _constraints(computed) if eqn.outvars[0].aval.shape[0] in batch]
    said = {axes for eqn in constraints if (axes := sharding_axes(eqn, 0)) is not None}
    if not said:
        return (
            "nothing in it says how its batch is split. Let it constrain what it returns, "
            "jax.lax.with_sharding_constraint(x, P('data')), with the mesh axes of its batch, or P(None) where it has none"
        )
    return None if said == {()} else "its examples do not stay apart, or are not on axis 0 of all that enters it"


def _constraints(jaxpr: Any) -> list[Any]:
    """The `with_sharding_constraint`s of arrays in a block, those of nested jaxprs too."""
    found = [eqn for eqn in jx.equations(jaxpr) if eqn.primitive.name == "sharding_constraint"]
    return [eqn for eqn in found if isinstance(eqn.params["sharding"], NamedSharding) and eqn.outvars[0].aval.shape]


def _is_apart(jaxpr: Any, tiling: Tiling, carried: Sequence[int]) -> bool:
    """Whether nothing needs all examples at once, and groups are computed as the whole is."""
    whole = {var for i in tiling.before for var in jx.variables(jaxpr.eqns[i].invars)}
    needed = [*whole, *(place.of(jaxpr) for place in tiling.shared)]
    inside = [jaxpr.eqns[i] for i in tiling.inside]
    names = {eqn.primitive.name for outer in inside for eqn in [outer, *_within(outer)]}
    return flow.dependent(jaxpr, carried).isdisjoint(needed) and names.isdisjoint(_CHANGED_BY_VMAP)


def _within(eqn: Any) -> list[Any]:
    return [inner for jaxpr in jx.inner_jaxprs(eqn) for inner in jx.equations(jaxpr)]


def _said(jaxpr: Any, tiling: Tiling) -> Groups | None:
    """The groups that constraints in the block say; None where none says, or one says otherwise than another."""
    found: dict[Any, Groups] = {}
    for i, at in tiling.inside.items():
        eqn = jaxpr.eqns[i]
        if eqn.primitive.name != "sharding_constraint" or at is None or at.outputs[0] is None:
            continue
        if (axes := sharding_axes(eqn, at.outputs[0])) is not None:
            mesh = eqn.params["sharding"].mesh
            sizes = [(name, mesh.shape[name]) for name in axes]
            found[tuple(sizes)] = Groups(math.gcd(tiling.size, math.prod(size for _, size in sizes)), mesh)
    return next(iter(found.values())) if len(found) == 1 else None


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
            made = slices.run(jaxpr.eqns[i], found, inputs, size, group * size, 1)
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
