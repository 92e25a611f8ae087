"""The reversal engine: gradients, what it stores, how often it runs a block, and what it says it cannot do."""

import math
import random
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.extend.core import Literal

from jaxckpt import checkpoint_scan
from jaxckpt.analysis.jaxpr import equations
from jaxckpt.engine.schedule import least_advances
from tests.support import QUICK, plain_loop, random_like, relative_error

N = 7
reversed_scan = partial(checkpoint_scan, engine="reversal")


def block(w, x, *, mask, scale=1.0):
    h = checkpoint_name(jnp.tanh(x @ w["up"]) * mask, "h")
    return x + scale * jnp.sin(h @ w["down"]) + jnp.exp(-mask.sum()) * w["bias"]


W = {"up": jnp.zeros((N, 4, 5)), "down": jnp.zeros((N, 5, 4)), "bias": jnp.zeros((N, 1, 4))}


def inputs(dtype="float32"):
    return random_like(jax.tree.map(lambda a: a.astype(dtype), (W, jnp.zeros((3, 4)), jnp.zeros((3, 5)))))


def value_and_gradients(fn, *args, jit=True):
    """The value and all gradients, for a random cotangent."""

    def run(*args):
        value, vjp = jax.vjp(fn, *args)
        return value, vjp(random_like(value, seed=1))

    return (jax.jit(run, compiler_options=QUICK) if jit else run)(*args)


def of_stack(stack):
    return lambda w, x, mask: stack(w, x, mask=mask)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("policy", ["everything", "nothing", "dots", "save:h", "except:h"])
@pytest.mark.parametrize("k", [None, 1, 2, 3, N])
def test_equals_the_plain_loop(k, policy):
    got = value_and_gradients(of_stack(reversed_scan(block, blocks_per_ckpt=k, policy=policy)), *inputs("float64"))
    want = value_and_gradients(of_stack(partial(plain_loop, block)), *inputs("float64"))
    assert relative_error(got, want) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "k, snapshots", [(k, s) for k in (None, 2, 3) for s in range(1, math.ceil(N / (k or 1)) + 1)], ids=str
)
def test_snapshots_equal_the_plain_loop(k, snapshots, offload):
    stack = checkpoint_scan(block, blocks_per_ckpt=k, snapshots=snapshots, offload_carry=offload)
    got = value_and_gradients(of_stack(stack), *inputs("float64"))
    assert relative_error(got, value_and_gradients(of_stack(partial(plain_loop, block)), *inputs("float64"))) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "knobs", [{}, {"blocks_per_ckpt": 2}, {"blocks_per_ckpt": 3, "policy": "dots"}, {"snapshots": 2}], ids=str
)
def test_pieces_equal_the_plain_loop(knobs):
    got = value_and_gradients(of_stack(reversed_scan(block, stages="tags:h", **knobs)), *inputs("float64"))
    assert relative_error(got, value_and_gradients(of_stack(partial(plain_loop, block)), *inputs("float64"))) < 1e-12


def counting(w, carry, *, mask, drop):
    """A key and an integer in the carry, per-block values, aux of both kinds, a carry that is passed through."""
    x, key, n, same = carry
    key, own = jax.random.split(key)
    x = block(w, x, mask=mask * jax.random.bernoulli(own, 0.7, mask.shape) * drop) + same
    return (x, key, n + 1, same), {"norm": (x**2).sum(), "n": n}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "knobs", [{}, {"blocks_per_ckpt": 3}, {"blocks_per_ckpt": 2, "snapshots": 2}, {"policy": "dots"}], ids=str
)
def test_keys_integers_aux_and_per_block_arguments(knobs):
    w, x, mask = inputs("float64")
    drop = jnp.linspace(0.1, 1, N)

    def plain(w, x, mask, drop, same):
        carry, aux = (x, jax.random.key(0), 0, same), []
        for i in range(N):
            carry, a = counting(jax.tree.map(lambda leaf, i=i: leaf[i], w), carry, mask=mask, drop=drop[i])
            aux.append(a)
        return carry[0], carry[3], jnp.stack([a["norm"] for a in aux])

    def ours(w, x, mask, drop, same):
        stack = reversed_scan(counting, has_aux=True, per_block="drop", **knobs)
        (x, _, n, same), aux = stack(w, (x, jax.random.key(0), 0, same), mask=mask, drop=drop)
        assert n.dtype == aux["n"].dtype and aux["n"].shape == (N,)
        return x, same, aux["norm"]

    args = w, x, mask, drop, jnp.ones((3, 4)) / 8
    assert relative_error(value_and_gradients(ours, *args), value_and_gradients(plain, *args)) < 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2}, {"blocks_per_ckpt": 2, "policy": "nothing"}], ids=str)
