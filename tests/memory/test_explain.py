"""What a setting keeps, value by value: the totals are those of the jaxpr, to the byte."""

import json
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jaxckpt import checkpoint, checkpoint_scan, explain, plan
from jaxckpt.models import NNXTransformerBlock, PairformerBlock, TransformerBlock

N = 6
TOKENS = jnp.ones((5, 8))


def mlp(w, x, *, scale):
    h = checkpoint_name(jnp.tanh(x @ w["up"]), "h")
    return x + jnp.sin(h @ w["down"]) * scale


MLP = {"up": jnp.ones((N, 8, 16)), "down": jnp.ones((N, 16, 8))}


@jax.custom_vjp
def normed(x):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))


def _forward(x):
    inverse = checkpoint_name(jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)), "inverse")
    return x * inverse, (x * inverse, inverse)


def _backward(residuals, ct):
    y, inverse = residuals
    return ((ct - y * jnp.mean(ct * y, -1, keepdims=True)) * inverse,)


normed.defvjp(_forward, _backward)


def with_custom_vjp(w, x):
    return x + jnp.tanh(normed(x) @ w)


def with_inner_scan(w, x):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=3)[0]


FIXED = jnp.linspace(0.5, 1, 5)[:, None]


def with_closed_over_array(w, x):
    return x + jnp.sin(x @ w) * FIXED


_sizes = dict(d_model=8, num_heads=2, d_ff=12)
_pair = dict(c_s=8, num_heads_single=2, c_z=8, c_hidden_mul=4, num_heads_pair=2, head_dim_pair=4, transition_factor=1)
PAIRS = jnp.ones((5, 5, 8))


def of_function(block, params, *carry, **shared):
    return lambda **knobs: (checkpoint_scan(block, **knobs), (params, *carry), shared)


def of_linen(block, sizes, *carry):
    def make(**knobs):
        stack = checkpoint_scan(block, N, **knobs)(**sizes)
        return stack, (jax.eval_shape(stack.init, jax.random.key(0), *carry), *carry), {}

    return make


def of_nnx(**knobs):
    return checkpoint_scan(NNXTransformerBlock, N, **knobs)(**_sizes, rngs=nnx.Rngs(0)), (TOKENS,), {}


STACKS = {
    "mlp": of_function(mlp, MLP, TOKENS, scale=jnp.ones((1, 8))),
    "custom_vjp": of_function(with_custom_vjp, jnp.ones((N, 8, 8)), TOKENS),
    "inner scan": of_function(with_inner_scan, jnp.ones((N, 8, 8)), TOKENS),
    "closed over": of_function(with_closed_over_array, jnp.ones((N, 8, 8)), TOKENS),
    "linen": of_linen(TransformerBlock, _sizes, TOKENS),
    "nnx": of_nnx,
    "pairformer": of_linen(PairformerBlock, _pair, TOKENS, PAIRS),
}


def stored_bytes(stack, args, shared):
    """The bytes that the forward pass makes and keeps for the backward pass, counted in the program of `jax.vjp`.

    Without what is given: inputs, constants, and reshaped or sliced ones, which XLA does not copy.
    """
    if isinstance(stack, nnx.Module):
        graph, params, rest = nnx.split(stack, nnx.Param, ...)
        fn, args = lambda params, *carry: nnx.merge(graph, params, rest)(*carry), (params, *args)
    else:
        fn = stack.apply if isinstance(stack, nn.Module) else stack

    def residuals(args, shared):
        return jax.tree.leaves(jax.vjp(lambda args, shared: fn(*args, **shared), args, shared)[1])

    jaxpr = jax.make_jaxpr(residuals)(args, shared).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reshape" and eqn.invars[0] in given:
            given.update(eqn.outvars)
        if not [v for v in eqn.invars if not isinstance(v, Literal) and v not in given] and eqn.primitive.name == "iota":
            given.update(eqn.outvars)
    made = dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal) and v not in given)
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in made)


