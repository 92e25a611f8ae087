"""Equinox modules: what works, and what is said of what does not. Without Equinox a class stands for theirs."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import checkpoint_blocks, checkpoint_scan, stack_params, unstack_params
from tests.support import relative_error

IS_THERE = importlib.util.find_spec("equinox") is not None
N, X = 4, jnp.linspace(-1.0, 1.0, 3)

if IS_THERE:
    import equinox as eqx

    Module = eqx.Module
else:
    Module = type("Module", (), {"__module__": "equinox._module"})


@functools.partial(jax.tree_util.register_pytree_with_keys_class) if not IS_THERE else lambda cls: cls
class Block(Module):
    w: jax.Array
    act: object

    def __init__(self, w, act=jnp.tanh):
        self.w, self.act = w, act

    def __call__(self, x):
        return x + self.act(x @ self.w)

    if not IS_THERE:

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey(k), getattr(self, k)) for k in ("w", "act")], None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)


BLOCKS = [Block(jax.random.normal(jax.random.key(i), (3, 3))) for i in range(N)]
STACKED = Block(jnp.stack([block.w for block in BLOCKS]))
COMBINE = "checkpoint_scan(lambda arrays, x: eqx.combine(arrays, static)(x))"


def partition(module):
    """As `eqx.partition(module, eqx.is_array)`."""
    is_array = lambda leaf: isinstance(leaf, jax.Array)  # noqa: E731
    return [jax.tree.map(lambda v, own=own: v if is_array(v) == own else None, module) for own in (True, False)]


def combine(arrays, static):
    return jax.tree.map(lambda a, b: b if a is None else a, arrays, static, is_leaf=lambda leaf: leaf is None)


@pytest.mark.parametrize(
    "block",
    [Block, functools.partial(Block, act=jnp.sin), BLOCKS[0], STACKED],
    ids=["class", "class with arguments", "module", "modules in one"],
)
def test_a_module_is_no_block(block):
    with pytest.raises(
        TypeError, match=r"Block is an Equinox module, .* eqx\.partition\(stacked, eqx\.is_array\)"
    ) as caught:
        checkpoint_scan(block, N)
    assert COMBINE in str(caught.value)


def test_a_list_of_modules_is_no_block():
    with pytest.raises(TypeError, match=r"Block is one of Equinox: write .* checkpoint_scan") as caught:
        checkpoint_scan(BLOCKS)
    assert f"{COMBINE}(stack_params(" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: checkpoint_scan(lambda block, x: block(x))(STACKED, X), COMBINE),
        (lambda: checkpoint_scan(lambda p, x: p["a"](x))({"a": STACKED}, X), COMBINE),
        (lambda: checkpoint_scan(lambda w, x, *, m: m(x) * w, per_block=["m"])(jnp.ones(N), X, m=STACKED), COMBINE),
        (lambda: stack_params(BLOCKS), COMBINE),
        (lambda: unstack_params(STACKED), "unstack_params(eqx.filter(stacked, eqx.is_array))"),
    ],
    ids=["parameters", "among parameters", "per block", "stack_params", "unstack_params"],
)
def test_what_is_no_array_in_a_module_is_named(call, said):
    with pytest.raises(TypeError, match=r"act is tanh of type .*, and no array: write ") as caught:
        call()
    assert said in str(caught.value)


def test_other_things_among_parameters_are_named():
    stack = checkpoint_scan(lambda p, x: x * p["w"])
    with pytest.raises(TypeError, match=r"\['mode'\] is 'fast' of type str, and no array: keep it apart, and close over it"):
        stack({"w": jnp.ones(N), "mode": "fast"}, X)


@pytest.mark.parametrize("knobs", [{}, {"snapshots": 2, "policy": None}], ids=str)
def test_what_is_told_to_be_written_works(knobs):
    arrays, static = partition(STACKED)
    same = stack_params([partition(block)[0] for block in BLOCKS])
    assert jax.tree.structure(same) == jax.tree.structure(arrays)
    stack = checkpoint_scan(lambda arrays, x: combine(arrays, static)(x), **knobs)
    got = jax.grad(lambda arrays: (stack(arrays, X) ** 2).sum())(arrays)
    blocks = lambda arrays: [combine(one, static) for one in unstack_params(arrays)]  # noqa: E731
    want = jax.grad(lambda arrays: (checkpoint_blocks(blocks(arrays), X, 2)[0] ** 2).sum())(arrays)
    assert relative_error(got, want) < 1e-5


def test_modules_may_be_shared():
    stack = checkpoint_scan(lambda w, x, *, module: module(x) * w)
    assert stack(jnp.ones(N), X, module=BLOCKS[0]).shape == X.shape


@pytest.mark.skipif(not IS_THERE, reason="Equinox is not installed")
def test_a_function_that_equinox_has_wrapped_is_one():
    stack = checkpoint_scan(eqx.filter_jit(lambda w, x: x * w))
    assert stack(jnp.full(N, 2.0), X).tolist() == (16 * X).tolist()


def test_equinox_is_not_imported():
    found = [name for name, module in sys.modules.items() if name.startswith("jaxckpt") and hasattr(module, "equinox")]
    assert jaxckpt and not found
