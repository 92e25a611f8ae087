"""Bad input: the type and the message of each error, when it is raised, and that it is ours and not JAX's.

Knobs are refused at `checkpoint_scan(...)`, what depends on the block at the first call.
"""

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

import jaxckpt
from jaxckpt import checkpoint_blocks, checkpoint_scan, explain, measure, plan
from jaxckpt._plan import Plan

PACKAGE = str(Path(jaxckpt.__file__).parent)
N, WIDTH = 3, 4
X = jnp.ones((2, WIDTH))
W = jnp.ones((N, WIDTH, WIDTH))


def assert_refused(call: Callable[[], Any], error: type[Exception], *parts: str) -> str:
    """`call` raises exactly `error`, from inside the package, with `parts` in the message."""
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    innermost = traceback.extract_tb(caught.tb)[-1]
    assert innermost.filename.startswith(PACKAGE), f"raised in {innermost.filename}:{innermost.lineno}"
    return message


def function(params, x, *, mask=None, then=lambda y: y):
    return then(checkpoint_name(x @ params["kernel"], "proj"))


class LinenBlock(nn.Module):
    then: Callable[[Any], Any] = lambda y: y

    @nn.compact
    def __call__(self, x, *, mask=None):
        return self.then(checkpoint_name(nn.Dense(WIDTH, use_bias=False)(x), "proj"))


class NnxBlock(nnx.Module):
    def __init__(self, then=lambda y: y, *, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.then = then

    def __call__(self, x, *, mask=None):
        return self.then(checkpoint_name(self.linear(x), "proj"))


BLOCKS = {"function": function, "linen": LinenBlock, "nnx": NnxBlock}
NAMES = {"function": "function", "linen": "LinenBlock", "nnx": "NnxBlock"}
each_kind = pytest.mark.parametrize("kind", BLOCKS)
each_module = pytest.mark.parametrize("kind", ["linen", "nnx"])


def ready(kind: str, then: Callable[[Any], Any] = lambda y: y, **knobs: Any) -> Callable[..., Any]:
    """A stack of `N` blocks that return `then(projection)`, of which no block has been traced: call it with the carry."""
    if kind == "function":
        return partial(checkpoint_scan(partial(function, then=then), N, **knobs), {"kernel": W})
    if kind == "linen":
        return partial(checkpoint_scan(LinenBlock, N, **knobs)(then).init, jax.random.key(0))
    return checkpoint_scan(NnxBlock, N, **knobs)(then, rngs=nnx.Rngs(0))


@each_kind
def test_good_input_is_taken(kind):
    ready(kind, policy="save:proj", blocks_per_ckpt=2)(X, mask=X)


# At checkpoint_scan(...)


@each_kind
@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("nothng", ["unknown policy 'nothng'", "did you mean 'nothing'?", "dots_no_batch", "save:NAMES"]),
        ("dots+sav:proj", ["unknown policy 'sav:proj' in 'dots+sav:proj'", "did you mean 'save:'?"]),
        ("save:", ["a name is missing in 'save:'", "write 'save:NAME'"]),
    ],
)
def test_an_unknown_policy(kind, policy, parts):
    assert_refused(lambda: checkpoint_scan(BLOCKS[kind], N, policy=policy), ValueError, *parts)


@each_kind
@pytest.mark.parametrize(
    "factory",
    [
        "save_only_these_names",
        "save_any_names_but_these",
        "save_anything_except_these_names",
        "save_and_offload_only_these_names",
        "save_from_both_policies",
        "offload_dot_with_no_batch_dims",
    ],
)
def test_an_unapplied_policy_factory(kind, factory):
    policy = getattr(jax.checkpoint_policies, factory)
    parts = [f"jax.checkpoint_policies.{factory} makes policies and is not one"]
    assert_refused(lambda: checkpoint_scan(BLOCKS[kind], N, policy=policy), TypeError, *parts)


@each_kind
@pytest.mark.parametrize("value", [0, -1, N + 1, 2.0, True, np.True_, "2"])
def test_a_chunk_size_out_of_range(kind, value):
    parts = [
        f"blocks_per_ckpt must be between 1 and len(blocks) = {N}, and an integer",
        f"got {value!r} of type {type(value).__name__}",
        "Write None",
    ]
    assert_refused(lambda: checkpoint_scan(BLOCKS[kind], N, blocks_per_ckpt=value), ValueError, *parts)


