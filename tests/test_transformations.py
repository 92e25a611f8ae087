"""What works on a function works on a stack of it: every transformation, for each way to checkpoint."""

import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxckpt import checkpoint_scan
from tests.support import QUICK, assert_no_zero_leaf, plain_loop, random_like, relative_error

SCAN = [{"blocks_per_ckpt": k, "policy": policy} for k in (None, 2) for policy in ("nothing", "everything", "dots")]
REVERSAL = [{**knobs, "engine": "reversal"} for knobs in SCAN] + [{"snapshots": 2}]
SETTINGS = SCAN + REVERSAL
settings = pytest.mark.parametrize("knobs", SETTINGS, ids=lambda knobs: " ".join(map(str, knobs.values())))
LENGTH, SHAPE = 3, (2, 4)

quick_jit = partial(jax.jit, compiler_options=QUICK)


def block(p, x, *, mask):
    return x + jnp.tanh(x @ p["w"] + p["b"]) * mask


@pytest.fixture
def args(x64):
    params = {"w": jnp.zeros((LENGTH, 4, 4)), "b": jnp.zeros((LENGTH, 1, 4))}
    return random_like((params, jnp.zeros(SHAPE), jnp.zeros((2, 1))))


def loop(p, x, mask):
    return plain_loop(block, p, x, mask=mask)


def stack_of(knobs):
    stack = checkpoint_scan(block, **knobs)
    return lambda p, x, mask: stack(p, x, mask=mask)


def scalar(fn):
    """A loss whose gradients and second derivatives are not zero."""
    return lambda *args: jnp.sum(jnp.sin(fn(*args)) * jnp.arange(1.0, 9.0).reshape(SHAPE))


def linearized(fn):
    def run(*args):
        value, tangent_map = jax.linearize(fn, *args)
        return value, tangent_map(*random_like(args, seed=5))

    return run


def linear_transposed(fn):
    def run(p, x, mask):
        _, tangent_map = jax.linearize(lambda x: fn(p, x, mask), x)
        return jax.linear_transpose(tangent_map, x)(random_like(x, seed=6))

    return run


def batched(fn, axes):
    def run(p, x, mask):
        several = [jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1, -leaf]), arg) for arg in (p, x, mask)]
        given = [s if axis == 0 else arg for s, axis, arg in zip(several, axes, (p, x, mask), strict=True)]
        return jax.vmap(fn, in_axes=axes)(*given)

    return run


TRANSFORMATIONS = {
    "call": lambda f: f,
    "jit": jax.jit,
    "grad": lambda f: jax.grad(scalar(f), argnums=(0, 1, 2)),
    "value_and_grad of jit": lambda f: jax.value_and_grad(jax.jit(scalar(f)), argnums=(0, 1, 2)),
    "jvp": lambda f: lambda *args: jax.jvp(f, args, random_like(args, seed=4)),
    "linearize": linearized,
    "linear_transpose": linear_transposed,
    "jacfwd": lambda f: jax.jacfwd(f, argnums=2),
    "jacrev": lambda f: jax.jacrev(f, argnums=2),
    "hessian": lambda f: jax.hessian(scalar(f), argnums=2),
    "grad of grad": lambda f: jax.grad(
        lambda *args: jnp.sum(jnp.sin(jax.grad(scalar(f), argnums=1)(*args))), argnums=(0, 1)
    ),
    "vmap of all": lambda f: batched(f, (0, 0, 0)),
    "vmap of the carry": lambda f: batched(f, (None, 0, None)),
    "vmap of grad": lambda f: batched(jax.grad(scalar(f), argnums=(0, 1)), (None, 0, 0)),
    "grad of vmap": lambda f: jax.grad(
        lambda *args: jnp.sum(jnp.sin(batched(f, (0, None, None))(*args))), argnums=(0, 1, 2)
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(scalar(f)), argnums=(0, 1)),
}

NOT_REVERSED = ("jvp", "linearize", "jacfwd", "hessian", "grad of grad")


@pytest.fixture(scope="module")
def of_the_loop():
    """What the plain loop gives under a transformation, compiled once for all settings."""
    known = {}

    def reference(transformation, args):
        if transformation not in known:
            known[transformation] = quick_jit(TRANSFORMATIONS[transformation](loop))(*args)
            assert_no_zero_leaf(known[transformation])
        return known[transformation]

    return reference


@settings
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_equals_the_loop_under(transformation, knobs, args, of_the_loop):
    if knobs in REVERSAL and transformation in NOT_REVERSED:
        with pytest.raises(TypeError, match="engine='scan'"):
            quick_jit(TRANSFORMATIONS[transformation](stack_of(knobs)))(*args)
        return
    got = quick_jit(TRANSFORMATIONS[transformation](stack_of(knobs)))(*args)
    assert relative_error(got, of_the_loop(transformation, args)) < 1e-12


@settings
@pytest.mark.parametrize("jit", ["outside", "disabled"])
def test_equals_the_loop_without_jit(jit, knobs, args, of_the_loop):
    with jax.disable_jit(jit == "disabled"):
        got = TRANSFORMATIONS["grad"](stack_of(knobs))(*args)
    assert relative_error(got, of_the_loop("grad", args)) < 1e-12


@settings
def test_no_tracer_leaks(knobs, args):
    with jax.checking_leaks():
        jax.jit(jax.grad(scalar(stack_of(knobs))))(*args)
        jax.jit(jax.vmap(stack_of(knobs), in_axes=(None, 0, None))).lower(args[0], args[1][None], args[2])


@settings
def test_eval_shape(knobs, args):
    shapes = jax.eval_shape(jax.grad(scalar(stack_of(knobs))), *args)
    assert shapes == jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args[0])


