"""Policies that choose by themselves what a block keeps: what they keep, that gradients are right, what is run again."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jaxckpt import checkpoint_blocks, checkpoint_scan, explain
from jaxckpt.analysis import inlining, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.models import PairformerBlock, TransformerBlock
from tests.support import assert_no_zero_leaf, plain_loop, pull_back, random_like, relative_error

N, WIDTH = 5, 8


def block(params, x, *, scale):
    """Matrix products, a softmax and cheap things between, one of them inside a nested jit."""
    h = jax.jit(jax.nn.gelu)(x @ params["in"])
    weights = jax.nn.softmax(h @ h.T)
    return x + scale * (weights @ h) @ params["out"]


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def params_of(length=N):
    shapes = {"in": jnp.zeros((length, WIDTH, 2 * WIDTH)), "out": jnp.zeros((length, 2 * WIDTH, WIDTH))}
    return jax.tree.map(lambda leaf: 0.3 * leaf, random_like(shapes))


X = np.random.default_rng(5).normal(size=(4, WIDTH))
POLICIES = ["cheap", "budget:0", "budget:0.3", "budget:0.7", "budget:1", "budget:2KiB"]
KNOBS = [
    {},
    {"blocks_per_ckpt": 2},
    {"blocks_per_ckpt": 1},
    {"engine": "reversal"},
    {"engine": "reversal", "blocks_per_ckpt": 3},
    {"snapshots": 2, "blocks_per_ckpt": 2},
    {"stages": 3},
    {"stages": "auto", "engine": "reversal", "blocks_per_ckpt": 2},
]


@pytest.mark.parametrize(
    ("policy", "knobs"), [*itertools.product(["cheap", "budget:0.3"], KNOBS), *((p, {}) for p in POLICIES)], ids=str
)
@pytest.mark.filterwarnings("ignore:.*found nothing to cut")
def test_gradients_equal_the_plain_loop(policy, knobs):
    stack = checkpoint_scan(block, policy=policy, **knobs)
    scale = jnp.float64(0.7)
    got = pull_back(lambda p, x, s: stack(p, x, scale=s), params_of(), X, scale)
    want = pull_back(lambda p, x, s: plain_loop(block, p, x, scale=s), params_of(), X, scale)
    assert relative_error(got, want) < 1e-12
    assert_no_zero_leaf(got)


def primitives(fn, *args):
    """How often each primitive stands in the program of the gradients, loops' bodies once."""
    counted = {}
    for eqn in jx.equations(jax.make_jaxpr(jax.grad(fn))(*args).jaxpr):
        counted[eqn.primitive.name] = counted.get(eqn.primitive.name, 0) + 1
    return counted


@pytest.mark.parametrize("knobs", [{}, {"engine": "reversal"}], ids=str)
@pytest.mark.parametrize("of", ["transformer", "pairformer", "function", "dropout"])
def test_cheap_runs_no_dear_equation_again(of, knobs):
    call, params = stack_of(of)

    def counted(policy):
        found = primitives(lambda p: call(p, policy, knobs), params)
        return {name: found.get(name, 0) for name in ("dot_general", "random_bits", "threefry2x32")}

    assert counted("cheap") == counted("everything")
    assert counted("nothing")["dot_general"] > counted("cheap")["dot_general"] > 0
    if of == "dropout":
        assert counted("nothing")["random_bits"] > counted("cheap")["random_bits"] > 0


def stack_of(of):
    """A stack's scalar as a function of parameters, a policy and knobs, and its parameters."""
    if of == "function":
        return lambda p, policy, knobs: checkpoint_scan(block, policy=policy, **knobs)(p, X, scale=0.7).sum(), params_of()
    args = (jnp.ones((2, 6, 16)),)
    cls, fields = TransformerBlock, {"d_model": 16, "num_heads": 2, "d_ff": 32}
    if of == "dropout":
        fields |= {"dropout_rate": 0.2}
    if of == "pairformer":
        args = jnp.ones((6, 16)), jnp.ones((6, 6, 8))
        cls, fields = PairformerBlock, dict(c_s=16, c_z=8, c_hidden_mul=8, num_heads_pair=2, head_dim_pair=4)
        fields |= {"num_heads_single": 2}
    keywords = {"deterministic": False} if of == "dropout" else {}
    rngs = {"rngs": {"dropout": jax.random.key(1)}} if of == "dropout" else {}

    def made(policy, knobs):
        return checkpoint_scan(cls, 3, policy=policy, **knobs)(**fields)

    def call(variables, policy, knobs):
        out = made(policy, knobs).apply(variables, *args, **keywords, **rngs)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(out))

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return call, jax.eval_shape(lambda: made("nothing", {}).init(keys, *args, **keywords))


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_those_that_were_predicted(policy):
    found = explain(checkpoint_scan(block, policy=policy), params_of(), X, scale=0.7)
    of_carry = 4 * WIDTH * X.dtype.itemsize
    assert found.stored_bytes == N * (found.chosen.bytes + of_carry)
    if policy.endswith("KiB"):
        assert found.chosen.bytes <= 2048
    assert "jaxckpt_value" not in str(found)
    assert "chosen: " in str(found)


