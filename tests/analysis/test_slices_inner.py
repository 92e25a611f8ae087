"""Slices of equations with jaxprs of their own: calls, loops, branches, functions with a derivative of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices import rule, through
from tests.analysis.slicing import assert_same_in_loop, check_types, equation, integers, rejoined, used

X, W = integers((4, 6, 10)), integers((4, 6), seed=1)
SQUARE = integers((6, 6), seed=2)
TABLE = integers((4, 6), seed=3)  # which functions close over


def with_time(x, constant):
    """Carries, constants, what is scanned and what is put out, each along an axis of its own."""

    def body(carry, x):
        total, number = carry
        total = total + x * constant + number.astype(x.dtype)
        return (total, number + 1), (total.T, jnp.sum(total, 1))

    (total, _), (transposed, _) = lax.scan(body, (jnp.zeros_like(constant), jnp.int32(0)), x, reverse=True, unroll=2)
    return total, transposed


def through_another(a, b, c):
    """The axis of the first carry is known by the second's alone, and that one's by the third's."""
    return lax.scan(lambda carry, _: ((carry[1], carry[2], jnp.cos(carry[0])), None), (a, b, c), None, length=5)[0]


def best_and_sum(x):
    best, places = lax.top_k(x, 4)
    return best * jnp.sum(places, 0, keepdims=True)


def branches(*fns):
    return lambda number, *args: lax.switch(number, fns, *args)


# The name of the equation, a function, its arguments; by output and axis the axes of its inputs, None where it stays whole.
CASES = {
    "jit": ("jit", jax.jit(lambda x, w: x @ (w * 2)), [W.T, W], {(0, 0): (0, None), (0, 1): (None, 1)}),
    "jit: a softmax": ("jit", jax.jit(lambda x: x / jnp.sum(x, 1, keepdims=True)), [W], {(0, 0): (0,), (0, 1): None}),
    "jit: sliced and whole": ("jit", jax.jit(lambda x: x @ x.T), [W], {(0, 0): None, (0, 1): None}),
    "jit: of one equation, one output sliced, one whole": ("jit", jax.jit(best_and_sum), [W], {(0, 0): None, (0, 1): None}),
    "jit: along two axes": ("jit", jax.jit(lambda x: x + x.T), [SQUARE], {(0, 0): None, (0, 1): None}),
    "jit: one_hot": ("jit", lambda x: jax.nn.one_hot(x, 6), [np.arange(4)], {(0, 0): (0,), (0, 1): (None,)}),
    "jit: positions": ("jit", jax.jit(lambda x: x + jnp.arange(6.0)[None]), [W], {(0, 0): (0,), (0, 1): (1,)}),
    "jit: a constant": ("jit", jax.jit(lambda x: x @ jnp.asarray(TABLE)), [W.T], {(0, 0): (0,), (0, 1): None}),
    "jit: two outputs": (
        "jit",
        jax.jit(lambda x: (x + 1, (2 * x).T)),
        [W],
        {(0, 0): (0,), (0, 1): (1,), (1, 0): (1,), (1, 1): (0,)},
    ),
    "jit: outputs of their own": (
        "jit",
        jax.jit(lambda x, y: (x + 1, jnp.sum(y, 0))),
        [SQUARE, SQUARE],
        {(0, 0): (0, 1), (0, 1): (1, 1), (1, 0): (0, 1)},
    ),
    "jit: an output that turns": (
        "jit",
        jax.jit(lambda x: (x + 1, 2 * x.T)),
        [SQUARE],
        {(0, 0): (0,), (0, 1): (1,), (1, 0): (1,), (1, 1): (0,)},
    ),
    "jit: another size": ("jit", jax.jit(lambda x: (x[:2] + 1, x + 1)), [W], {(0, 0): None, (0, 1): (1,), (1, 0): None}),
    "jit: a random draw": (
        "jit",
        jax.jit(lambda key, x: x * jax.random.bits(key, (4, 6)).astype(x.dtype)),
        [jax.random.key(0), W],
        {(0, 0): None, (0, 1): None},
    ),
    "checkpoint": (
        None,
        jax.checkpoint(lambda x: jnp.sin(x) + jnp.arange(6.0)[None], policy=jax.checkpoint_policies.dots_saveable),
        [W],
        {(0, 0): (0,), (0, 1): (1,)},
    ),
    "scan": (
        "scan",
        with_time,
        [integers((4, 6, 10)), integers((6, 10))],
        {(0, 0): (0, 0, None, 1), (0, 1): (1, 1, None, 2), (2, 0): None, (2, 1): (1, 1, None, 2), (2, 2): (0, 0, None, 1)},
    ),
    "scan: a map": ("scan", lambda x: lax.map(lambda row: row * 2, x), [X], {(0, 0): None, (0, 1): (1,), (0, 2): (2,)}),
    "scan: one carry through another": (
        "scan",
        through_another,
        [W, W + 1, W + 2],
        {(k, axis): (axis, axis, axis) for k in range(3) for axis in range(2)},
    ),
    "scan: a carry that turns": (
        "scan",
        lambda x: lax.scan(lambda c, _: (c.T, None), x, None, length=2)[0],
        [SQUARE],
        {(0, 0): None, (0, 1): None},
    ),
    "scan: a carry that mixes": (
        "scan",
        lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, None, length=2)[0],
        [W, SQUARE],
        {(0, 0): (None, 0), (0, 1): None},
    ),
    "scan: a carry that is not read": (
        "scan",
        lambda x, c: lax.scan(lambda c, x: (x + 1, None), c, x)[0],
        [X, integers((6, 10))],
        {(0, 0): (0, 1), (0, 1): (1, 2)},
    ),
    "scan: a number that is used": (
        "scan",
        lambda x: lax.scan(lambda c, _: ((c[0] + 1, c[1] * 2), None), (0, x), None, length=3)[0],
        [W],
        {(1, 0): None, (1, 1): None},
    ),
    "fori_loop": (
        "scan",
        lambda x: lax.fori_loop(0, 3, lambda i, c: c * i + x, x),
        [W],
        {(1, 0): (0, None, 0), (1, 1): (1, None, 1)},
    ),
    "cond": (
        "cond",
        lambda p, x, y: lax.cond(p, lambda x, y: x + 1, lambda x, y: x @ y, x, y),
        [np.True_, W, SQUARE],
        {(0, 0): (None, 0, None), (0, 1): None},
    ),
    "cond: one operand each": (
        "cond",
        lambda p, x, y: lax.cond(p, lambda x, y: x + 1, lambda x, y: y * 2, x, y),
        [np.False_, W, W - 3],
        {(0, 0): (None, 0, 0), (0, 1): (None, 1, 1)},
    ),
    "cond: in disagreement": (
        "cond",
        lambda p, x: lax.cond(p, lambda x: x + 1, lambda x: x.T, x),
        [np.True_, SQUARE],
        {(0, 0): None, (0, 1): None},
    ),
    "switch": (
        "cond",
        branches(lambda x: x * jnp.arange(4.0)[:, None], lambda x: jnp.cumsum(x, 0), lambda x: jnp.full_like(x, 2)),
        [np.int32(2), W],
        {(0, 0): None, (0, 1): (None, 1)},
    ),
    "switch with positions": (
        "cond",
        branches(lambda x: x * jnp.arange(4.0)[:, None], lambda x: -x, lambda x: jnp.full_like(x, 2)),
        [np.int32(0), W],
        {(0, 0): (None, 0), (0, 1): (None, 1)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case):
    name, fn, args, expected = CASES[case]
    eqn, inputs = equation(fn, *args, name=name)
    read = used(fn, *args, name=name)
    checked = []
    for (k, axis), axes in expected.items():
        one = rule(eqn, k, axis, read)
        assert (one and one.inputs) == axes
        if one is not None:
            assert [k for k, i in enumerate(one.outputs) if i is not None] == read
            check_types(eqn, one)
            checked.append((eqn, one, inputs))
    if checked:
        assert_same_in_loop(checked)


def nested(x, y):
    h = jnp.tanh(x @ y) * jnp.arange(6.0)[None]
    return jax.nn.relu(h).T, lax.cumsum(h, axis=1)


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        ((1, 0), (0, None)),  # rows of `h`
        ((None, 0), None),  # and all of them
        ((0, None), None),
        ((0, 1), None),  # of which the second is along its own axis
        ((1, 1), None),  # along two axes
        ((None, None), (None, None)),
    ],
)
def test_through(outputs, inputs):
    jaxpr = jx.trace(nested, W.T, W).jaxpr  # [6, 4] and [4, 6] to [6, 6]
    assert through(jaxpr, outputs) == inputs