def test_a_carry_that_does_not_move(knobs):
    def aux_of(w, x):
        return x, jnp.sin(x @ w["up"]) ** 2

    def plain(w, x):
        return x, jnp.stack([aux_of(jax.tree.map(lambda leaf, i=i: leaf[i], w), x)[1] for i in range(N)])

    w, x, _ = inputs("float64")
    got = value_and_gradients(reversed_scan(aux_of, has_aux=True, **knobs), w, x)
    assert relative_error(got, value_and_gradients(plain, w, x)) < 1e-12


def test_without_jit_too():
    stack = reversed_scan(block, blocks_per_ckpt=3)
    got = value_and_gradients(of_stack(stack), *inputs(), jit=False)
    assert relative_error(got, value_and_gradients(of_stack(stack), *inputs())) < 1e-5


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2, "policy": "nothing"}, {"blocks_per_ckpt": 7}], ids=str)
@pytest.mark.parametrize("other", ["scan engine", "plain loop"])
def test_the_same_bits(other, knobs):
    """But for gradients of what blocks share: the scan engine adds those of a chunk first."""
    if other == "scan engine" and knobs and jax.__version_info__ >= (0, 11):
        pytest.skip("XLA of JAX 0.12 rounds otherwise in the nested loops of the scan engine")
    *args, mask = inputs()
    reference = partial(plain_loop, block) if other == "plain loop" else checkpoint_scan(block, **knobs)
    ours, others = (
        value_and_gradients(lambda w, x, fn=fn: fn(w, x, mask=mask), *args)
        for fn in (reversed_scan(block, **knobs), reference)
    )
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=False):
        h = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(6)(x))
        self.sow("intermediates", "norm", (h**2).sum())
        return x + nn.BatchNorm(use_running_average=False)(nn.Dense(4)(jnp.tanh(h)))


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2}, {"snapshots": 2}], ids=str)
def test_linen_with_dropout_statistics_and_sow(knobs):
    x = random_like(jnp.zeros((3, 4)))

    def run(engine):
        stack = checkpoint_scan(Block, 5, engine=engine, **(knobs if engine == "reversal" else {}))()
        variables = stack.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

        def loss(params):
            y, new = stack.apply(
                variables | {"params": params},
                x,
                rngs={"dropout": jax.random.key(2)},
                mutable=["batch_stats", "intermediates"],
            )
            return (y * x).sum(), new

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    assert relative_error(run("reversal"), run("scan")) < 1e-5


def test_nnx_list():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return x + jnp.tanh(self.dense(x))

    layers = [Layer(nnx.Rngs(i)) for i in range(4)]
    x = random_like(jnp.zeros((3, 4)))
    loss = lambda stack: (stack(x) ** 2).sum()  # noqa: E731
    got = nnx.grad(loss)(reversed_scan(layers, blocks_per_ckpt=2))
    assert relative_error(got, nnx.grad(loss)(checkpoint_scan(layers))) < 1e-5


# --- what is stored and how often a block runs --------------------------------------------------------------------------


def stored(knobs, *wanted):
    """Shapes of the floats that the forward pass makes for the backward pass."""
    stack = of_stack(reversed_scan(block, **knobs))
    w, x, mask = inputs()
    where = {"w": 0, "x": 1, "mask": 2}
    argnums = [where[name] for name in wanted or where]

    def leaves(*args):
        values = [args[i] for i in argnums]

        def fn(*values):
            full = list(args)
            for i, value in zip(argnums, values, strict=True):
                full[i] = value
            return stack(*full)

        return jax.tree.leaves(jax.vjp(fn, *values)[1])

    jaxpr = jax.make_jaxpr(leaves)(w, x, mask).jaxpr
    made = dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal) and v not in jaxpr.invars)
    return sorted(v.aval.shape for v in made if jnp.issubdtype(v.aval.dtype, jnp.inexact))