def test_budgets_are_kept_and_more_of_them_never_runs_more_again():
    args = params_of(), X
    of_everything = explain(checkpoint_scan(block, policy="everything"), *args, scale=0.7)
    wanted = of_everything.wanted_bytes / N - 4 * WIDTH * X.dtype.itemsize
    found = [explain(checkpoint_scan(block, policy=f"budget:{k / 20}"), *args, scale=0.7).chosen for k in range(21)]
    assert all(chosen.bytes <= k / 20 * wanted + 1 for k, chosen in enumerate(found))
    again = [chosen.rerun for chosen in found]
    assert again == sorted(again, reverse=True) and again[0] > again[-1]
    assert found[0].bytes == 0


def test_the_choice_is_the_same_each_time():
    def kept():
        found = explain(
            checkpoint_scan(lambda p, x, **kw: block(p, x, **kw), policy="budget:0.4"), params_of(), X, scale=0.7
        )
        return dataclasses.replace(found, block="")

    assert kept() == kept()


@jax.custom_vjp
def flash(q, k):
    return _flash(q, k)[0]


def _flash(q, k):
    logits = q @ k.T
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - lse) @ k, lse


def _forward(q, k):
    out, lse = _flash(q, k)
    return out, (q, k, out, lse)


def _backward(saved, ct):
    q, k, out, lse = saved
    weights = jnp.exp(q @ k.T - lse)
    of_weights = ct @ k.T
    of_logits = weights * (of_weights - jnp.sum(ct * out, axis=-1, keepdims=True))
    return of_logits @ k, of_logits.T @ q + weights.T @ ct


flash.defvjp(_forward, _backward)


@jax.custom_vjp
def twice(x):
    return 2 * x


twice.defvjp(lambda x: (2 * x, None), lambda _, ct: (2 * ct,))


BLOCKS = {
    "custom_vjp": lambda p, x: x + flash(x @ p["in"], jnp.tanh(x @ p["in"])) @ p["out"],
    "custom_vjp without residuals": lambda p, x: x + twice(jnp.tanh(x @ p["in"])) @ p["out"],
    "scan": lambda p, x: x + lax.scan(lambda c, _: (jnp.sin(c @ p["in"] @ p["out"]), None), x, None, length=3)[0],
    "cond": lambda p, x: x + lax.cond(x[0, 0] > 0, lambda y: jnp.sin(y @ p["in"]), lambda y: y @ p["in"] * 2, x) @ p["out"],
    "checkpoint": lambda p, x: x + jax.checkpoint(lambda y: jnp.sin(y @ p["in"]) @ p["out"])(x),
    "custom_jvp": lambda p, x: x + jax.nn.relu(jax.nn.silu(x @ p["in"])) @ p["out"],
    "integers": lambda p, x: x + jnp.take(jnp.sort(x @ p["in"], axis=-1), jnp.argsort(x[0]), axis=-1) @ p["out"][:8],
}


