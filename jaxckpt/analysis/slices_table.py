"""Slices of equations without inner jaxprs: a table by primitive of which slices of its inputs an equation needs.

A primitive that is not in the table is computed whole: never wrong, only larger.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.analysis import tagging

Axes = tuple[int | None, ...]


class Where(NamedTuple):
    """Which entries of an axis a slice has: `size` of them, the `k`-th at `first + k * stride`.

    Fields:
        orders: for how many derivatives the slices were found to do, see `slices`.
    """

    size: int
    first: Any
    stride: int
    orders: int


class Row(NamedTuple):
    """What is known of a primitive.

    Fields:
        inputs: of an equation and the axis of its outputs, the axis of each input, None where it is whole; or None where the
            equation cannot be computed in slices.
        params: of an equation, the axis and the size of a slice, the parameters that differ from those of the whole.
    """

    inputs: Callable[[Any, int], Axes | None]
    params: Callable[[Any, int, int], dict[str, Any]] = lambda eqn, axis, size: {}


def row_of(eqn: Any) -> Row | None:
    """What is known of an equation's primitive."""
    return _TABLE["name"] if tagging.tag_of(eqn) is not None else _TABLE.get(eqn.primitive.name)


def bind(eqn: Any, axis: int, inputs: Sequence[Any], where: Where) -> list[Any]:
    """The outputs' slices of an equation that `row_of` knows."""
    if (tag := tagging.tag_of(eqn)) is not None:
        return [checkpoint_name(inputs[0], tag)]
    if eqn.primitive.name == "iota" and axis == eqn.params["dimension"]:
        return [_positions(eqn, axis, where)]
    row = _TABLE[eqn.primitive.name]
    params = {**eqn.params, **row.params(eqn, axis, where.size)}
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
    return list(out) if eqn.primitive.multiple_results else [out]


def _positions(eqn: Any, axis: int, where: Where) -> Any:
    """A slice of an iota along its own axis."""
    dtype = eqn.params["dtype"]
    wide = jnp.int64 if dtype in (jnp.int64, jnp.uint64) else jnp.int32
    line = lax.iota(wide, where.size) * wide(where.stride) + jnp.asarray(where.first, wide)
    return lax.broadcast_in_dim(line.astype(dtype), resized(eqn.params["shape"], axis, where.size), [axis])


def resized(sizes: Sequence[int], axis: int | None, size: int) -> tuple[int, ...]:
    """A shape with another size of one axis."""
    return tuple(size if i == axis else n for i, n in enumerate(sizes))


def _resizes(name: str) -> Callable[[Any, int, int], dict[str, Any]]:
    """Parameters of a primitive that says the shape of its output."""
    return lambda eqn, axis, size: {name: resized(eqn.params[name], axis, size)}


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _elementwise(eqn: Any, axis: int) -> Axes | None:
    """An operand that is a scalar, or of size 1 along the axis, is needed whole."""
    shape = _shape(eqn.outvars[0])
    if any(len(_shape(var)) not in (len(shape), 0) for var in eqn.invars):
        return None
    return tuple(axis if _shape(var)[axis : axis + 1] == (shape[axis],) else None for var in eqn.invars)


def _bitcast_convert_type(eqn: Any, axis: int) -> Axes | None:
    is_kept = axis < len(_shape(eqn.invars[0]))  # else it is the new one, of the parts of a number
    return (axis,) if is_kept and _shape(eqn.invars[0])[axis] == _shape(eqn.outvars[0])[axis] else None


def _barrier(eqn: Any, axis: int) -> Axes | None:
    size = _shape(eqn.outvars[0])[axis]
    return (axis,) * len(eqn.invars) if all(_shape(var)[axis : axis + 1] == (size,) for var in eqn.invars) else None


def _broadcast_in_dim(eqn: Any, axis: int) -> Axes | None:
    if axis not in (dimensions := eqn.params["broadcast_dimensions"]):
        return (None,)
    source = dimensions.index(axis)
    return (source if _shape(eqn.invars[0])[source] == eqn.params["shape"][axis] else None,)


def _reshape(eqn: Any, axis: int) -> Axes | None:
    """An axis survives where the axes before it have as many entries as they had."""
    old, new = _shape(eqn.invars[0]), eqn.params["new_sizes"]
    before = math.prod(new[:axis])
    survives = [i for i, n in enumerate(old) if n == new[axis] and math.prod(old[:i]) == before]
    return (survives[0],) if survives and eqn.params["dimensions"] is None else None


