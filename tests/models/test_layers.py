"""Shared sublayers against loops over the indices of the papers' algorithms, in float64 NumPy."""

import itertools

import numpy as np
import pytest

from jaxckpt.models._layers import (
    ReluTransition,
    Transition,
    TriangleAttention,
    TriangleMultiplication,
)

pytestmark = pytest.mark.usefixtures("x64")
N, C, HIDDEN, HEADS = 4, 6, 5, 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0)


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


@pytest.fixture(params=["unmasked", "masked"])
def pair(request):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(N, N, C))
    return z, None if request.param == "unmasked" else rng.choice([0.0, 0.5, 1.0], size=(N, N))


@pytest.fixture
def output_and_params(random_variables, run):
    def apply(module, *args):
        variables = random_variables(module, *args)
        return run(module.apply, variables, *args), as_numpy(variables["params"])

    return apply


def as_numpy(tree):
    return {k: as_numpy(v) if isinstance(v, dict) else np.asarray(v, float) for k, v in tree.items()}


@pytest.mark.parametrize("use_bias", [False, True], ids=["AF3", "AF2"])
@pytest.mark.parametrize("outgoing", [True, False])
def test_triangle_multiplication(output_and_params, pair, outgoing, use_bias):
    z, mask = pair
    module = TriangleMultiplication(outgoing, HIDDEN, use_bias)
    actual, p = output_and_params(module, z, mask)
    assert ("bias" in p["out_proj"]) == use_bias

    mask = np.ones((N, N)) if mask is None else mask
    x = layer_norm(p["norm_in"], z)
    a = mask[..., None] * sigmoid(linear(p["a_gate"], x)) * linear(p["a_proj"], x)
    b = mask[..., None] * sigmoid(linear(p["b_gate"], x)) * linear(p["b_proj"], x)
    for i, j in itertools.product(range(N), repeat=2):
        total = sum(a[i, k] * b[j, k] if outgoing else a[k, i] * b[k, j] for k in range(N))
        gate = sigmoid(linear(p["out_gate"], x[i, j]))
        expected = gate * linear(p["out_proj"], layer_norm(p["norm_out"], total))
        np.testing.assert_allclose(actual[i, j], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_bias", [False, True], ids=["AF3", "AF2"])
@pytest.mark.parametrize("starting", [True, False])
def test_triangle_attention(output_and_params, pair, starting, use_bias):
    z, mask = pair
    module = TriangleAttention(starting, HEADS, 3, use_bias)
    actual, p = output_and_params(module, z, mask)
    assert ("bias" in p["attention"]["out"]) == use_bias

    mask = np.ones((N, N)) if mask is None else mask
    x = layer_norm(p["norm"], z)
    att = p["attention"]
    q, k, v, g = (linear(att[name], x) for name in ("query", "key", "value", "gate"))
    bias = linear(p["pair_bias"], x)
    for i, j in itertools.product(range(N), repeat=2):
        context = []
        for h in range(HEADS):
            c = slice(3 * h, 3 * h + 3)
            weight, others = np.empty(N), np.empty((N, 3))
            for n in range(N):
                edge, third = ((i, n), (j, n)) if starting else ((n, j), (n, i))
                logit = q[i, j, c] @ k[edge][c] / np.sqrt(3) + bias[third][h]
                weight[n], others[n] = mask[edge] * np.exp(logit), v[edge][c]
            if weight.sum() == 0:  # all masked: uniform, as documented
                weight[:] = 1
            context.append(weight @ others / weight.sum())
        expected = linear(att["out"], sigmoid(g[i, j]) * np.concatenate(context))
        np.testing.assert_allclose(actual[i, j], expected, rtol=1e-7, atol=1e-9)


def test_transitions(output_and_params):
    x = np.random.default_rng(2).normal(size=(3, C))
    actual, p = output_and_params(Transition(factor=2), x)
    y = layer_norm(p["norm"], x)
    gate = linear(p["gate"], y)
    expected = linear(p["out"], gate * sigmoid(gate) * linear(p["up"], y))
    np.testing.assert_allclose(actual, expected, rtol=1e-10)

    actual, p = output_and_params(ReluTransition(factor=2), x)
    expected = linear(p["out"], np.maximum(linear(p["up"], layer_norm(p["norm"], x)), 0))
    np.testing.assert_allclose(actual, expected, rtol=1e-10)
    assert p["up"]["kernel"].shape == (C, 2 * C)