@pytest.mark.parametrize(
    "knobs", [{}, {"policy": "everything"}, {"policy": "dots"}, {"blocks_per_ckpt": 2}, {"blocks_per_ckpt": 1}]
)
@pytest.mark.parametrize("name", STACKS)
def test_totals_are_the_residuals_in_the_jaxpr(name, knobs):
    stack, args, shared = STACKS[name](**knobs)
    found = explain(stack, *args, **shared)
    want = stored_bytes(stack, args, shared)
    assert found.stored_bytes == want > 0
    chunked = found.blocks_per_ckpt is not None
    of_rows = [v.bytes for v in found.values if v.fate == ("kept per chunk" if chunked else "kept")]
    assert sum(of_rows) == want
    if chunked:
        assert found.chunk_bytes == sum(v.bytes for v in found.values if v.fate == "kept")
    assert found.host_bytes == 0


@pytest.mark.parametrize("name", STACKS)
def test_without_checkpointing(name):
    stack, args, shared = STACKS[name](policy="everything")
    plain = explain(stack, *args, **shared)
    assert {v.fate for v in plain.values} == {"kept"}
    assert plain.stored_bytes == plain.wanted_bytes
    for knobs in ({"policy": "nothing"}, {"blocks_per_ckpt": 3, "policy": "dots"}):
        stack, args, shared = STACKS[name](**knobs)
        found = explain(stack, *args, **shared)
        assert found.wanted_bytes == plain.wanted_bytes > found.stored_bytes
        assert "re-run" in {v.fate for v in found.values}


@pytest.mark.parametrize("k", [4, 5])
def test_a_shorter_last_chunk(k):
    stack, args, shared = STACKS["mlp"](blocks_per_ckpt=k, policy="nothing")
    found = explain(stack, *args, **shared)
    assert found.stored_bytes == math.ceil(N / k) * TOKENS.nbytes
    assert found.chunk_bytes == k * TOKENS.nbytes


def fates(policy, **knobs):
    stack, args, shared = STACKS["mlp"](policy=policy, **knobs)
    return {(v.name, v.op, v.fate) for v in explain(stack, *args, **shared).values}


def test_fates_follow_the_policy():
    x = ("x", "input", "kept")
    nothing = fates("nothing") - {x}
    assert {fate for _, _, fate in nothing} == {"re-run"}
    assert {("h", "tanh", "re-run"), ("sin", "sin", "re-run"), ("cos", "cos", "re-run")} < nothing
    assert {x, ("h", "tanh", "kept"), ("sin", "sin", "re-run")} < fates("save:h")
    assert {x, ("dot_general", "dot_general", "kept"), ("h", "tanh", "re-run")} < fates("dots")
    assert {fate for _, _, fate in fates("everything")} == {"kept"}
    assert {("x", "input", "kept per chunk"), ("sin", "sin", "re-run")} < fates("nothing", blocks_per_ckpt=2)


def test_tags_in_the_rule_of_a_custom_vjp():
    kept = explain(*_called("custom_vjp", policy="save:inverse"))
    assert kept.stored_bytes == N * (TOKENS.nbytes + TOKENS.shape[0] * 4)


def _called(name, **knobs):
    stack, args, shared = STACKS[name](**knobs)
    assert not shared
    return stack, *args


def test_offloaded_values_are_counted_apart():
    stack, args, shared = STACKS["mlp"](policy="offload:h")
    found = explain(stack, *args, **shared)
    assert found.host_bytes == N * 5 * 16 * 4
    assert found.stored_bytes == N * TOKENS.nbytes
    assert [v.name for v in found.values if v.fate == "offloaded"] == ["h"]


def test_rows_say_where_values_come_from():
    stack, args, shared = STACKS["mlp"](policy="save:h")
    rows = {v.name: v for v in explain(stack, *args, **shared).values}
    assert rows["h"].source.startswith("test_explain.py:") and rows["h"].shape == (5, 16) and rows["h"].dtype == "float32"
    assert rows["h"].times == N and rows["h"].bytes == N * rows["h"].bytes_per_block
    in_model = {v.source.partition(":")[0] for v in explain(*_called("pairformer")).values if v.op != "input"}
    assert in_model <= {"pairformer.py", "_layers.py", "_attention.py"}


def test_times_are_those_of_the_target():
    stack, args, shared = STACKS["mlp"](policy="dots")
    found = {name: explain(stack, *args, target=name, **shared) for name in ("h200", "a100-40gb")}
    assert 0 < found["h200"].rerun_seconds < found["h200"].forward_seconds < found["a100-40gb"].forward_seconds
    assert explain(stack, *args, **shared).forward_seconds is None
    nothing, everything = (
        explain(*_called("linen", policy=policy), target="h200").rerun_seconds for policy in ("nothing", "everything")
    )
    assert nothing > everything == 0


