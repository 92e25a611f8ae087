from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_blocks, checkpoint_scan, policies
from jaxckpt.engine.offload import FIXED_IN, guard_offload
from tests.support import assert_no_zero_leaf, plain_loop, pull_back, random_like, relative_error

REFUSAL = r"wrong gradients on GPU \(openxla/xla#46231\)[\s\S]*JAX 0\.11\.1 or later[\s\S]*'save:NAMES'"
OFFLOADING = {
    "offload:q": "offload:q",
    "save:k+offload:q": "save:k+offload:q",
    "a function of jax": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=["k"],
        names_which_can_be_offloaded=["q"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "offloaded dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}
offloading = pytest.mark.parametrize("policy", OFFLOADING.values(), ids=OFFLOADING.keys())
before_the_fix = jax.__version_info__ < FIXED_IN


def block(w, x):
    q = checkpoint_name(jnp.sin(x @ w), "q")
    return jnp.tanh(checkpoint_name(jnp.cos(q), "k")) * q


@pytest.fixture
def args():
    return random_like((jnp.zeros((5, 4, 4)), jnp.zeros((2, 4))))


def export_for_gpu(fn, *args):
    return jax.export.export(jax.jit(fn), platforms=["cuda"])(*args)


@offloading
@pytest.mark.parametrize("k", [None, 2])
def test_gradients_for_a_gpu(policy, k, args):
    stack = checkpoint_scan(block, blocks_per_ckpt=k, policy=policy)
    grad = jax.grad(lambda w, x: stack(w, x).sum())
    if before_the_fix:
        with pytest.raises(NotImplementedError, match=REFUSAL):
            export_for_gpu(grad, *args)
    else:
        assert export_for_gpu(grad, *args).platforms == ("cuda",)


@offloading
def test_forward_passes_for_a_gpu_are_accepted(policy, args):
    assert export_for_gpu(checkpoint_scan(block, policy=policy), *args).platforms == ("cuda",)


@pytest.mark.parametrize(
    "policy", ["everything", "dots", "save:q", jax.checkpoint_policies.save_only_these_names("q"), lambda *_, **__: False]
)
def test_policies_that_offload_nothing_are_accepted(policy, args):
    stack = checkpoint_scan(block, policy=policy)
    assert export_for_gpu(jax.grad(lambda w, x: stack(w, x).sum()), *args).platforms == ("cuda",)


@offloading
@pytest.mark.parametrize("k", [None, 1, 2])
def test_gradients_on_a_cpu_are_right(policy, k, args, x64):
    args = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), args)
    got = pull_back(checkpoint_scan(block, blocks_per_ckpt=k, policy=policy), *args)
    want = pull_back(lambda w, x: plain_loop(block, w, x), *args)
    assert_no_zero_leaf(want)
    assert relative_error(got, want) < 1e-12


# The guard itself, for JAX versions that are not installed.


def guarded(policy, version):
    """A step whose backward pass keeps what `policy` says, guarded as under JAX `version`."""
    policy = policies.get(policy)
    keep, _, mark = guard_offload(policy.for_tags({"q", "k"}), policy.may_offload, version)

    def step(w, x):
        (x,) = mark([x])
        (x,) = mark([jax.checkpoint(block, policy=keep)(w[0], x)])
        return x.sum()

    return step


@offloading
@pytest.mark.parametrize("version", [(0, 10, 2), (0, 11, 0)])
def test_old_versions_refuse(policy, version, args):
    with pytest.raises(NotImplementedError, match=REFUSAL):
        export_for_gpu(jax.grad(guarded(policy, version)), *args)


@offloading
@pytest.mark.parametrize("version", [(0, 11, 1), (0, 12, 0)])
def test_new_versions_accept(policy, version, args):
    assert export_for_gpu(jax.grad(guarded(policy, version)), *args).platforms == ("cuda",)


@pytest.mark.parametrize("policy", ["save:q", "everything", jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0)])
def test_the_guard_is_absent_where_nothing_is_offloaded(policy, version, args):
    grad = jax.grad(guarded(policy, version))
    assert "offload_guard" not in str(jax.make_jaxpr(grad)(*args))
    assert export_for_gpu(grad, *args).platforms == ("cuda",)


def test_the_guard_is_invisible_on_a_cpu(args):
    w, x = args
    xs = jnp.stack([x, x + 1])

    def results(step):
        yield jax.grad(step)(w, x)
        yield jax.jit(jax.vmap(jax.value_and_grad(step), in_axes=(None, 0)))(w, xs)
        yield jax.jit(lambda w, x: jax.jvp(step, (w, x), (w, x)))(w, x)

    for got, want in zip(results(guarded("offload:q", (0, 10, 2))), results(guarded("save:q", (0, 10, 2))), strict=True):
        assert relative_error(got, want) < 1e-6


# --- what enters a chunk, on the host -----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["scan", "reversal"])
@pytest.mark.parametrize(
    "knobs", [{}, {"blocks_per_ckpt": 1}, {"blocks_per_ckpt": 2}, {"blocks_per_ckpt": 2, "policy": "save:q"}]
)
def test_carries_on_the_host(engine, knobs, args, x64):
    args = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), args)
    got = pull_back(checkpoint_scan(block, offload_carry=True, engine=engine, **knobs), *args)
    want = pull_back(lambda w, x: plain_loop(block, w, x), *args)
    assert relative_error(got, want) < 1e-12


