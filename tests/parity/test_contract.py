"""One contract, two libraries: the same table of cases against `jaxckpt.checkpoint_blocks` and the torch reference."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra 'test'")

import torch

import jaxckpt
import torch_ref

SENTENCE = "blocks_per_ckpt must be between 1 and len(blocks)"


class Library(NamedTuple):
    """What the table needs to know of a framework."""

    checkpoint_blocks: Callable[..., Any]
    array: Callable[[Any], Any]
    kind: type
    gradient: Callable[[Callable[..., Any], Any], Any]  # of a scalar function


def _torch_gradient(fn, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(fn(x), x)[0]


LIBRARIES = {
    "jax": Library(jaxckpt.checkpoint_blocks, jnp.asarray, jax.Array, lambda fn, x: jax.grad(fn)(x)),
    "torch": Library(torch_ref.checkpoint_blocks, torch.asarray, torch.Tensor, _torch_gradient),
}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]


class Pair(NamedTuple):
    x: Any
    z: Any


class Marker:
    """An object that only its identity tells apart."""


MARKER = Marker()
X, Z = np.arange(3, dtype=np.float32), np.arange(4, dtype=np.float32).reshape(2, 2)


def _mixed(i, x, name, flag, nothing, marker, number, options):
    assert type(name) is str and type(flag) is bool and nothing is None and marker is MARKER and number == 2.0
    return x * number if flag else x + i, f"{name}{i}", not flag, nothing, marker, number, {**options, "last": options["z"]}


class Case(NamedTuple):
    """The arguments, block number `i` on what the block before returned, and the structure of what comes out."""

    args: Any
    block: Callable[..., Any]
    structure: Any  # a type for each leaf, "array" where it is one


# Powers of two and small integers: exact in float32.
CASES = {
    "array": Case(X, lambda i, x: x * 2 + i, ("array",)),
    "array, returned in a tuple": Case(X, lambda i, x: (x * 2 + i,), ("array",)),
    "tuple of one": Case((X,), lambda i, x: x * 2 + i, ("array",)),
    "tuple": Case((X, Z), lambda i, x, z: (x + z.sum(), z * 2) if i % 2 else (x * 2, z + i), ("array", "array")),
    "list": Case([X, Z], lambda i, xz: [xz[0] * 2, xz[1] + i], (["array", "array"],)),
    "tuple to list": Case((X, Z), lambda i, *a: [*a] if len(a) == 2 else [a[0][0] + i, a[0][1]], (["array", "array"],)),
    "NamedTuple": Case(Pair(X, Z), lambda i, p: Pair(p.x * 2, p.z + p.x.sum()), (Pair("array", "array"),)),
    "dict": Case({"h": X, "k": Z}, lambda i, d: {"h": d["h"] + i, "k": d["k"] * 2}, ({"h": "array", "k": "array"},)),
    "nested": Case(
        ({"h": X, "deep": [Z, (X,)]}, Z),
        lambda i, d, z: ({"h": d["deep"][1][0] + i, "deep": [z, (d["h"],)]}, z * 2),
        ({"h": "array", "deep": ["array", ("array",)]}, "array"),
    ),
    "no arguments": Case((), lambda i: (), ()),
    "one argument more": Case((X, "s"), lambda i, x, *rest: (x + i, "s", i), ("array", str, int)),
    "mixed leaves": Case(
        (X, "name", True, None, MARKER, 2.0, {"z": Z, "mode": "fast"}),
        _mixed,
        ("array", str, bool, type(None), Marker, float, {"z": "array", "mode": str, "last": "array"}),
    ),
}


def mapped(leaf_of: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `leaf_of` applied to its leaves; None is a leaf, and containers keep their type."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(leaf_of, part) for part in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(mapped(leaf_of, part) for part in tree)
    if isinstance(tree, dict):
        return {key: mapped(leaf_of, part) for key, part in tree.items()}
    return leaf_of(tree)


def plain(blocks, args):
    """The loop, in NumPy."""
    args = args if type(args) is tuple else (args,)
    for block in blocks:
        out = block(*args)
        args = out if type(out) is tuple else (out,)
    return args


def comparable(tree):
    return mapped(lambda leaf: np.asarray(leaf).tolist() if hasattr(leaf, "shape") else leaf, tree)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("length", "per_ckpt"), [(n, k) for n in (1, 2, 3, 5) for k in (None, *range(1, n + 1), np.int64(1))]
)
def test_return_type_structure_and_values(library, case, length, per_ckpt):
    args, block, structure = CASES[case]
    blocks = [partial(block, i) for i in range(length)]
    given = mapped(lambda leaf: library.array(leaf) if isinstance(leaf, np.ndarray) else leaf, args)
    got = library.checkpoint_blocks(blocks, given, per_ckpt)
    assert type(got) is tuple
    if length > 1 or case != "tuple to list":
        kinds = mapped(lambda leaf: "array" if isinstance(leaf, library.kind) else type(leaf), got)
        assert kinds == structure and mapped(type, kinds) == mapped(type, structure)
    assert comparable(got) == comparable(plain(blocks, args))


NOT_CHUNK_SIZES = [0, -1, 4, np.int64(0), 2.0, 1.0, np.float32(1), True, False, np.True_, "2", "", [1], (1,), 1j, object()]


@pytest.mark.parametrize("per_ckpt", NOT_CHUNK_SIZES, ids=lambda value: f"{type(value).__name__} {value!s:.6}")
@pytest.mark.parametrize("length", [0, 3])
def test_what_is_not_a_chunk_size_is_refused(library, length, per_ckpt):
    def block(x):
        pytest.fail("a block ran")

    with pytest.raises(ValueError) as caught:
        library.checkpoint_blocks([block] * length, library.array(X), per_ckpt)
    assert type(caught.value) is ValueError
    for part in (SENTENCE, f"len(blocks) = {length}", f"got {per_ckpt!r} of type {type(per_ckpt).__name__}", "Write None"):
        assert part in str(caught.value)


@pytest.mark.parametrize("per_ckpt", [1, np.int64(1)])
def test_a_chunk_size_without_blocks_is_refused(library, per_ckpt):
    with pytest.raises(ValueError) as caught:
        library.checkpoint_blocks([], library.array(X), per_ckpt)
    assert SENTENCE in str(caught.value)


@pytest.mark.parametrize("args", [X, (X,), (X, "s"), [X], Pair(X, Z), ()], ids=lambda args: type(args).__name__)
def test_no_blocks_return_the_arguments(library, args):
    got = library.checkpoint_blocks([], args, None)
    assert type(got) is tuple
    assert got is args or (len(got) == 1 and got[0] is args)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int32, np.int64])
def test_numpy_integers_are_integers(library, integer):
    (count,) = library.checkpoint_blocks([lambda x: x + 1] * 150, library.array(np.float32(0)), integer(100))
    assert float(count) == 150


@pytest.mark.parametrize(
    "leaf", ["s", True, None, 2.5, 3, 1 + 2j, MARKER, np.dtype("float32")], ids=lambda leaf: str(type(leaf))
)
@pytest.mark.parametrize("per_ckpt", [None, 1, 2])
def test_what_is_not_an_array_passes_untouched(library, leaf, per_ckpt):
    seen = []

    def block(x, leaf):
        seen.append(leaf)
        return x * 2, leaf

    x, got = library.checkpoint_blocks([block] * 3, (library.array(X), leaf), per_ckpt)
    assert got is leaf and len(seen) >= 3 and all(other is leaf for other in seen)
    assert comparable(x) == (X * 8).tolist()


@pytest.mark.parametrize("length, per_ckpt", [(n, k) for n in (1, 4, 5) for k in (None, *range(1, n + 1))])
def test_gradients_reach_arguments_and_what_blocks_close_over(library, length, per_ckpt):
    """Of `w**n * x`, with `w` closed over; also where no argument has a gradient."""

    def loss(x, w):
        return library.checkpoint_blocks([lambda x, mode: (x * w, mode)] * length, (x, "s"), per_ckpt)[0].sum()

    x, w = library.array(X), library.array(np.float32(2))
    assert comparable(library.gradient(lambda x: loss(x, w), x)) == [2.0**length] * 3
    assert float(library.gradient(lambda w: loss(x, w), w)) == length * 2.0 ** (length - 1) * X.sum()


def test_an_error_in_a_block_is_the_users(library):
    def block(x):
        raise KeyError("mine")

    for per_ckpt in (None, 1):
        with pytest.raises(KeyError, match="mine"):
            library.checkpoint_blocks([block], library.array(X), per_ckpt)


@pytest.mark.parametrize(("per_ckpt", "training"), [(None, 1), (1, 2), (2, 2), (3, 2)])
def test_torch_runs_blocks_again_only_with_grad_mode(per_ckpt, training):
    runs = []

    def block(x):
        runs.append(x)
        return (x * 1.5).tanh()

    x = torch.ones(2, requires_grad=True)
    torch_ref.checkpoint_blocks([block] * 3, x, per_ckpt)[0].sum().backward()
    assert len(runs) == 3 * training
    for without in (torch.no_grad, torch.inference_mode):
        runs.clear()
        with without():
            torch_ref.checkpoint_blocks([block] * 3, x, per_ckpt)
            with pytest.raises(ValueError, match="must be between 1"):
                torch_ref.checkpoint_blocks([block] * 3, x, 4)
        assert len(runs) == 3


@pytest.mark.parametrize(("per_ckpt", "kept"), [(None, 6), (1, 6), (2, 3), (3, 2), (6, 1)])
def test_torch_keeps_one_carry_per_chunk(per_ckpt, kept):
    """Checkpointing saves what it is there to save: the forward pass keeps the input of each chunk."""
    saved = []
    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        torch_ref.checkpoint_blocks([torch.sin] * 6, x, per_ckpt)
    assert len(set(saved)) == kept