def test_shapes_do_and_static_arguments_pass():
    def block(w, x, *, kind, mask=None):
        return x + jnp.tanh(x @ w) if kind == "add" else x

    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((N, 8, 8), (5, 8))]
    found = explain(checkpoint_scan(block), *shapes, kind="add", mask=None)
    assert found.stored_bytes == N * 5 * 8 * 2


def test_functions_that_run_a_stack():
    stack, (variables, x), _ = STACKS["linen"]()
    direct = explain(stack, variables, x)
    assert explain(lambda v, x: stack.apply(v, 2 * x).sum(), variables, x) == direct


def test_a_stack_in_a_parent_module():
    class Parent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return checkpoint_scan(TransformerBlock, N)(**_sizes)(nn.Dense(8)(x))

    variables = Parent().init(jax.random.key(0), TOKENS)
    assert explain(Parent(), variables, TOKENS).stored_bytes == explain(*_called("linen")).stored_bytes


def test_prints_and_dumps():
    stack, args, shared = STACKS["mlp"](blocks_per_ckpt=2, policy="save:h")
    found = explain(stack, *args, target="h200", **shared)
    text, page = str(found), found.to_html()
    assert text.startswith("6 x mlp, blocks_per_ckpt=2, policy='save:h'")
    assert "stored from the forward to the backward pass: 480 B" in text
    assert "by the time model of h200" in text
    assert page.startswith("<!doctype html>") and page.count("<tr") == 1 + len(found.values)
    assert "http" not in page and "<script" not in page
    assert json.loads(json.dumps(found.to_json()))["stored_bytes"] == found.stored_bytes


def head(kernel, x, labels):
    hidden = checkpoint_name(jnp.tanh(x), "hidden")
    logits = hidden @ kernel
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


HEAD = jnp.ones((8, 512)), jnp.ones((64, 8)), jnp.zeros(64, int)


class LinenHead(nn.Module):
    @nn.compact
    def __call__(self, x, labels):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (8, 512))
        return head(kernel, x, labels)


class NNXHead(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs(), (8, 512)))

    def __call__(self, x, labels):
        return head(self.kernel[...], x, labels)


def single(kind, **knobs):
    """The head under `checkpoint`, and what it is called with."""
    if kind == "function":
        return checkpoint(head, **knobs), HEAD
    if kind == "linen":
        return checkpoint(LinenHead, **knobs)(), ({"params": {"kernel": HEAD[0]}}, *HEAD[1:])
    return checkpoint(NNXHead(nnx.Rngs(0)), **knobs), HEAD[1:]


@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
@pytest.mark.parametrize(
    "knobs, kept", [({}, []), ({"policy": "save:hidden"}, ["hidden"]), ({"policy": "dots"}, ["dot_general"])]
)
def test_what_is_no_stack_is_one_block(kind, knobs, kept):
    fn, args = single(kind, **knobs)
    found = explain(fn, *args, target="h200")
    assert (found.length, found.pieces, found.blocks_per_ckpt) == (1, 1, None)
    assert str(found).startswith(found.block + ", policy=")
    assert [value.name for value in found.values if value.fate == "kept"] == kept
    sizes = {"hidden": 64 * 8 * 4, "dot_general": 64 * 512 * 4}
    assert found.stored_bytes == sum(sizes[name] for name in kept)
    assert 1 < found.forward_runs < 2  # the loss itself has no part in derivatives


@pytest.mark.parametrize("kind", ["function", "linen", "nnx"])
def test_slices_of_what_is_no_stack(kind):
    fn, args = single(kind, tiles=4)
    found = explain(fn, *args, target="h200")
    assert [piece.count for piece in found.slices] == [4] and found.slices[0].slice_bytes == 16 * 512 * 4
    assert found.wanted_bytes == explain(single(kind, policy="everything")[0], *args).stored_bytes


