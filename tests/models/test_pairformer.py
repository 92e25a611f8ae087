import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.models import PairformerBlock
from jaxckpt.models.pairformer import AttentionPairBias

pytestmark = pytest.mark.usefixtures("x64")
N, C_S, C_Z = 5, 8, 6
BF16, F32, F64 = jnp.bfloat16, jnp.float32, jnp.float64
TAGS = [
    *("tri_mul_product", "tri_mul_outgoing", "tri_mul_incoming"),
    *("attention_context", "tri_att_starting", "tri_att_ending", "pair_transition"),
    *("single_attention", "single_transition"),
]


def block(**fields):
    sizes = dict(c_hidden_mul=5, num_heads_pair=2, head_dim_pair=3, num_heads_single=2)
    return PairformerBlock(c_s=C_S, c_z=C_Z, transition_factor=2, **sizes, **fields)


@functools.cache
def shapes(module):
    """The parameters' shapes, traced once."""
    return jax.eval_shape(module.init, jax.random.key(0), jnp.ones((N, C_S)), jnp.ones((N, N, C_Z)))


@pytest.fixture(scope="module")
def forward(quick_jit):
    """One compiled block for all tests of values."""
    return quick_jit(block(param_dtype=jnp.float64).apply)


@pytest.fixture(scope="module")
def inputs(random_variables):
    rng = np.random.default_rng(0)
    s, z = rng.normal(size=(N, C_S)), rng.normal(size=(N, N, C_Z))
    with jax.enable_x64(True):
        return random_variables(block(param_dtype=jnp.float64), s, z), s, z


@pytest.mark.parametrize(
    "s_dtype, z_dtype",
    [(BF16, BF16), (F32, F32), (F64, F64), (F32, BF16), (BF16, F64)],
)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_carry_keeps_shape_and_dtype(s_dtype, z_dtype, dtype):
    s = jax.ShapeDtypeStruct((2, N, C_S), s_dtype)
    z = jax.ShapeDtypeStruct((2, N, N, C_Z), z_dtype)
    mask = jax.ShapeDtypeStruct((2, N), F32)

    variables = shapes(block())
    carry = jax.eval_shape(block(dtype=dtype).apply, variables, s, z, mask=mask)
    assert [(y.shape, y.dtype) for y in carry] == [(x.shape, x.dtype) for x in (s, z)]


def test_float64_is_float64_throughout(inputs, float_dtypes):
    found = float_dtypes(block(param_dtype=jnp.float64).apply, *inputs, mask=jnp.ones(N))
    assert found == {jnp.dtype(jnp.float64)}


def test_bf16_compute_on_a_float32_stream(random_variables, assert_mixed_precision):
    s, z, mask = jnp.ones((N, C_S), F32), jnp.ones((N, N, C_Z), F32), jnp.ones(N)
    module = block(dtype=jnp.bfloat16)
    assert_mixed_precision(module.apply, random_variables(module, s, z), s, z, mask=mask)


