"""Tests of the tests: a wrong block, and the comparison says so, far above its tolerance."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra 'test'")

import torch

from torch_ref import dropout, parity
from torch_ref.models._layers import Dropout
from torch_ref.problems import LENGTH, MODELS, problem, torch_stack

BLOCK = 2  # the one of the four that goes wrong


@functools.cache
def posed(model):
    given = problem(model, with_dropout=True)
    return given, parity.run_flax(given, policy="nothing")


def missing_residual(block, given):
    """The last value of the carry leaves without what came in."""

    def forget(module, carry, out):
        return (*out[:-1], out[-1] - carry[-1]) if isinstance(out, tuple) else out - carry[-1]

    block.register_forward_hook(forget)


def transposed_weight(block, given):
    """The first square matrix, which no check of shapes protects."""
    weight = next(p for p in block.parameters() if p.ndim == 2 and p.shape[0] == p.shape[1])
    with torch.no_grad():
        weight.copy_(weight.T.clone())


def dropped_mask(block, given, name):
    """The block is not told which keys are masked."""

    def forget(module, carry, shared):
        return carry, {**shared, name: torch.ones_like(shared[name])}

    block.register_forward_pre_hook(forget, with_kwargs=True)


def dropped_dropout_mask(block, given):
    """The last dropout of the block does nothing."""
    *_, last = (module for module in block.modules() if isinstance(module, Dropout))
    last.register_forward_hook(lambda module, args, out: args[0])


MUTATIONS = [
    *((model, mutate) for model in MODELS for mutate in (missing_residual, transposed_weight, dropped_dropout_mask)),
    *((model, functools.partial(dropped_mask, name=name)) for model in MODELS for name in MODELS[model].masks),
]


def _named(value):
    return getattr(value, "__name__", None) or f"dropped_{value.keywords['name']}" if callable(value) else value


@pytest.mark.parametrize(("model", "mutate"), MUTATIONS, ids=_named)
def test_a_wrong_block_is_found(model, mutate):
    given, flax = posed(model)
    stack = torch_stack(model, given)
    assert parity.errors(flax, parity.run_torch(stack, given, 3)).within(parity.TOLERANCE["float64"])
    mutate(stack.blocks[BLOCK], given)
    found = parity.errors(parity.run_torch(stack, given, 3), flax)
    assert not found.within(parity.TOLERANCE["float64"])
    assert min(found) > 1e-3, found  # would be found in float32 too


def test_a_result_that_is_not_a_number_is_found():
    _, flax = posed("transformer")
    broken = flax._replace(values=(np.full_like(flax.values[0], np.nan),))
    assert not parity.errors(broken, flax).within(1e9)


def test_zeros_show_nothing():
    _, flax = posed("transformer")
    blank = flax._replace(shared={"mask": np.zeros_like(flax.shared["mask"])})
    with pytest.raises(ValueError, match=r"\['shared'\]\['mask'\] is all zero"):
        parity.errors(blank, blank)


@pytest.mark.parametrize("model", MODELS)
def test_masks_have_the_rate_of_the_dropout_and_differ_between_blocks(model):
    given, _ = posed(model)
    for name, keep in given.masks.items():
        assert len(keep) == LENGTH
        assert set(np.unique(keep)) == {0, np.max(keep)} and np.max(keep) > 1
        assert not any(np.array_equal(keep[i], keep[j]) for i in range(LENGTH) for j in range(i)), name


def test_masks_that_do_not_fit_are_refused():
    given, _ = posed("transformer")
    stack = torch_stack("transformer", given)
    name = "mlp_dropout"
    with pytest.raises(ValueError, match=f"only one of the masks and the torch block has {name}"):
        dropout.feed(stack, {key: keep for key, keep in given.masks.items() if key != name})
    with pytest.raises(ValueError, match=f"{name} has rate 0.25, and its mask other values"):
        dropout.feed(stack, given.masks | {name: given.masks[name] * 2})


def test_torch_draws_masks_of_its_own_where_none_are_fed():
    given, _ = posed("pairformer")
    stack = torch_stack("pairformer", given).train()
    dropout.feed(stack, {})
    x = torch.ones(5, 5, 6, dtype=torch.float64)
    for name, shared in (("tri_mul_outgoing", 0), ("tri_att_ending", 1)):
        module = getattr(stack.blocks[0].triangle_updates, f"dropout_{name}")
        drawn = module(x)
        assert set(drawn.unique().tolist()) == {0.0, 1 / (1 - module.rate)}
        assert (drawn == drawn.select(shared, 0).unsqueeze(shared)).all()
        assert (module.eval()(x) == x).all()
