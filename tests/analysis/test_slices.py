"""Slices of equations without inner jaxprs: a test for each row of the table, and for what must stay whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive, primitives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.analysis.slices import rule, run
from jaxckpt.analysis.slices_table import ELEMENTWISE, KNOWN, sharding_axes
from tests.analysis.slicing import assert_equal, check, check_types, equation, integers

X = integers((4, 6, 10))
IMAGES = integers((4, 2, 6))  # batch, channels, width
INDICES = integers((6, 1), jnp.int32, low=0, high=4)
TWICE = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0,))
BEHIND = lax.GatherDimensionNumbers(offset_dims=(0, 1), collapsed_slice_dims=(1,), start_index_map=(1,))
AT = lax.ScatterDimensionNumbers(update_window_dims=(1,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0,))


def convolution(**knobs):
    return functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="SAME", **knobs)


def scattering(fn):
    return lambda x, i, u: fn(x, i, u, AT)


def constrained(*spec):
    mesh = jax.make_mesh((1, 1), ("i", "j"), axis_types=(AxisType.Auto,) * 2)
    return lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


# A function, its arguments, and by axis of its output the axes of its inputs; None where it must be computed whole.
ROWS = {
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (4, 8, 6), (0, 2)), [X[:, :, 0]], [(0,), (None,), (1,)]),
    "broadcast_in_dim of size 1": (lambda x: lax.broadcast_in_dim(x, (4, 6), (0, 1)), [X[:, :1, 0]], [(0,), (None,)]),
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), [X], [(2,), (0,), (1,)]),
    "rev": (lambda x: lax.rev(x, (1,)), [X], [(0,), None, (2,)]),
    "reshape, merged": (lambda x: lax.reshape(x, (4, 60)), [X], [(0,), None]),
    "reshape, divided": (lambda x: lax.reshape(x, (2, 2, 6, 10)), [X], [None, None, (1,), (2,)]),
    "reshape, size 1": (lambda x: lax.reshape(x, (1, 4, 6, 1, 10)), [X], [None, (0,), (1,), None, (2,)]),
    "reshape, other order": (lambda x: lax.reshape(x, (6, 4, 10)), [X], [None, None, (2,)]),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), [X[:, :1]], [(0,), (2,)]),
    "dot_general": (
        lambda x, y: lax.dot_general(x, y, (((2,), (1,)), ((0,), (0,)))),
        [X, integers((4, 10, 8))],
        [(0, 0), (1, None), (None, 2)],
    ),
    "dot_general, other order": (
        lambda x, y: lax.dot_general(x, y, (((0,), (2,)), ((2,), (1,)))),
        [X, integers((8, 10, 4))],
        [(2, 1), (1, None), (None, 0)],
    ),
    "convolution": (convolution(), [IMAGES, integers((8, 2, 3))], [(0, None), None, None]),
    "convolution of groups": (
        convolution(feature_group_count=2, dimension_numbers=("CHN", "HOI", "HNC")),
        [IMAGES.transpose(1, 2, 0), integers((3, 8, 1))],
        [None, (2, None), None],
    ),
    "convolution of groups of the batch": (convolution(batch_group_count=2), [IMAGES, integers((8, 2, 3))], 3 * [None]),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 1), [X, X[:, 1:]], [(0, 0), None, (2, 2)]),
    "pad": (lambda x: lax.pad(x, np.float32(0), [(0, 0, 0), (1, -1, 0), (0, 0, 1)]), [X], [(0, None), None, None]),
    "slice": (lambda x: lax.slice(x, (0, 1, 0), (4, 5, 10), (1, 1, 2)), [X], [(0,), None, None]),
    "dynamic_slice": (
        lambda x, i: lax.dynamic_slice(x, (i, i, i), (4, 4, 10)),
        [X, np.int32(1)],
        [(0, None, None, None), None, (2, None, None, None)],
    ),
    "dynamic_update_slice": (
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i, i)),
        [X, X[:, 1:5], np.int32(1)],
        [(0, 0, None, None, None), None, (2, 2, None, None, None)],
    ),
    "gather": (lambda x, i: lax.gather(x, i, TWICE, (1, 6)), [X[:, :, 0], INDICES], [(None, 0), (1, None)]),
    "gather behind": (lambda x, i: lax.gather(x, i, BEHIND, (4, 1, 10)), [X, INDICES], [(0, None), (2, None), (None, 0)]),
    "gather out of bounds": (
        lambda x, i: lax.gather(x, i, TWICE, (1, 6), mode="fill"),
        [X[:, :, 0], INDICES + 2],
        [(None, 0), (1, None)],
    ),
    "gather of a part": (lambda x, i: lax.gather(x, i, TWICE, (1, 4)), [X[:, :, 0], INDICES], [(None, 0), None]),
    "gather with batching": (
        jax.vmap(lambda x, i: lax.gather(x, i, TWICE, (1, 10))),
        [X, integers((4, 8, 1), jnp.int32, low=0, high=6)],
        [(0, 0), (None, 1), (2, None)],
    ),
    "scatter": (scattering(lax.scatter), [X[:, :, 0], INDICES[:3], integers((3, 6))], [None, (1, None, 1)]),
    "scatter-add": (scattering(lax.scatter_add), [X[:, :, 0], INDICES, integers((6, 6))], [None, (1, None, 1)]),
    "scatter-mul": (scattering(lax.scatter_mul), [X[:, :, 0], INDICES, integers((6, 6))], [None, (1, None, 1)]),
    "scatter-min": (scattering(lax.scatter_min), [X[:, :, 0], INDICES, integers((6, 6))], [None, (1, None, 1)]),
    "scatter-max": (scattering(lax.scatter_max), [X[:, :, 0], INDICES, integers((6, 6))], [None, (1, None, 1)]),
    "scatter of a part": (scattering(lax.scatter_add), [X[:, :, 0], INDICES, integers((6, 4))], [None, None]),
    "scatter with batching": (
        jax.vmap(scattering(lax.scatter_add)),
        [X, integers((4, 8, 1), jnp.int32, low=0, high=6), integers((4, 8, 10))],
        [(0, 0, 0), None, (2, None, 2)],
    ),
    **{
        name: (functools.partial(getattr(lax, name), axis=1), [integers((4, 6), low=1)], [(0,), None])
        for name in "cumsum cumprod cummax cummin cumlogsumexp".split()
    },
    "sort": (lambda x, y: lax.sort([x, y], dimension=1, num_keys=1), [X, -X], [(0, 0), None, (2, 2)]),
    "fft": (lambda x: lax.fft(x, "RFFT", (10,)), [X], [(0,), (1,), None]),
    "top_k": (lambda x: lax.top_k(x, 4), [X], [(0,), (1,), None]),
    "split": (lambda x: lax.split(x, (2, 4), 1), [X], [(0,), None, (2,)]),
    "stack": (lambda x, y: jnp.stack([x, y], 1), [X, X], [(0, 0), None, (1, 1), (2, 2)]),
    "unstack": (lambda x: jnp.unstack(x, axis=1), [X], [(0,), (2,)]),
    "tile": (lambda x: jnp.tile(x, (1, 2, 1)), [X], [(0,), None, (2,)]),
    "iota": (lambda: lax.broadcasted_iota(jnp.int32, (4, 6), 1), [], [(), ()]),
    "iota of numbers": (lambda: lax.broadcasted_iota(jnp.bfloat16, (4, 6), 0), [], [(), ()]),
    "select_n": (lambda p, x, y: lax.select_n(p, x, y), [X > 0, X, -X], [(0, 0, 0), (1, 1, 1), (2, 2, 2)]),
    "select_n, one for all": (lambda p, x, y: lax.select_n(p, x, y), [np.True_, X[0], -X[0]], [(None, 0, 0), (None, 1, 1)]),
    "clamp": (lambda a, x, b: lax.clamp(a, x, b), [np.float32(0), X[0], X[0] + 2], [(None, 0, 0), (None, 1, 1)]),
    "elementwise, a scalar": (lax.add, [X[0], 2.0], [(0, None), (1, None)]),
    "elementwise, size 1": (lambda x, y: lax.add_p.bind(x, y), [X, X[:, :1]], [(0, 0), (1, None), (2, 2)]),
    "optimization_barrier": (lambda x, y: lax.optimization_barrier((x, y)), [X, -X], [(0, 0), (1, 1), (2, 2)]),
    "optimization_barrier of two sizes": (
        lambda x, y: lax.optimization_barrier((x, y)),
        [X, X[:, :2]],
        [(0, 0), None, (2, 2)],
    ),
    "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, jnp.uint32), [X[0]], [(0,), (1,)]),
    "bitcast_convert_type, narrower": (lambda x: lax.bitcast_convert_type(x, jnp.uint16), [X[0]], [(0,), (1,), None]),
    "name": (lambda x: checkpoint_name(x, "a"), [X[0]], [(0,), (1,)]),
    "sharding_constraint": (constrained("i"), [X], [(0,), (1,), (2,)]),
    "sharding_constraint along two axes": (constrained(None, ("i", "j")), [X], [(0,), (1,), (2,)]),
    "sharding_constraint that is open": (constrained(P.UNCONSTRAINED, "i"), [X], [(0,), (1,), (2,)]),
}
for name in "sum max min prod and or xor".split():
    x = X > 1 if name in ("and", "or") else X.astype(np.int32) if name == "xor" else X
    ROWS[f"reduce_{name}"] = (functools.partial(getattr(lax, f"reduce_{name}"), axes=(1,)), [x], [(0,), (2,)])
for name in "argmax argmin".split():
    ROWS[name] = (functools.partial(getattr(lax, name), axis=1, index_dtype=np.int32), [X], [(0,), (2,)])


@pytest.mark.parametrize("row", ROWS)
def test_rows(row):
    fn, args, expected = ROWS[row]
    eqn, _ = equation(fn, *args)
    found = [rule(eqn, 0, axis) for axis in range(len(eqn.outvars[0].aval.shape))]
    assert [one and one.inputs for one in found] == expected
    for axis, one in enumerate(found):
        if one is not None:
            assert one.outputs == (axis,) * len(eqn.outvars)
            check_types(eqn, one)


def test_values_of_all_rows():
    found = [equation(fn, *args) for fn, args, _ in ROWS.values()]
    rules = [(eqn, rule(eqn, 0, axis), inputs) for eqn, inputs in found for axis in range(len(eqn.outvars[0].aval.shape))]
    assert_equal([row for row in rules if row[1] is not None])


def test_what_a_constraint_splits_is_left_to_the_compiler_in_a_slice():
    eqn, (x,) = equation(constrained("i", None, "j"), X)
    of_slices = jax.make_jaxpr(lambda x: run(eqn, rule(eqn, 0, 0), [x], 2, 0, 2))(x[::2])
    (found,) = [eqn.params for eqn in of_slices.eqns if eqn.primitive.name == "sharding_constraint"]
    assert found["sharding"].spec == P(P.UNCONSTRAINED, None, "j") and found["unconstrained_dims"] == {0}
    assert [sharding_axes(eqn, axis) for axis in range(3)] == [("i",), (), ("j",)]


FLOATS, WHOLE, BITS = integers((4, 6), low=1) / 16, integers((4, 6), np.int32, low=1), integers((4, 6), bool)
COMPLEX = FLOATS + 1j * X[:, :, 0]
OF_OTHER_NAMES = {
    **{name: getattr(lax, f"bitwise_{name}") for name in ("and", "or", "xor", "not")},
    "add_any": lambda x, y: primitives.add_jaxvals_p.bind(x, y),
    "complex": lambda x, y: lax.complex(x, y),
    "convert_element_type": lambda x: lax.convert_element_type(x, np.int32),
    "copy": lambda x: primitives.copy_p.bind(x),
    "eq_to": lambda x, y: primitives.eq_to_p.bind(x, y),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "le_to": lambda x, y: primitives.le_to_p.bind(x, y),
    "lt_to": lambda x, y: primitives.lt_to_p.bind(x, y),
    "mulhi": lambda x, y: lax.mulhi_p.bind(x, y),
    "name": lambda x: checkpoint_name(x, "a"),
    "polynomial": lambda x, y, z: primitives.polynomial_p.bind(x, y, z),
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 3),
    "select_n": lambda p, x, y: lax.select_n(p > 3, x, y),
}
OF_INTEGERS = "and clz mulhi not or population_count shift_left shift_right_arithmetic shift_right_logical xor".split()
OF_COMPLEX = "conj imag real".split()


def applied(name):
    """The one equation of an elementwise primitive."""
    fn = OF_OTHER_NAMES.get(name) or getattr(lax, name)
    x = WHOLE if name in OF_INTEGERS else COMPLEX if name in OF_COMPLEX else FLOATS + (name in ("acosh", "zeta"))
    for args in ([x], [x, x[::-1]], [x, x[::-1], x + x]):
        try:
            found = equation(fn, *args)
        except TypeError:
            continue
        assert name in (found[0].primitive.name, "name")  # that one has another under jax_remat3
        return found


def existing():
    """The names of this JAX's primitives."""
    found = [value for module in (lax, primitives) for value in vars(module).values()]
    found += [getattr(primitives, name) for name in dir(primitives) if name.endswith("_p")]
    return {value.name for value in found if isinstance(value, Primitive)}


