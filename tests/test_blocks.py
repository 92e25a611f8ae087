"""`checkpoint_blocks` against a restatement of the original's contract, and what checkpointing adds to it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_blocks, policies
from tests.support import assert_no_zero_leaf, pull_back, random_like, relative_error

SENTENCE = "blocks_per_ckpt must be between 1 and len(blocks)"


def original(blocks: Sequence[Callable[..., Any]], args: Any, blocks_per_ckpt: Any) -> tuple[Any, ...]:
    """What the original returns and raises; the checkpoint itself changes neither."""

    def wrap(value):
        return value if type(value) is tuple else (value,)

    def run(blocks, args):
        for block in blocks:
            args = wrap(block(*args))
        return args

    args = wrap(args)
    if blocks_per_ckpt is None:
        return run(blocks, args)
    if type(blocks_per_ckpt) is bool or not isinstance(blocks_per_ckpt, (int, np.integer)):
        raise ValueError(SENTENCE)
    if not 1 <= blocks_per_ckpt <= len(blocks):
        raise ValueError(SENTENCE)
    for start in range(0, len(blocks), blocks_per_ckpt):
        args = run(blocks[start : start + blocks_per_ckpt], args)
    return args


class Pair(NamedTuple):
    x: Any
    z: Any


class Marker:
    """An object that only its identity tells apart."""


MARKER = Marker()
X, Z = jnp.arange(3.0), jnp.arange(4.0).reshape(2, 2)


def _mixed(i, x, name, flag, nothing, marker, number, options):
    assert type(name) is str and type(flag) is bool and nothing is None and marker is MARKER and type(number) is float
    return (
        x * number if flag else x + i,
        f"{name}{i}",
        not flag,
        nothing,
        marker,
        number,
        {**options, "last": options["z"]},
    )


# The arguments, and block number i on what the block before returned. Powers of two and small integers: exact in floats.
KINDS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "array": (X, lambda i, x: x * 2 + i),
    "array, returned in a tuple": (X, lambda i, x: (x * 2 + i,)),
    "tuple of one": ((X,), lambda i, x: x * 2 + i),
    "tuple": ((X, Z), lambda i, x, z: (x + z.sum(), z * 2) if i % 2 else (x * 2, z + i)),
    "list": ([X, Z], lambda i, xz: [xz[1] + i, xz[0] * 2]),
    "NamedTuple": (Pair(X, Z), lambda i, pair: Pair(pair.x * 2, pair.z + pair.x.sum())),
    "NamedTuple to tuple": ((X, Z), lambda i, *a: Pair(*a) if len(a) == 2 else tuple(a[0])),
    "nested": (
        ({"h": X, "deep": [Z, (X,)]}, Z),
        lambda i, d, z: ({"h": d["deep"][1][0] + i, "deep": [z, (d["h"],)]}, z * 2),
    ),
    "growing": (X, lambda i, *a: (*a, a[-1] * 2 + i)),
    "nothing": ((), lambda i: ()),
    "mixed leaves": ((X, "name", True, None, MARKER, 2.0, {"z": Z, "mode": "fast"}), _mixed),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "per_ckpt"), [(n, k) for n in range(1, 8) for k in (None, *range(1, n + 1))])
def test_returns_what_the_original_returns(kind, length, per_ckpt):
    args, block = KINDS[kind]
    blocks = [functools.partial(block, i) for i in range(length)]
    got, want = checkpoint_blocks(blocks, args, per_ckpt), original(blocks, args, per_ckpt)
    assert type(got) is tuple
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(w, jax.Array):
            assert (g.shape, g.dtype) == (w.shape, w.dtype)
            np.testing.assert_array_equal(g, w)
        else:
            assert g is w or (type(g) is type(w) is str and g == w)


@pytest.mark.parametrize("per_ckpt", [0, -1, 4, 2.0, 1.0, np.float32(1), True, False, np.True_, "2", "", [1], (1,), 1j])
@pytest.mark.parametrize("length", [0, 3])
def test_what_is_not_a_chunk_size_is_refused(length, per_ckpt):
    blocks = [jnp.sin] * length
    for run in (original, checkpoint_blocks):
        with pytest.raises(ValueError) as caught:
            run(blocks, X, per_ckpt)
        assert SENTENCE in str(caught.value)
    for part in (f"len(blocks) = {length}", f"got {per_ckpt!r} of type {type(per_ckpt).__name__}", "Write None"):
        assert part in str(caught.value)


@pytest.mark.parametrize("per_ckpt", [1, np.int64(1)])
def test_no_blocks_and_a_chunk_size_are_refused(per_ckpt):
    with pytest.raises(ValueError, match=r"between 1 and len\(blocks\) = 0"):
        checkpoint_blocks([], X, per_ckpt)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int32, np.int64])
def test_numpy_integers_are_integers(integer):
    blocks = [lambda x: x + 1] * 3
    np.testing.assert_array_equal(checkpoint_blocks(blocks, X, integer(2))[0], X + 3)


def test_a_small_numpy_integer_does_not_wrap_around():
    (count,) = checkpoint_blocks([lambda x: x + 1] * 150, jnp.zeros(()), np.int8(100))
    assert count == 150


@pytest.mark.parametrize("args", [X, (X,), (X, "s"), [X], Pair(X, Z), ()])
def test_no_blocks_and_no_checkpointing_return_the_arguments(args):
    got = checkpoint_blocks([], args, None)
    assert type(got) is tuple
    assert got is args or (got[0] is args and len(got) == 1)


def test_nothing_is_validated_without_checkpointing():
    got = checkpoint_blocks([lambda x: x * 2], X, None, policy="no such policy")
    np.testing.assert_array_equal(got[0], X * 2)


@pytest.mark.parametrize("per_ckpt", [1, 2])
@pytest.mark.parametrize(
    "leaf",
    [
        "s",
        True,
        None,
        2.5,
        3,
        1 + 2j,
        MARKER,
        jnp.float32,
        np.dtype("float32"),
        np.str_("s"),
        np.array("s"),
        np.array([MARKER]),
    ],
    ids=lambda leaf: f"{type(leaf).__name__} {leaf!s:.12}",
)
def test_what_is_not_an_array_passes_untouched(leaf, per_ckpt):
    seen = []

    def block(x, leaf):
        seen.append(leaf)
        return x, leaf

    got = checkpoint_blocks([block] * 3, (X, leaf), per_ckpt, policy="nothing")
    assert got[1] is leaf
    assert len(seen) >= 3 and all(other is leaf for other in seen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "bool", "complex64"])
def test_numpy_arrays_are_arrays(dtype):
    leaf = np.ones(3, jnp.dtype(dtype))

    def block(x):
        assert isinstance(x, jax.Array)
        return x

    (got,) = checkpoint_blocks([block] * 2, leaf, 1)
    assert got.dtype == leaf.dtype
    np.testing.assert_array_equal(np.asarray(got), leaf)


def test_a_string_that_a_block_makes_is_seen_by_the_next():
    def block(x, mode):
        return (x * 2, "add") if mode == "double" else (x + 1, "double")

    def loss(x):
        x, mode = checkpoint_blocks([block] * 5, (x, "double"), 2)
        assert mode == "add"
        return x.sum()

    value, grad = jax.jit(jax.value_and_grad(loss))(X)
    assert value == (X * 8 + 6).sum()
    np.testing.assert_array_equal(grad, jnp.full(3, 8.0))


WIDTH, LENGTH = 2, 4
RECIPE_TAGS = ("query_proj", "context", "out_proj", "mlpwi")


def _weights(dtype=jnp.float32):
    shapes = {"w": jax.ShapeDtypeStruct((LENGTH, WIDTH, WIDTH), dtype), "b": jax.ShapeDtypeStruct((LENGTH, WIDTH), dtype)}
    stacked = random_like(shapes, seed=3)
    return [jax.tree.map(lambda leaf, i=i: leaf[i] / 2, stacked) for i in range(LENGTH)]


def _cube(p, x, z):
    return (x @ p["w"] + p["b"]) ** 3, z + x.sum()


def _sine(p, x, z):
    h = x @ p["w"]
    for tag in RECIPE_TAGS:
        h = checkpoint_name(jnp.sin(h), tag)
    return h + p["b"] * z, z


def _blocks(weights):
    """Blocks that differ, the tags in only one of them; the parameters come by `partial` and by closure."""
    kinds = [functools.partial(_sine if i == 2 else _cube, p) for i, p in enumerate(weights)]
    kinds[0] = lambda x, z, p=weights[0]: _cube(p, x, z)
    return kinds


def _stack(weights, x, z, **how):
    return checkpoint_blocks(_blocks(weights), (x, z), **how)


def _plain(weights, x, z):
    return original(_blocks(weights), (x, z), None)


def _inputs():
    return _weights(jnp.float64), *random_like((jnp.zeros(WIDTH, jnp.float64), jnp.zeros((), jnp.float64)))


@pytest.fixture
def inputs(x64):
    return _inputs()


def _eager_pull_back(stack):
    """As `pull_back`, op by op: compiled operations are shared by all settings."""
    value, vjp = jax.vjp(stack, *_inputs())
    return value, vjp(random_like(value, seed=1))


def _vmap(stack):
    return jax.jit(jax.vmap(stack))(*jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf / 2]), _inputs()))


def _jvp(stack):
    return jax.jit(lambda *primals: jax.jvp(stack, primals, random_like(primals, seed=5)))(*_inputs())


def _grad_of_grad(stack):
    weights, x, z = _inputs()

    def loss(x):
        return sum(out.sum() for out in stack(weights, x, z))

    return jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()))(x)


def _jit_grad(stack):
    return pull_back(stack, *_inputs())


@functools.cache
def _wanted(transform):
    """The plain loop under `transform`, once for all settings."""
    want = transform(_plain)
    assert_no_zero_leaf(want)
    return want


@pytest.mark.parametrize(
    ("per_ckpt", "policy"),
    [(k, policy) for k in range(1, LENGTH + 1) for policy in ("everything", "nothing")]
    + [(3, policy) for policy in policies.names()]
    + [
        (2, "save:context"),
        (LENGTH, "except:context,mlp*"),
        (3, "dots+save:mlpwi"),
        (2, jax.checkpoint_policies.dots_saveable),
    ],
)
@pytest.mark.usefixtures("x64")
def test_values_and_gradients_equal_the_plain_loop(per_ckpt, policy):
    got = _eager_pull_back(functools.partial(_stack, blocks_per_ckpt=per_ckpt, policy=policy))
    assert relative_error(got, _wanted(_eager_pull_back)) < 1e-12


@pytest.mark.parametrize("per_ckpt", [1, 3, LENGTH])
def test_a_tag_that_no_block_has_is_refused(inputs, per_ckpt):
    with pytest.raises(ValueError, match=r"policy 'save:contxt': 'contxt' tags nothing .*did you mean 'context'\?"):
        _stack(*inputs, blocks_per_ckpt=per_ckpt, policy="save:contxt")


def test_an_unknown_policy_is_refused_before_a_block_runs():
    def block(x):
        pytest.fail("the block ran")

    with pytest.raises(ValueError, match="unknown policy 'nothng'; did you mean 'nothing'"):
        checkpoint_blocks([block], X, 1, policy="nothng")


@pytest.mark.parametrize(("per_ckpt", "policy"), [(1, "everything"), (3, "everything"), (3, "nothing")])
@pytest.mark.parametrize("transform", [_jit_grad, _vmap, _jvp, _grad_of_grad])
@pytest.mark.usefixtures("x64")
def test_transformations(transform, per_ckpt, policy):
    got = transform(functools.partial(_stack, blocks_per_ckpt=per_ckpt, policy=policy))
    assert relative_error(got, _wanted(transform)) < 1e-12


def _count_runs(program: Callable[..., Any], per_ckpt: int | None, policy: str, length: int = LENGTH) -> float:
    """How often `program(loss)(x)` runs each of `length` blocks; counted on a value of the carry."""
    runs = []

    def block(x):
        y = jnp.tanh(x * 1.5)
        jax.debug.callback(lambda value: runs.append(value), y.sum())
        return y

    def loss(x):
        return checkpoint_blocks([block] * length, x, per_ckpt, policy=policy)[0].sum()

    jax.block_until_ready(program(loss)(X))
    jax.effects_barrier()
    assert len(set(map(float, runs))) == length, "each block has a carry of its own"
    return len(runs) / length


@pytest.mark.parametrize("per_ckpt", [None, 1, 2, LENGTH])
@pytest.mark.parametrize("policy", ["everything", "nothing"])
def test_forward_only_runs_each_block_once(per_ckpt, policy):
    assert _count_runs(jax.jit, per_ckpt, policy) == 1


@pytest.mark.parametrize(
    ("per_ckpt", "policy", "runs"),
    [
        (None, "nothing", 1),
        (1, "everything", 2),
        (1, "nothing", 2),
        *[(k, policy, runs) for k in (2, 3, LENGTH) for policy, runs in (("everything", 2), ("dots", 3), ("nothing", 3))],
    ],
)
@pytest.mark.parametrize("program", [lambda loss: jax.jit(jax.grad(loss)), jax.grad], ids=["jit", "eager"])
def test_forward_runs_in_training(program, per_ckpt, policy, runs):
    assert _count_runs(program, per_ckpt, policy) == runs