@pytest.mark.parametrize(
    "knobs, shapes",
    [
        ({}, [(7, 3, 4)]),
        ({"policy": "save:h"}, [(7, 3, 4), (7, 3, 5)]),
        ({"blocks_per_ckpt": 1}, [(7, 3, 4)]),
        ({"blocks_per_ckpt": 2, "policy": "nothing"}, [(2, 3, 4), (3, 3, 4)]),
        ({"blocks_per_ckpt": 3, "policy": "save:h"}, [(2, 3, 4), (3, 3, 4), (3, 3, 5)]),
        ({"snapshots": 2}, [(3, 3, 4)]),
        ({"blocks_per_ckpt": 2, "policy": "nothing", "snapshots": 2}, [(2, 3, 4), (2, 3, 4)]),
    ],
    ids=str,
)
def test_snapshots_and_slots_are_what_is_stored(knobs, shapes):
    found = [shape for shape in stored(knobs) if shape != (3, 5) and shape != ()]
    assert found == sorted(shapes)


def test_parameters_in_another_dtype_are_not_stored():
    def mixed(w, x):
        return x + (x @ w["up"].astype(x.dtype)) @ w["down"].astype(x.dtype)

    args = {"up": jnp.ones((5, 4, 6)), "down": jnp.ones((5, 6, 4))}, jnp.ones((3, 4), jnp.bfloat16)
    stored = jax.tree.leaves(
        jax.eval_shape(lambda *args: jax.vjp(reversed_scan(mixed, policy="everything"), *args)[1], *args)
    )
    shapes = sorted(leaf.shape for leaf in stored if leaf.dtype == jnp.bfloat16)
    assert shapes == [(5, 3, 4), (5, 3, 6)]
    got, want = (
        jax.jit(jax.grad(lambda w, x, fn=fn: fn(w, x).astype("float32").sum(), (0, 1)))(*random_like(args))
        for fn in (reversed_scan(mixed, policy="everything"), partial(plain_loop, mixed))
    )
    assert relative_error(got, want) < 1e-2


def runs(length, **knobs):
    """How often a block runs in one gradient, counted through a value of the carry."""
    found = []

    def count(x):
        found.append(x)
        return x

    @jax.custom_jvp
    def counted(x):
        return jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="sequential")

    counted.defjvp(lambda primals, tangents: (counted(*primals), *tangents))
    stack = reversed_scan(lambda w, x: jnp.sin(w * counted(x)), **knobs)
    jax.block_until_ready(jax.jit(jax.value_and_grad(lambda w: stack(w, jnp.float32(1))))(jnp.ones(length)))
    return len(found)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_runs_without_snapshots(length):
    for k in {1, 2, 3, length} - {k for k in (2, 3) if k > length}:
        chunks = math.ceil(length / k)
        again = length - k  # the last chunk is not run again
        assert runs(length, blocks_per_ckpt=k, policy="everything") == (length + again if k > 1 else 2 * length)
        # What the last block of a chunk returns is known: it is the input of the next chunk.
        to_slots = again - (chunks - 1) if k > 1 else 0
        assert runs(length, blocks_per_ckpt=k, policy="nothing") == 2 * length + to_slots


@pytest.mark.parametrize("length, snapshots", [(1, 1), (5, 1), (12, 4), (20, 20)])
def test_runs_with_snapshots_where_all_is_kept(length, snapshots):
    assert runs(2 * length, blocks_per_ckpt=2, snapshots=snapshots) == 2 * (least_advances(length, snapshots) + length)


def fewest_runs(length, k, snapshots):
    """In closed form, for chunks of equal length in which nothing is kept."""
    chunks = length // k
    to_slots = (chunks - 1) * (
        k - 1
    )  # the last chunk keeps on its first run, and what a chunk's last block returns is known
    return k * least_advances(chunks, snapshots) + k + to_slots + length


def cases(count):
    rng = random.Random(0)
    for _ in range(count):
        k, chunks = rng.choice([1, 1, 2, 3]), rng.randint(1, 21)
        yield k * chunks, k, rng.randint(1, chunks)