def test_through_outputs_of_two_sizes():
    jaxpr = jx.trace(lambda x, y: (x + 1, y + 1), W, X).jaxpr
    assert through(jaxpr, (0, 0)) == (0, 0)
    assert through(jaxpr, (0, 1)) is None


def test_source_and_context_stay():
    """What is computed in slices has the name scope, the line and the context of the equation it comes of."""

    @jax.jit
    def fn(x):
        with set_xla_metadata(mark="here"):
            return lax.scan(lambda c, _: (jax.named_call(jnp.sin, name="inner")(c), None), x, None, length=2)[0]

    eqn, inputs = equation(fn, W)
    eqns = jx.equations(jax.make_jaxpr(rejoined(eqn, rule(eqn, 0, 0), lax.map))(*inputs).jaxpr)
    (of_slices,) = [eqn for eqn in eqns if eqn.primitive.name == "sin"]
    (of_whole,) = [eqn for eqn in jx.equations(jx.trace(fn, W).jaxpr) if eqn.primitive.name == "sin"]
    assert of_slices.source_info.traceback is of_whole.source_info.traceback
    assert of_slices.ctx.xla_metadata == of_whole.ctx.xla_metadata == {"mark": "here"}
    assert "inner" in str(of_slices.source_info.name_stack)


def test_a_checkpoint_stays_one():
    policy = jax.checkpoint_policies.dots_saveable
    eqn, inputs = equation(jax.checkpoint(lambda x: jnp.sin(x @ SQUARE), policy=policy), W)
    eqns = jx.equations(jax.make_jaxpr(rejoined(eqn, rule(eqn, 0, 0), lax.map))(*inputs).jaxpr)
    (found,) = filter(jx.is_checkpoint, eqns)
    assert found.params.get("_prim", found).params["policy"] is policy
