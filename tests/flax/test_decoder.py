"""A decoder as people post-train it, from a list of its layers, beside its own Python loop.

After Qwen3: RMSNorm, a rotary table under `jit`, grouped keys and values, norms of queries and keys, SwiGLU, a configuration
without a hash, and the call `layer(x, positions, cache, mask) -> (cache, x)`.
"""

import dataclasses
import functools
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan
from tests.support import assert_no_zero_leaf, relative_error


@dataclasses.dataclass(slots=True)
class Config:
    layers: int = 3
    width: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 4
    hidden: int = 12
    vocabulary: int = 11
    theta: float = 1e4
    eps: float = 1e-6
    longest: int = 16


class RMSNorm(nnx.Module):
    def __init__(self, width, eps, *, rngs):
        self.scale, self.eps = nnx.Param(1 + 0.1 * rngs.params.normal((width,))), eps

    def __call__(self, x):
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps) * scale


def rotary(x, positions, config):
    """Rotates halves of heads; the table is a constant of the inner `jit`."""
    half = config.head_width // 2
    angles = np.arange(config.longest)[:, None] * config.theta ** -(np.arange(half) / half)
    table = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], -1), x.dtype)

    @jax.jit
    def rotate(x, positions):
        cos, sin = jnp.moveaxis(table[positions][:, :, None], -1, 0)
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return rotate(x, positions)


class Attention(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config, c = config, config
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, rngs=rngs)
        self.q = linear(c.width, (c.heads, c.head_width))
        self.k, self.v = (linear(c.width, (c.kv_heads, c.head_width)) for _ in range(2))
        self.o = linear((c.heads, c.head_width), c.width, axis=(-2, -1))
        self.q_norm, self.k_norm = (RMSNorm(c.head_width, c.eps, rngs=rngs) for _ in range(2))

    def __call__(self, x, positions, cache, mask):
        c = self.config
        q = rotary(self.q_norm(self.q(x)), positions, c)
        k, v = rotary(self.k_norm(self.k(x)), positions, c), self.v(x)
        if cache is not None:
            k, v = jnp.concatenate([cache["k"], k], 1), jnp.concatenate([cache["v"], v], 1)
            cache = {"k": k, "v": v}
        q = q.reshape(*q.shape[:2], c.kv_heads, c.heads // c.kv_heads, c.head_width)
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / c.head_width**0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9))
        out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        return cache, self.o(out.reshape(*out.shape[:2], c.heads, c.head_width))


class MLP(nnx.Module):
    def __init__(self, config, *, rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate, self.up = (linear(config.width, config.hidden) for _ in range(2))
        self.down = linear(config.hidden, config.width)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.before_attention, self.before_mlp = (RMSNorm(config.width, config.eps, rngs=rngs) for _ in range(2))
        self.attention, self.mlp = Attention(config, rngs=rngs), MLP(config, rngs=rngs)

    def __call__(self, x, positions, cache, mask):
        cache, h = self.attention(self.before_attention(x), positions, cache, mask)
        x = x + h
        return cache, x + self.mlp(self.before_mlp(x))


class Decoder(nnx.Module):
    def __init__(self, config, *, rngs):
        self.config = config
        self.table = nnx.Param(rngs.params.normal((config.vocabulary, config.width)))
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.width, config.eps, rngs=rngs)

    def __call__(self, tokens, positions, mask):
        x = self.table[tokens]
        if isinstance(self.layers, nnx.List):
            for layer in self.layers:
                _, x = layer(x, positions, None, mask)
        else:
            x = self.layers(x, positions=positions, mask=mask)
        return self.norm(x) @ self.table.T


def call(layer, x, *, positions, mask):
    return layer(x, positions, None, mask)[1]


def batch(config: Config) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, config.vocabulary, (2, 6))) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    return tokens, targets, positions, jnp.tril(jnp.ones((2, 6, 6), bool))


def loss(model, tokens, targets, positions, mask):
    log_p = jax.nn.log_softmax(model(tokens, positions, mask))
    return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()


step = nnx.jit(nnx.value_and_grad(loss))


@functools.cache
def by_loop() -> Any:
    """The model, and its loss and gradients, the layers' stacked; in float64."""
    config = Config()
    model = Decoder(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(model, nnx.Param)))
    value, gradients = step(model, *batch(config))
    gradients = nnx.to_pure_dict(gradients)
    layers = gradients["layers"]
    gradients["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[i] for i in range(config.layers)))
    assert_no_zero_leaf(gradients)
    return model, (value, gradients)


def check(**setting: Any) -> None:
    model, want = by_loop()
    stacked = nnx.clone(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="snapshots=.* of single blocks")
        stacked.layers = checkpoint_scan(list(model.layers), call=call, **setting)
        value, gradients = step(stacked, *batch(model.config))
    assert relative_error((value, nnx.to_pure_dict(gradients)), want) < 1e-12


KNOBS: dict[str, list[Any]] = {
    "policy": [None, "everything", "nothing", "dots", "cheap", "budget:0.3"],
    "blocks_per_ckpt": [None, 1, 2],
    "stages": [None, "auto", 3],
    "engine": ["scan", "reversal"],
    "snapshots": [None, 2],
    "offload_carry": [False, True],
}


def settings() -> list[dict[str, Any]]:
    """All combinations of knobs that go together."""
    product = (dict(zip(KNOBS, values, strict=True)) for values in itertools.product(*KNOBS.values()))
    return [setting for setting in product if fits(**setting)]


def fits(policy, blocks_per_ckpt, stages, engine, snapshots, offload_carry) -> bool:
    if engine == "scan" and (snapshots or (offload_carry and jax.__version_info__ < (0, 11, 1))):
        return False
    return not offload_carry or bool(blocks_per_ckpt or snapshots) or policy in (None, "nothing")


@pytest.mark.parametrize(
    "setting",
    [{"blocks_per_ckpt": 2, "policy": "cheap"}, {"snapshots": 2, "stages": "auto", "offload_carry": True}],
    ids=str,
)
def test_loss_and_gradients_are_those_of_the_loop(x64, setting):
    check(**setting)


@pytest.mark.full
@pytest.mark.parametrize("setting", settings(), ids=str)
def test_loss_and_gradients_are_those_of_the_loop_under_every_setting(x64, setting):
    check(**setting)
    jax.clear_caches()  # XLA of JAX 0.12.0.1 crashes where hundreds of programs live in one process


def test_a_token_is_generated_with_the_caches_of_all_layers(x64):
    """Caches are per block, and grow."""
    model, _ = by_loop()
    tokens, _, positions, mask = batch(model.config)
    want = model(tokens, positions, mask)[:, -1]

    def with_cache(layer, x, *, positions, mask, cache):
        return layer(x, positions, cache, mask)[::-1]

    stack = checkpoint_scan(list(model.layers), call=with_cache, per_block=("cache",), has_aux=True)
    empty = jnp.zeros((model.config.layers, 2, 0, model.config.kv_heads, model.config.head_width))
    cache = {"k": empty, "v": empty}
    for part in (slice(0, 5), slice(5, 6)):
        x, cache = stack(
            model.table[tokens[:, part]],
            positions=positions[:, part],
            mask=mask[:, part, : part.stop],
            cache=cache,
        )
    np.testing.assert_allclose((model.norm(x) @ model.table.T)[:, -1], want, rtol=1e-9)