@pytest.mark.parametrize("length, k, snapshots", list(cases(8)))
def test_runs_are_the_fewest(length, k, snapshots):
    assert runs(length, blocks_per_ckpt=k, snapshots=snapshots, policy="nothing") == fewest_runs(length, k, snapshots)


@pytest.mark.full
@pytest.mark.parametrize("length, k, snapshots", list(cases(200)))
def test_runs_are_the_fewest_in_full(length, k, snapshots):
    assert runs(length, blocks_per_ckpt=k, snapshots=snapshots, policy="nothing") == fewest_runs(length, k, snapshots)


@pytest.mark.full
@pytest.mark.parametrize("snapshots", [1, 4])
@pytest.mark.parametrize("length", range(1, 65))
def test_runs_are_the_fewest_for_all_lengths(length, snapshots):
    assert runs(length, snapshots=min(snapshots, length)) == fewest_runs(length, 1, min(snapshots, length))


def attending(w, x):
    scores = jnp.exp(x @ x.T)  # [R, R], a residual if it is differentiated
    return x + jnp.tanh(x @ w), scores


@pytest.mark.parametrize("use", [lambda y, aux: y.sum(), lambda y, aux: (y.sum(), aux)], ids=["dropped", "returned"])
@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 4}, {"policy": "everything"}], ids=str)
def test_aux_that_is_not_differentiated_costs_no_more_than_with_the_scan_engine(knobs, use):
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((16, 32, 32), (128, 32))]

    def temp_bytes(engine):
        stack = checkpoint_scan(attending, has_aux=True, engine=engine, **knobs)
        loss = lambda w, x: use(*stack(w, x))  # noqa: E731
        grad = jax.grad(loss, has_aux=isinstance(use(jnp.ones(1), 1), tuple))
        return jax.jit(grad).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes("reversal") <= 1.05 * temp_bytes("scan")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 3}, {"policy": "everything"}, {"snapshots": 2}], ids=str)
def test_aux_of_which_a_part_is_differentiated(knobs):
    def with_aux(w, x):
        y, scores = attending(w, x)
        return y, {"used": jnp.sin(scores).sum(), "unused": jnp.cos(scores), "whole": jnp.int32(1)}

    def loss(engine, knobs, w, x):
        y, aux = checkpoint_scan(with_aux, has_aux=True, engine=engine, **knobs)(w, x)
        return (y**2).sum() + (aux["used"] ** 2).sum(), aux

    args = random_like((jnp.zeros((5, 4, 4)), jnp.zeros((3, 4))))
    got, want = (
        jax.jit(jax.value_and_grad(partial(loss, *setting), (0, 1), has_aux=True))(*args)
        for setting in (("reversal", knobs), ("scan", {}))
    )
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2, "policy": "nothing"}, {"blocks_per_ckpt": 2}], ids=str)
def test_a_leaf_of_the_carry_that_only_aux_depends_on(knobs):
    def two(w, x, t):
        return (x + jnp.tanh(x @ w), t + jnp.sin(t @ w)), jnp.cos(t).sum()

    def loss(engine, knobs, w, x, t):
        (x, _), aux = checkpoint_scan(two, has_aux=True, engine=engine, **knobs)(w, x, t)
        return (x**2).sum(), aux

    args = random_like((jnp.zeros((5, 4, 4)), jnp.zeros((3, 4)), jnp.zeros((3, 4))))
    got, want = (
        jax.jit(jax.value_and_grad(partial(loss, *s), (0, 1, 2), has_aux=True))(*args)
        for s in (("reversal", knobs), ("scan", {}))
    )
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2}, {"policy": "everything"}], ids=str)
def test_a_leaf_of_the_carry_that_is_not_differentiated(knobs):
    """It may go through what has no derivative, as in the scan engine."""

    def slower(w, x, t, key, n):
        t = jax.lax.while_loop(lambda t: t > 0.5, lambda t: t * 0.7, t) + 0.4
        return x + jnp.tanh(x @ w) * t * jax.random.normal(key), t, jax.random.fold_in(key, n), n + 1

    def loss(engine, knobs, w):
        return checkpoint_scan(slower, engine=engine, **knobs)(w, x, jnp.float32(2), jax.random.key(0), 0)[0].sum()

    w, x = random_like((jnp.zeros((5, 4, 4)), jnp.zeros((3, 4))))
    got, want = (jax.jit(jax.grad(partial(loss, *s)))(w) for s in (("reversal", knobs), ("scan", {})))
    assert relative_error(got, want) < 1e-5