@pytest.mark.parametrize("policy", ["cheap", "budget:0.3", "budget:1"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_blocks_with_rules_loops_and_branches_of_their_own(name, policy, engine):
    fn, params, x = BLOCKS[name], params_of(3), X
    got = pull_back(checkpoint_scan(fn, policy=policy, engine=engine), params, x)
    assert relative_error(got, pull_back(lambda p, x: plain_loop(fn, p, x), params, x)) < 1e-12
    assert_no_zero_leaf(got)


@pytest.mark.parametrize("name, primitive", [("custom_vjp", "dot_general"), ("scan", "scan"), ("checkpoint", "dot_general")])
def test_cheap_keeps_what_derivatives_want_inside_of_rules_and_loops(name, primitive):
    def counted(policy):
        stack = checkpoint_scan(BLOCKS[name], policy=policy)
        return primitives(lambda p: stack(p, X).sum(), params_of(3))[primitive]

    if name == "checkpoint":  # whose own re-run is gone: what the whole block keeps is the policy's
        assert counted("cheap") < counted("everything")
    else:
        # `x @ p["in"]` stands twice in the block with a rule, and is computed once and differentiated once, by two products.
        twice = 3 if name == "custom_vjp" else 0
        assert counted("cheap") == counted("everything") - twice < counted("nothing") - twice


def test_flash_attention_keeps_its_output_and_its_sums():
    found = explain(checkpoint_scan(BLOCKS["custom_vjp"], policy="cheap"), params_of(3), X)
    kept = [value.shape for value in found.values if value.fate == "kept"]
    assert (4, 1) in kept  # lse, inside the forward rule


@pytest.mark.parametrize("policy", ["cheap", "budget:0.3"])
def test_complex_values_are_not_kept_by_name(policy):
    """JAX cannot keep those; they are run again."""
    w = 0.3 * jax.random.normal(jax.random.key(0), (3, 4, 4)) * (1 + 1j)
    x = jnp.ones((2, 4), w.dtype)
    got, want = (
        jax.grad(lambda w, p=p: jnp.sum(jnp.abs(checkpoint_scan(lambda w, x: x + jnp.sin(x @ w), policy=p)(w, x))))(w)
        for p in (policy, "nothing")
    )
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("policy", ["cheap", "budget:0.3"])
def test_blocks_that_compute_nothing(policy):
    assert jax.grad(lambda x: checkpoint_scan(lambda w, x: x, policy=policy)(jnp.ones(3), x))(1.0) == 1


@pytest.mark.parametrize("policy", ["cheap", "budget:0.3"])
@pytest.mark.parametrize("per_ckpt", [None, 1, 2, 3])
def test_lists_of_blocks(policy, per_ckpt):
    trees = [jax.tree.map(lambda leaf, i=i: leaf[i], params_of()) for i in range(N)]
    x = X

    def run(trees, x, per_ckpt):
        blocks = [lambda x, note, p=p, i=i: (BLOCKS[list(BLOCKS)[i % 2]](p, x), note) for i, p in enumerate(trees)]
        return checkpoint_blocks(blocks, (x, "untouched"), per_ckpt, policy=policy)[0]

    got = pull_back(lambda trees, x: run(trees, x, per_ckpt), trees, x)
    assert relative_error(got, pull_back(lambda trees, x: run(trees, x, None), trees, x)) < 1e-12


def test_nnx_and_its_statistics():
    class Block(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.norm(self.linear(x)))

    def trained(policy):
        stack = checkpoint_scan(Block, 3, policy=policy)(rngs=nnx.Rngs(0))
        gradients = nnx.grad(lambda m: jnp.sum(m(X.astype("float32")) ** 2))(stack)
        return nnx.state(gradients), stack.norm.mean[...]

    assert relative_error(trained("cheap"), trained("nothing")) < 1e-5


def test_linen_module_with_tags_of_its_own():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jax.ad_checkpoint.checkpoint_name(nn.Dense(WIDTH)(x), "hidden")
            return x + jnp.sin(h)

    stack = checkpoint_scan(Block, 3, policy="cheap+save:hidden")()
    variables = stack.init(jax.random.key(0), X)
    found = explain(stack, variables, X)
    assert "hidden" in [value.name for value in found.values if value.fate == "kept"]
    with pytest.raises(ValueError, match="its tags are 'hidden'; did you mean 'hidden'"):
        checkpoint_scan(Block, 3, policy="cheap+save:hiden")().apply(variables, X)


def test_transformations():
    stack = checkpoint_scan(block, policy="cheap")
    call = lambda p, x: stack(p, x, scale=0.5).sum()  # noqa: E731
    params, x = params_of(2), X
    hessian = jax.hessian(call, argnums=1)(params, x[:1])
    want = jax.hessian(lambda p, x: plain_loop(block, p, x, scale=0.5).sum(), argnums=1)(params, x[:1])
    assert relative_error(hessian, want) < 1e-10
    many = jax.vmap(jax.grad(call), (None, 0))(params, jnp.stack([x, 2 * x]))
    assert relative_error(jax.tree.map(lambda leaf: leaf[0], many), jax.grad(call)(params, x)) < 1e-12


def test_tags_leave_the_program_as_it_is_but_for_names():
    closed = inlining.inlined(jx.trace(lambda x: jnp.sin(jnp.cos(x)) * 2, X))
    tagged = tagging.with_tags(closed, {tagging.value_name(0, 0)})
    assert [eqn.primitive.name for eqn in tagged.jaxpr.eqns] == ["cos", "name", "sin", "mul"]
    assert not isinstance(tagged.jaxpr.eqns[2].invars[0], Literal)
    assert tagged.jaxpr.eqns[2].invars == tagged.jaxpr.eqns[1].outvars
    assert tagging.tags(tagged) == frozenset()


LOW_RANK = {"a": jnp.ones((N, WIDTH, 2)), "b": jnp.ones((N, 2, WIDTH)), "w": jnp.ones((N, WIDTH, WIDTH), jnp.float32)}


def low_rank(w, x, *, key=None, shared=None):
    """Weights that are a product of parameters, converted and transposed: nothing of the carry is in them."""
    whole = checkpoint_name((w["a"] @ w["b"] + w["w"].astype(x.dtype)).T, "whole")
    if shared is not None:  # by which it is no parameter alone
        whole = checkpoint_name(whole @ shared, "with shared")
    h = jnp.sin(checkpoint_name(x @ whole, "product"))
    if key is not None:
        mask = checkpoint_name(jax.random.bernoulli(key, 0.9, h.shape), "mask")
        h = jnp.where(mask, h, 0)
    return x + jnp.sin(h) @ whole


def kept_by(policy, block=low_rank, **keywords):
    found = explain(checkpoint_scan(block, policy=policy, per_block=("key",) * ("key" in keywords)), LOW_RANK, X, **keywords)
    return {value.name for value in found.values if value.fate == "kept"} - {"x"}


@pytest.mark.parametrize("policy", ["cheap", "budget:0.9", "budget:1.0", "budget:1GiB"])
def test_what_depends_on_parameters_alone_is_not_chosen(policy):
    """With every block's gathered or converted weights whole on each device nobody would have had to split them."""
    kept = kept_by(policy)
    assert "product" in kept and "whole" not in kept
    assert "with shared" in kept_by(policy, shared=jnp.ones((WIDTH, WIDTH)))
    assert "mask" in kept_by(policy, key=jax.random.split(jax.random.key(0), N))
    assert "whole" in kept_by("save:whole") and "whole" in kept_by("save:whole+cheap")


def test_what_is_smaller_than_parameters_or_mixed_with_others_may_be_chosen():
    def scaled(w, x, *, memory=None):
        """A norm that three products make, and a weight whose product with an array of each block is none of parameters."""
        norm = checkpoint_name(jnp.linalg.norm(w["w"].T @ (w["w"] @ w["w"])).astype(x.dtype), "norm")
        x = x + jnp.sin(x @ checkpoint_name(w["w"] / norm, "whole"))
        return x if memory is None else x + jnp.sin(checkpoint_name(memory @ w["w"], "product")) * x

    assert kept_by("budget:1.0", scaled) >= {"norm"} and "whole" not in kept_by("budget:1.0", scaled)
    memory = jnp.ones((N, *X.shape))
    found = explain(checkpoint_scan(scaled, policy="cheap", per_block=("memory",)), LOW_RANK, X, memory=memory)
    assert "product" in {value.name for value in found.values if value.fate == "kept"}


CONSTANT = np.tri(WIDTH)


@pytest.mark.parametrize(
    "whole",
    [
        lambda w: w["w"] * jnp.tri(WIDTH, dtype=jnp.float32),
        lambda w: w["w"] * CONSTANT,
        lambda w: jnp.linalg.inv(jnp.eye(WIDTH) + w["w"]),
        lambda w: (w["int8"].astype(jnp.float32) * 0.5) @ w["w"],
    ],
    ids=["tri", "closed over", "inverse", "int8"],
)
def test_constants_beside_parameters_are_in_the_way_of_nothing(whole):
    block = lambda w, x: x + jnp.sin(checkpoint_name(x @ whole(w), "product"))  # noqa: E731
    w = {**LOW_RANK, "int8": jnp.ones((N, WIDTH, WIDTH), jnp.int8)}
    for policy in ("cheap", "budget:1.0"):
        found = explain(checkpoint_scan(block, policy=policy), w, X)
        assert {v.name for v in found.values if v.fate == "kept" and v.times == N} == {"x", "product"}  # constants once


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_gathered_weights_are_not_chosen(engine, check_vma):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gathered(w, x):
        whole = checkpoint_name(lax.all_gather(w["w"], "data", axis=0, tiled=True).astype(x.dtype), "whole")
        sums = checkpoint_name(lax.psum(jnp.sin(x @ whole), "data"), "sums")  # a collective of activations is dear
        return x + jnp.sin(sums) @ whole

    def stored(policy):
        stack = checkpoint_scan(gathered, policy=policy, engine=engine)
        kept = lambda w, x: jax.tree.leaves(jax.vjp(stack, w, x)[1])  # noqa: E731
        specs = jax.sharding.PartitionSpec("data")
        on_mesh = jax.shard_map(kept, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma)
        return [aval.shape for aval in jax.make_jaxpr(on_mesh)(LOW_RANK, X).out_avals if aval.dtype == jnp.float64]

    weights, carries = (N, WIDTH, WIDTH), (N, *X.shape)
    # Of activations the carry, the product and the sums, and by the budget the sums' sines.
    for policy, expected in (("cheap", (0, 3)), ("budget:0.9", (0, 4)), ("save:whole+cheap", (1, 3))):
        found = stored(policy)
        assert (found.count(weights), found.count(carries)) == expected, policy