def test_single_attention(random_variables, run):
    rng = np.random.default_rng(3)
    s, z, mask = (
        rng.normal(size=(N, C_S)),
        rng.normal(size=(N, N, C_Z)),
        np.array([1, 1, 0, 0.5, 1]),
    )
    module = AttentionPairBias(num_heads=2, param_dtype=jnp.float64)
    variables = random_variables(module, s, z, mask)
    p = jax.tree.map(np.asarray, variables["params"])

    def normalize(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def linear(name, x):
        return x @ p["attention"][name]["kernel"] + p["attention"][name].get("bias", 0)

    x = normalize(s) * p["norm"]["scale"] + p["norm"]["bias"]
    bias = normalize(z) * p["pair_bias"]["norm"]["scale"] @ p["pair_bias"]["out"]["kernel"]
    q, k, v = linear("query", x), linear("key", x), linear("value", x)
    context = np.empty((N, C_S))
    for i in range(N):
        for c, h in ((slice(0, 4), 0), (slice(4, 8), 1)):
            weight = mask * np.exp(k[:, c] @ q[i, c] / 2 + bias[i, :, h])
            context[i, c] = weight @ v[:, c] / weight.sum()
    expected = linear("out", context / (1 + np.exp(-linear("gate", x))))
    np.testing.assert_allclose(run(module.apply, variables, s, z, mask), expected, rtol=1e-10)
    assert "bias" in p["attention"]["query"] and "bias" not in p["attention"]["out"]


def test_masked_tokens_reach_no_other(inputs, run, forward):
    variables, s, z = inputs
    mask = np.array([1.0, 0, 1, 1, 0])
    keep = mask > 0
    other_s = np.where(keep[:, None], s, s + 3)
    other_z = np.where((keep[:, None] & keep)[..., None], z, 5 - z)
    expected_s, expected_z = forward(variables, s, z, mask=mask)
    actual_s, actual_z = forward(variables, other_s, other_z, mask=mask)
    np.testing.assert_allclose(actual_s[keep], expected_s[keep], rtol=1e-12)
    np.testing.assert_allclose(actual_z[keep][:, keep], expected_z[keep][:, keep], rtol=1e-12)
    assert np.isfinite(actual_s).all() and np.isfinite(actual_z).all()

    # What remains is the block on the tokens that remain.
    apply = block(param_dtype=jnp.float64).apply
    alone_s, alone_z = run(apply, variables, s[keep], z[keep][:, keep])
    np.testing.assert_allclose(alone_s, expected_s[keep], rtol=1e-10)
    np.testing.assert_allclose(alone_z, expected_z[keep][:, keep], rtol=1e-10)


def test_pair_mask_defaults_to_the_outer_product(inputs, forward):
    variables, s, z = inputs
    mask = np.array([1.0, 0.5, 1, 0, 1])
    implied = forward(variables, s, z, mask=mask)
    given = forward(variables, s, z, mask=mask, pair_mask=np.outer(mask, mask))
    for a, b in zip(implied, given, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_batch_axes_in_front(inputs, run, forward):
    variables, s, z = inputs
    mask = np.stack([np.ones(N), np.array([1.0, 1, 0, 1, 1])])
    s, z = np.stack([s, -s]), np.stack([z, z[::-1]])
    batched = run(block(param_dtype=jnp.float64).apply, variables, s, z, mask=mask)
    for i in range(2):
        single = forward(variables, s[i], z[i], mask=mask[i])
        for a, b in zip(batched, single, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-10)


def test_dropout_masks_are_shared_along_the_axis_of_algorithm_17(inputs, run):
    variables, s, z = inputs
    module = block(param_dtype=jnp.float64, dropout_rate=0.5)
    apply = functools.partial(
        module.apply,
        deterministic=False,
        rngs={"dropout": jax.random.key(1, impl="unsafe_rbg")},
        capture_intermediates=lambda m, _: isinstance(m, nn.Dropout),
    )
    _, state = run(apply, variables, s, z)
    dropouts = state["intermediates"]["triangle_updates"]
    patterns = {name: np.asarray(d["__call__"][0]) == 0 for name, d in dropouts.items()}
    assert sorted(patterns) == [
        *("dropout_tri_att_ending", "dropout_tri_att_starting"),
        *("dropout_tri_mul_incoming", "dropout_tri_mul_outgoing"),
    ]
    for name, dropped in patterns.items():
        shared = 1 if name == "dropout_tri_att_ending" else 0
        dropped = np.moveaxis(dropped, shared, 0)
        assert (dropped == dropped[:1]).all()
        assert not (dropped[0] == dropped[0, :1]).all()  # not shared along the other axis,
        assert not (dropped[0] == dropped[0, :, :1]).all()  # nor along the channels
    first, *others = patterns.values()
    assert not any((first == other).all() for other in others)


def test_dropout_is_off_by_default_and_needs_a_key(inputs):
    variables, s, z = inputs
    module = block(param_dtype=jnp.float64)
    run = functools.partial(jax.eval_shape, module.apply, variables, s, z)
    run()
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(functools.partial(module.apply, deterministic=False), variables, s, z)


def test_tags(inputs, tags):
    assert tags(block(param_dtype=jnp.float64).apply, *inputs) == TAGS
    assert all(name in PairformerBlock.__doc__ for name in TAGS)


def test_no_gradient_is_zero(inputs, assert_gradients_nonzero):
    apply = block(param_dtype=jnp.float64).apply
    mask, pair_mask = np.ones(N), np.ones((N, N))
    assert_gradients_nonzero(
        lambda v, s, z, mask, pair_mask: apply(v, s, z, mask=mask, pair_mask=pair_mask),
        *(*inputs, mask, pair_mask),
    )


def test_unfit_inputs_are_refused():
    s, z = jnp.ones((N, C_S)), jnp.ones((N, N, C_Z + 1))
    with pytest.raises(ValueError, match=r"c_z=6.*\(5, 5, 7\).*build it with c_z=7"):
        jax.eval_shape(block().init, jax.random.key(0), s, z)
    with pytest.raises(ValueError, match="num_heads_single=16 does not divide c_s=8"):
        module = PairformerBlock(c_s=C_S, c_z=C_Z)
        jax.eval_shape(module.init, jax.random.key(0), s, z[..., :-1])
