"""Ten steps of AdamW from one start, each framework with its own optimizer and its own chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("torch", reason="parity needs the extra 'test'")

import torch

from jaxckpt import checkpoint_scan
from tests.support import relative_error
from torch_ref import from_state_dict, parity
from torch_ref.convert import to_torch
from torch_ref.problems import MODELS, problem, torch_stack

STEPS = 10
# By name on both sides: optax's weight decay is 1e-4 by default, torch's 1e-2.
ADAMW = {"eps": 1e-8, "weight_decay": 0.1}
RATE, BETAS = 1e-2, (0.9, 0.95)
SETTINGS = {"transformer": (3, "dots"), "pairformer": (2, "nothing"), "evoformer": (None, "nothing")}


def batches(given):
    """Another first carry and another target for every step."""
    rng = np.random.default_rng(5)
    return [[tuple(rng.normal(size=x.shape) for x in given.carry) for _ in ("carry", "target")] for _ in range(STEPS)]


def train_torch(stack, given, blocks_per_ckpt):
    optimizer = torch.optim.AdamW(stack.parameters(), lr=RATE, betas=BETAS, **ADAMW)
    shared = {name: to_torch(x) for name, x in given.shared.items()}
    losses = []
    for carry, target in batches(given):
        out = stack(*map(to_torch, carry), blocks_per_ckpt=blocks_per_ckpt, **shared)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum(((y - to_torch(t)) ** 2).mean() for y, t in zip(out, target, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return from_state_dict(stack.state_dict(), given.variables), losses


def train_flax(given, blocks_per_ckpt, policy):
    stack = checkpoint_scan(given.block, given.length, blocks_per_ckpt=blocks_per_ckpt, policy=policy)
    optimizer = optax.adamw(RATE, *BETAS, **ADAMW)

    def loss_of(variables, carry, target):
        out = stack.apply(variables, *carry, **given.shared)
        out = out if isinstance(out, tuple) else (out,)
        return sum(((y - t) ** 2).mean() for y, t in zip(out, target, strict=True))

    def step(variables, state, carry, target):
        loss, gradient = jax.value_and_grad(loss_of)(variables, carry, target)
        updates, state = optimizer.update(gradient, state, variables)
        return optax.apply_updates(variables, updates), state, loss

    step = jax.jit(step, compiler_options=parity.QUICK)
    variables = jax.tree.map(jnp.asarray, given.variables)
    state, losses = optimizer.init(variables), []
    for carry, target in batches(given):
        variables, state, loss = step(variables, state, carry, target)
        losses.append(float(loss))
    return variables, losses


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("x64")
def test_parameters_agree_after_ten_steps(model):
    given = problem(model, length=4)
    want, their_losses = train_torch(torch_stack(model, given), given, blocks_per_ckpt=4)
    got, our_losses = train_flax(given, *SETTINGS[model])
    assert relative_error(got, want) < 1e-8
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-8)
    # All have moved, and so far that ten steps are more than noise.
    moved = jax.tree.map(lambda before, after: float(np.abs(before - after).max()), given.variables, want)
    assert min(jax.tree.leaves(moved)) > RATE
