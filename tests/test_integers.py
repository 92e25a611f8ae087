"""Parameters that are integers (quantised or frozen weights, indices, flags, keys) are taken as they are: no gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, explain
from tests.support import QUICK, random_like, relative_error

N, WIDTH = 5, 4
SETTINGS = [{"blocks_per_ckpt": 2, "policy": "cheap", "unroll": 2}, {"snapshots": 2, "blocks_per_ckpt": 2, "stages": 2}]
MORE = [
    {"policy": "everything"},
    {"policy": "budget:0.5"},
    {"stages": 2},
    {"engine": "reversal", "policy": "cheap"},
    {"engine": "reversal", "policy": "everything"},
    {"snapshots": 2, "offload_carry": True},
]
FROZEN = ("q", "bits", "flag", "index", "key")


def forward(p, x):
    """A block with an int8 weight and its scale, a packed one, a flag, an index, a key, and a weight that is trained."""
    x = x + jnp.tanh(x @ (p["q"].astype(x.dtype) * p["scale"]))
    unpacked = ((p["bits"] >> jnp.arange(WIDTH, dtype=jnp.uint32)) & 1).astype(x.dtype)
    noise = jax.random.uniform(p["key"], x.shape, x.dtype)
    x = jnp.where(p["flag"], jnp.sin(x * unpacked), x) + 0.1 * noise
    return x + jnp.cos(x @ p["w"]) * x[p["index"]]


def parameters():
    rng = np.random.default_rng(0)
    return {
        "q": jnp.asarray(rng.integers(-127, 128, (N, WIDTH, WIDTH)), jnp.int8),
        "scale": jnp.asarray(rng.uniform(0.001, 0.01, (N, 1, WIDTH))),
        "bits": jnp.asarray(rng.integers(0, 16, (N, 1)), jnp.uint32),
        "flag": jnp.asarray([True, False, True, True, False]),
        "index": jnp.asarray(rng.integers(0, WIDTH, N), jnp.int32),
        "key": jax.random.split(jax.random.key(3), N),
        "w": jnp.asarray(0.3 * rng.normal(size=(N, WIDTH, WIDTH))),
    }


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return forward({k: self.param(k, lambda key, v=v: v[0]) for k, v in parameters().items()}, x)


class NnxBlock(nnx.Module):
    def __init__(self, i):
        for name, value in parameters().items():
            setattr(self, name, nnx.Param(value[i]))

    def __call__(self, x):
        return forward({name: getattr(self, name)[...] for name in parameters()}, x)


def as_function(knobs):
    return checkpoint_scan(forward, **knobs)


def as_linen(knobs):
    stack = checkpoint_scan(LinenBlock, N, **knobs)()
    return lambda p, x: stack.apply({"params": p}, x)


def as_nnx(knobs):
    def call(p, x):
        stack = checkpoint_scan([NnxBlock(i) for i in range(N)], **knobs)
        nnx.update(stack, {name: nnx.Param(value) for name, value in p.items()})
        return stack(x)

    return call


def loop(p, x):
    for i in range(N):
        x = forward(jax.tree.map(lambda leaf, i=i: leaf[i], p), x)
    return x


def differentiated(fn, p, x):
    """The value, and the gradients of every parameter and of `x`, under `jit`."""

    def run(p, x):
        value, pull = jax.vjp(fn, p, x)
        gradients = pull(random_like(value))
        kinds.update({name: gradients[0][name].dtype for name in FROZEN})
        return value, [{k: g for k, g in gradients[0].items() if k not in FROZEN}, gradients[1]]

    kinds = {}
    return jax.jit(run, compiler_options=QUICK)(p, x), kinds


@pytest.fixture(scope="module")
def case():
    with jax.enable_x64(True):
        p, x = parameters(), random_like(jnp.zeros(WIDTH))
        return p, x, differentiated(loop, p, x)[0]


CASES = [(front, knobs) for front in (as_function, as_linen, as_nnx) for knobs in SETTINGS]
CASES += [(as_function, knobs) for knobs in MORE]


@pytest.mark.parametrize(("front", "knobs"), CASES)
def test_have_no_gradient_and_all_others_have_theirs(front, knobs, case, x64):
    p, x, want = case
    got, kinds = differentiated(front(knobs), p, x)
    assert relative_error(got, want) < 1e-12
    assert set(kinds.values()) == {jax.dtypes.float0}


@pytest.mark.parametrize("front", [as_function, as_linen, as_nnx])
def test_need_no_derivative(front, case, x64):
    p, x, want = case
    assert relative_error(jax.jit(front({"engine": "reversal"}), compiler_options=QUICK)(p, x), want[0]) < 1e-12


def test_are_explained(x64):
    told = explain(checkpoint_scan(forward, policy="cheap"), parameters(), jnp.zeros(WIDTH))
    assert told.length == N and told.stored_bytes < told.wanted_bytes


def test_init_makes_them(x64):
    variables = checkpoint_scan(LinenBlock, N, engine="reversal")().init(jax.random.key(0), jnp.zeros(WIDTH))
    assert {name: (leaf.dtype, leaf.shape) for name, leaf in variables["params"].items()} == {
        name: (leaf.dtype, leaf.shape) for name, leaf in parameters().items()
    }


@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_may_be_numpy_arrays_of_any_width(engine):
    p = {"w": jnp.ones((N, WIDTH, WIDTH)), "step": np.arange(N), "on": np.ones(N, bool)}
    stack = checkpoint_scan(lambda p, x: jnp.where(p["on"], x + jnp.tanh(x @ p["w"]) * p["step"], x), engine=engine)
    value, gradients = jax.value_and_grad(lambda w: stack({**p, "w": w}, jnp.ones(WIDTH)).sum())(p["w"])
    assert jnp.isfinite(value) and gradients.any()
