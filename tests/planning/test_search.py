"""Plans for small steps, compiled for the CPU: within the budget, the faster the more memory, pinned, saved, refused."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint_scan, explain, measure, plan
from jaxckpt._plan import Candidate, Knobs, Plan, load
from jaxckpt.analysis.cost import REFERENCE
from jaxckpt.planning import search
from jaxckpt.planning.model import Stack
from tests.support import relative_error, slice_small_values

N, WIDTH = 12, 32
MIB = 2**20
X = jnp.ones((64, WIDTH))


def block(w, x):
    h = jnp.tanh(x @ w)
    return x + jnp.sin(jax.nn.softmax(h @ h.T) @ h)


W = 0.1 * jax.random.normal(jax.random.key(0), (N, WIDTH, WIDTH))


def step_of(setting, length=N):
    stack = checkpoint_scan(block, **setting)
    return lambda w, x: jax.value_and_grad(lambda w: jnp.sum(stack(w, x) ** 2))(w)


STEP = step_of({"plan": "auto"})


def planned(budget, step=STEP, args=(W, X), **keywords):
    return plan(step, *args, budget=budget, **{"target": "cpu", "progress": False, **keywords})


@pytest.fixture(scope="module", autouse=True)
def rates_of_a_gpu():
    """Under which memory costs no time, so that more of it always helps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "rates_of", lambda target: REFERENCE)
        yield


@pytest.fixture(scope="module")
def range_of_peaks():
    """The least possible peak, and that without checkpointing."""
    least = planned(None, objective="memory").peak_bytes
    return least, measure(step_of({"policy": "everything"}), W, X, target="cpu").peak_bytes


def test_every_budget_is_kept_and_more_memory_is_never_slower(range_of_peaks):
    least, most = range_of_peaks
    found = [planned(int(least + (most - least) * i / 8)) for i in range(9)]
    for i, p in enumerate(found):
        assert p.peak_bytes <= least + (most - least) * i / 8
        assert p.chosen.predicted_bytes == pytest.approx(p.peak_bytes, rel=0.05)  # before it was compiled
        assert p.peak_bytes == measure(p.around(STEP), W, X, target="cpu").peak_bytes  # the compiled peak, and no other
    seconds = [p.chosen.seconds for p in found]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert found[-1].chosen.forward_runs < 1.2 < found[0].chosen.forward_runs
    assert len({str(p[""].knobs) for p in found}) > 3


def test_a_plan_depends_on_no_clock_and_on_no_plan_before(monkeypatch, range_of_peaks):
    budget = sum(range_of_peaks) // 3
    after_others = planned(budget)
    search.forget()
    ticking = itertools.count(0, 1000)
    for name in ("monotonic", "perf_counter", "time"):  # each compilation takes hours
        monkeypatch.setattr(time, name, lambda: next(ticking))
    assert planned(budget) == after_others


