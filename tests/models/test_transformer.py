import functools
import operator

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.models import NNXTransformerBlock, TransformerBlock, TransformerLM

pytestmark = pytest.mark.usefixtures("x64")
B, T, D, HEADS, D_FF = 2, 6, 8, 2, 12
TAGS = [
    *("decoder_layer_input", "query_proj", "key_proj", "value_proj", "context", "out_proj"),
    *("mlpwi_0", "mlpwi_1", "mlpwo"),
]


def block(**fields):
    return TransformerBlock(D, HEADS, D_FF, **fields)


def nnx_block(**options):
    return NNXTransformerBlock(D, HEADS, D_FF, rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def forward(quick_jit):
    """One compiled block for all tests of values."""
    return quick_jit(block(param_dtype=jnp.float64).apply)


@pytest.fixture(scope="module")
def inputs(random_variables):
    x = np.random.default_rng(0).normal(size=(B, T, D))
    with jax.enable_x64(True):
        return random_variables(block(param_dtype=jnp.float64), x), x


@pytest.fixture(scope="module")
def twin(inputs):
    """The NNX block with the parameters of the Linen block (and an abstract dropout stream)."""
    variables, _ = inputs
    with jax.enable_x64(True):
        module = nnx.eval_shape(lambda: nnx_block(param_dtype=jnp.float64))
        state = nnx.state(module, nnx.Param)
        shapes = (jax.tree.map(jnp.shape, p) for p in (nnx.to_pure_dict(state), variables["params"]))
        assert next(shapes) == next(shapes)
        nnx.replace_by_pure_dict(state, variables["params"])
        nnx.update(module, state)
    return module


@pytest.mark.parametrize("carry", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("dtype, shape", [(None, (T, D)), (jnp.bfloat16, (2, 3, T, D)), (jnp.float32, (B, T, D))])
def test_carry_keeps_shape_and_dtype(carry, dtype, shape):
    x = jax.ShapeDtypeStruct(shape, carry)
    mask = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)

    def linen(x, mask):
        return block(dtype=dtype).init_with_output(jax.random.key(0), x, mask=mask)[0]

    def other(x, mask):
        return nnx_block(dtype=dtype)(x, mask=mask)

    for function in (linen, other):
        y = jax.eval_shape(function, x, mask)
        assert (y.shape, y.dtype) == (shape, carry)


def test_float64_is_float64_throughout(inputs, twin, float_dtypes):
    mask, float64 = jnp.ones((B, T), jnp.float32), {jnp.dtype(jnp.float64)}
    assert float_dtypes(block(param_dtype=jnp.float64).apply, *inputs, mask=mask) == float64
    assert float_dtypes(twin, inputs[1], mask=mask) == float64


def test_bf16_compute_on_a_float32_stream(random_variables, assert_mixed_precision):
    x, mask = jnp.ones((B, T, D), jnp.float32), jnp.ones((B, T))
    module = block(dtype=jnp.bfloat16)
    assert_mixed_precision(module.apply, random_variables(module, x), x, mask=mask)
    assert_mixed_precision(lambda x, **masks: nnx_block(dtype=jnp.bfloat16)(x, **masks), x, mask=mask)


def test_linen_and_nnx_are_the_same_function(inputs, twin, run, forward):
    variables, x = inputs
    mask = np.array([[1.0, 1, 1, 1, 0, 0], [0, 1, 0.5, 1, 1, 1]])
    for kwargs in ({}, {"mask": mask}):
        actual = run(lambda x, **kwargs: twin(x, **kwargs), x, **kwargs)
        np.testing.assert_allclose(actual, forward(variables, x, **kwargs), rtol=1e-12)


def test_the_future_is_invisible(inputs, forward):
    variables, x = inputs
    other = np.where(np.arange(T)[:, None] < 3, x, -x)
    for mask in (np.ones((B, T)), np.array([[0.0, 0, 1, 1, 1, 1]] * B)):  # left padding too
        a, b = (np.asarray(forward(variables, y, mask=mask)) for y in (x, other))
        np.testing.assert_allclose(a[:, :3], b[:, :3], rtol=1e-13)
        assert (np.abs(a[:, 3:] - b[:, 3:]).max(-1) > 1e-3).all()


def test_masked_positions_reach_no_other(inputs, run, forward):
    variables, x = inputs
    mask = np.array([[1.0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 1, 1]])
    other = np.where(mask[..., None] > 0, x, 2 - x)
    a, b = (forward(variables, y, mask=mask)[mask > 0] for y in (x, other))
    np.testing.assert_allclose(a, b, rtol=1e-13)
    np.testing.assert_allclose(forward(variables, x, mask=mask > 0)[mask > 0], a, rtol=1e-13)
    # Padding on the right is as if it were not there; elsewhere it counts in the rotary positions.
    right = np.array([[1.0] * 4 + [0] * 2] * B)
    a = forward(variables, x, mask=right)[:, :4]
    b = run(block(param_dtype=jnp.float64).apply, variables, x[:, :4])
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_dropout(inputs, run, forward):
    variables, x = inputs
    module = block(param_dtype=jnp.float64, dropout_rate=0.5)
    np.testing.assert_allclose(run(module.apply, variables, x), forward(variables, x), rtol=1e-12)
    apply = functools.partial(
        module.apply,
        deterministic=False,
        rngs={"dropout": jax.random.key(0, impl="unsafe_rbg")},
        capture_intermediates=lambda m, _: isinstance(m, nn.Dropout),
    )
    _, state = run(apply, variables, x)
    first, second = (
        np.asarray(state["intermediates"][name]["__call__"][0]) == 0 for name in ("attention_dropout", "mlp_dropout")
    )
    assert 0.2 < first.mean() < 0.8 and 0.2 < second.mean() < 0.8
    assert (first != second).any()


def test_dropout_nnx(inputs, run):
    def calls(x):
        module, same = nnx_block(dropout_rate=0.5), nnx_block(dropout_rate=0.5)
        dropped = [m(x, deterministic=False) for m in (module, same, module)]
        return *dropped, module(x), same(x)

    first, same, second, kept, same_kept = run(calls, inputs[1])
    assert np.array_equal(first, same)  # the masks are a function of the module's state,
    assert not np.array_equal(first, second)  # which a call advances,
    assert np.array_equal(kept, same_kept)  # and off by default


def test_tags(inputs, twin, tags):
    assert tags(block(param_dtype=jnp.float64).apply, *inputs) == TAGS
    assert tags(twin, inputs[1]) == TAGS
    assert all(name in TransformerBlock.__doc__ for name in TAGS)


def test_no_gradient_is_zero(inputs, assert_gradients_nonzero):
    apply = block(param_dtype=jnp.float64).apply
    assert_gradients_nonzero(lambda v, x, mask: apply(v, x, mask=mask), *inputs, np.ones((B, T)))


@pytest.mark.parametrize("heads", [0, 3, 8])
def test_unfit_heads_are_refused(heads):
    message = f"d_model=8 with num_heads={heads}: .* choose d_model a multiple of 2"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TransformerBlock(D, heads, D_FF).init, jax.random.key(0), jnp.ones((T, D)))
    with pytest.raises(ValueError, match=message):
        NNXTransformerBlock(D, heads, D_FF, rngs=nnx.Rngs(0))


