"""Plans of what `checkpoint` is given, a head with its loss above all, beside the stacks of a step."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from jaxckpt import Plan, checkpoint, checkpoint_scan, explain, plan, targets
from jaxckpt._plan import Knobs, under
from jaxckpt.planning.model import Stack
from jaxckpt.planning.search import _stacks
from tests.support import random_like, relative_error, slice_small_values

N, TOKENS, WIDTH, WORDS = 3, 64, 16, 2048
LABELS = (jnp.arange(TOKENS) * 7) % WORDS
W, KERNEL, X = random_like((jnp.zeros((N, WIDTH, WIDTH)), jnp.zeros((WIDTH, WORDS)), jnp.zeros((TOKENS, WIDTH))))
OF_HEAD = [
    Knobs(policy="everything"),
    Knobs(),
    Knobs(stages="auto"),
    Knobs(tiles="auto"),
]

LEANEST = [Knobs(tiles="auto"), Knobs(tiles=64)]  # which take the same here, but for what the compiler adds


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    slice_small_values(monkeypatch, 256)


def loss_of(kernel, x):
    hidden = jnp.tanh(jnp.sin(x @ kernel[:, :512]))
    x = x + hidden @ kernel[:, :512].T
    return optax.softmax_cross_entropy_with_integer_labels(x @ kernel, LABELS).mean()


class Head(nn.Module):
    @nn.compact
    def __call__(self, kernel, x):
        return loss_of(kernel, x) + self.param("bias", nn.initializers.ones, ()) * 0


class NnxHead(nnx.Module):
    def __init__(self):
        self.bias = nnx.Param(jnp.ones(()))

    def __call__(self, kernel, x):
        return loss_of(kernel, x) + self.bias[...] * 0


def of_linen(head):
    return lambda kernel, x: head.apply({"params": {"bias": jnp.ones(())}}, kernel, x)


HEADS = {
    "function": lambda **knobs: checkpoint(loss_of, **knobs),
    "Linen class": lambda **knobs: of_linen(checkpoint(Head, **knobs)()),
    "Linen instance": lambda **knobs: of_linen(checkpoint(Head(), **knobs)),
    "NNX class": lambda **knobs: checkpoint(NnxHead, **knobs)(),
    "NNX module": lambda **knobs: checkpoint(NnxHead(), **knobs),
}


def block(w, x):
    return x + jnp.tanh(x @ w)


def step_of(head, **knobs):
    stack = checkpoint_scan(block, **knobs)
    return jax.value_and_grad(lambda w, kernel: head(kernel, stack(w, X)), argnums=(0, 1))


WANT = jax.jit(step_of(loss_of))(W, KERNEL)
WANT_OF_TANH = jax.jit(step_of(lambda kernel, x: loss_of(kernel, jnp.tanh(x))))(W, KERNEL)


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_planned_with_the_stack(kind, tmp_path):
    step = step_of(HEADS[kind](plan="auto:head"), plan="auto:blocks")
    most = plan(step, W, KERNEL, budget="1GiB", target="cpu", progress=False)
    assert most["head"].knobs.pieces is None
    found = plan(step, W, KERNEL, objective="memory", target="cpu", progress=False)
    assert list(found.stacks) == ["blocks", "head"] and found["head"].length == 1
    assert found["head"].knobs in LEANEST and found.peak_bytes < most.peak_bytes
    assert f"(1 block): nothing, tiles={found['head'].knobs.tiles}" in str(found) and "(3 blocks)" in str(found)
    found.save(tmp_path / "plan.json")
    pinned = step_of(HEADS[kind](plan=f"{tmp_path / 'plan.json'}:head"), plan=f"{tmp_path / 'plan.json'}:blocks")
    for run in (found.around(step), pinned, Plan.load(tmp_path / "plan.json").around(step), step):
        assert relative_error(jax.jit(run)(W, KERNEL), WANT) < 1e-5


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("knobs", OF_HEAD, ids=str)
def test_gradients_under_what_a_plan_may_say(kind, knobs):
    head = HEADS[kind](plan="auto:head")
    with under({"head": knobs}):
        got = jax.jit(step_of(head))(W, KERNEL)
    assert relative_error(got, WANT) < 1e-5


def early(kernel, x):
    logits = x @ kernel
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    return loss, (logits.argmax(-1) == LABELS).sum()


def late(kernel, x):
    logits = x @ kernel
    accuracy = (logits.argmax(-1) == LABELS).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), accuracy


def of_each(kernel, x):
    logits = x @ kernel
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()
    return loss, {"right": logits.argmax(-1) == LABELS}


@pytest.mark.parametrize("fn", [early, late, of_each])
def test_sums_beside_the_loss_are_in_the_way_of_no_slices(fn):
    step = jax.value_and_grad(checkpoint(fn, plan="auto"), has_aux=True)
    found = plan(step, KERNEL, X, objective="memory", target="cpu", progress=False)
    assert found[""].knobs in LEANEST and found.peak_bytes < 0.6 * found.most_bytes
    numbers = lambda tree: jax.tree.map(lambda leaf: leaf + 0.0, tree)  # noqa: E731
    got, want = jax.jit(found.around(step))(KERNEL, X), jax.jit(jax.value_and_grad(fn, has_aux=True))(KERNEL, X)
    assert relative_error(numbers(got), numbers(want)) < 1e-5


def test_what_a_head_takes_is_asked_of_the_compiler():
    step = step_of(checkpoint(loss_of, plan="auto:head"), plan="auto:blocks")
    found = plan(step, W, KERNEL, objective="memory", target="cpu", progress=False)
    assert 0.95 < found.chosen.predicted_bytes / found.peak_bytes < 1.05


def test_a_head_without_a_stack():
    step = jax.grad(checkpoint(loss_of, plan="auto"))
    found = plan(step, KERNEL, X, objective="memory", target="cpu", progress=False)
    assert found[""].knobs in LEANEST and found[""].block == "loss_of"


def test_forward_runs_of_a_head():
    def simple(kernel, x):
        return optax.softmax_cross_entropy_with_integer_labels(x @ kernel, LABELS).mean()

    def runs(fn):
        step, gpu = jax.grad(checkpoint(fn, plan="auto")), targets.get("h200").gpu
        found, _, _ = _stacks(step, (KERNEL, X), lambda run: Stack(run, gpu))
        return {str(option.knobs): option.forward_runs for option in found[""]._all(may_offload=True)}

    found = runs(simple)  # where the loss of each token crosses the one cut, and is kept
    assert list(found)[:3] == ["everything, scan", "nothing, scan", "nothing, tiles=auto, scan"]
    assert found["everything, scan"] == 1 and 1.5 < found["nothing, scan"] <= 2
    assert found["nothing, tiles=auto, scan"] == pytest.approx(found["nothing, scan"])
    found = runs(loss_of)  # where much does
    assert found["nothing, tiles=auto, scan"] > found["nothing, scan"] + 0.2


def test_without_a_plan_it_is_what_checkpoint_makes():
    program = lambda head: str(jax.make_jaxpr(jax.grad(head))(KERNEL, X))  # noqa: E731
    assert program(checkpoint(loss_of, plan="auto:head")) == program(checkpoint(loss_of))


def test_a_plan_for_another_head_runs_without_derivatives_only():
    found = plan(jax.grad(checkpoint(loss_of, plan="auto")), KERNEL, X, budget="1GiB", target="cpu", progress=False)
    head = checkpoint(loss_of, plan=found)
    assert relative_error(head(KERNEL, X[:32].repeat(2, 0)), loss_of(KERNEL, X[:32].repeat(2, 0))) < 1e-6
    other = checkpoint(lambda kernel, x: 2 * loss_of(kernel, x), plan=found)
    assert other(KERNEL, X) == 2 * loss_of(KERNEL, X)
    with pytest.raises(ValueError, match=r"the plan is for something else: its block is .*, and the plan is for loss_of"):
        jax.grad(other)(KERNEL, X)


def test_a_plan_for_a_head_is_for_the_types_that_it_was_given():
    def mean_of(kernel, x):
        return jnp.sin(x @ kernel).mean()

    found = plan(jax.grad(checkpoint(mean_of, plan="auto")), KERNEL, X, budget="1GiB", target="cpu", progress=False)
    said = r"mean_of: .*it is given \(.*float32\[32,16\]\), and the plan is for \(.*float32\[64,16\]\)"
    with pytest.raises(ValueError, match=said):
        jax.grad(checkpoint(mean_of, plan=found))(KERNEL, X[:32])
    step = jax.grad(lambda kernel: (head := checkpoint(mean_of, plan="auto"))(kernel, X) + head(kernel, X[:32]))
    with pytest.raises(ValueError, match="mean_of: what has plan='auto' is run twice in the step, given"):
        plan(step, KERNEL, budget="1GiB", target="cpu", progress=False)


def test_a_stack_is_explained_beside_a_planned_head():
    stack = checkpoint_scan(block, plan="auto:blocks")
    found = plan(jax.grad(checkpoint(loss_of, plan="auto")), KERNEL, X, budget="1GiB", target="cpu", progress=False)
    of_another = checkpoint(lambda kernel, x: 2 * loss_of(kernel, x), plan=found)
    for head in (checkpoint(loss_of, plan="auto:head"), of_another):
        assert explain(lambda w, kernel, head=head: head(kernel, stack(w, X)), W, KERNEL).block == "block"


def test_a_head_inside_of_a_block_is_no_part_of_the_plan():
    inner = checkpoint(lambda w, x: jnp.tanh(x @ w), plan="auto:inner")
    stack = checkpoint_scan(lambda w, x: x + inner(w, x), plan="auto:blocks")
    step = jax.grad(lambda w: stack(w, X).sum())
    assert list(plan(step, W, budget="1GiB", target="cpu", progress=False).stacks) == ["blocks"]


@pytest.mark.parametrize("inner_plan", ["auto:inner", "auto"])
def test_what_is_planned_inside_of_a_head_is_no_part_of_the_plan(inner_plan):
    def whole(w, kernel):
        inner = checkpoint(lambda x: jnp.tanh(x), plan=inner_plan)
        return loss_of(kernel, inner(checkpoint_scan(block, plan="auto:blocks")(w, X)))

    step = jax.value_and_grad(checkpoint(whole, plan="auto"), argnums=(0, 1))
    found = plan(step, W, KERNEL, objective="memory", target="cpu", progress=False)
    assert list(found.stacks) == [""]
    assert relative_error(jax.jit(found.around(step))(W, KERNEL), WANT_OF_TANH) < 1e-5
    pinned = jax.value_and_grad(checkpoint(whole, plan=found), argnums=(0, 1))
    assert relative_error(jax.jit(pinned)(W, KERNEL), WANT_OF_TANH) < 1e-5


@pytest.mark.parametrize(
    "knobs",
    [
        {"blocks_per_ckpt": 1},
        {"snapshots": 1, "engine": "reversal"},
        {"engine": "reversal"},
        {"offload_carry": True, "engine": "reversal"},
    ],
    ids=str,
)
def test_what_only_stacks_have_is_refused_in_a_plan(knobs, tmp_path):
    found = plan(jax.grad(checkpoint(loss_of, plan="auto")), KERNEL, X, budget="1GiB", target="cpu", progress=False)
    edited = dataclasses.replace(found, stacks={"": dataclasses.replace(found[""], knobs=Knobs(**knobs))})
    edited.save(tmp_path / "plan.json")
    said = rf"loss_of: its plan says {next(iter(knobs))}.*which only stacks of blocks have"
    with pytest.raises(ValueError, match=said):
        checkpoint(loss_of, plan=tmp_path / "plan.json")(KERNEL, X)
    with pytest.raises(ValueError, match=said):
        edited.around(checkpoint(loss_of, plan="auto"))(KERNEL, X)


def test_bad_input():
    for knobs in ({"tiles": 2}, {"stages": "auto"}, {"policy": "dots"}):
        with pytest.raises(ValueError, match=r"plan='auto' sets all knobs, and .* is given beside it"):
            checkpoint(loss_of, plan="auto", **knobs)
    with pytest.raises(TypeError, match="plan must be 'auto', 'auto:NAME', a plan"):
        checkpoint(loss_of, plan=3)
    with pytest.raises(FileNotFoundError, match="is no file: write 'auto', 'auto:NAME'"):
        checkpoint(loss_of, plan="nowhere.json")
    step = step_of(checkpoint(loss_of, plan="auto"), plan="auto")
    with pytest.raises(ValueError, match="two stacks are built with plan='auto', 3 x block and 1 x loss_of"):
        plan(step, W, KERNEL, budget="1GiB", target="cpu", progress=False)