def test_names_exist():
    """A name that JAX does not know any more would be a row that nothing uses; `pvary` is not among its public ones."""
    newer = {(0, 10): {"log2", "one_minus_square", "polynomial"}}
    assert KNOWN - existing() - {"pvary"} == newer.get(jax.__version_info__[:2], set())


def test_elementwise():
    found = [applied(name) for name in sorted(ELEMENTWISE & existing())]
    rules = [(eqn, rule(eqn, 0, axis), inputs) for eqn, inputs in found for axis in (0, 1)]
    assert all(set(one.inputs) == set(one.outputs) for _, one, _ in rules)
    for eqn, one, _ in rules[::2]:
        check_types(eqn, one)
    assert_equal(rules)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.float32])
def test_a_last_slice_may_be_shorter_and_begin_elsewhere(dtype):
    """Slices of 11 entries in threes: three of them, and the two entries that are left."""
    eqn, _ = equation(lambda: lax.broadcasted_iota(dtype, (2, 11), 1))
    one = rule(eqn, 0, 1)
    slices = lax.map(lambda t: run(eqn, one, [], 3, t, 3)[0], jnp.arange(3))
    (rest,) = run(eqn, one, [], 2, 9, 1)
    assert slices.dtype == rest.dtype == dtype
    np.testing.assert_array_equal(slices, [2 * [[t, t + 3, t + 6]] for t in range(3)])
    np.testing.assert_array_equal(rest, 2 * [[9, 10]])


def test_positions_in_64_bits(x64):
    eqn, _ = equation(lambda: lax.iota(jnp.int64, 8))
    (found,) = run(eqn, rule(eqn, 0, 0), [], 3, jnp.int32(2), 2)
    np.testing.assert_array_equal(found, np.array([2, 4, 6]), strict=True)


def test_lengths_that_are_not_divided():
    eqn, inputs = equation(lambda x, y: lax.dot_general(x, y, (((1,), (0,)), ((), ()))), X[0], X[1].T)
    assert check(eqn, inputs, 0, 1, count=4).inputs == (None, 1)