def test_frozen_parameters_have_no_gradient_buffer():
    w, x, mask = inputs()

    def written(*names):
        def loss(some):
            return reversed_scan(block)(w | some, x, mask=mask).sum()

        jaxpr = jax.make_jaxpr(jax.grad(loss))({name: w[name] for name in names}).jaxpr
        return [e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "dynamic_update_slice"]

    assert (7, 4, 5) in written("up") and (7, 1, 4) not in written("up")
    assert (7, 4, 5) not in written("bias") and (7, 1, 4) in written("bias")


# --- JAX's transformations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.linearize(f, x)[1](x),
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
        lambda f, x: jax.linearize(jax.vmap(f), x[None])[1](x[None]),
    ],
    ids=["jvp", "linearize", "jacfwd", "jvp of vmap", "linearize of vmap"],
)
def test_forward_mode_names_the_other_engine(transform, jit):
    w, x, mask = inputs()
    with pytest.raises(TypeError, match=r"no forward mode .*engine='scan'"):
        transform(jit(lambda x: reversed_scan(block)(w, x, mask=mask)), x)


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize(
    "second", [lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()), jax.hessian, lambda f: jax.jacrev(jax.grad(f))]
)
def test_second_derivatives_name_the_other_engine(second, jit):
    w, x, mask = inputs()
    with pytest.raises(TypeError, match=r"no second derivatives .*engine='scan'"):
        second(jit(lambda x: reversed_scan(block)(w, x, mask=mask).sum()))(x)


@pytest.mark.parametrize("knobs", [{"blocks_per_ckpt": 3}, {"snapshots": 2}], ids=str)
def test_second_derivatives_through_loops_name_the_other_engine(knobs):
    w, x, mask = inputs()
    loss = jax.grad(lambda x: reversed_scan(block, **knobs)(w, x, mask=mask).sum())
    with pytest.raises(TypeError, match=r"no second derivatives .*engine='scan'"):
        jax.grad(lambda x: (loss(x) ** 2).sum())(x)


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 3}, {"snapshots": 2}], ids=str)
def test_gradients_of_gradients_that_are_stopped(knobs):
    """As in a first-order inner step of meta-learning."""
    w, x, mask = inputs()

    def after_a_step(stack, w):
        loss = lambda w: (stack(w, x, mask=mask) ** 2).sum()  # noqa: E731
        step = jax.lax.stop_gradient(jax.grad(loss)(w))
        return loss(jax.tree.map(lambda w, g: w - 0.01 * g, w, step))

    got, want = (
        jax.jit(jax.grad(partial(after_a_step, stack)))(w)
        for stack in (reversed_scan(block, **knobs), checkpoint_scan(block))
    )
    assert relative_error(got, want) < 1e-5


def test_a_side_effect_happens_once_where_each_block_runs_once():
    seen = []

    def noting(w, x):
        return x + w * io_callback(lambda: (seen.append(1), np.float32(1))[1], jax.ShapeDtypeStruct((), jnp.float32))

    stack = reversed_scan(noting, policy="everything")
    jax.block_until_ready(jax.jit(jax.grad(lambda w: stack(w, jnp.float32(1))))(jnp.ones(3)))
    assert len(seen) <= 3


@pytest.mark.filterwarnings("ignore:snapshots=2 of single blocks")
def test_a_side_effect_between_snapshots_is_refused():
    def noting(w, x):
        return x + w * io_callback(lambda: np.float32(1), jax.ShapeDtypeStruct((), jnp.float32))

    stack = checkpoint_scan(noting, snapshots=2, policy="everything")
    with pytest.raises(ValueError, match=r"has a side effect, io_callback\("):
        stack(jnp.ones(3), jnp.float32(1))