@pytest.mark.parametrize("value", [0, N + 1, True])
def test_a_chunk_size_out_of_range_for_a_list(value):
    blocks = [NnxBlock(rngs=nnx.Rngs(i)) for i in range(N)]
    parts = [f"got {value!r} of type"]
    assert_refused(lambda: checkpoint_scan(blocks, blocks_per_ckpt=value), ValueError, *parts)


def test_a_chunk_size_larger_than_the_parameters_tell():
    stack = checkpoint_scan(function, blocks_per_ckpt=N + 1)
    parts = [f"between 1 and len(blocks) = {N}", f"got {N + 1} of type int"]
    assert_refused(lambda: stack({"kernel": W}, X), ValueError, *parts)


@each_kind
@pytest.mark.parametrize("length", [0, -1, 2.0, True, "3"])
def test_a_length_out_of_range(kind, length):
    parts = [f"length, the number of blocks, must be an integer of at least 1; got {length!r}"]
    assert_refused(lambda: checkpoint_scan(BLOCKS[kind], length), ValueError, *parts)


@pytest.mark.parametrize(
    "block", [LinenBlock, LinenBlock(), NnxBlock, partial(NnxBlock, jnp.tanh), partial(LinenBlock, jnp.tanh)]
)
def test_a_missing_length(block):
    name = "NnxBlock" if "Nnx" in str(block) else "LinenBlock"
    parts = [f"length is missing: write checkpoint_scan({name}, N)"]
    assert_refused(lambda: checkpoint_scan(block), ValueError, *parts)


def test_a_length_in_conflict_with_a_list():
    blocks = [NnxBlock(rngs=nnx.Rngs(i)) for i in range(N)]
    parts = [f"length={N + 1} is in conflict with the list of {N} modules", "omit it"]
    assert_refused(lambda: checkpoint_scan(blocks, N + 1), ValueError, *parts)


@pytest.mark.parametrize("blocks", [[], ()])
def test_an_empty_list(blocks):
    assert_refused(lambda: checkpoint_scan(blocks), ValueError, "an empty list of blocks", "at least one")


def _nnx():
    return NnxBlock(rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        (
            lambda: [LinenBlock()] * 2,
            ["a list of Linen modules", "checkpoint_scan(LinenBlock, 2)(...)", "checkpoint_blocks"],
        ),
        (lambda: [function, function], ["must hold NNX modules; got function", "checkpoint_scan(f)(stack_params(trees)"]),
        (lambda: [_nnx(), function], ["must hold NNX modules; got function", "checkpoint_blocks"]),
        (lambda: [_nnx(), LinenBlock()], ["checkpoint_scan(LinenBlock, ", "checkpoint_blocks"]),
        (
            lambda: [nnx.Linear(4, 4, rngs=nnx.Rngs(0)), _nnx()],
            ["block 0 is Linear, block 1 is NnxBlock", "checkpoint_blocks"],
        ),
        (_nnx, ["NnxBlock is one NNX module", "checkpoint_scan(NnxBlock, N)(..., rngs=rngs)", "a list of N modules"]),
        (lambda: 3, ["a Flax module class, a list of NNX modules or a function; got 3"]),
        (lambda: None, ["got None"]),
    ],
)
def test_what_is_no_block(block, parts):
    block = block()
    assert_refused(lambda: checkpoint_scan(block, None if isinstance(block, list) else N), TypeError, *parts)


def test_modules_of_a_list_that_share_a_variable():
    block = _nnx()
    parts = ["blocks 0 and 1 share the variable linear.", "keyword argument"]
    assert_refused(lambda: checkpoint_scan([block, block]), ValueError, *parts)


class WideNnx(NnxBlock):
    def __init__(self, width, *, rngs):
        self.up, self.down = nnx.Linear(WIDTH, width, rngs=rngs), nnx.Linear(width, WIDTH, rngs=rngs)


def test_modules_of_a_list_with_other_shapes():
    blocks = [WideNnx(width, rngs=nnx.Rngs(0)) for width in (5, 6)]
    parts = ["float32[5", "float32[6", "['down']['kernel']", "tree 0"]
    assert_refused(lambda: checkpoint_scan(blocks), ValueError, *parts)


