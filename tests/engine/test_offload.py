import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_scan, policies
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


def test_without_jit(args):
    got_and_want = []
    for policy in ("offload:q", "save:q"):
        with jax.disable_jit():
            got_and_want.append(pull_back(checkpoint_scan(block, policy=policy), *args))
    assert relative_error(*got_and_want) < 1e-6


# The guard itself, for JAX versions that are not installed.


def guarded(policy, version):
    """A step whose backward pass keeps what `policy` says, guarded as under JAX `version`."""
    policy = policies.get(policy)
    keep, mark = guard_offload(policy.for_tags({"q", "k"}), policy, version)

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
