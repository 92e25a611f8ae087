"""Slices that loops read and write by kernels: the same numbers, nothing kept for it, and less memory since JAX 0.11."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt import checkpoint_scan, measure
from jaxckpt.engine import kernels
from jaxckpt.models import TransformerBlock

N = 4


@pytest.fixture
def everywhere(monkeypatch):
    monkeypatch.setattr(kernels, "COPIES_ASYNCHRONOUSLY_FROM", (0, 0))
    monkeypatch.setattr(kernels, "LAYS_OUT_MASKS_UNTIL", (0, 0))


@pytest.fixture
def nowhere(monkeypatch):
    monkeypatch.setattr(kernels, "COPIES_ASYNCHRONOUSLY_FROM", (99,))
    monkeypatch.setattr(kernels, "LAYS_OUT_MASKS_UNTIL", (99,))


def block(p, x, *, shift, mask):
    """A parameter of integers, a key and a mask stand beside what has gradients."""
    noise = jax.random.normal(p["key"], x.shape, x.dtype)
    hidden = jnp.tanh(x @ p["w"] + p["steps"].astype(x.dtype)) * p["scale"][None]
    return x + jnp.where((noise > 0) & mask, hidden, 0) + shift


def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (N, 16, 16))
    p = {"w": w, "scale": jnp.ones((N, 16)), "steps": jnp.arange(N), "key": jax.random.split(keys[2], N)}
    return p, jax.random.normal(keys[1], (8, 16)), {"shift": jnp.float32(0.1), "mask": jnp.arange(8)[:, None] != 3}


def gradients(**knobs):
    stack = checkpoint_scan(block, **knobs)

    p, x, shared = arguments()

    def loss(w, scale, x, shift):
        return (stack({**p, "w": w, "scale": scale}, x, **{**shared, "shift": shift}) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(p["w"], p["scale"], x, shared["shift"])


SETTINGS = [
    {},
    {"policy": "everything"},
    {"policy": "dots"},
    {"policy": "cheap"},
    {"blocks_per_ckpt": 2, "policy": "dots"},
    {"blocks_per_ckpt": 3, "policy": "nothing"},
    {"engine": "reversal"},
    {"engine": "reversal", "blocks_per_ckpt": 3, "policy": "everything"},
    {"snapshots": 2},
    {"tiles": 2},
]


@pytest.mark.filterwarnings("ignore")  # a block as small as this is not worth slices
@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_numbers_are_the_same(knobs, request):
    request.getfixturevalue("nowhere")
    want = gradients(**knobs)
    jax.clear_caches()
    request.getfixturevalue("everywhere")
    got = gradients(**knobs)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(want))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("knobs", [{}, {"engine": "reversal"}, {"policy": "everything"}], ids=str)
def test_programs_for_a_cpu_are_the_same(knobs, request):
    p, x, shared = arguments()
    stack = checkpoint_scan(block, **knobs)

    def program():
        jax.clear_caches()
        step = jax.grad(lambda w, x: (stack({**p, "w": w}, x, **shared) ** 2).sum())
        return jax.jit(lambda w, x: step(w, x)).lower(p["w"], x).as_text()

    request.getfixturevalue("nowhere")
    want = program()
    request.getfixturevalue("everywhere")
    assert program() == want


def everything_but(*_, **__):
    """A policy that keeps whatever it is asked for."""
    return True


@pytest.mark.parametrize("policy", ["everything", everything_but, "dots"])
def test_nothing_is_kept_for_it(policy, request):
    p, x, shared = arguments()

    def residuals():
        stack = checkpoint_scan(block, policy=policy)
        run = lambda w, x: stack({**p, "w": w}, x, **shared)  # noqa: E731
        out = jax.eval_shape(lambda w, x: jax.vjp(run, w, x)[1], p["w"], x)
        return sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(out))

    request.getfixturevalue("nowhere")
    want = residuals()
    jax.clear_caches()
    request.getfixturevalue("everywhere")
    assert residuals() == want


def test_forward_mode_and_second_derivatives(everywhere):
    p, x, shared = arguments()
    stack = checkpoint_scan(block, policy="everything")
    run = lambda w: (stack({**p, "w": w}, x, **shared) ** 2).sum()  # noqa: E731
    _, along = jax.jvp(run, (p["w"],), (jnp.ones_like(p["w"]),))
    np.testing.assert_allclose(along, jax.grad(run)(p["w"]).sum(), rtol=1e-5)
    twice = jax.jvp(jax.grad(run), (p["w"],), (jnp.ones_like(p["w"]),))[1]
    back = jax.grad(lambda w: jax.grad(run)(w).sum())(p["w"])
    np.testing.assert_allclose(twice, back, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("knobs", [{}, {"policy": "everything"}, {"engine": "reversal"}], ids=str)
def test_under_vmap(knobs, everywhere):
    p, x, shared = arguments()
    stack = checkpoint_scan(block, **knobs)
    gradient = jax.grad(lambda w, x: (stack({**p, "w": w}, x, **shared) ** 2).sum())
    xs, ws = jnp.stack([x, 2 * x]), jnp.stack([p["w"], p["w"] / 2])
    each = jnp.stack([gradient(w, x) for w, x in zip(ws, xs, strict=True)])
    np.testing.assert_allclose(jax.vmap(gradient)(ws, xs), each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine, since", [("scan", (0, 11)), ("reversal", (0, 12))])
def test_an_attention_matrix_less_is_alive(h200, engine, since, request):
    if jax.__version_info__ < since:
        pytest.skip("XLA orders this loop by memory either way")
    module = TransformerBlock(256, num_heads=8, d_ff=1024, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, 1024, 256), jnp.bfloat16)
    one = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((8, *leaf.shape), leaf.dtype), one)
    stack = checkpoint_scan(lambda p, x: module.apply({"params": p}, x), engine=engine)
    step = jax.grad(lambda p, x: (stack(p, x).astype(jnp.float32) ** 2).sum())
    take = functools.partial(measure, target=h200)
    less = take(lambda p, x: step(p, x), params, x).temp_bytes
    request.getfixturevalue("nowhere")
    more = take(lambda p, x: step(p, x), params, x).temp_bytes
    matrix = 4 * 8 * 1024 * 1024 * 2
    assert less <= more - 0.9 * matrix
