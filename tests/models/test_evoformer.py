import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxckpt.models import EvoformerBlock
from jaxckpt.models.evoformer import MSAColumnAttention, MSARowAttention, OuterProductMean

pytestmark = pytest.mark.usefixtures("x64")
S, R, C_M, C_Z = 3, 5, 8, 6
BF16, F32, F64 = jnp.bfloat16, jnp.float32, jnp.float64
TAGS = [
    *("attention_context", "msa_row_attention", "msa_column_attention", "msa_transition"),
    *("outer_product", "outer_product_mean"),
    *("tri_mul_product", "tri_mul_outgoing", "tri_mul_incoming"),
    *("tri_att_starting", "tri_att_ending", "pair_transition"),
]


def block(**fields):
    sizes = dict(num_heads_msa=2, head_dim_msa=3, num_heads_pair=2, head_dim_pair=3)
    hidden = dict(c_hidden_opm=3, c_hidden_mul=5, transition_factor=2)
    return EvoformerBlock(c_m=C_M, c_z=C_Z, **sizes, **hidden, **fields)


@functools.cache
def shapes(module):
    """The parameters' shapes, traced once."""
    return jax.eval_shape(module.init, jax.random.key(0), jnp.ones((S, R, C_M)), jnp.ones((R, R, C_Z)))


@pytest.fixture(scope="module")
def forward(quick_jit):
    """One compiled block for all tests of values."""
    return quick_jit(block(param_dtype=jnp.float64).apply)


@pytest.fixture(scope="module")
def inputs(random_variables):
    rng = np.random.default_rng(0)
    m, z = rng.normal(size=(S, R, C_M)), rng.normal(size=(R, R, C_Z))
    with jax.enable_x64(True):
        return random_variables(block(param_dtype=jnp.float64), m, z), m, z


@pytest.mark.parametrize(
    "m_dtype, z_dtype",
    [(BF16, BF16), (F32, F32), (F64, F64), (F32, BF16), (BF16, F64)],
)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_carry_keeps_shape_and_dtype(m_dtype, z_dtype, dtype):
    m = jax.ShapeDtypeStruct((2, S, R, C_M), m_dtype)
    z = jax.ShapeDtypeStruct((2, R, R, C_Z), z_dtype)
    mask = jax.ShapeDtypeStruct((2, S, R), F32)

    variables = shapes(block())
    carry = jax.eval_shape(block(dtype=dtype).apply, variables, m, z, msa_mask=mask)
    assert [(y.shape, y.dtype) for y in carry] == [(x.shape, x.dtype) for x in (m, z)]


def test_float64_is_float64_throughout(inputs, float_dtypes):
    masks = dict(msa_mask=jnp.ones((S, R)), pair_mask=jnp.ones((R, R)))
    found = float_dtypes(block(param_dtype=jnp.float64).apply, *inputs, **masks)
    assert found == {jnp.dtype(jnp.float64)}


def test_bf16_compute_on_a_float32_stream(random_variables, assert_mixed_precision):
    m, z, pair_mask = jnp.ones((S, R, C_M), F32), jnp.ones((R, R, C_Z), F32), jnp.ones((R, R))
    module = block(dtype=jnp.bfloat16)
    assert_mixed_precision(module.apply, random_variables(module, m, z), m, z, pair_mask=pair_mask)