def test_carries_through_the_scan_engine_for_a_gpu(args):
    grad = jax.grad(lambda w, x: checkpoint_scan(block, offload_carry=True, engine="scan")(w, x).sum())
    if before_the_fix:
        with pytest.raises(NotImplementedError, match=REFUSAL + r".*engine='reversal'"):
            export_for_gpu(grad, *args)
    else:
        assert export_for_gpu(grad, *args).platforms == ("cuda",)


@pytest.mark.parametrize("engine", [{}, {"engine": "reversal"}], ids=str)
def test_carries_through_an_engine_that_is_right_for_a_gpu(engine, args):
    grad = jax.grad(lambda w, x: checkpoint_scan(block, offload_carry=True, **engine)(w, x).sum())
    assert export_for_gpu(grad, *args).platforms == ("cuda",)


def test_forward_mode_with_carries_on_the_host(args):
    w, x = args
    got = jax.jit(lambda w, x: jax.jvp(checkpoint_scan(block, offload_carry=True, engine="scan"), (w, x), (w, x)))(w, x)
    want = jax.jvp(lambda w, x: plain_loop(block, w, x), (w, x), (w, x))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("knobs", [{"offload_carry": True, "engine": "scan"}, {"policy": "offload:q"}], ids=str)
def test_without_jit(knobs, args):
    loss = lambda stack: lambda w, x: (stack(w, x) ** 2).sum()  # noqa: E731
    with jax.disable_jit():
        got = jax.grad(loss(checkpoint_scan(block, **knobs)), (0, 1))(*args)
    assert relative_error(got, jax.grad(loss(partial(plain_loop, block)), (0, 1))(*args)) < 1e-5


@pytest.mark.parametrize("policy", ["everything", "nothing"])
def test_policies_that_are_known_by_identity_stay(policy):
    keep = policies.get(policy).for_tags(())
    assert guard_offload(keep, may_offload=True, version=(0, 10, 2)).keep is keep


@pytest.mark.parametrize(
    "batched",
    [
        lambda f, xs: jax.vmap(jax.grad(f))(xs),
        lambda f, xs: jax.vmap(jax.jit(jax.grad(f)))(xs),
        lambda f, xs: jax.grad(lambda xs: jax.vmap(f)(xs).sum())(xs),
    ],
    ids=["vmap of grad", "vmap of jit", "grad of vmap"],
)
def test_batches_of_carries_on_the_host_are_refused(batched, args):
    w, x = args
    stack = checkpoint_scan(block, offload_carry=True, engine="reversal")
    with pytest.raises(NotImplementedError, match=r"offload_carry=True .* does not work under jax.vmap.*engine='scan'"):
        batched(lambda x: stack(w, x).sum(), x[None])
    assert jax.vmap(partial(stack, w))(x[None]).shape == (1, *x.shape)  # forward passes offload nothing


def test_nothing_to_take_to_the_host():
    with pytest.raises(ValueError, match=r"offload_carry=True moves what enters each chunk .* policy='dots' keeps"):
        checkpoint_scan(block, offload_carry=True, policy="dots")


def loop_inside(w, x):
    return lax.scan(lambda c, _: (block(w, c), None), x, length=2)[0]


INSIDE = r"inside a loop of the block \(scan at [^)]*test_offload\.py:\d+\)[\s\S]*'save:NAMES'[\s\S]*behind the loop"


@offloading
@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2}, {"engine": "reversal"}])
def test_a_loop_inside_the_block_is_refused_for_a_gpu_on_every_version(policy, knobs, args):
    stack = checkpoint_scan(loop_inside, policy=policy, **knobs)
    with pytest.raises(NotImplementedError, match=INSIDE):
        export_for_gpu(jax.grad(lambda w, x: stack(w, x).sum()), *args)
    assert export_for_gpu(stack, *args).platforms == ("cuda",)


def test_a_loop_inside_the_block_on_a_cpu(args):
    stack = checkpoint_scan(loop_inside, policy="offload:q")
    got, want = pull_back(stack, *args), pull_back(lambda w, x: plain_loop(loop_inside, w, x), *args)
    assert relative_error(got, want) < 1e-5


def test_a_stack_inside_the_block_is_such_a_loop(args):
    stack = checkpoint_scan(lambda w, x: checkpoint_scan(block)(w, x), policy="offload:q")
    w, x = args
    with pytest.raises(NotImplementedError, match=r"inside a loop of the block"):
        export_for_gpu(jax.grad(lambda w, x: stack(w, x).sum()), jnp.stack([w, w]), x)


def test_a_tag_behind_the_loop_is_no_offload_inside_it(args):
    behind = lambda w, x: checkpoint_name(lax.scan(lambda c, _: (c @ w, None), x, length=2)[0], "q")  # noqa: E731
    stack = checkpoint_scan(behind, policy="offload:q")
    grad = jax.grad(lambda w, x: jnp.sin(stack(w, x)).sum())
    if before_the_fix:
        with pytest.raises(NotImplementedError, match=REFUSAL):
            export_for_gpu(grad, *args)
    else:
        assert export_for_gpu(grad, *args).platforms == ("cuda",)


def test_checkpoint_blocks_of_blocks_with_a_loop(args):
    w, x = args
    run = lambda x: checkpoint_blocks([lambda x: loop_inside(w[0], x)] * 2, x, 2, policy="offload:q")[0].sum()  # noqa: E731
    if before_the_fix:
        with pytest.raises(NotImplementedError, match=REFUSAL):
            export_for_gpu(jax.grad(run), x)
    else:
        assert export_for_gpu(jax.grad(run), x).platforms == ("cuda",)