# At the first call: the policy and the parameters


@each_kind
@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("save:prj", ["policy 'save:prj': 'prj' tags nothing in the block", "its tags are 'proj'; did you mean 'proj'?"]),
        ("offload:q*", ["policy 'offload:q*': 'q*' tags nothing"]),
        ("except:q", ["policy 'except:q': 'q' tags nothing"]),
        ("save_out_proj", ["policy 'save_out_proj'", "'out_proj' tags nothing", "its tags are 'proj'"]),
        ("save:proj+offload:*", ["both saves and offloads 'proj'", "name it in one term"]),
    ],
)
def test_a_name_that_tags_nothing(kind, policy, parts):
    stack = ready(kind, policy=policy)
    message = assert_refused(lambda: stack(X), ValueError, *parts)
    assert message.startswith(f"{NAMES[kind]}: ")


def test_a_name_that_tags_nothing_in_a_list_of_blocks():
    parts = ["'prj' tags nothing", "did you mean 'proj'?"]
    assert_refused(
        lambda: checkpoint_blocks([lambda x: checkpoint_name(x, "proj")], X, 1, policy="save:prj"), ValueError, *parts
    )


def test_a_block_without_tags():
    stack = checkpoint_scan(lambda w, x: x @ w, policy="save:q")
    parts = ["'q' tags nothing", "no tags at all", "jax.ad_checkpoint.checkpoint_name(value, name)"]
    assert_refused(lambda: stack(W, X), ValueError, *parts)


def test_a_length_in_conflict_with_the_parameters():
    stack = checkpoint_scan(function, N + 1)
    parts = [f"['kernel'] has shape {W.shape}", f"{N + 1} blocks", "stack_params"]
    assert_refused(lambda: stack({"kernel": W}, X), ValueError, "function: the stacked parameters: ", *parts)


def test_variables_of_another_length_linen():
    variables = checkpoint_scan(LinenBlock, N + 1)().init(jax.random.key(0), X)
    stack = checkpoint_scan(LinenBlock, N)()
    parts = ["LinenBlock", f"['params']['Dense_0']['kernel'] has shape ({N + 1}, 4, 4)", f"{N} blocks"]
    assert_refused(lambda: stack.apply(variables, X), ValueError, *parts)


def test_variables_without_a_layer_axis_linen():
    variables = LinenBlock().init(jax.random.key(0), X)
    stack = checkpoint_scan(LinenBlock, N)()
    parts = [f"['params']['Dense_0']['kernel'] has shape ({WIDTH}, {WIDTH})", f"{N} blocks", "jaxckpt.stack_params"]
    assert_refused(lambda: stack.apply(variables, X), ValueError, *parts)


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        (
            {"a": W, "b": {"c": W[:2]}},
            ["['b']['c'] has shape (2, 4, 4)", "3 blocks (the leading axis of ['a'], shape (3, 4, 4))"],
        ),
        ({"a": W, "b": jnp.ones(())}, ["['b'] has shape ()", "leading axis"]),
        ({"a": W[:0]}, ["0 blocks (the leading axis of ['a'], shape (0, 4, 4))", "at least 1"]),
        ({}, ["no parameters to tell the number of blocks", "length="]),
    ],
)
def test_ragged_leading_axes(params, parts):
    stack = checkpoint_scan(lambda params, x: x)
    assert_refused(lambda: stack(params, X), ValueError, *parts)


def test_ragged_leading_axes_linen():
    stack = checkpoint_scan(nn.Dense, N)(WIDTH)
    variables = stack.init(jax.random.key(0), X)
    variables["params"]["bias"] = variables["params"]["bias"][:2]
    parts = ["Dense: ", "['params']['bias'] has shape (2, 4)", f"{N} blocks"]
    assert_refused(lambda: stack.apply(variables, X), ValueError, *parts)


def test_ragged_leading_axes_nnx():
    stack = checkpoint_scan(NnxBlock, N)(rngs=nnx.Rngs(0))
    stack.linear.bias = nnx.Param(jnp.ones((2, WIDTH)))
    assert_refused(lambda: stack(X), ValueError, "NnxBlock: ", "['linear']['bias']", "(2, 4)", f"{N} blocks")


# At the first call: the carry