def test_a_planned_head():
    step = jax.grad(checkpoint(head, plan="auto"), argnums=(0, 1))
    found = plan(step, *HEAD, budget="100KiB", target="cpu", progress=False)
    assert explain(found.around(checkpoint(head, plan="auto")), *HEAD) == explain(checkpoint(head, plan=found), *HEAD)
    assert explain(checkpoint(head, plan=found), *HEAD).slices
    with pytest.raises(ValueError, match="the plan is for something else: it is given"):
        explain(checkpoint(head, plan=found), HEAD[0], HEAD[1][:32], HEAD[2][:32])


def test_a_stack_comes_before_what_is_no_stack():
    stack, over = checkpoint_scan(lambda w, x: jnp.tanh(x @ w)), checkpoint(head)
    w = jnp.ones((3, 8, 8))
    assert explain(lambda w, kernel, x, labels: over(kernel, stack(w, x), labels), w, *HEAD).length == 3
    with pytest.raises(ValueError, match=r"several functions under checkpoint were run \(head, head\)"):
        explain(lambda *args: over(*args) + over(*args), *HEAD)
    with pytest.raises(ValueError, match=r"^head was run under vmap.* explain it by itself, called with the whole batch"):
        explain(jax.vmap(over, (None, 0, 0)), HEAD[0], HEAD[1][None], HEAD[2][None])


def test_a_function_with_a_checkpoint_in_it_is_one():
    inner = checkpoint(lambda x: jnp.sin(jnp.sin(x)))
    outer = checkpoint(lambda w, x: inner(x @ w).sum())
    found = explain(outer, jnp.ones((8, 4)), jnp.ones((2, 8)))
    assert str(found).startswith("<lambda>, policy=") and found.stored_bytes == 0
    w = jnp.ones((1, 8, 8))
    assert str(explain(checkpoint_scan(lambda w, x: jnp.tanh(x @ w)), w, HEAD[1])).startswith("1 x <lambda>, policy=")


@pytest.mark.parametrize(
    "fn, said", [(lambda x: x, "ran nothing that checkpoint_scan or checkpoint made"), (3, "explain takes a stack")]
)
def test_what_is_no_stack(fn, said):
    with pytest.raises(TypeError, match=said):
        explain(fn, TOKENS)


def test_linen_without_variables():
    stack = checkpoint_scan(TransformerBlock, N)(**_sizes)
    with pytest.raises(TypeError, match=r"its variables first, explain\(stack, variables, x\); got"):
        explain(stack, TOKENS)
    with pytest.raises(
        TypeError, match="explain takes a stack, what checkpoint made, or a function that runs one; got <class"
    ):
        explain(checkpoint_scan(TransformerBlock, N), {}, TOKENS)


def test_several_stacks():
    stack, args, shared = STACKS["mlp"]()
    with pytest.raises(ValueError, match=r"several stacks were run \(6 x mlp, 6 x mlp\)"):
        explain(lambda w, x: stack(w, stack(w, x, **shared), **shared), *args)


@jax.jit
def tanh_of_product(w, x):
    product = x @ w
    return jnp.tanh(product)


def nested(w, x):
    return tanh_of_product(w, x) + jax.nn.relu(jnp.where(x > 0, jnp.sin(x), x))


def flat(w, x):
    return jnp.tanh(x @ w) + jax.nn.relu(jnp.where(x > 0, jnp.sin(x), x))


def looping(w, x):
    def body(c, _):
        waved = jnp.sin(c)
        return waved @ w, jnp.cos(waved)

    c, ys = jax.lax.scan(body, x, None, length=3)
    return c + ys.sum(0)


def checkpointed(w, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x)


WEIGHTS, ROWS = jnp.ones((5, 16, 16)), jnp.ones((32, 16))


def line_of(text):
    return [line.strip() for line in Path(__file__).read_text().splitlines()].index(text) + 1


@pytest.mark.parametrize("policy", ["everything", "dots", "nothing"])
def test_what_is_jitted_inside_counts_like_what_is_not(policy):
    a, b = (explain(checkpoint_scan(block, policy=policy), WEIGHTS, ROWS, target="h200") for block in (nested, flat))
    assert a.forward_runs == b.forward_runs
    of = lambda found: [(v.op, v.bytes, v.fate, v.seconds) for v in found.values]  # noqa: E731
    assert of(a) == of(b)
    if policy == "dots":
        assert 1 < a.forward_runs < 2


