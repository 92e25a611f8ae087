import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra 'test'")

import torch

from jaxckpt import unstack_params
from torch_ref import Stack, from_state_dict, to_state_dict
from torch_ref.problems import MODELS, problem, torch_stack

DTYPES = ("float64", "float32", "bfloat16")


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def small(dtype="float32"):
    """A Flax tree of two blocks, and the torch stack that it is for."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.ModuleDict({"up": torch.nn.Linear(2, 3)})
            self.norm = torch.nn.LayerNorm(2)

    rng = np.random.default_rng(0)
    shapes = {"mlp": {"up": {"kernel": (2, 2, 3), "bias": (2, 3)}}, "norm": {"scale": (2, 2), "bias": (2, 2)}}
    draw = jax.tree.map(
        lambda s: rng.normal(size=s).astype(jnp.dtype(dtype)), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return {"params": draw}, Stack([Block(), Block()]).to(getattr(torch, dtype))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_models_go_there_and_back_bit_for_bit(model, dtype):
    given = problem(model, np.dtype(dtype))
    stack = torch_stack(model, given)
    back = from_state_dict(stack.state_dict(), given.variables)
    assert jax.tree.structure(back) == jax.tree.structure(given.variables)
    assert bits(back) == bits(given.variables)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_per_block_and_single_are_one_state_dict(dtype):
    stacked, stack = small(dtype)
    like = stack.state_dict()
    per_block = unstack_params(stacked)
    one, same = to_state_dict(stacked, like), to_state_dict(per_block, like)
    assert one.keys() == same.keys() == like.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    block = to_state_dict(per_block[1], stack.blocks[1].state_dict())
    assert all(torch.equal(value, one[f"blocks.1.{name}"]) for name, value in block.items())

    assert bits(from_state_dict(one, stacked)) == bits(stacked)
    assert bits(from_state_dict(one, per_block)) == bits(per_block)
    assert bits(from_state_dict(block, per_block[1])) == bits(per_block[1])


def test_matrices_change_their_layout_and_share_no_memory():
    stacked, stack = small()
    state = to_state_dict(stacked, stack.state_dict())
    kernel = stacked["params"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(state["blocks.1.mlp.up.weight"], kernel[1].T)
    before = kernel.copy()
    for value in state.values():
        value.zero_()
    np.testing.assert_array_equal(kernel, before)


def test_boxes_of_metadata_come_back():
    stacked, stack = small()
    params = stacked["params"]["mlp"]["up"]
    params["kernel"] = nn.Partitioned(params["kernel"], names=("layers", None, "mlp"))
    back = from_state_dict(to_state_dict(stacked, stack.state_dict()), stacked)
    assert back["params"]["mlp"]["up"]["kernel"].names == ("layers", None, "mlp")
    assert bits(back) == bits(stacked)


def _without(variables):
    del variables["params"]["norm"]["scale"]


def _more(variables):
    variables["params"]["out"] = {"kernel": np.ones((2, 3, 2), np.float32)}


def _other_shape(variables):
    variables["params"]["mlp"]["up"]["bias"] = np.ones((2, 4), np.float32)


def _other_dtype(variables):
    variables["params"]["norm"]["bias"] = np.ones((2, 2))


def _unknown(variables):
    variables["params"]["norm"]["mean"] = np.ones((2, 2))


def _other_collection(variables):
    variables["batch_stats"] = {"mean": np.ones((2, 2))}


def _one_block_less(variables):
    variables["params"] = jax.tree.map(lambda leaf: leaf[:1], variables["params"])


@pytest.mark.parametrize(
    ("spoil", "there", "back"),
    [
        (
            _without,
            "the Flax variables lacks blocks.0.norm.weight, blocks.1.norm.weight",
            "no place for blocks.0.norm.weight",
        ),
        (_more, "the torch module has no place for blocks.0.out.weight", "the torch state_dict lacks blocks.0.out.weight"),
        (
            _other_shape,
            r"blocks.0.mlp.up.bias is float32\[4\], and its place is float32\[3\]",
            r"its place is float32\[2, 4\]",
        ),
        (_other_dtype, r"norm.bias is float64\[2\], and its place is float32\[2\]", r"its place is float64\[2, 2\]"),
        (_unknown, r"no name for the Flax parameter \['params'\]\['norm'\]\['mean'\]", "no name for the Flax parameter"),
        (
            _other_collection,
            "no place for the Flax collections batch_stats",
            "no place for the Flax collections batch_stats",
        ),
        (
            _one_block_less,
            "the Flax variables lacks blocks.1.mlp.up.bias",
            r"is float32\[2, 3\], and its place is float32\[1, 3\]",
        ),
    ],
)
def test_what_does_not_match_is_refused_by_name(spoil, there, back):
    variables, stack = small()
    spoil(variables)
    with pytest.raises(ValueError, match=there):
        to_state_dict(variables, stack.state_dict())
    with pytest.raises(ValueError, match=back):
        from_state_dict(stack.state_dict(), variables)