def language_model(**fields):
    return TransformerLM(num_blocks=3, d_model=D, num_heads=HEADS, d_ff=D_FF, **fields)


def test_language_model_gives_float32_logits(random_variables):
    tokens = jnp.zeros((B, T), jnp.int32)
    for dtypes, logits in (
        ({}, jnp.float32),
        (dict(dtype=jnp.bfloat16), jnp.float32),
        (dict(param_dtype=jnp.float64), jnp.float64),
    ):
        module = language_model(**dtypes)
        y, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), tokens)
        assert (y.shape, y.dtype) == ((B, T, 256), logits)


def test_language_model_is_a_loop_over_its_blocks(random_variables, run, forward):
    tokens = np.random.default_rng(0).integers(256, size=(B, T))
    mask = np.array([[1.0] * T, [1.0] * (T - 1) + [0]])
    tokens = tokens.astype(np.int32)
    module = language_model(param_dtype=jnp.float64)
    variables = random_variables(module, tokens)
    p = variables["params"]
    assert set(p) == {"embed", "blocks", "norm", "logits"}
    x = np.asarray(p["embed"]["embedding"])[tokens]
    blocks = jax.device_get(p["blocks"])
    for i in range(3):
        x = forward({"params": jax.tree.map(operator.itemgetter(i), blocks)}, x, mask=mask)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(p["norm"]["scale"])
    expected = x @ p["logits"]["kernel"]
    for blocks_per_ckpt in (None, 2):
        module = language_model(param_dtype=jnp.float64, blocks_per_ckpt=blocks_per_ckpt)
        actual = run(module.apply, variables, tokens, mask=mask)
        np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)