def test_sees_inside_nested_jit_and_scan():
    here = "test_explain.py:{}".format
    values = explain(checkpoint_scan(nested, policy="dots"), WEIGHTS, ROWS).values
    rows = {v.op: v.source for v in values}
    assert rows["dot_general"] == here(line_of("product = x @ w"))
    assert rows["cos"] == here(line_of("return tanh_of_product(w, x) + jax.nn.relu(jnp.where(x > 0, jnp.sin(x), x))"))
    # What the derivative of tanh keeps has another name in each version of JAX.
    assert here(line_of("return jnp.tanh(product)")) in {v.source for v in values if v.fate == "re-run"}
    found = explain(checkpoint_scan(looping, policy="dots"), WEIGHTS, ROWS, target="h200")
    rows = {v.op: v for v in found.values}
    assert rows["dot_general"].fate == "kept" and rows["cos"].fate == "re-run"
    assert rows["cos"].source == here(line_of("waved = jnp.sin(c)")) and rows["cos"].shape == (3, 32, 16)
    assert found.forward_runs > 1.5  # for the values that are not kept the whole loop is run again


@pytest.mark.parametrize("policy", ["everything", "nothing"])
def test_the_blocks_own_checkpoint_is_run_again(policy):
    assert explain(checkpoint_scan(checkpointed, policy=policy), WEIGHTS, ROWS, target="h200").forward_runs == 2


def test_forward_runs():
    runs = [
        explain(checkpoint_scan(flat, **knobs), WEIGHTS, ROWS, target="h200").forward_runs
        for knobs in ({"policy": "everything"}, {"blocks_per_ckpt": 1}, {"blocks_per_ckpt": 5})
    ]
    assert runs == [1, 2, 2]
    nested_chunks = explain(checkpoint_scan(flat, blocks_per_ckpt=2, policy="nothing"), WEIGHTS, ROWS, target="h200")
    assert 2.5 < nested_chunks.forward_runs <= 3
    assert explain(checkpoint_scan(flat), WEIGHTS, ROWS).forward_runs is None


def test_a_function_that_was_jitted_and_called_before():
    run = jax.jit(lambda w, x: checkpoint_scan(flat)(w, x))
    run(WEIGHTS, ROWS)
    assert explain(run, WEIGHTS, ROWS).stored_bytes == explain(run, WEIGHTS, ROWS).stored_bytes == 5 * ROWS.nbytes


def test_under_vmap_it_refuses_to_count_one_example():
    stack = checkpoint_scan(flat)
    with pytest.raises(ValueError, match="run under vmap, where its bytes are those of one example"):
        explain(lambda w, xs: jax.vmap(lambda x: stack(w, x))(xs), WEIGHTS, jnp.ones((7, 32, 16)))


def test_sizes_do_not_read_as_products():
    found = explain(checkpoint_scan(flat, policy="dots"), WEIGHTS, ROWS)
    head, *rows = [line for line in str(found).splitlines() if line.startswith(("value ", "x "))]
    assert "of one block  blocks" in head and "in all" in head
    size = found.values[0].bytes_per_block
    assert rows[0].split()[3:] == [f"{size / 1024:.1f}", "KiB", "5", f"{size * 5 / 1024:.1f}", "KiB", "kept"], rows[0]
    assert not re.search(r"\bx\d", str(found)) and "<td>x" not in found.to_html().replace("<td>x</td>", "")


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_stack_in_a_shard_map(check_vma):
    """What is sent along an axis has its row, and what was gathered is not what `cheap` keeps."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def block(w, x):
        return x + jnp.tanh(x @ jax.lax.all_gather(w, "data", axis=0, tiled=True))

    def found(policy):
        stack = checkpoint_scan(block, policy=policy)
        loss = lambda w, x: jax.lax.psum(jnp.sum(stack(w, x) ** 2), "data")  # noqa: E731
        specs = jax.P(None, "data"), jax.P("data")
        of_all = jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=check_vma)
        return explain(of_all, jnp.ones((6, 16, 16)), jnp.ones((8, 16)), target="h200")

    assert {value.op: value.fate for value in found("cheap").values}["all_gather"] == "re-run"
    assert found("everything").forward_runs == 1 and found("nothing").stored_bytes == 6 * 8 * 16 * 4
