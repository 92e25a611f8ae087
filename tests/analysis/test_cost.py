"""The time model, one primitive family at a time, on a GPU with round numbers."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.analysis.cost import CPU, FUSED, cost, step_seconds

# A byte takes 1 s; a bfloat16 operation of the matrix units 1 s, a float32 one 4 s.
GPU = SimpleNamespace(
    memory_bandwidth=1.0,
    matmul_rate={"bfloat16": 1.0, "float32": 0.25},
    vector_rate={"float32": 0.1},
    link_bandwidth=0.5,
)
X = jnp.ones((4, 8), jnp.float32)


def costs(fn, *args):
    return [cost(eqn, GPU) for eqn in jax.make_jaxpr(fn)(*args).jaxpr.eqns]


def one(fn, *args):
    (found,) = costs(fn, *args)
    return found


@pytest.mark.parametrize("dtype, per_operation", [(jnp.bfloat16, 1), (jnp.float32, 4)])
def test_matmuls_by_operations_and_dtype(dtype, per_operation):
    a, b = jnp.ones((3, 16, 32), dtype), jnp.ones((3, 32, 64), dtype)
    assert one(jnp.matmul, a, b).seconds == 2 * 3 * 16 * 32 * 64 * per_operation


def test_matmuls_that_bandwidth_bounds():
    fast = SimpleNamespace(memory_bandwidth=1.0, matmul_rate={"float32": 1e9}, vector_rate={"float32": 1.0})
    (eqn,) = jax.make_jaxpr(jnp.dot)(X, jnp.ones((8, 2))).jaxpr.eqns
    assert cost(eqn, fast).seconds == 4 * (4 * 8 + 8 * 2 + 4 * 2)


def test_dtypes_that_the_matrix_units_lack():
    gpu = SimpleNamespace(memory_bandwidth=1e9, matmul_rate={}, vector_rate={"float32": 0.5})
    (eqn,) = jax.make_jaxpr(jnp.dot)(X, jnp.ones((8, 2))).jaxpr.eqns
    assert cost(eqn, gpu).seconds == 2 * (2 * 4 * 8 * 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    image, kernel = jnp.ones((2, 10, 10, 4), jnp.bfloat16), jnp.ones((3, 3, 4 // groups, 6), jnp.bfloat16)

    def convolve(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    assert one(convolve, image, kernel).seconds == 2 * (2 * 10 * 10 * 6) * (3 * 3 * 4 // groups)


def test_views_cost_nothing():
    assert one(lambda x: x.reshape(32), X).seconds == 0
    assert one(lambda x: jax.lax.broadcast_in_dim(x, (2, 4, 8), (1, 2)), X).seconds == 0


@pytest.mark.parametrize(
    "fn, values", [(jnp.exp, 64), (lambda x: x + x, 96), (lambda x: jax.lax.reduce_sum(x, axes=(1,)), 36)]
)
def test_fusible_equations_are_discounted(fn, values):
    assert one(fn, X).seconds == FUSED * 4 * values


@pytest.mark.parametrize("fn, values", [(lambda x: jax.lax.sort(x), 64), (lambda x: jax.lax.cumsum(x), 64)])
def test_others_by_bytes(fn, values):
    assert one(fn, X) == (4 * values, False)


def with_a_rule(fn):
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_a_rule])
def test_calls_cost_what_they_call(wrap):
    inner = lambda x: jnp.sin(jnp.cos(x))  # noqa: E731
    assert one(wrap(inner), X).seconds == sum(c.seconds for c in costs(inner, X))


def test_custom_vjp():
    fn = jax.custom_vjp(jnp.sin)
    fn.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (ct * jnp.cos(x),))
    assert one(fn, X).seconds == one(jnp.sin, X).seconds


def test_scans_cost_their_length():
    body = one(jnp.sin, X).seconds
    found = one(lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=7)[0], X)
    assert found == (7 * body, False)


def test_branches_and_loops():
    found = one(lambda x: jax.lax.cond(True, jnp.sin, lambda x: jnp.sin(jnp.cos(x)), x), X)
    assert found.seconds == 2 * one(jnp.sin, X).seconds
    loop = one(lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, jnp.sin, x), X)
    assert loop == (one(jnp.sin, X).seconds, True)


@pytest.mark.parametrize(
    ("collective", "sent"),
    [
        (lambda x: jax.lax.psum(x, "i"), 2 * 32),
        (lambda x: jax.lax.pmax(x, "i"), 2 * 32),
        (lambda x: jax.lax.all_gather(x, "i"), 3 * 32),
        (lambda x: jax.lax.all_gather(x, "i", tiled=True), 3 * 32),
        (lambda x: jax.lax.psum_scatter(x, "i"), 3 / 4 * 32),
        (lambda x: jax.lax.all_to_all(x, "i", 0, 0, tiled=True), 32),
        (lambda x: jax.lax.ppermute(x, "i", [(0, 1), (1, 0)]), 32),
    ],
)
def test_collectives_by_what_is_sent(collective, sent):
    jaxpr = jax.make_jaxpr(collective, axis_env=[("i", 4)])(X).jaxpr
    assert [cost(eqn, GPU) for eqn in jaxpr.eqns] == [(2 * 4 * sent, False)]


def test_what_the_model_does_not_know_is_marked():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert one(lambda x: jax.pure_callback(lambda x: x, shape, x), X) == (2 * X.nbytes, True)


def test_a_step_runs_its_blocks_differentiates_them_and_moves_what_is_stored():
    gpu = SimpleNamespace(host_bandwidth=10.0)
    assert step_seconds(6, 2.0, 1.5, gpu) == 6 * 2.0 * (1.5 + 2)
    assert step_seconds(6, 2.0, 1.5, gpu, host_bytes=30, fresh_bytes=100) == 42.0 + 2 * 30 / 10
    fresh = CPU._replace(host_bandwidth=10.0, fresh_bandwidth=4.0)
    assert step_seconds(6, 2.0, 1.5, fresh, host_bytes=30, fresh_bytes=100) == 42.0 + 2 * 30 / 10 + 100 / 4
