import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.models._attention import attention, mask_bias, rotary

pytestmark = pytest.mark.usefixtures("x64")


def test_attention_is_a_weighted_mean_and_a_mask_is_a_weight(run):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 5, 2, 4))  # Q = K = 5, H = 2, c = 4
    mask = np.array([1.0, 0.0, 0.5, 1.0, 0.25])

    def masked(q, k, v, mask, causal):
        bias = jnp.expand_dims(mask_bias(mask, jnp.float64), (0, 1))
        return attention(q, k, v, biases=[bias], causal=causal)

    for causal in (False, True):
        expected = np.zeros_like(v)
        for h in range(2):
            for i in range(5):
                weight = mask * np.exp(k[:, h] @ q[i, h] / 2)
                if causal:
                    weight[i + 1 :] = 0
                expected[i, h] = weight @ v[:, h] / weight.sum()
        actual = run(functools.partial(masked, causal=causal), q, k, v, mask)
        np.testing.assert_allclose(actual, expected, rtol=1e-13)


def test_mask_gradient_is_that_of_a_weight():
    rng = np.random.default_rng(1)
    q, k, v, cotangent = rng.normal(size=(4, 5, 1, 4))

    @jax.jit
    def loss(mask):
        bias = jnp.expand_dims(mask_bias(mask, jnp.float64), (0, 1))
        return jnp.vdot(cotangent, attention(q, k, v, biases=[bias]))

    mask = np.array([1.0, 0.7, 0.0, 1.0, 0.2])
    gradient = jax.device_get(jax.grad(loss)(mask))
    for i, step in enumerate(1e-6 * np.eye(5)):
        if mask[i]:
            numeric = (loss(mask + step) - loss(mask - step)) / 2e-6
            np.testing.assert_allclose(gradient[i], numeric, rtol=1e-6)
    assert gradient[2] == 0


def test_a_row_without_keys_is_finite(run):
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(3, 4, 1, 2)).astype(np.float32)

    def out(mask, q):
        bias = jnp.expand_dims(mask_bias(mask, jnp.float32), (0, 1))
        return attention(q, k, v, biases=[bias], causal=True)

    def value_and_gradients(mask, q):
        value, vjp = jax.vjp(out, mask, q)
        return value, vjp(jnp.ones_like(value))

    value, gradients = run(value_and_gradients, np.zeros(4, np.float32), q)
    assert np.isfinite(value).all() and all(np.isfinite(g).all() for g in gradients)
    np.testing.assert_allclose(value[0, 0], v[0, 0], rtol=1e-6)  # the first position sees nothing but itself


def test_boolean_and_float_masks_agree():
    flags = np.array([True, False, True])
    assert np.array_equal(mask_bias(flags, jnp.float32), mask_bias(1.0 * flags, jnp.float32))


def test_rotary_keeps_norms_and_depends_on_distance_only(run):
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(2, 1, 1, 8))
    rotated_q, rotated_k = (run(rotary, np.tile(x, (2, 6, 1, 1))) for x in (q, k))
    np.testing.assert_allclose((rotated_q**2).sum(-1), (q**2).sum() * np.ones((2, 6, 1)))
    scores = np.einsum("qc,kc->qk", rotated_q[0, :, 0], rotated_k[0, :, 0])
    for offset in range(-5, 6):
        diagonal = np.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, diagonal[0] * np.ones_like(diagonal))
    assert abs(scores[0, 1] - scores[1, 0]) > 1e-3
