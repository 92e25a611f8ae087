"""A decoder as people post-train it, from a list of its layers, beside its own Python loop.

After Qwen3 (`jaxckpt.models.decoder_nnx`): RMSNorm, a rotary table under `jit`, grouped keys and values, norms of queries
and keys, SwiGLU, a configuration without a hash, and the call `layer(x, positions, cache, mask) -> (cache, x)`.
"""

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
from jaxckpt.models import DecoderConfig, DecoderLayer
from jaxckpt.models.decoder_nnx import RMSNorm
from tests.support import assert_no_zero_leaf, relative_error

LAYERS, WORDS = 3, 11
CONFIG = DecoderConfig(width=8, heads=4, kv_heads=2, head_width=4, hidden=12, theta=1e4, longest=16)


class Decoder(nnx.Module):
    def __init__(self, config, *, rngs):
        self.table = nnx.Param(rngs.params.normal((WORDS, config.width)))
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(LAYERS)])
        self.norm = RMSNorm(config.width, config, rngs=rngs)

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


def batch() -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, WORDS, (2, 6))) for _ in range(2))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    return tokens, targets, positions, jnp.tril(jnp.ones((2, 6, 6), bool))


def loss(model, tokens, targets, positions, mask):
    log_p = jax.nn.log_softmax(model(tokens, positions, mask))
    return -jnp.take_along_axis(log_p, targets[..., None], -1).mean()


step = nnx.jit(nnx.value_and_grad(loss))


@functools.cache
def by_loop() -> Any:
    """The model, and its loss and gradients, the layers' stacked; in float64."""
    model, rng = Decoder(CONFIG, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape), nnx.state(model, nnx.Param))
    nnx.update(model, params)
    value, gradients = step(model, *batch())
    gradients = nnx.to_pure_dict(gradients)
    layers = gradients["layers"]
    gradients["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[i] for i in range(LAYERS)))
    assert_no_zero_leaf(gradients)
    return model, (value, gradients)


def check(**setting: Any) -> None:
    model, want = by_loop()
    stacked = nnx.clone(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="snapshots=.* of single blocks")
        stacked.layers = checkpoint_scan(list(model.layers), call=call, **setting)
        value, gradients = step(stacked, *batch())
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
    tokens, _, positions, mask = batch()
    want = model(tokens, positions, mask)[:, -1]

    def with_cache(layer, x, *, positions, mask, cache):
        return layer(x, positions, cache, mask)[::-1]

    stack = checkpoint_scan(list(model.layers), call=with_cache, per_block=("cache",), has_aux=True)
    empty = jnp.zeros((LAYERS, 2, 0, CONFIG.kv_heads, CONFIG.head_width))
    cache = {"k": empty, "v": empty}
    for part in (slice(0, 5), slice(5, 6)):
        x, cache = stack(
            model.table[tokens[:, part]],
            positions=positions[:, part],
            mask=mask[:, part, : part.stop],
            cache=cache,
        )
    np.testing.assert_allclose((model.norm(x) @ model.table.T)[:, -1], want, rtol=1e-9)
