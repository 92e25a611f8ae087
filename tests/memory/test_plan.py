"""Budgets kept and bytes saved on a GPU that need not be there; `benchmarks/plan_under_budgets.py` has the full sizes."""

import jax
import jax.numpy as jnp
import pytest

from jaxckpt import checkpoint_scan, measure, plan
from jaxckpt.models import TransformerBlock

N, SHAPE = 12, (4, 1024, 256)


def step_of(**knobs):
    stack = checkpoint_scan(TransformerBlock, N, **knobs)(d_model=256, num_heads=4, d_ff=1024, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct(SHAPE, "bfloat16")
    step = jax.value_and_grad(lambda v, x: jnp.sum(stack.apply(v, x).astype("float32") ** 2))
    return step, jax.eval_shape(stack.init, jax.random.key(0), x), x


def test_budgets_are_kept_on_a_gpu(h200):
    step, *args = step_of(plan="auto")
    most = measure(*step_of(policy="everything"), target=h200).peak_bytes
    least = plan(step, *args, objective="memory", target=h200, progress=False).peak_bytes
    budgets = [least, (3 * least * most) // (2 * least + most), most]
    found = [plan(step, *args, budget=budget, target=h200, progress=False) for budget in budgets]
    assert all(p.peak_bytes <= budget for p, budget in zip(found, budgets, strict=True))
    # What the model had said before the step was compiled.
    assert [p.chosen.predicted_bytes for p in found] == [pytest.approx(p.peak_bytes, rel=0.05) for p in found]
    assert [p.chosen.seconds for p in found] == sorted((p.chosen.seconds for p in found), reverse=True)
    assert found[-1].chosen.forward_runs == pytest.approx(1, abs=0.02) and found[0].chosen.forward_runs > 1.5
    with pytest.raises(ValueError, match=r"the least possible is .* bytes"):
        plan(step, *args, budget=least // 2, target=h200, progress=False)


def test_cheap_keeps_a_third(h200):
    temp = {
        policy: measure(*step_of(policy=policy), target=h200).temp_bytes for policy in ("cheap", "everything", "nothing")
    }
    assert temp["nothing"] < temp["cheap"] < 0.36 * temp["everything"] + temp["nothing"]