GIVEN = "float32[2,4]"
RETURNS = {
    "shape": (lambda y: y[:1], [f"x as {GIVEN}", "returned it as float32[1,4]", "keeps its shape"]),
    "rank": (lambda y: y[0], [f"x as {GIVEN}", "returned it as float32[4]", "keeps its shape"]),
    "narrower dtype": (
        lambda y: y.astype(jnp.bfloat16),
        [f"x as {GIVEN}", "returned it as bfloat16[2,4]", "x.astype('float32')", "x.astype('bfloat16')"],
    ),
    "integer dtype": (lambda y: y.astype(int), ["returned it as int32[2,4]", "x.astype('float32')"]),
    "None": (lambda y: None, [f"was given the carry {GIVEN} and returned None", "return statement missing"]),
    "tuple of one": (lambda y: (y,), [f"returned ({GIVEN},)", "return x, not (x,)"]),
    "two values": (lambda y: (y, y), [f"returned ({GIVEN}, {GIVEN})", "passed by position", "has_aux=True"]),
    "list": (lambda y: [y], [f"returned [{GIVEN}]", "same structure"]),
    "dict": (lambda y: {"h": y}, [f"returned {{'h': {GIVEN}}}", "same structure"]),
    "string": (lambda y: "y", ["returned 'y' of type str", "blocks return arrays"]),
}


@each_kind
@pytest.mark.parametrize("returned", RETURNS)
def test_a_block_that_returns_another_carry(kind, returned):
    then, parts = RETURNS[returned]
    stack = ready(kind, then)
    message = assert_refused(lambda: stack(X), TypeError, *parts)
    assert message.startswith(f"{NAMES[kind]} ")


@pytest.mark.parametrize("how", [{}, {"blocks_per_ckpt": 2}, {"policy": "everything"}, {"unroll": True}])
@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.eval_shape])
def test_the_carry_is_checked_under_every_knob_and_transformation(how, transform):
    stack = checkpoint_scan(lambda w, x: (x @ w).astype(jnp.bfloat16), **how)
    if transform is jax.eval_shape:
        call = partial(jax.eval_shape, stack, W, X)
    elif transform is jax.vmap:
        call = partial(jax.vmap(stack, (None, 0)), W, X)
    else:
        call = partial(transform(stack), W, X)
    assert_refused(call, TypeError, "returned it as bfloat16[", "x.astype('float32')")


def test_a_leaf_of_the_carry_is_named():
    stack = checkpoint_scan(lambda w, state, x: ({"h": [state["h"][0].astype(jnp.float16)]}, x))
    parts = ["was given state['h'][0] as float32[2,4]", "float16[2,4]", "state['h'][0].astype('float32')"]
    assert_refused(lambda: stack(W, {"h": [X]}, X), TypeError, *parts)


def test_a_residual_in_float32_of_a_bfloat16_carry():
    stack = checkpoint_scan(lambda w, x: x + (x @ w.astype(x.dtype)).astype(jnp.float32))
    parts = ["x as bfloat16[2,4]", "returned it as float32[2,4]", "x.astype('bfloat16')", "x.astype('float32')"]
    assert_refused(lambda: stack(W, X.astype(jnp.bfloat16)), TypeError, *parts)


def test_fewer_values_than_were_carried():
    stack = checkpoint_scan(lambda w, x, z: x @ w)
    parts = [f"({GIVEN}, {GIVEN}) and returned {GIVEN}", "as many values as it is given by position"]
    assert_refused(lambda: stack(W, X, X), TypeError, *parts)


@pytest.mark.parametrize("value", ["fast", object(), len], ids=["string", "object", "function"])
def test_a_carry_that_is_no_array(value):
    stack = checkpoint_scan(lambda w, x, mode: (x @ w, mode))
    parts = ["the carry holds arrays", f"mode is {value!r} of type {type(value).__name__}", "keyword argument"]
    assert_refused(lambda: stack(W, X, value), TypeError, *parts)