def normalize(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def gated_attention(p, x, bias, mask):
    """One sequence `x [K, c]`, two heads of three channels, by a loop over queries and heads."""
    q, k, v, g = (x @ p[name]["kernel"] + p[name].get("bias", 0) for name in ("query", "key", "value", "gate"))
    context = np.empty_like(q)
    for i in range(len(x)):
        for h in range(2):
            c = slice(3 * h, 3 * h + 3)
            weight = mask * np.exp(k[:, c] @ q[i, c] / np.sqrt(3) + bias[i, :, h])
            context[i, c] = weight @ v[:, c] / weight.sum()
    return context / (1 + np.exp(-g)) @ p["out"]["kernel"] + p["out"]["bias"]


def test_msa_attentions(inputs, random_variables, run):
    _, m, z = inputs
    mask = np.random.default_rng(1).choice([0, 0.5, 1], size=(S, R))
    mask[0], mask[:, 0] = 1, 1  # no row and no column without keys
    module = MSARowAttention(num_heads=2, head_dim=3, param_dtype=jnp.float64)
    variables = random_variables(module, m, z, mask)
    p = jax.tree.map(np.asarray, variables["params"])
    x = normalize(m) * p["norm"]["scale"] + p["norm"]["bias"]
    bias = normalize(z) * p["pair_bias"]["norm"]["scale"] @ p["pair_bias"]["out"]["kernel"]
    expected = [gated_attention(p["attention"], x[s], bias, mask[s]) for s in range(S)]
    actual = run(module.apply, variables, m, z, mask)
    np.testing.assert_allclose(actual, np.stack(expected), rtol=1e-9)

    module = MSAColumnAttention(num_heads=2, head_dim=3, param_dtype=jnp.float64)
    variables = random_variables(module, m, mask)
    p = jax.tree.map(np.asarray, variables["params"])
    x = normalize(m) * p["norm"]["scale"] + p["norm"]["bias"]
    no_bias = np.zeros((S, S, 2))
    expected = [gated_attention(p["attention"], x[:, r], no_bias, mask[:, r]) for r in range(R)]
    actual = run(module.apply, variables, m, mask)
    np.testing.assert_allclose(actual, np.stack(expected, 1), rtol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_outer_product_mean(inputs, random_variables, run, masked):
    _, m, _ = inputs
    mask = np.random.default_rng(2).choice([0, 0.5, 1], size=(S, R)) if masked else None
    module = OuterProductMean(C_Z, c_hidden=3, param_dtype=jnp.float64)
    variables = random_variables(module, m, mask)
    p = jax.tree.map(np.asarray, variables["params"])
    x = normalize(m) * p["norm"]["scale"] + p["norm"]["bias"]
    a, b = (x @ p[name]["kernel"] + p[name]["bias"] for name in "ab")
    weight = np.ones((S, R)) if mask is None else mask
    actual = run(module.apply, variables, m, mask)
    for i in range(R):
        for j in range(R):
            terms = [weight[s, i] * weight[s, j] * np.outer(a[s, i], b[s, j]) for s in range(S)]
            count = (weight[:, i] * weight[:, j]).sum() + (1e-3 if masked else 0)
            expected = (sum(terms) / count).ravel() @ p["out"]["kernel"] + p["out"]["bias"]
            np.testing.assert_allclose(actual[i, j], expected, rtol=1e-9)


def test_masked_residues_and_sequences_reach_no_other(inputs, forward):
    variables, m, z = inputs
    sequences, residues = np.array([True, False, True]), np.array([True, True, False, True, False])
    msa, pair = sequences[:, None] & residues, residues[:, None] & residues
    masks = dict(msa_mask=1.0 * msa, pair_mask=1.0 * pair)
    other_m = np.where(msa[..., None], m, m + 3)
    other_z = np.where(pair[..., None], z, 5 - z)
    expected_m, expected_z = forward(variables, m, z, **masks)
    actual_m, actual_z = forward(variables, other_m, other_z, **masks)
    np.testing.assert_allclose(actual_m[msa], expected_m[msa], rtol=1e-12)
    np.testing.assert_allclose(actual_z[pair], expected_z[pair], rtol=1e-12)
    assert np.isfinite(actual_m).all() and np.isfinite(actual_z).all()


def test_dropout_masks_are_shared_along_the_axis_of_algorithm_6(inputs, run):
    variables, m, z = inputs
    module = block(param_dtype=jnp.float64, msa_dropout_rate=0.5, pair_dropout_rate=0.5)
    apply = functools.partial(
        module.apply,
        deterministic=False,
        rngs={"dropout": jax.random.key(1, impl="unsafe_rbg")},
        capture_intermediates=lambda m, _: isinstance(m, nn.Dropout),
    )
    _, state = run(apply, variables, m, z)
    found = dict(state["intermediates"])
    found.update(found.pop("triangle_updates"))
    assert len(found) == 5
    for name, dropout in found.items():
        dropped = np.asarray(dropout["__call__"][0]) == 0
        dropped = np.moveaxis(dropped, 1 if name == "dropout_tri_att_ending" else 0, 0)
        assert (dropped == dropped[:1]).all()
        assert not (dropped[0] == dropped[0, :1]).all()


def test_tags(inputs, tags):
    assert tags(block(param_dtype=jnp.float64).apply, *inputs) == TAGS
    assert all(name in EvoformerBlock.__doc__ for name in TAGS)


def test_no_gradient_is_zero(inputs, assert_gradients_nonzero):
    apply = block(param_dtype=jnp.float64).apply
    assert_gradients_nonzero(
        lambda v, m, z, msa_mask, pair_mask: apply(v, m, z, msa_mask=msa_mask, pair_mask=pair_mask),
        *(*inputs, np.ones((S, R)), np.ones((R, R))),
    )


def test_unfit_inputs_are_refused():
    m, z = jnp.ones((S, R, C_M + 2)), jnp.ones((R, R, C_Z))
    with pytest.raises(ValueError, match=r"c_m=8.*\(3, 5, 10\).*build it with c_m=10"):
        jax.eval_shape(block().init, jax.random.key(0), m, z)