@settings
def test_donated_parameters_are_updated_in_place(knobs, args):
    stack = stack_of(knobs)

    def update(p, x, mask):
        return jax.tree.map(lambda p, g: p - 0.1 * g, p, jax.grad(scalar(stack))(p, x, mask))

    want = jax.jit(update)(*args)
    step = jax.jit(update, donate_argnums=0)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(args[0]))
    assert step.lower(*args).compile().memory_analysis().alias_size_in_bytes == size
    params = jax.tree.map(jnp.copy, args[0])
    got = step(params, *args[1:])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert relative_error(got, want) < 1e-12


@settings
def test_traced_once_per_signature(knobs, args):
    traced = []

    def noting(p, x, *, mask):
        traced.append(x.shape)
        return block(p, x, mask=mask)

    stack = checkpoint_scan(noting, **knobs)
    step = jax.jit(jax.grad(scalar(lambda p, x, mask: stack(p, x, mask=mask))))
    for _ in range(3):
        step(*args)
    assert traced == [SHAPE]


@settings
@pytest.mark.parametrize("under", ["grad", "jvp", "vmap", "scan"])
def test_traced_values_that_the_block_closes_over(under, knobs, args):
    """Parameters may reach a block by closure: they are shared, and have gradients."""
    if knobs in REVERSAL and under == "jvp":
        pytest.skip("no forward mode")
    params, x, mask = args

    def with_scale(runner):
        def run(scale):
            return jnp.sum(jnp.sin(runner(lambda p, x, *, mask: block(p, x, mask=mask) * scale)))

        return run

    def stack(block):
        return checkpoint_scan(block, **knobs)(params, x, mask=mask)

    transform = {
        "grad": jax.grad,
        "jvp": lambda f: lambda s: jax.jvp(f, (s,), (1.0,)),
        "vmap": lambda f: lambda s: jax.vmap(jax.grad(f))(s + jnp.arange(3.0)),
        "scan": lambda f: lambda s: jax.lax.scan(lambda c, _: (0.1 * jnp.sin(jax.grad(f)(c)), None), s, length=2)[0],
    }[under]
    scale = jnp.float64(0.7)
    got = quick_jit(transform(with_scale(stack)))(scale)
    want = quick_jit(transform(with_scale(lambda block: plain_loop(block, params, x, mask=mask))))(scale)
    assert_no_zero_leaf(want)
    assert relative_error(got, want) < 1e-12


# Several devices have to be asked for before JAX starts, hence a process of its own. It prints one line per setting.

ON_FOUR_DEVICES = """
    import sys
    from functools import partial

    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    from tests import test_transformations as here
    from tests.support import relative_error

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert jax.device_count() == 4
    params = {"w": jnp.zeros((here.LENGTH, 4, 4)), "b": jnp.zeros((here.LENGTH, 1, 4))}
    p, x, mask = here.random_like((params, jnp.zeros((8, 4)), jnp.zeros((8, 1))))


    def loss(fn, p, x, mask):
        return jnp.sum(jnp.sin(fn(p, x, mask)))


    def gradients(loss):
        return here.quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


    def data_parallel(kind, fn):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        with jax.set_mesh(mesh):
            args = jax.device_put(p, everywhere), jax.device_put(x, rows), jax.device_put(mask, rows)
            value, grads = gradients(partial(loss, fn))(*args)
            assert jax.tree.leaves(grads[0])[0].sharding.is_fully_replicated
            assert tuple(grads[1].sharding.spec)[0] == "data"
        return jax.device_get((value, grads))


    def shard_map(fn):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

        def on_shard(p, x, mask):
            return lax.psum(loss(fn, p, x, mask), "data")

        specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=P())
        return jax.device_get(gradients(jax.shard_map(on_shard, mesh=mesh, **specs))(p, x, mask))


    def becomes_varying(fn):
        # The first carry is the same on all devices, and the mask makes it differ.
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

        def on_shard(p, x, mask):
            return lax.psum(loss(fn, p, x, mask), "data")

        specs = dict(in_specs=(P(), P(), P("data")), out_specs=P())
        return jax.device_get(gradients(jax.shard_map(on_shard, mesh=mesh, **specs))(p, x[:2], mask))


    def four_times(fn):
        return lambda p, x, mask: jnp.concatenate([fn(p, x, mask[i : i + 2]) for i in (0, 2, 4, 6)])


    cases = {
        "explicit": (partial(data_parallel, AxisType.Explicit), lambda fn: gradients(partial(loss, fn))(p, x, mask)),
        "auto": (partial(data_parallel, AxisType.Auto), lambda fn: gradients(partial(loss, fn))(p, x, mask)),
        "shard_map": (shard_map, lambda fn: gradients(partial(loss, fn))(p, x, mask)),
        "becomes_varying": (becomes_varying, lambda fn: gradients(partial(loss, four_times(fn)))(p, x[:2], mask)),
    }
    run, reference = cases[sys.argv[1]]
    want = jax.device_get(reference(here.loop))
    for knobs in here.SETTINGS:
        print(*knobs.values(), relative_error(run(here.stack_of(knobs)), want))
"""


@pytest.mark.parametrize("case", ["explicit", "auto", "shard_map", "becomes_varying"])
def test_on_four_devices(case):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_FOUR_DEVICES), case],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors = {setting: float(error) for setting, error in (line.rsplit(" ", 1) for line in done.stdout.splitlines())}
    assert len(errors) == len(SETTINGS)
    assert not {setting: error for setting, error in errors.items() if not error < 1e-12}