@each_kind
@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        (lambda y: y, ["with has_aux=True a block returns (carry, aux)", f"got {GIVEN}"]),
        (lambda y: None, ["(carry, aux)", "got None"]),
        (lambda y: (y, y, y), ["(carry, aux)", f"({GIVEN}, {GIVEN}, {GIVEN})"]),
        (lambda y: (y, "loss"), ["returned 'loss' of type str in aux", "blocks return arrays"]),
        (lambda y: (y.astype(jnp.float16), y), ["returned it as float16[2,4]"]),
    ],
)
def test_aux_that_is_none(kind, returned, parts):
    stack = ready(kind, returned, has_aux=True)
    assert_refused(lambda: stack(X), TypeError, *parts)


# At the first call: what is passed by position and by keyword


@each_kind
def test_a_carry_passed_by_keyword(kind):
    stack = ready(kind)
    parts = ["no carry was given", "passed by position", "stack(..., x, z, mask=mask)"]
    assert_refused(lambda: stack(x=X), TypeError, *parts)


def test_a_second_carry_passed_by_keyword():
    stack = checkpoint_scan(lambda w, x, z: (x @ w, z + 1))
    parts = [f"was given the carry {GIVEN} and returned ({GIVEN}, {GIVEN})", "stack(..., x, z), not stack(..., x, z=z)"]
    assert_refused(lambda: stack(W, X, z=X), TypeError, *parts)


@each_kind
def test_a_shared_argument_that_the_block_does_not_take(kind):
    stack = ready(kind)
    assert_refused(lambda: stack(X, bias=X), TypeError, "takes no keyword argument 'bias'", "it takes: mask")


def test_a_shared_argument_of_a_block_that_takes_none():
    stack = checkpoint_scan(lambda w, x: x @ w)
    assert_refused(lambda: stack(W, X, mask=X), TypeError, "takes no keyword argument 'mask'", "it takes: none")


@each_kind
def test_more_carries_than_the_block_takes(kind):
    stack = ready(kind)
    parts = ["cannot be called with 2 carried argument(s) by position", "too many positional arguments"]
    assert_refused(lambda: stack(X, X), TypeError, *parts)


def test_fewer_carries_than_the_block_takes():
    stack = checkpoint_scan(lambda w, x, z: (x, z))
    parts = ["cannot be called with 1 carried argument(s)", "missing a required argument: 'z'"]
    assert_refused(lambda: stack(W, X), TypeError, *parts)


@each_kind
def test_a_per_block_argument_that_is_not_passed(kind):
    stack = ready(kind, per_block=("mask",))
    parts = ["mask is named in per_block but was not passed by keyword"]
    assert_refused(lambda: stack(X), TypeError, *parts)


@each_kind
@pytest.mark.parametrize("rate", [jnp.ones(N - 1), jnp.ones(()), 0.1])
def test_a_per_block_argument_of_another_length(kind, rate):
    stack = ready(kind, per_block=("mask",))
    parts = ["the per-block argument 'mask'", f"has shape {jnp.shape(rate)}", "one slice per block"]
    assert_refused(lambda: stack(X, mask=rate), ValueError, *parts)


# At the first call: functions that differ, effects, rngs


class Alternating(nnx.Module):
    """One parameter tree, two functions, as GPT-Neo's global and local layers."""

    def __init__(self, index, *, rngs):
        self.linear, self.index = nnx.Linear(WIDTH, WIDTH, rngs=rngs), index

    def __call__(self, x):
        return jnp.tanh(self.linear(x)) if self.index % 2 else jnp.sin(self.linear(x))


def test_modules_of_a_list_that_are_different_functions():
    stack = checkpoint_scan([Alternating(i, rngs=nnx.Rngs(i)) for i in range(N)])
    parts = ["blocks 0 and 1 of the list are different functions", "Alternating", "static attribute", "checkpoint_blocks"]
    assert_refused(lambda: stack(X), ValueError, *parts)


def test_modules_of_a_list_that_differ_in_what_does_not_matter():
    blocks = [Alternating(2 * i, rngs=nnx.Rngs(i)) for i in range(N)]
    want = X
    for block in blocks:
        want = block(want)
    assert jnp.allclose(checkpoint_scan(blocks)(X), want, rtol=1e-5)


def report(y):
    return y


def _reporting(y):
    return io_callback(report, jax.ShapeDtypeStruct(y.shape, y.dtype), y)


@each_kind
@pytest.mark.parametrize("how", [{}, {"blocks_per_ckpt": 2}, {"policy": "dots"}])
def test_io_callback(kind, how):
    stack = ready(kind, _reporting, **how)
    parts = ["has a side effect, io_callback(report)", "run again", "has_aux=True", "jax.debug.callback"]
    assert_refused(lambda: stack(X), ValueError, *parts)