def test_an_ordered_side_effect_beside_offload_is_refused():
    def talking(w, x):
        jax.debug.print("{}", x, ordered=True)
        return w * x

    with pytest.raises(ValueError, match=r"talking has a side effect in order, .*Write ordered=False"):
        checkpoint_scan(talking, offload_carry=True)(jnp.ones(3), jnp.float32(1))


@pytest.mark.parametrize("knobs", [{"engine": "scan"}, {"engine": "reversal"}, {"snapshots": 2}], ids=str)
def test_nans_are_found(knobs):
    """`jax_debug_nans` needs no engine of its own."""
    stack = checkpoint_scan(lambda w, x: x + jnp.sqrt(0 * w), **knobs)  # the root's derivative at 0 is infinite, times 0
    gradient = jax.jit(jax.grad(lambda w: stack(w, jnp.ones(3)).sum()))
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        gradient(jnp.ones((3, 3)))


@pytest.mark.parametrize("knobs", [{}, {"policy": "everything"}, {"blocks_per_ckpt": 2}], ids=str)
def test_what_is_behind_a_stop_gradient_may_go_through_what_has_no_derivative(knobs):
    def noting(w, x, h):
        fixed = jax.lax.stop_gradient(jnp.abs(jnp.sin(h) + x))
        return (x + jnp.tanh(x @ w) * h, fixed), {"fixed": fixed.sum(), "moving": jnp.sin(x).sum()}

    def loss(engine, knobs, w, x):
        (y, h), aux = checkpoint_scan(noting, has_aux=True, engine=engine, **knobs)(w, x, jax.lax.stop_gradient(x))
        h = jax.lax.while_loop(lambda h: jnp.max(h) > 0.1, lambda h: h / 2, h + aux["fixed"].sum())
        return (y * h).sum() + aux["moving"].sum()

    args = random_like((jnp.zeros((5, 4, 4)), jnp.zeros((4, 4))))
    got, want = (jax.jit(jax.grad(partial(loss, *s), (0, 1)))(*args) for s in (("reversal", knobs), ("scan", {})))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 2}, {"snapshots": 2}], ids=str)
def test_collectives_along_an_axis_of_vmap(knobs):
    def centred(w, x):
        return x + jnp.tanh(x @ w) - jax.lax.pmean(jnp.sin(x @ w), "batch")

    w, xs = random_like((jnp.zeros((5, 4, 4)), jnp.zeros((3, 2, 4))))

    def inside(stack):
        gradient = jax.grad(lambda w, x: (stack(w, x) ** 2).sum())
        return jax.vmap(gradient, (None, 0), axis_name="batch")(w, xs)

    assert relative_error(inside(reversed_scan(centred, **knobs)), inside(checkpoint_scan(centred))) < 1e-5
    outside = jax.vmap(partial(reversed_scan(centred, **knobs), w), axis_name="batch")
    with pytest.raises(NotImplementedError, match=r"along the axis 'batch' of a jax.vmap .* write engine='scan'"):
        jax.grad(lambda xs: outside(xs).sum())(xs)


@pytest.mark.parametrize("knobs", [{}, {"blocks_per_ckpt": 3}, {"snapshots": 2}, {"stages": "tags:h"}], ids=str)
def test_vmap(knobs):
    w, x, mask = inputs()
    xs = jnp.stack([x, 2 * x, -x])
    gradients = jax.grad(lambda w, x: (reversed_scan(block, **knobs)(w, x, mask=mask) ** 2).sum(), (0, 1))
    got = jax.jit(jax.vmap(gradients, (None, 0)))(w, xs)
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gradients(w, x) for x in xs))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize(
    "knobs", [{}, {"blocks_per_ckpt": 3}, {"snapshots": 2}, {"policy": "dots"}, {"stages": "tags:h"}], ids=str
)
def test_inside_a_checkpoint_and_a_scan(knobs):
    w, x, mask = inputs()

    def loss(stack, w, x):
        def twice(x, _):
            return jax.checkpoint(lambda x: stack(w, x, mask=mask))(x), None

        return (jax.lax.scan(twice, x, None, length=2)[0] ** 2).sum()

    got, want = (
        jax.jit(jax.grad(partial(loss, stack), (0, 1)))(w, x)
        for stack in (reversed_scan(block, **knobs), checkpoint_scan(block))
    )
    assert relative_error(got, want) < 1e-5