def _without(name: str) -> Callable[[Any, int], Axes | None]:
    """Inputs of a primitive whose outputs lack the axes that a parameter names."""

    def inputs(eqn: Any, axis: int) -> Axes:
        kept = [i for i in range(len(_shape(eqn.invars[0]))) if i not in _several(eqn.params[name])]
        return (kept[axis],) * len(eqn.invars)

    return inputs


def _beside(name: str) -> Callable[[Any, int], Axes | None]:
    """Inputs of a primitive that works along the axes that a parameter names, and on all others entry by entry."""
    return lambda eqn, axis: None if axis in _several(eqn.params[name]) else (axis,) * len(eqn.invars)


def _several(axes: Any) -> Sequence[int]:
    return (axes,) if np.ndim(axes) == 0 else axes  # NumPy's integers too


def _stack(eqn: Any, axis: int) -> Axes | None:
    new = eqn.params["axis"]
    return None if axis == new else (axis - (axis > new),) * len(eqn.invars)


def _fft(eqn: Any, axis: int) -> Axes | None:
    return (axis,) if axis < len(_shape(eqn.outvars[0])) - len(eqn.params["fft_lengths"]) else None


def _dot_general(eqn: Any, axis: int) -> Axes | None:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    left_free, right_free = (
        [i for i in range(len(_shape(var))) if i not in (*contracted, *batch)]
        for var, contracted, batch in zip(eqn.invars, (left, right), (left_batch, right_batch), strict=True)
    )
    pairs = [*zip(left_batch, right_batch, strict=True), *((i, None) for i in left_free), *((None, i) for i in right_free)]
    return pairs[axis]


def _convolution(eqn: Any, axis: int) -> Axes | None:
    numbers = eqn.params["dimension_numbers"]
    is_batch = axis == numbers.out_spec[0] and eqn.params["batch_group_count"] == 1
    return (numbers.lhs_spec[0], None) if is_batch else None


def _pad(eqn: Any, axis: int) -> Axes | None:
    return (axis, None) if eqn.params["padding_config"][axis] == (0, 0, 0) else None


def _tile(eqn: Any, axis: int) -> Axes | None:
    return (axis,) if eqn.params["reps"][axis] == 1 and len(eqn.params["reps"]) == len(_shape(eqn.invars[0])) else None


def _slice(eqn: Any, axis: int) -> Axes | None:
    """An axis that is taken whole, and not with a stride: as many entries as there were."""
    return (axis,) if _shape(eqn.invars[0])[axis] == _shape(eqn.outvars[0])[axis] else None


def _dynamic_slice(eqn: Any, axis: int) -> Axes | None:
    """As `_slice`: a start that leaves no room is moved to 0, in a slice too."""
    return None if _slice(eqn, axis) is None else (axis, *[None] * (len(eqn.invars) - 1))


def _dynamic_update_slice(eqn: Any, axis: int) -> Axes | None:
    operand, update, *indices = eqn.invars
    return (axis, axis, *[None] * len(indices)) if _shape(operand)[axis] == _shape(update)[axis] else None


def _gather_axes(eqn: Any, axis: int) -> tuple[int | None, int | None] | None:
    """The axis of the operand and that of the indices that an axis of a gather's output comes of."""
    numbers = eqn.params["dimension_numbers"]
    if axis not in numbers.offset_dims:
        batch = axis - sum(i < axis for i in numbers.offset_dims)
        if batch in (batching := numbers.start_indices_batching_dims):
            return numbers.operand_batching_dims[batching.index(batch)], batch
        return None, batch
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [i for i in range(len(_shape(eqn.invars[0]))) if i not in gone]
    source = window[numbers.offset_dims.index(axis)]
    is_whole = eqn.params["slice_sizes"][source] == _shape(eqn.invars[0])[source]
    return (source, None) if is_whole and source not in numbers.start_index_map else None


def _gather_params(eqn: Any, axis: int, size: int) -> dict[str, Any]:
    operand, indices = _gather_axes(eqn, axis) or (None, None)
    if operand is None or indices is not None:  # one entry at a time, as it was
        return {}
    return {"slice_sizes": resized(eqn.params["slice_sizes"], operand, size)}