def test_what_was_left_untried_is_part_of_the_plan(tmp_path, range_of_peaks):
    found = planned(range_of_peaks[1] * 2 // 3, compilations=1)
    assert len(found.candidates) == 1 and found.untried and not found.untried[0].peak_bytes
    assert all(c.seconds < found.chosen.seconds and c.predicted_bytes <= found.budget_bytes for c in found.untried)
    assert "left untried: " in str(found) and "compiled were 1 of the step, of at most compilations=1" in str(found)
    found.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json") == found
    most = planned(2 * range_of_peaks[1])
    assert most.untried == () and "left untried: nothing that should be much faster and should fit" in str(most)
    assert "untried" not in str(planned(None, objective="memory"))
    with pytest.raises(ValueError, match="compilations is an integer of at least 1; got 0"):
        planned("1GiB", compilations=0)


def test_what_was_compiled_for_one_step_is_not_believed_of_another():
    def with_head(width):
        stack = checkpoint_scan(block, plan="auto")
        return lambda w, x: jax.grad(lambda w: jnp.sum(jnp.sin(stack(w, x) @ jnp.ones((WIDTH, width)))))(w)

    small, large = (planned("64MiB", step=with_head(width)) for width in (1, 4096))
    assert large.peak_bytes > small.peak_bytes + MIB


def test_the_first_blocks_keep_less_than_the_others(tmp_path, range_of_peaks):
    """So that budgets between those of two settings of all blocks alike are used too."""
    least, most = range_of_peaks
    found = [planned(int(budget)) for budget in np.geomspace(1.3 * least, 0.95 * most, 6)]
    assert all(p.peak_bytes >= 0.9 * p.budget_bytes for p in found)
    of_two = [p for p in found if p[""].knobs.first is not None]
    assert len(of_two) >= 3
    want = STEP(W, X)
    for p in of_two:
        count, knobs = p[""].knobs.first
        assert 0 < count < N and knobs != p[""].knobs and knobs.first is None
        assert f"first {count}: {knobs}, then: " in str(p)
        p.save(tmp_path / "plan.json")
        assert load(tmp_path / "plan.json") == p
        assert relative_error(step_of({"plan": tmp_path / "plan.json"})(W, X), want) < 1e-5


def of_two(first, **knobs):
    """What the file of a plan says of a stack whose first blocks have knobs of their own."""
    return {**dataclasses.asdict(Knobs(engine="reversal")), **knobs, "first": first}


LEAN = dataclasses.asdict(Knobs(engine="reversal"))


@pytest.mark.parametrize(
    "knobs, said",
    [
        (of_two([N, LEAN]), f"its first {N} blocks are no part of {N}"),
        (of_two([0, LEAN]), "its first 0 blocks are no part"),
        (of_two([3.5, LEAN]), "its first 3.5 blocks are no part"),
        (of_two([True, LEAN]), "its first True blocks are no part"),
        (of_two([]), "is no plan that jaxckpt.plan saved"),
        (of_two([3, LEAN, 7]), "is no plan that jaxckpt.plan saved"),
        (of_two([3, {**LEAN, "first": [2, LEAN]}]), "of the first blocks none have knobs of their own"),
        (of_two([3, LEAN], engine="scan"), "run by the reversal engine"),
        (of_two([3, {**LEAN, "engine": "scan"}]), "run by the reversal engine"),
        (of_two([3, {**LEAN, "policy": "offload:x"}]), "not under offload:x"),
        (of_two([3, {**LEAN, "snapshots": 5}]), "snapshots=5, reversal is not for 3 blocks"),
        (of_two([3, LEAN], blocks_per_ckpt=10), "blocks_per_ckpt=10, reversal is not for 9 blocks"),
    ],
)
def test_files_whose_parts_are_none(knobs, said, tmp_path, range_of_peaks):
    fields = planned(range_of_peaks[1]).to_json()
    fields["stacks"][""]["knobs"] = knobs
    (tmp_path / "plan.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=said):
        checkpoint_scan(block, plan=tmp_path / "plan.json")


def test_tiles_are_a_knob_of_the_plan(monkeypatch, tmp_path):
    """A block of which one matrix is nearly all that differentiating it takes."""
    slice_small_values(monkeypatch)
    x = jnp.ones((1024, WIDTH))

    def least(knobs):
        steps = [step_of({"engine": engine, **knobs}) for engine in ("scan", "reversal")]
        return min(measure(step, W, x, target="cpu").peak_bytes for step in steps)

    found = planned(None, args=(W, x), objective="memory")
    sliced = least({"tiles": "auto"})
    assert found[""].knobs.tiles == 64 and found.peak_bytes <= 1.02 * sliced and sliced < 0.5 * least({})
    assert "tiles=64" in str(found)
    found.save(tmp_path / "plan.json")
    assert load(tmp_path / "plan.json") == found
    budget = planned(int(1.3 * found.peak_bytes), args=(W, x))
    assert budget.peak_bytes <= 1.3 * found.peak_bytes and budget.chosen.forward_runs <= found.chosen.forward_runs
    want = step_of({"policy": "everything"})(W, x)
    assert relative_error(jax.jit(step_of({"plan": tmp_path / "plan.json"}))(W, x), want) < 1e-5


def test_slices_take_less_and_longer(monkeypatch):
    slice_small_values(monkeypatch)
    (stack,) = search._stacks(STEP, (W, jnp.ones((512, WIDTH))), lambda run: Stack(run, REFERENCE))[0].values()
    settings = Knobs(), Knobs(stages="auto"), Knobs(tiles="auto"), Knobs(tiles=64)
    whole, in_stages, in_tiles, leanest = (stack._option(knobs, stack._kept_none()) for knobs in settings)
    assert whole.seconds < in_stages.seconds < in_tiles.seconds < leanest.seconds
    assert whole.block_bytes >= in_stages.block_bytes > 2 * in_tiles.block_bytes > 2 * leanest.block_bytes


def test_gradients_under_a_plan_are_those_without(range_of_peaks):
    found = planned(sum(range_of_peaks) // 2)
    want = step_of({"policy": "everything"})(W, X)
    assert relative_error(found.around(STEP)(W, X), want) < 1e-5
    assert relative_error(jax.jit(step_of({"plan": found}))(W, X), want) < 1e-5


def test_a_plan_is_for_what_is_jitted_too(range_of_peaks):
    jitted = jax.jit(STEP)
    before = measure(jitted, W, X, target="cpu").peak_bytes
    found = planned(range_of_peaks[1], step=jitted)
    assert found.peak_bytes > before
    jaxpr = str(jax.make_jaxpr(found.around(jitted))(W, X))
    assert jaxpr != str(jax.make_jaxpr(jitted)(W, X))
    assert measure(jitted, W, X, target="cpu").peak_bytes == before  # as it was, outside of the plan


def test_saved_and_loaded(tmp_path, range_of_peaks):
    found = planned(sum(range_of_peaks) // 2)
    path = tmp_path / "plan.json"
    found.save(path)
    again = load(path)
    assert again == found and str(again) == str(found)
    pinned = step_of({"plan": str(path)})
    assert measure(pinned, W, X, target="cpu").peak_bytes == found.peak_bytes
    assert relative_error(pinned(W, X), step_of({})(W, X)) < 1e-5


IN_ANOTHER_PROCESS = """
import sys
import jax
sys.path.insert(0, "{root}")
from tests.planning.test_search import W, X, step_of
jax.eval_shape(step_of({{"plan": "{path}"}}), W, X)
"""


def test_a_plan_holds_in_another_process(tmp_path, range_of_peaks, pytestconfig):
    path = tmp_path / "plan.json"
    planned(range_of_peaks[1]).save(path)
    code = IN_ANOTHER_PROCESS.format(root=pytestconfig.rootpath, path=path)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a plan with some fields of its stack changed."""
    stack = planned("1GiB")[""]

    def save(name="plan.json", **changed):
        row = Candidate("", 1, 1.0, 1.0, 1)
        of = dataclasses.replace(stack, **changed)
        Plan({"": of}, "cpu", "time", 1, row, (row,), 1, 1).save(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"length": 7}, r"its length is 12, and the plan is for 7.*plan again"),
        ({"block": "Other"}, r"its block is block, and the plan is for Other"),
        ({"carry": "(float32[8],)"}, r"it is given \(float32\[64,32\],\), and the plan is for \(float32\[8\],\)"),
        ({"program": "0"}, r"computes something else, though its name and types are the same"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_plan_for_another_stack_is_refused(saved, changed, said):
    with pytest.raises(ValueError, match=said):
        step_of({"plan": saved(**changed)})(W, X)


def test_a_plan_for_another_mesh_is_refused(saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(X, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    path = saved(mesh="data=8")
    with pytest.raises(ValueError, match=r"it lies on the mesh data=1, and the plan is for data=8\. .*plan again"):
        step_of({"plan": path})(W, x)
    jax.eval_shape(step_of({"plan": path}), W, X)  # on no mesh that is known
    assert plan(step_of({"plan": "auto"}), W, x, budget="1GiB", progress=False)[""].mesh == "data=1"
    assert load(path)[""].mesh == "data=8"
    step_of({"plan": saved(mesh=None)})(W, x)


def test_plans_that_cannot_be_used_are_refused_at_once(saved, tmp_path):
    with pytest.raises(ValueError, match=f"made with JAX 0.1, and this is JAX {jax.__version__}"):
        checkpoint_scan(block, plan=saved(jax_version="0.1"))
    with pytest.raises(ValueError, match="plan is for 12 x block, and length is 6"):
        checkpoint_scan(block, 6, plan=saved())
    with pytest.raises(FileNotFoundError):
        checkpoint_scan(block, plan=str(tmp_path / "none.json"))
    for knobs in (Knobs(blocks_per_ckpt=13), Knobs(blocks_per_ckpt=4, snapshots=4)):
        with pytest.raises(ValueError, match=r"is no plan that jaxckpt.plan saved: .*is not for 12 blocks"):
            checkpoint_scan(block, plan=saved(knobs=knobs))
    for knobs in ({"tiles": "x"}, {"tiles": 0}, {"stages": 2.5}, {"engine": "bogus"}, {"policy": "none such"}):
        with pytest.raises(
            ValueError, match=rf"a plan says .*{next(iter(knobs.values()))}.* is not allowed: .*jaxckpt\.plan again"
        ):
            checkpoint_scan(block, plan=saved(knobs=Knobs(**knobs)))
    for text in (json.dumps({"format": 2}), json.dumps({"format": 1}), json.dumps({"format": 2, "stacks": {}}), "no"):
        (tmp_path / "no.json").write_text(text)
        with pytest.raises(ValueError, match=r"no\.json is no plan that jaxckpt\.plan saved"):
            checkpoint_scan(block, plan=tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match="plan='Auto' is no file: write 'auto', 'auto:NAME'"):
        checkpoint_scan(block, plan="Auto")
    with pytest.raises(ValueError, match="plan='auto' sets all knobs, and policy='dots' is given beside it"):
        checkpoint_scan(block, plan="auto", policy="dots")
    with pytest.raises(ValueError, match=r"sets all knobs, and unroll=2"):
        checkpoint_scan(block, plan="auto", unroll=2)
    with pytest.raises(TypeError, match="plan must be 'auto', 'auto:NAME'"):
        checkpoint_scan(block, plan=3)


def test_a_budget_that_is_too_small_names_the_least_and_the_largest_buffers(range_of_peaks):
    least = range_of_peaks[0]
    with pytest.raises(
        ValueError, match=rf"the least possible is .* \({least} bytes\), with .*The largest: .*block"
    ) as error:
        planned(least - 1)
    assert "the argument [0]" in str(error.value)
    assert planned(least).peak_bytes == least


@pytest.mark.parametrize("budget", ["40", "much", "-3GiB", -1, 0, True, 2.5])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="budget"):
        planned(budget)


def test_integers_of_numpy_are_budgets():
    assert planned(np.int64(MIB)).budget_bytes == MIB


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"no stack in the step is to be planned: .*plan='auto'"):
        planned("1GiB", step=step_of({}))
    with pytest.raises(ValueError, match="objective must be 'time' or 'memory'"):
        planned("1GiB", objective="speed")
    with pytest.raises(ValueError, match=r"budget is missing: the memory of 'cpu' is not known"):
        planned(None)
    with pytest.raises(ValueError, match="unknown target"):
        planned("1GiB", target="h20")


def test_targets_without_the_plugin(monkeypatch):
    from jaxckpt.memory import targets

    def missing(gpu, count):
        raise RuntimeError('which is not installed: pip install "jaxckpt[aot]"')

    monkeypatch.setattr(targets, "_described", missing)
    with pytest.raises(RuntimeError, match=r"pip install \"jaxckpt\[aot\]\""):
        planned("1GiB", target="h200")


def two_stacks(names, lengths=(N, N // 2)):
    first, second = (checkpoint_scan(block, plan=name) for name in names)
    return lambda w, x: jax.grad(lambda w: jnp.sum(second(w[: lengths[1]], first(w, x)) ** 2))(w)


def test_several_stacks(tmp_path, range_of_peaks):
    step = two_stacks(["auto:trunk", "auto:head"])
    found = planned(sum(range_of_peaks) // 2, step=step)
    assert set(found.stacks) == {"trunk", "head"}
    assert found["trunk"].length == N and found["head"].length == N // 2
    found.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="has several stacks, 'trunk', 'head'"):
        checkpoint_scan(block, plan=tmp_path / "plan.json")
    pinned = two_stacks([f"{tmp_path}/plan.json:trunk", found["head"]])
    assert measure(pinned, W, X, target="cpu").peak_bytes == found.peak_bytes
    with pytest.raises(KeyError, match="no stack 'tail'; it has 'trunk', 'head'"):
        checkpoint_scan(block, plan=f"{tmp_path}/plan.json:tail")


def test_two_stacks_of_one_name():
    with pytest.raises(ValueError, match=r"two stacks are built with plan='auto', 12 x block and 6 x block: .*'auto:NAME'"):
        planned("1GiB", step=two_stacks(["auto", "auto"]))
    same = two_stacks(["auto:both", "auto:both"], (N, N))  # equal stacks, or one that is run twice, share a plan
    assert set(planned("1GiB", step=same).stacks) == {"both"}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(WIDTH)(jnp.tanh(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


def test_linen_and_a_whole_training_step():
    model = checkpoint_scan(Block, 6, plan="auto")()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    optimizer = optax.adam(1e-3)

    def step(variables, state, x):
        loss, gradients = jax.value_and_grad(lambda v: jnp.mean(model.apply(v, x) ** 2))(variables)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(variables, updates), state, loss

    state = jax.eval_shape(optimizer.init, variables)
    found = planned("8MiB", step=jax.jit(step, donate_argnums=(0, 1)), args=(variables, state, X))
    assert found.peak_bytes <= 8 * MIB
    assert found[""].block == "Block" and found[""].length == 6
    pinned = checkpoint_scan(Block, 6, plan=found)()
    assert pinned == checkpoint_scan(Block, 6, plan=found)()  # equal stacks are equal modules
    jax.eval_shape(pinned.apply, variables, X)


def test_nnx():
    stack = checkpoint_scan(NNXBlock, 4, plan="auto")(rngs=nnx.Rngs(0))
    graph, state = nnx.split(stack)
    step = lambda state, x: jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x) ** 2))(state)  # noqa: E731
    assert planned("8MiB", step=step, args=(state, X)).peak_bytes <= 8 * MIB


def nnx_step(model, optimizer, x):
    loss, gradients = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
    optimizer.update(model, gradients)
    return loss


def nnx_objects():
    model = checkpoint_scan(NNXBlock, 6, plan="auto")(rngs=nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def test_a_step_that_changes_nnx_objects_is_planned_as_nnx_jit_runs_it():
    model, optimizer = nnx_objects()
    jitted = planned("1MiB", step=nnx.jit(nnx_step), args=(model, optimizer, X))
    assert planned("1MiB", step=nnx_step, args=(model, optimizer, X)) == jitted
    assert planned("1MiB", step=functools.partial(nnx_step, model, optimizer), args=(X,)) == jitted
    assert measure(jitted.around(nnx_step), model, optimizer, X, target="cpu").peak_bytes == jitted.peak_bytes
    first = jitted.around(nnx_step)(model, optimizer, X)
    assert jitted.around(nnx_step)(model, optimizer, X) < first  # it is changed in place
    with pytest.raises(ValueError, match=r"plan: step changes NNX objects .*plan\(step, model, optimizer, \.\.\.\)"):

        def step(x):
            return nnx_step(model, optimizer, x)

        planned("1MiB", step=step, args=(X,))


def test_steps_that_change_nnx_objects_are_timed():
    found = planned("1GiB", step=nnx_step, args=(*nnx_objects(), X), time=True, target="attached")
    assert found.chosen.measured_seconds > 0


def test_timed_on_a_present_device():
    found = planned("1GiB", time=True, target="attached")
    timed = [c for c in found.candidates if c.measured_seconds is not None]
    assert found.chosen in timed and all(found.chosen.measured_seconds <= c.measured_seconds for c in timed)
    assert "nothing, scan" in [c.setting for c in timed]  # the default knobs are always among them
    donating = jax.jit(lambda w, x: (w - STEP(w, x)[1], x), donate_argnums=0)
    assert planned("1GiB", step=donating, time=True, target="attached").chosen.measured_seconds > 0
    assert not W.is_deleted()
    with pytest.raises(ValueError, match="time=True runs the step"):
        planned("1GiB", time=True, target="h200")
    with pytest.raises(ValueError, match="needs arrays; among the arguments is ShapeDtypeStruct"):
        planned("1GiB", args=(jax.ShapeDtypeStruct(W.shape, W.dtype), X), time=True, target="attached")


def test_explained_under_a_plan():
    stack = checkpoint_scan(block, plan=planned("400KiB"))
    assert "jaxckpt_value" not in str(explain(stack, W, X))


def test_a_plan_as_text(range_of_peaks):
    text = str(planned(sum(range_of_peaks) // 2))
    assert "on cpu, JAX" in text and "block (12 blocks)" in text and "*" in text


def test_auto_stands_for_the_default_knobs_without_a_plan():
    jaxpr = [str(jax.make_jaxpr(step_of(knobs))(W, X)) for knobs in ({"plan": "auto"}, {})]
    assert jaxpr[0] == jaxpr[1]
    assert Knobs() == Knobs(policy="nothing", engine="scan")


# --- steps of all kinds ---------------------------------------------------------------------------------------------------


def test_what_was_compiled_under_other_static_arguments_is_not_believed():
    stack = checkpoint_scan(block, plan="auto")

    @functools.partial(jax.jit, static_argnums=2)
    def step(w, x, width):
        return jax.grad(lambda w: jnp.sum(jnp.sin(stack(w, x) @ jnp.ones((WIDTH, width)))))(w)

    small, large = (planned("64MiB", step=step, args=(W, X, width)) for width in (1, 4096))
    assert large.peak_bytes > small.peak_bytes + MIB


def one_device(axis_type=AxisType.Auto):
    return jax.make_mesh((1,), ("d",), axis_types=(axis_type,), devices=jax.devices()[:1])


def under_shard_map(stack):
    summed = jax.grad(lambda w, x: lax.psum(jnp.sum(stack(w, x) ** 2), "d"))
    mapped = jax.shard_map(summed, mesh=one_device(), in_specs=(P(), P("d")), out_specs=P())
    return jax.jit(lambda w, x: mapped(w, x))


def over_a_named_axis(stack):
    with_mean = lambda w, x: stack(w, x - lax.pmean(x, "i"))  # noqa: E731
    return lambda w, x: jax.vmap(jax.grad(lambda w, x: jnp.sum(with_mean(w, x) ** 2)), (None, 0), axis_name="i")(
        w, jnp.stack([x, 2 * x])
    )


def second_order(stack):
    slope = lambda w, x: jax.grad(lambda x: jnp.sum(stack(w, x) ** 2))(x)  # noqa: E731
    return lambda w, x: jax.grad(lambda w: jnp.sum(slope(w, x) ** 2))(w)


@pytest.mark.parametrize(
    "step_with",
    [
        under_shard_map,
        over_a_named_axis,
        second_order,
        lambda stack: lambda w, x: jax.jvp(lambda x: stack(w, x), (x,), (x,)),
        lambda stack: lambda w, x: stack(w, x),
        lambda stack: lambda w, x: jax.grad(lambda w: jnp.sum(lax.map(lambda x: stack(w, x), jnp.stack([x, x]))))(w),
        lambda stack: lambda w, x: jax.grad(lambda w: jnp.sum(jax.checkpoint(stack)(w, x) ** 2))(w),
    ],
    ids=["shard_map", "vmap", "second order", "jvp", "no gradients", "map", "checkpoint"],
)
@pytest.mark.parametrize("objective", ["time", "memory"])
def test_steps_that_some_knobs_cannot_run(step_with, objective, x64):
    """The rest of the knobs are planned with; values are those of the default ones."""
    args = W.astype("float64"), X.astype("float64")
    step = step_with(checkpoint_scan(block, plan="auto"))
    found = planned("1GiB", step=step, args=args, objective=objective)
    assert found.peak_bytes == measure(found.around(step), *args, target="cpu").peak_bytes
    assert relative_error(found.around(step)(*args), step_with(checkpoint_scan(block))(*args)) < 1e-12


def test_an_error_of_the_step_itself_is_not_hidden():
    stack = checkpoint_scan(block, plan="auto")

    def step(w, x):
        jax.grad(lambda w: jnp.sum(stack(w, x)))(w)
        return jnp.ones(3) @ x

    with pytest.raises(TypeError, match="dot_general"):
        planned("1GiB", step=step)


def test_a_step_that_says_where_its_arguments_lie():
    sharding = NamedSharding(one_device(), P())
    step = jax.jit(STEP, in_shardings=(sharding, sharding))
    assert planned("1GiB", step=step, target=None).peak_bytes <= 2**30


def test_blocks_that_compute_nothing():
    stack = checkpoint_scan(lambda w, x: x, plan="auto")
    assert planned("1GiB", step=lambda w, x: jax.grad(lambda x: jnp.sum(stack(w, x)))(x)).peak_bytes > 0


def test_many_stacks_are_planned_together():
    stacks = [checkpoint_scan(block, plan=f"auto:{i}") for i in range(6)]
    step = lambda w, x: jax.grad(lambda w: jnp.sum(functools.reduce(lambda x, s: s(w, x), stacks, x)))(w)  # noqa: E731
    least = planned(None, step=step, objective="memory").peak_bytes
    found = planned(2 * least, step=step)
    assert least < found.peak_bytes <= 2 * least and len(found.stacks) == 6


def test_a_step_whose_head_needs_most_is_refused_soon(monkeypatch):
    """Less stored does not help: it is not tried for the whole front, and the error says where the memory is."""
    stack = checkpoint_scan(block, plan="auto")
    step = lambda w, x: jax.grad(lambda w: jnp.sum(jax.nn.logsumexp(stack(w, x) @ jnp.ones((WIDTH, 20_000)), 1)))(w)  # noqa: E731
    least = planned(None, step=step, objective="memory").peak_bytes
    search.forget()
    compiled = []
    monkeypatch.setattr(
        search, "measure", lambda *args, **keywords: compiled.append(measure(*args, **keywords)) or compiled[-1]
    )
    with pytest.raises(ValueError, match=r"The largest: the rest of the step"):
        planned(least // 2, step=step)
    assert len(compiled) <= 12


def test_a_plan_around_another_step_is_refused():
    found = planned("1GiB")
    with pytest.raises(ValueError, match="its length is 3, and the plan is for 12"):
        found.around(step_of({"plan": "auto"}))(W[:3], X)


def test_a_pinned_linen_stack_is_initialised():
    model = checkpoint_scan(Block, 6, plan="auto")()
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    step = lambda v, x: jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(v)  # noqa: E731
    pinned = checkpoint_scan(Block, 6, plan=planned("8MiB", step=step, args=(variables, X)))()
    made = pinned.init(jax.random.key(0), X)
    assert relative_error(made, model.init(jax.random.key(0), X)) == 0
    pinned.apply(made, X)


def test_one_stack_with_two_shapes():
    stack = checkpoint_scan(block, plan="auto")
    step = lambda w, x: jax.grad(lambda w: jnp.sum(stack(w, x)) + jnp.sum(stack(w, x[:4])))(w)  # noqa: E731
    with pytest.raises(ValueError, match=r"run twice in the step, given \(float32\[64,32\],\) and \(float32\[4,32\],\)"):
        planned("1GiB", step=step)


def test_leaks_are_checked():
    search.forget()
    with jax.checking_leaks():
        planned("1GiB")


def test_donated_memory_is_counted_once():
    state = jnp.ones((2**20,))
    step = jax.jit(lambda w, x, s: (STEP(w, x)[1], s + 1), donate_argnums=2)
    plain, with_state = planned("600KiB"), planned(600 * 1024 + state.nbytes, step=step, args=(W, X, state))
    assert with_state.chosen.predicted_bytes == pytest.approx(with_state.peak_bytes, rel=0.05)
    for beside_state in (plain.peak_bytes, with_state.peak_bytes - state.nbytes):
        assert 0.95 <= beside_state / (600 * 1024) <= 1


def test_what_a_step_needs_beside_its_stacks_is_learnt():
    """The model knows nothing of a large head, and refuses all at first."""
    stack = checkpoint_scan(block, plan="auto")
    head = lambda y: jnp.sum(jax.nn.logsumexp(y @ jnp.ones((WIDTH, 4096)), 1))  # noqa: E731
    step = lambda w, x: jax.grad(lambda w: head(stack(w, x)))(w)  # noqa: E731
    most = measure(
        lambda w, x: jax.grad(lambda w: head(checkpoint_scan(block, policy="everything")(w, x)))(w), W, X, target="cpu"
    )
    found = planned(most.peak_bytes, step=step)
    assert found.peak_bytes <= most.peak_bytes and found.chosen.forward_runs < 1.1


def test_a_stack_inside_of_a_block_is_no_part_of_the_plan():
    inner = checkpoint_scan(lambda w, x: x + jnp.tanh(x @ w), plan="auto")
    outer = checkpoint_scan(lambda w, x: jnp.sin(inner(w, x)), plan="auto")
    w = jnp.stack([W[:2], W[2:4], W[4:6]])
    step = lambda w, x: jax.grad(lambda w: jnp.sum(outer(w, x) ** 2))(w)  # noqa: E731
    found = planned("1GiB", step=step, args=(w, X))
    assert found[""].length == 3
    assert relative_error(found.around(step)(w, X), step(w, X)) < 1e-5


def test_static_arguments_are_timed():
    step = jax.jit(lambda w, x, name, scale, power: STEP(w, x)[1] * scale**power, static_argnums=(2, 4))
    found = planned("1GiB", step=step, args=(W, X, "a name", 2.0, 3), time=True, target="attached")
    assert found.chosen.measured_seconds > 0


def test_two_ways_to_choose_are_refused():
    with pytest.raises(ValueError, match="time=True chooses the fastest, and objective='memory' the least memory"):
        planned("1GiB", time=True, objective="memory", target="attached")


def test_rates_that_were_calibrated_meanwhile_are_taken(monkeypatch):
    before = planned("1GiB")
    monkeypatch.setattr(search, "rates_of", lambda target: REFERENCE._replace(memory_bandwidth=1e9))
    after = planned("1GiB")
    assert after.chosen.seconds > before.chosen.seconds
    assert min(c.seconds for c in after.candidates) > max(c.seconds for c in before.candidates)
