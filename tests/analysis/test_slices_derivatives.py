"""Functions with a forward derivative of their own, in slices: values, derivatives, and what must stay whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxckpt.analysis import flow, inlining
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices import rule
from tests.analysis.slicing import check_types, equation, integers, rejoined, unrolled, whole

X = integers((4, 6)) / 4


@jax.custom_jvp
def scaled(x, row, number):
    """A derivative that is not that of the function, of an array, a row and an integer."""
    return x * row * number


@scaled.defjvp
def _(primals, tangents):
    x, row, number = primals
    return scaled(x, row, number), 3 * tangents[0] * row + x * tangents[1] * jnp.arange(6.0)[None]


# A function and by axis of its output the axes of its inputs.
FUNCTIONS = {
    "relu": (jax.nn.relu, [X], {0: (0,), 1: (1,)}),
    "relu6": (jax.nn.relu6, [X], {0: (0,), 1: (1,)}),
    "silu": (jax.nn.silu, [X], {0: (0,), 1: (1,)}),
    "gelu": (jax.nn.gelu, [X], {0: (0,), 1: (1,)}),
    "elu": (jax.nn.elu, [X], {0: (0,), 1: (1,)}),
    "softplus": (jax.nn.softplus, [X], {0: (0,), 1: (1,)}),
    "logaddexp": (jnp.logaddexp, [X, X[::-1]], {0: (0, 0), 1: (1, 1)}),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, 1), [X], {0: (0,)}),
    "softmax": (jax.nn.softmax, [X], {0: (0,), 1: None}),
    "log_softmax": (lambda x: jax.nn.log_softmax(x, 0), [X], {0: None, 1: (1,)}),
    "several inputs": (scaled, [X, X[:1], np.int32(2)], {0: (0, None, None), 1: (1, 1, None)}),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives(name):
    """Forward and reverse, of a function that is called twice in a nested jit."""
    fn, args, expected = FUNCTIONS[name]
    eqn, inputs = equation(jax.jit(lambda x, *args: fn(x if name == "logsumexp" else fn(x, *args), *args)), *args)
    found = {axis: rule(eqn, 0, axis) for axis in expected}
    assert {axis: one and one.inputs for axis, one in found.items()} == expected
    moving = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    tangents = [integers(inputs[i].shape, seed=i + 1) for i in moving]

    def both(run):
        def call(*values):
            given = list(inputs)
            for i, x in zip(moving, values, strict=True):
                given[i] = x
            return run(*given)[0]

        primals = [inputs[i] for i in moving]
        out, pull = jax.vjp(call, *primals)
        return jax.jvp(call, primals, tangents), pull(integers(out.shape, seed=9))

    # As slices are: without nested jit, whose transposition adds up in another order.
    inlined = inlining.inlined(jx.trace(lambda *args: whole(eqn, args), *inputs))
    want = jax.jit(lambda: both(jx.as_function(inlined)))()
    for one in filter(None, found.values()):
        check_types(eqn, one)
        jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda one=one: both(rejoined(eqn, one, unrolled)))(), want)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("batched", [False, True])
def test_in_a_checkpointed_loop(axis, batched):
    """As tiles are run: gradients of a rule that is not the function's own, exact since all numbers are whole quarters."""
    eqn, (x, row, number) = equation(jax.jit(lambda *args: jax.nn.relu(scaled(*args))), X, X[:1], np.int32(2))
    run = rejoined(eqn, rule(eqn, 0, axis), lambda fn, xs: lax.map(jax.checkpoint(fn), xs))

    def gradients(run):
        fn = jax.grad(lambda x, row, number: (run(x, row, number)[0] * X).sum(), (0, 1))
        return jax.vmap(fn, (0, None, 0)) if batched else fn

    args = (np.stack([x, -x, x + 1]), row, number + np.arange(3, dtype=np.int32)) if batched else (x, row, number)
    got = jax.jit(gradients(run))(*args)
    want = jax.jit(gradients(lambda *args: whole(eqn, args)))(*args)
    assert all(jnp.any(leaf != 0) for leaf in want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("fn", [jax.nn.relu6, jax.nn.softplus])
def test_second_derivatives(fn, axis):
    eqn, inputs = equation(fn, X)
    direction = integers(X.shape, seed=1)

    def second(run):
        return jax.jvp(
            jax.grad(lambda *inputs: jnp.vdot(run(*inputs)[0] ** 3, direction)), inputs, [direction] * len(inputs)
        )

    got = jax.jit(lambda: second(rejoined(eqn, rule(eqn, 0, axis), unrolled)))()
    want = jax.jit(lambda: second(lambda *inputs: whole(eqn, inputs)))()
    assert jnp.any(want[1] != 0)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def function(rule_of_tangent, value=jnp.sin, **knobs):
    """A function of one array with a derivative of its own."""
    fn = jax.custom_jvp(value)
    fn.defjvp(lambda primals, tangents: (value(*primals), rule_of_tangent(*primals, *tangents)), **knobs)
    return fn


def refuses(x, t):
    raise TypeError("no derivative")


@jax.custom_jvp
def sum_of_tangents(x):
    return x


sum_of_tangents.defjvp(lambda primals, tangents: (primals[0], jnp.cumsum(tangents[0], 0)))

STAYS_WHOLE = {
    "the rule adds up along the axis": (function(lambda x, t: jnp.cumsum(t, 0)), False),
    "the rule turns": (function(lambda x, t: t.T), True),
    "the rule needs all of the input": (function(lambda x, t: t * jnp.sum(x)), True),
    "the function adds up along the axis": (function(lambda x, t: t, lambda x: jnp.cumsum(x, 0)), False),
    "the rule refuses": (function(refuses), True),
    "one rule for each choice of tangents": (function(lambda x, t: t, symbolic_zeros=True), True),
}


@pytest.mark.parametrize("case", STAYS_WHOLE)
def test_stays_whole(case):
    """Along the first axis, and along the second where that is true of it too."""
    fn, along_both = STAYS_WHOLE[case]
    eqn, _ = equation(fn, integers((6, 6)))
    assert eqn.primitive.name == "custom_jvp_call"
    assert [rule(eqn, 0, axis) is None for axis in (0, 1)] == [True, along_both]


def test_a_second_derivative_that_has_no_slices_is_refused():
    """The first has: it takes only the value of the function that is the rule's factor."""
    eqn, inputs = equation(function(lambda x, t: sum_of_tangents(x) * t), X)
    run, everything = rejoined(eqn, rule(eqn, 0, 0), unrolled), lambda *inputs: whole(eqn, inputs)

    def first(run):
        return jax.grad(lambda x: run(x)[0].sum())

    np.testing.assert_array_equal(jax.jit(first(run))(*inputs), jax.jit(first(everything))(*inputs))
    with pytest.raises(NotImplementedError, match=r"through the jax\.custom_jvp sum_of_tangents.*pass tiles=None"):
        jax.jvp(first(run), inputs, inputs)


def test_a_derivative_is_traced_once():
    eqn, other = (equation(lambda x: jax.nn.relu6(x), x)[0] for x in (X, X.T))
    assert flow.derivative(eqn) is flow.derivative(eqn) is not None
    assert flow.derivative(other).in_avals[0].shape == X.T.shape
