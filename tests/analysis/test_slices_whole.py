"""What has no rule for slices and must be computed whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import primitives

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices import rule, run
from tests.analysis.slicing import check, equation, integers

X = integers((4, 6, 10))


@jax.custom_vjp
def with_backward_rule(x):
    return jnp.sin(x)


with_backward_rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))
KEY = jax.random.key(0)
EXPLICIT, AUTO = (
    jax.make_mesh((1,), ("i",), (kind,)) for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto)
)


def mapped(fn):
    """The equations within a `shard_map`."""
    return jax.shard_map(fn, mesh=AUTO, in_specs=jax.P("i"), out_specs=jax.P("i"))


# What is never sliced: a function, its arguments, and the equation.
STAYS_WHOLE = {
    "random_bits": (lambda key: jax.random.bits(key, (4, 6)), [KEY], "random_bits"),
    "random_bits of several keys": (
        jax.vmap(lambda key: jax.random.bits(key, (6,))),
        [jax.random.split(KEY, 4)],
        "random_bits",
    ),
    "random_split": (lambda key: jax.random.split(key, 4), [KEY], "random_split"),
    "random_fold_in": (jax.vmap(jax.random.fold_in), [jax.random.split(KEY, 4), np.arange(4)], "random_fold_in"),
    "rng_bit_generator": (lambda key: lax.rng_bit_generator(key, (4, 6)), [np.zeros(4, np.uint32)], "rng_bit_generator"),
    "threefry2x32": (lambda a, b: primitives.threefry2x32_p.bind(a, a, b, b), 2 * [np.zeros(4, np.uint32)], "threefry2x32"),
    "custom_vjp": (with_backward_rule, [X], "custom_vjp_call"),
    "while": (lambda x: lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x + 1, x), [X], "while"),
    "reduce by any function": (lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b * a, (1,)), [X], "reduce"),
    "a loop until all entries are exact": (
        lambda x: primitives.regularized_incomplete_beta_p.bind(x, x, x),
        [X],
        "regularized_incomplete_beta",
    ),
    "windows": (lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "VALID"), [X], "reduce_window_sum"),
    "linear algebra": (jnp.linalg.cholesky, [np.eye(4, dtype=np.float32) * np.ones((3, 1, 1), np.float32)], "cholesky"),
    "callbacks": (lambda x: jax.pure_callback(lambda x: x, x, x), [X], "pure_callback"),
    "effects": (jax.jit(lambda x: [x + 1, jax.debug.print("{}", x[0, 0, 0])][0]), [X], "jit"),
    "psum": (mapped(lambda x: x * lax.psum(x, "i")), [X], "psum_invariant"),
    "all_gather": (mapped(lambda x: lax.all_gather(x, "i")[0]), [X], "all_gather"),
    "ppermute": (mapped(lambda x: lax.ppermute(x, "i", [(0, 0)])), [X], "ppermute"),
    "all_to_all": (mapped(lambda x: lax.all_to_all(x, "i", 1, 2, tiled=True)), [X], "all_to_all"),
}


@pytest.mark.parametrize("case", STAYS_WHOLE)
def test_stays_whole(case):
    fn, args, name = STAYS_WHOLE[case]
    eqns = [eqn for eqn in jx.equations(jx.trace(fn, *args).jaxpr) if eqn.primitive.name == name]
    assert eqns
    for eqn in eqns:
        axes = [(k, axis) for k, var in enumerate(eqn.outvars) for axis in range(len(var.aval.shape))]
        assert axes and not any(rule(eqn, *axis) for axis in axes)


def test_axes_of_one_entry_stay_whole():
    eqn, _ = equation(jnp.sin, X[:, :1])
    assert [rule(eqn, 0, axis) is None for axis in range(3)] == [False, True, False]


def test_what_an_explicit_mesh_splits_stays_whole():
    with jax.set_mesh(EXPLICIT):
        split, whole = jax.device_put(X, jax.P("i")), jax.device_put(X, jax.P())
        assert rule(equation(lambda x: x + 1, split)[0], 0, 2) is None
        assert rule(equation(lambda x: lax.broadcast_in_dim(x, (3, 4, 6, 10), (1, 2, 3)), split)[0], 0, 3) is None
        assert check(*equation(lambda x: x + 1, whole), 0, 2).inputs == (2, None)
        assert check(*equation(lambda x: lax.broadcast_in_dim(x, (3, 4, 6, 10), (1, 2, 3)), whole), 0, 3).inputs == (2,)


def test_within_a_shard_map():
    """Where a value that is equal on all devices meets one that is not, JAX says so by an equation of its own."""
    fn = jax.shard_map(lambda x, y: x * y, mesh=AUTO, in_specs=(jax.P("i"), jax.P()), out_specs=jax.P("i"))
    (eqn,) = (eqn for eqn in jx.equations(jx.trace(fn, X, X).jaxpr) if eqn.primitive.name == "pvary")
    assert rule(eqn, 0, 1).inputs == (1,)

    def in_slices(x):
        return jnp.stack(
            run(eqn, rule(eqn, 0, 1), [x[:, ::2]], 3, 0, 2) + run(eqn, rule(eqn, 0, 1), [x[:, 1::2]], 3, 1, 2), 2
        )

    got = jax.shard_map(in_slices, mesh=AUTO, in_specs=jax.P(), out_specs=jax.P("i"))(X)
    np.testing.assert_array_equal(got.reshape(X.shape), X)