def test_io_callback_deep_in_the_block():
    def block(w, x):
        return jax.lax.cond(x.sum() > 0, jax.jit(_reporting), lambda y: y, x @ w)

    stack = checkpoint_scan(block)
    assert_refused(lambda: jax.jit(jax.grad(lambda w: stack(w, X).sum()))(W), ValueError, "io_callback(report)")


def test_io_callback_where_the_block_runs_once():
    stack = ready("function", _reporting, policy="everything")
    assert stack(X).shape == X.shape


@each_kind
def test_debug_callback_is_allowed(kind):
    def watch(y):
        jax.debug.callback(lambda value: None, y)
        return y

    ready(kind, watch)(X)
    jax.effects_barrier()


class Dropping(nn.Module):
    stream: str = "dropout"

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False, rng_collection=self.stream)(nn.Dense(WIDTH)(x))


@pytest.mark.parametrize("stream", ["dropout", "droppath"])
@pytest.mark.parametrize("how", [{}, {"blocks_per_ckpt": 2}])
def test_a_missing_rng(stream, how):
    stack = checkpoint_scan(Dropping, N, **how)(stream=stream)
    variables = stack.init({"params": jax.random.key(0), stream: jax.random.key(1)}, X)
    parts = [f"Dropping draws random numbers from '{stream}'", f"rngs={{'{stream}': key}}", "deterministic"]
    assert_refused(lambda: stack.apply(variables, X), ValueError, *parts)


def test_a_missing_rng_for_the_parameters():
    stack = checkpoint_scan(Dropping, N)()
    message = assert_refused(lambda: stack.init({"dropout": jax.random.key(0)}, X), ValueError, "'params'", "init")
    assert "deterministic" not in message, "no flag makes parameters without a key"


class DroppingNnx(nnx.Module):
    def __init__(self, *, rngs):
        self.linear, self.dropout = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, *, rngs=None):
        return self.dropout(self.linear(x), rngs=rngs)


def test_a_missing_rng_nnx():
    stack = checkpoint_scan(DroppingNnx, N)(rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no `rngs` argument was provided to Dropout"):
        stack(X)


def test_a_linen_stack_outside_init_and_apply():
    stack = checkpoint_scan(LinenBlock, N)()
    assert_refused(lambda: stack(X), ValueError, "LinenBlock: call stack.init or stack.apply")


@pytest.mark.parametrize("per_ckpt", [None, 1])
@pytest.mark.parametrize(
    "blocks, parts",
    [
        (jnp.sin, ["checkpoint_blocks takes a list of callables, one for each block; got", "checkpoint_blocks([sin], "]),
        (LinenBlock(), ["checkpoint_blocks([LinenBlock], args, K)", "checkpoint_scan for a stack of equal blocks"]),
        (3, ["one for each block; got 3: write list(blocks)"]),
    ],
    ids=["function", "module", "number"],
)
def test_blocks_that_are_no_list(blocks, parts, per_ckpt):
    assert_refused(lambda: checkpoint_blocks(blocks, X, per_ckpt), TypeError, *parts)


@pytest.mark.parametrize(
    "blocks, part",
    [
        (iter([jnp.sin, jnp.cos]), "write list(blocks)"),
        ({"a": jnp.sin}, "write list(blocks)"),
        ([jnp.sin, 3], "blocks[1] is 3"),
    ],
    ids=["iterator", "mapping", "number"],
)
def test_blocks_that_cannot_be_cut_into_chunks(blocks, part):
    assert_refused(lambda: checkpoint_blocks(blocks, X, 1), TypeError, "checkpoint_blocks takes a list of callables", part)


@pytest.mark.parametrize("given", [3, "step", None, [jnp.sin]], ids=["number", "text", "none", "list"])
@pytest.mark.parametrize("of", [plan, measure, explain, Plan.around], ids=lambda of: of.__name__)
def test_what_is_no_function(of, given):
    call = (lambda: of(None, given)) if of is Plan.around else (lambda: of(given, X))
    assert_refused(call, TypeError, f"{of.__name__} takes", "function", f"got {given!r}"[:20])