def _scatter(eqn: Any, axis: int) -> Axes | None:
    """Along batching axes, and along those that every update covers."""
    numbers = eqn.params["dimension_numbers"]
    operand, _, updates = map(_shape, eqn.invars)
    if axis in numbers.operand_batching_dims:
        indices = numbers.scatter_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
        return axis, indices, [i for i in range(len(updates)) if i not in numbers.update_window_dims][indices]
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    if axis in (*gone, *numbers.scatter_dims_to_operand_dims):
        return None
    window = numbers.update_window_dims[[i for i in range(len(operand)) if i not in gone].index(axis)]
    return (axis, None, window) if updates[window] == operand[axis] else None


def _sharding_constraint(eqn: Any, axis: int) -> Axes | None:
    """Of a mesh whose axes are the compiler's; those that are types are no business of a slice's."""
    sharding = eqn.params["sharding"]
    is_auto = isinstance(sharding, NamedSharding) and set(sharding.mesh.axis_types) == {AxisType.Auto}
    return (axis,) if is_auto and eqn.params["layout"] is None else None


def _sharding_constraint_params(eqn: Any, axis: int, size: int) -> dict[str, Any]:
    """A sliced axis that was to be split is left to the compiler: who has which entries of a slice it knows."""
    sharding = eqn.params["sharding"]
    if not sharding_axes(eqn, axis):
        return {}
    spec = [P.UNCONSTRAINED if i == axis else names for i, names in enumerate(_padded(sharding.spec, eqn))]
    free = NamedSharding(sharding.mesh, P(*spec), memory_kind=sharding.memory_kind)
    return {"sharding": free, "unconstrained_dims": frozenset([*eqn.params["unconstrained_dims"], axis])}


def sharding_axes(eqn: Any, axis: int) -> tuple[str, ...] | None:
    """The mesh axes along which a `with_sharding_constraint` splits an axis; None where it leaves that open."""
    names = _padded(eqn.params["sharding"].spec, eqn)[axis]
    if names is P.UNCONSTRAINED:
        return None
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _padded(spec: Any, eqn: Any) -> list[Any]:
    return [*spec, *[None] * (len(_shape(eqn.outvars[0])) - len(spec))]


ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul
    mulhi name ne neg nextafter not one_minus_square or polygamma polynomial population_count pow pvary real
    reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
    square stop_gradient sub tan tanh xor zeta""".split()
)
_REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
_CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp".split()
_SCATTERS = "scatter scatter-add scatter-mul scatter-min scatter-max".split()

_TABLE: dict[str, Row] = {
    **dict.fromkeys(ELEMENTWISE, Row(_elementwise)),
    **dict.fromkeys(_REDUCTIONS, Row(_without("axes"))),
    **dict.fromkeys(_CUMULATIVE, Row(_beside("axis"))),
    **dict.fromkeys(_SCATTERS, Row(_scatter)),
    "bitcast_convert_type": Row(_bitcast_convert_type),
    "broadcast_in_dim": Row(_broadcast_in_dim, _resizes("shape")),
    "concatenate": Row(_beside("dimension")),
    "conv_general_dilated": Row(_convolution),
    "dot_general": Row(_dot_general),
    "dynamic_slice": Row(_dynamic_slice, _resizes("slice_sizes")),
    "dynamic_update_slice": Row(_dynamic_update_slice),
    "fft": Row(_fft),
    "gather": Row(_gather_axes, _gather_params),
    "iota": Row(lambda eqn, axis: (), _resizes("shape")),
    "optimization_barrier": Row(_barrier),
    "pad": Row(_pad),
    "reshape": Row(_reshape, _resizes("new_sizes")),
    "rev": Row(_beside("dimensions")),
    "sharding_constraint": Row(_sharding_constraint, _sharding_constraint_params),
    "slice": Row(_slice, _resizes("limit_indices")),
    "sort": Row(_beside("dimension")),
    "split": Row(_beside("axis")),
    "squeeze": Row(_without("dimensions")),
    "stack": Row(_stack),
    "tile": Row(_tile),
    "top_k": Row(_beside("axis")),
    "transpose": Row(lambda eqn, axis: (eqn.params["permutation"][axis],)),
    "unstack": Row(_without("axis")),
}
KNOWN = frozenset(_TABLE)
