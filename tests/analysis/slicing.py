"""What the tests of slices share: an equation with values for its inputs, its slices, and what they must be equal to."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices import Rule, rule, run

COUNT = 2


def equation(fn: Any, *args: Any, name: str | None = None) -> tuple[Any, list[Any]]:
    """The last equation of a function of arrays, or the last of a primitive, and the values of its inputs."""
    closed = jx.trace(fn, *args)
    last = max(i for i, eqn in enumerate(closed.jaxpr.eqns) if name in (None, eqn.primitive.name))
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))
    for eqn in closed.jaxpr.eqns[: last + 1]:
        inputs = [var.val if isinstance(var, core.Literal) else values[var] for var in eqn.invars]
        if eqn is not closed.jaxpr.eqns[last]:
            values.update(zip(eqn.outvars, whole(eqn, inputs), strict=True))
    return closed.jaxpr.eqns[last], inputs


def used(fn: Any, *args: Any, name: str | None = None) -> list[int]:
    """The outputs of that equation that something reads."""
    jaxpr = jx.trace(fn, *args).jaxpr
    eqn = next(eqn for eqn in reversed(jaxpr.eqns) if name in (None, eqn.primitive.name))
    read = {var for var in (*jaxpr.outvars, *(var for eqn in jaxpr.eqns for var in eqn.invars)) if isinstance(var, core.Var)}
    return [k for k, var in enumerate(eqn.outvars) if var in read]


def whole(eqn: Any, inputs: list[Any]) -> list[Any]:
    """The outputs of an equation."""
    out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def part(x: Any, axis: int | None, first: int = 0, count: int = COUNT) -> Any:
    """A strided slice; all of it without an axis."""
    return x if axis is None else x[(*[slice(None)] * axis, slice(first, None, count))]


def size_of(eqn: Any, found: Rule) -> int:
    """The size of the axis that an equation is sliced along."""
    return next(v.aval.shape[axis] for v, axis in zip(eqn.outvars, found.outputs, strict=True) if axis is not None)


def assert_equal(eqns: Sequence[tuple[Any, Rule, Sequence[Any]]], count: int = COUNT) -> None:
    """Slices of the outputs of equations are those of the whole ones, to the bit, for these values of their inputs.

    In one program, and of constants, so that XLA evaluates it where it would else compile a kernel for each equation, which
    takes ten times as long.
    """

    def both() -> list[tuple[list[Any], list[list[Any]]]]:
        return [(whole(eqn, inputs), _in_slices(eqn, found, inputs, count)) for eqn, found, inputs in eqns]

    for (eqn, found, _), (want, slices) in zip(eqns, jax.jit(both)(), strict=True):
        for t, got in enumerate(slices):
            for x, y, axis in zip(got, want, found.outputs, strict=True):
                if axis is not None:
                    np.testing.assert_array_equal(_bits(x), part(_bits(y), axis, t, count), str(eqn), strict=True)


def _in_slices(eqn: Any, found: Rule, inputs: Sequence[Any], count: int) -> list[list[Any]]:
    size = size_of(eqn, found)
    slices = [[part(x, axis, t, count) for x, axis in zip(inputs, found.inputs, strict=True)] for t in range(count)]
    return [run(eqn, found, given, len(range(t, size, count)), t, count) for t, given in enumerate(slices)]


def rejoined(eqn: Any, found: Rule, loop: Callable[..., Any], count: int = COUNT) -> Callable[..., list[Any]]:
    """A function of an equation's inputs that computes its outputs in slices; None for those not used.

    Arguments:
        loop: `lax.map`, or `unrolled`.
    """
    size = size_of(eqn, found) // count

    def divided(x: Any, axis: int | None) -> Any:
        if axis is None:
            return None
        return jnp.moveaxis(x.reshape(*x.shape[:axis], size, count, *x.shape[axis + 1 :]), axis + 1, 0)

    def call(*inputs: Any) -> list[Any]:
        def of_slice(xs: list[Any]) -> list[Any]:
            given = [x if axis is None else one for x, one, axis in zip(inputs, xs[1:], found.inputs, strict=True)]
            return run(eqn, found, given, size, xs[0], count)

        out = loop(of_slice, [np.arange(count, dtype=np.int32), *map(divided, inputs, found.inputs)])
        return [
            None if axis is None else jnp.moveaxis(x, 0, axis + 1).reshape(var.aval.shape)
            for x, axis, var in zip(out, found.outputs, eqn.outvars, strict=True)
        ]

    return call


def unrolled(fn: Callable[..., list[Any]], xs: Any) -> Any:
    """As `lax.map`, so that XLA can evaluate what is computed of constants, loops too."""
    slices = [fn(jax.tree.map(lambda x, t=t: x[t], xs)) for t in range(len(jax.tree.leaves(xs)[0]))]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *slices)


def assert_same_in_loop(eqns: Sequence[tuple[Any, Rule, Sequence[Any]]]) -> None:
    """Outputs of equations that are computed in a loop over slices are those of the whole, to the bit."""

    def both() -> list[tuple[list[Any], list[Any]]]:
        return [(rejoined(eqn, found, lax.map)(*inputs), whole(eqn, inputs)) for eqn, found, inputs in eqns]

    for (eqn, _, _), pairs in zip(eqns, jax.jit(both)(), strict=True):
        for x, y in zip(*pairs, strict=True):
            if x is not None:
                np.testing.assert_array_equal(x, y, str(eqn), strict=True)


def _bits(x: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def check_types(eqn: Any, found: Rule, count: int = COUNT) -> None:
    """A slice has the dtype, and the weak type, of the whole."""
    size = size_of(eqn, found) // count

    def of_slice(aval: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        shape = tuple(size if i == axis else n for i, n in enumerate(aval.shape))
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=aval.weak_type)

    given = [of_slice(var.aval, axis) for var, axis in zip(eqn.invars, found.inputs, strict=True)]
    got = jax.eval_shape(lambda index, *inputs: run(eqn, found, inputs, size, index, count), 0, *given)
    for x, var, axis in zip(got, eqn.outvars, found.outputs, strict=True):
        want = of_slice(var.aval, axis)
        assert axis is None or (x.shape, x.dtype, x.weak_type) == (want.shape, want.dtype, want.weak_type)


def check(eqn: Any, inputs: list[Any], output: int, axis: int, count: int = COUNT) -> Rule:
    """An equation has a rule, and its slices are those of the whole."""
    found = rule(eqn, output, axis)
    assert found is not None and found.outputs[output] == axis
    check_types(eqn, found, count)
    assert_equal([(eqn, found, inputs)], count)
    return found


def integers(shape: Any, dtype: Any = jnp.float32, seed: int = 0, low: int = -4, high: int = 9) -> np.ndarray:
    """Small whole numbers, of which sums and products are exact in any order."""
    drawn = np.random.default_rng(seed).integers(0 if jnp.issubdtype(dtype, jnp.unsignedinteger) else low, high, shape)
    return np.asarray(drawn > 1 if jnp.dtype(dtype) == jnp.bool else drawn, dtype)
