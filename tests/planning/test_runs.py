"""Forward runs: `explain` and plans count them in one way, whatever the setting."""

import jax
import jax.numpy as jnp
import pytest

from jaxckpt import checkpoint_scan, explain, targets
from jaxckpt._plan import Knobs, under
from jaxckpt.planning.model import Stack
from jaxckpt.planning.search import _stacks

N = 12
W = {"up": jax.ShapeDtypeStruct((N, 64, 256), "float32"), "down": jax.ShapeDtypeStruct((N, 256, 64), "float32")}
X = jax.ShapeDtypeStruct((128, 64), "float32")


def block(w, x):
    """Computes some values twice, has derivatives that compute values of their own, and a loop."""
    normed = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1)
    h = jnp.sin(jax.nn.gelu(normed @ w["up"]))
    again = (x - x.mean(-1, keepdims=True)) @ w["up"]
    looped, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w["up"] @ w["down"]), None), x, None, length=2)
    return x + (h + jnp.cos(again)) @ w["down"] + looped


stack = checkpoint_scan(block, plan="auto")


@pytest.fixture(scope="module")
def of_plan() -> Stack:
    found, _, _ = _stacks(jax.grad(lambda w, x: stack(w, x).sum()), (W, X), lambda run: Stack(run, targets.get("h200").gpu))
    return found[""]


def test_for_every_kind_of_setting(of_plan):
    options = {o.knobs: o for o in [*of_plan._all(may_offload=True), of_plan.plain()]}
    kinds = {}
    for knobs in options:
        kind = (knobs.policy, knobs.stages, knobs.blocks_per_ckpt == 8)
        kinds.setdefault((*kind, knobs.snapshots == 3, knobs.offload_carry), knobs)
    assert len(kinds) >= 12 and Knobs() in options
    for knobs in [*kinds.values(), Knobs()]:
        with under({"": knobs}):
            found = explain(stack, W, X, target="h200")
        assert found.forward_runs == pytest.approx(options[knobs].forward_runs, rel=1e-9), knobs


def test_what_is_kept_beside_pieces():
    x = jax.ShapeDtypeStruct((8192, 64), "float32")
    found, _, _ = _stacks(jax.grad(lambda w, x: stack(w, x).sum()), (W, x), lambda run: Stack(run, targets.get("h200").gpu))
    options = {o.knobs: o for o in found[""]._all(may_offload=False) if o.knobs.engine == "scan" and o.knobs.pieces}
    assert {knobs.pieces for knobs in options if knobs.kept} == {"stages", "tiles=16", "tiles=4"}
    for knobs, option in options.items():
        moved = 0.01 if knobs.stages and knobs.kept else 1e-9  # of a run: by the tag of what is kept a cut may move
        with under({"": knobs}):
            assert explain(stack, W, x, target="h200").forward_runs == pytest.approx(option.forward_runs, rel=moved), knobs
    runs = [option.forward_runs for knobs, option in options.items() if knobs.tiles == 4]
    # Without choices of values inside of the loop, which is no slice then.
    assert max(runs) == pytest.approx(1.8836, abs=1e-4) and min(runs) == pytest.approx(1.6205, abs=1e-4)


def test_nothing_and_everything(of_plan):
    by_name = {p: explain(checkpoint_scan(block, policy=p), W, X, target="h200") for p in ("nothing", "dots", "everything")}
    assert by_name["nothing"].forward_runs == pytest.approx(of_plan.plain().forward_runs)
    assert by_name["everything"].forward_runs == of_plan.everything().forward_runs == 1
    assert 1 < by_name["dots"].forward_runs < by_name["nothing"].forward_runs < 2
    assert f"forward runs of a block in a training step: {by_name['dots'].forward_runs:.2f}" in str(by_name["dots"])
    assert by_name["dots"].to_json()["forward_runs"] == by_name["dots"].forward_runs


@pytest.mark.parametrize(
    "knobs, runs",
    [
        ({"blocks_per_ckpt": 3, "policy": "everything"}, 2.0),
        ({"blocks_per_ckpt": 3, "policy": "everything", "engine": "reversal"}, 2 - 3 / 12),
        ({"blocks_per_ckpt": 5, "policy": "everything", "engine": "reversal"}, (10 + 12) / 12),
        ({"blocks_per_ckpt": 3, "policy": "everything", "snapshots": 2}, (4 * 3 + 12) / 12),
    ],
    ids=str,
)
def test_whole_chunks(knobs, runs):
    found = explain(checkpoint_scan(block, **knobs), W, X, target="h200")
    assert found.rerun_seconds == 0 and found.forward_runs == pytest.approx(runs)


def test_parts_of_a_stack_have_two_blocks_at_least(of_plan):
    """So that budgets just above a setting of all blocks alike are used too."""
    parts = {o.knobs.first[0] for o in of_plan._between(list(of_plan._all(may_offload=False)))}
    assert parts and parts <= set(range(2, N - 1)) and {2, N - 2} <= parts
