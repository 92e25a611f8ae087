"""The largest batch that fits, and which sizes are tried."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, largest_batch
from jaxckpt._plan import Candidate, Plan
from jaxckpt.planning.batch import Batch, Batches, _next_size

W, X = jnp.ones((6, 32, 32)), jnp.ones((8, 32))
STACK = checkpoint_scan(lambda w, x: x + jnp.tanh(x @ w), plan="auto")
HOW: dict[str, Any] = {"budget": "1MiB", "target": "cpu", "progress": False}
NO_STEP: Any = 3
CANDIDATE = Candidate("nothing, scan", predicted_bytes=0, seconds=0.0, forward_runs=2.0, peak_bytes=2**20)
PLAN = Plan({}, "cpu", "time", 2**20, CANDIDATE, (CANDIDATE,), least_bytes=0, most_bytes=0)


def step(w, x):
    return jax.grad(lambda w: STACK(w, x).sum())(w)


def test_the_largest_that_fits():
    found = largest_batch(step, W, X, in_axes=(None, 0), sizes=[2**k for k in range(4, 16)], plans=6, **HOW)
    largest = found.largest
    assert found[largest.size] is largest.plan and found[largest.size].peak_bytes <= 2**20
    above = next(batch for batch in found.tried if batch.size > largest.size)
    assert above.size == 2 * largest.size and above.plan is None and "the least possible is" in above.reason
    sizes = [*(batch.size for batch in found.tried), *found.not_tried]
    assert len(found.tried) == 6 and sorted(sizes) == [2**k for k in range(4, 16)]
    assert [batch.size for batch in found.tried] == sorted(batch.size for batch in found.tried)
    for batch in found.tried[: found.tried.index(largest) + 1]:
        assert batch.examples_per_second == pytest.approx(batch.size / found[batch.size].chosen.seconds)
    assert (found.fastest.examples_per_second or 0) >= 0.999 * max(b.examples_per_second or 0 for b in found.tried)
    text = str(found)
    assert f"a batch of {largest.size} in 1.0 MiB on cpu" in text and "plans=12 tries more" in text
    row = found.to_json()["tried"][0]
    assert row["plan"]["stacks"][""]["knobs"] and found.to_json()["largest"] == largest.size


@pytest.mark.parametrize(
    "sizes", [32, np.int64(32), np.array(32), np.array([32]), jnp.array([32]), {32}, range(32, 33)], ids=repr
)
def test_sizes_in_any_form(sizes):
    assert largest_batch(step, W, X, in_axes=(None, 0), sizes=sizes, **HOW).largest.size == 32


def test_a_plan_runs_with_its_batch():
    found = largest_batch(step, W, X, in_axes=(None, 0), sizes=[64, 128], **HOW)
    x = jnp.ones((found.largest.size, 32))
    got = found[found.largest.size].around(step)(W, x)
    assert jnp.allclose(got, step(W, x), rtol=1e-5)


def test_arguments_as_trees_and_nnx_objects():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(W)

    def step(model, batch):
        return nnx.grad(lambda model: (STACK(model.w[...], batch["x"]) * batch["scale"].T).sum())(model)

    batch = {"x": X, "scale": jnp.ones((1, 8)), "rate": 0.5}
    found = largest_batch(step, Model(), batch, in_axes=(None, {"x": 0, "scale": -1, "rate": None}), sizes=[16, 32], **HOW)
    assert found.largest.size == 32


def test_none_among_the_arguments():
    found = largest_batch(lambda w, x, mask: step(w, x), W, X, None, in_axes=(None, 0, 0), sizes=[16, 32], **HOW)
    assert found.largest.size == 32


def test_a_size_that_the_step_cannot_be_run_with_is_out():
    def accumulated(w, x):  # in micro-batches of 8
        return jax.lax.map(lambda x: step(w, x), x.reshape(-1, 8, 32)).sum(0)

    found = largest_batch(accumulated, W, X, in_axes=(None, 0), sizes=[8, 12, 16, 20, 24], **HOW)
    reasons = {batch.size: batch.reason for batch in found.tried}
    assert found.largest.size == 24 and reasons[12].startswith("cannot be run: TypeError") and not found.not_tried
    with pytest.raises(TypeError, match="reshape"):
        largest_batch(accumulated, W, X, in_axes=(None, 0), sizes=[12, 20], **HOW)


def test_stacks_that_take_no_time():
    found = Batches((Batch(8, PLAN), Batch(16, PLAN)), ())
    assert found.largest.seconds == 0.0 and found.largest.examples_per_second is None
    assert found.fastest.size == 16 and "*     16  1.0 MiB          2.00        0" in str(found)
    told = json.dumps(found.to_json(), allow_nan=False)
    assert [batch["examples_per_second"] for batch in json.loads(told)["tried"]] == [None, None]


def test_memory_that_the_compiler_runs_out_of():
    def large(w, x):
        if len(x) > 64:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2 bytes")
        return step(w, x)

    found = largest_batch(large, W, X, in_axes=(None, 0), sizes=[32, 64, 128, 256, 512], plans=3, **HOW)
    assert found.largest.size == 64 and {batch.size for batch in found.tried} == {32, 64, 128}
    assert found.tried[-1].is_too_large and found.tried[-1].reason.startswith("does not fit: JaxRuntimeError: RESOURCE")
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        largest_batch(large, W, X, in_axes=(None, 0), sizes=[128, 256], **HOW)


def test_not_even_the_smallest_fits():
    with pytest.raises(ValueError, match=r"budget=100.0 KiB .* is less than this step .* for a batch of 4096"):
        largest_batch(step, W, X, in_axes=(None, 0), sizes=[8192, 4096], **dict(HOW, budget="100KiB"))


def sizes_in_order(sizes, outcome, plans):
    """The sizes that are tried, where `outcome` says what becomes of one: "fits", "too large", "fails"."""
    tried = []
    while (size := _next_size(sizes, tried, plans)) is not None:
        found = outcome(size)
        tried.append(Batch(size, PLAN if found == "fits" else None, is_too_large=found == "too large"))
    asked = [batch.size for batch in tried]
    assert len(asked) == len(set(asked))
    return asked


@pytest.mark.parametrize("number, most", [(1, 1), (7, 3), (40, 17), (40, 40), (40, 0)])
def test_sizes_in_order(number, most):
    asked = sizes_in_order(range(1, number + 1), lambda size: "fits" if size <= most else "too large", plans=100)
    assert {size for size in asked if size <= most} == set(range(1, most + 1))
    of_bisection = number.bit_length()
    assert most in asked[:of_bisection] or most == 0
    assert most == number or most + 1 in asked[:of_bisection]


@pytest.mark.parametrize("plans", [1, 2, 3])
def test_the_last_plan_is_for_the_smallest_where_none_fits(plans):
    asked = sizes_in_order(range(1, 101), lambda size: "fits" if size <= 5 else "too large", plans)
    assert len(asked) == plans and asked[-1] == 1


@pytest.mark.parametrize("divisor, step", [(2, 1), (8, 1), (12, 4), (16, 8)])
def test_sizes_that_cannot_be_run_with_are_no_plans(divisor, step):
    def outcome(size):
        return "fails" if size % divisor else "fits" if size <= 72 else "too large"

    asked = sizes_in_order(range(step, 129, step), outcome, plans=6)
    assert max(size for size in asked if outcome(size) == "fits") == 72 // divisor * divisor
    assert sum(outcome(size) == "fails" for size in asked) <= 8


def test_the_smallest_that_can_be_run_with():
    def outcome(size):
        return "fails" if size % 8 else "fits" if size == 8 else "too large"

    assert sizes_in_order(range(1, 129), outcome, plans=3)[-1] == 8


def test_only_so_many_that_cannot_be_run_with():
    asked = sizes_in_order(range(8, 1025, 8), lambda size: "fits" if size == 520 else "fails", plans=6)
    assert asked[0] == 520 and len(asked) <= 10
    assert len(sizes_in_order(range(8, 1025, 8), lambda size: "fails", plans=6)) == 4


def test_a_step_with_a_bug_is_run_a_few_times():
    runs = []

    def broken(w, x):
        runs.append(x.shape)
        raise AssertionError(f"what is wrong with {len(x)}")

    with pytest.raises(AssertionError, match="wrong with 264"):  # the first
        largest_batch(broken, W, X, in_axes=(None, 0), sizes=range(8, 513, 8), **HOW)
    assert len(runs) == 4


def test_whether_the_largest_is_certain():
    found = largest_batch(step, W, X, in_axes=(None, 0), sizes=range(64, 961, 64), plans=2, **dict(HOW, budget="2MiB"))
    assert found.largest.size == 768 and found.may_fit == (832, 896, 960) and found.to_json()["may_fit"] == [832, 896, 960]
    assert "  not tried, and may fit: 3 sizes from 832 to 960; plans=4 tries more" in str(found)
    assert "  not tried, and smaller: 10 sizes from 64 to 704; plans=4 tries more" in str(found)
    found = largest_batch(step, W, X, in_axes=(None, 0), sizes=[64, 512, 2**20, 2**21], plans=3, **dict(HOW, budget="2MiB"))
    assert found.largest.size == 512 and not found.may_fit and found.not_tried == (2**21,) and "not tried" not in str(found)


def test_only_the_smallest_fits():
    found = largest_batch(step, W, X, in_axes=(None, 0), sizes=[2**k for k in range(5, 25)], plans=2, **HOW)
    assert found.largest.size == 32 and len(found.tried) == 2


@pytest.mark.parametrize(
    "in_axes, sizes, message",
    [
        ((None, None), [8], "in_axes names no axis"),
        ((None,), [8], "the step is given 2 arguments"),
        (0, [8], "the step is given 2 arguments"),
        ((None, 2), [8], r"in_axes names axis 2 of the argument \[1\], whose shape is \(8, 32\)"),
        ((None, "x"), [8], r"in_axes names axis 'x' of the argument \[1\]"),
        ((0, 0), [8], r"different sizes, which are not one batch: 6 of \[0\], 8 of \[1\]"),
        ((None, (0, 1)), [8], r"in_axes\[1\] is no tree prefix of the argument \[1\]"),
        ((None, 0), [], "sizes are those that the batch may have"),
        ((None, 0), [0, 8], "integers of at least 1"),
        ((None, 0), [8.5], "integers of at least 1"),
        ((None, 0), "8", "integers of at least 1"),
    ],
)
def test_bad_input(in_axes, sizes, message):
    with pytest.raises(ValueError, match=message):
        largest_batch(step, W, X, in_axes=in_axes, sizes=sizes, **HOW)


def test_more_bad_input():
    with pytest.raises(ValueError, match="plans, how many are made at most"):
        largest_batch(step, W, X, in_axes=(None, 0), sizes=[8], plans=0, **HOW)
    with pytest.raises(TypeError, match="largest_batch takes a training step"):
        largest_batch(NO_STEP, W, X, in_axes=(None, 0), sizes=[8], **HOW)
    with pytest.raises(ValueError, match="which has no axes: give it None"):
        largest_batch(step, W, {"x": X, "rate": 0.5}, in_axes=(None, 0), sizes=[8], **HOW)
    found = largest_batch(step, W, X, in_axes=(None, 0), sizes=[8], **HOW)
    with pytest.raises(KeyError, match="there is no plan for a batch of 9; there are plans for 8"):
        found[9]
