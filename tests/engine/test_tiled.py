"""Blocks of which pieces are computed in slices: values, gradients, what is alive, what is summed how, what is refused."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_scan, explain
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine import tiled
from tests.support import QUICK, plain_loop, pull_back, random_like, relative_error, slice_small_values

N, T, D = 3, 12, 4


def block(w, x, *, mask, scale=1.0):
    """Attention, and then channels by rows: the first needs keys and values whole."""
    q, k, v = (x @ w["qkv"][i] for i in range(3))
    logits = checkpoint_name(q @ k.T * scale + jnp.log(mask), "logits")
    x = checkpoint_name(x + jax.nn.softmax(logits) @ v, "first")
    return x + jnp.tanh(jax.nn.silu(x @ w["up"]) @ w["down"])


W = {"qkv": jnp.zeros((N, 3, D, D)), "up": jnp.zeros((N, D, 24)), "down": jnp.zeros((N, 24, D))}
X = jnp.zeros((T, D))
SETTINGS = [
    {},
    {"policy": "everything"},
    {"policy": "dots"},
    {"policy": "save:logits"},
    {"policy": "cheap"},
    {"policy": "budget:0.3"},
    {"blocks_per_ckpt": 2, "policy": "nothing"},
    {"blocks_per_ckpt": 2},
    {"stages": "tags:first"},
    {"stages": 2},
    {"unroll": True},
    {"engine": "reversal"},
    {"engine": "reversal", "policy": "save:logits", "blocks_per_ckpt": 2},
    {"snapshots": 2},
    {"offload_carry": True, "engine": "reversal"},
]


def mask_of(x):
    return jnp.asarray(np.random.default_rng(3).uniform(0.2, 1.0, (1, x.shape[0])), x.dtype)


def gradients(fn, *args, **shared):
    """The value and all gradients, for a random cotangent."""

    def run(args, shared):
        value, vjp = jax.vjp(lambda args, shared: fn(*args, **shared), args, shared)
        return value, vjp(random_like(value, seed=1))

    return jax.jit(run, compiler_options=QUICK)(args, shared)


def in_float64(tree):
    return random_like(jax.tree.map(lambda a: a.astype("float64"), tree))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("setting", "tiles"), [*((s, 5) for s in SETTINGS), *((s, n) for s in SETTINGS[:3] for n in (2, T))], ids=str
)
def test_equals_the_plain_loop(setting, tiles, monkeypatch):
    w, x = in_float64((W, X))
    mask, scale = mask_of(x), jnp.float64(0.7)
    got = gradients(checkpoint_scan(block, tiles=tiles, **setting), w, x, mask=mask, scale=scale)
    want = gradients(lambda w, x, **shared: plain_loop(block, w, x, **shared), w, x, mask=mask, scale=scale)
    assert relative_error(got, want) < 1e-12
    monkeypatch.setattr(jax, "device_count", lambda: 8)  # then the entries of a slice are apart
    got = gradients(checkpoint_scan(block, tiles=tiles, **setting), w, x, mask=mask, scale=scale)
    assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("devices", [1, 8])
def test_entries_of_a_slice_are_apart_on_several_devices(devices, monkeypatch):
    """And neighbours on one: `[16 / 8, 8, ...]` or `[8, 16 / 8, ...]` before the slices are the first axis."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    w, x = random_like((W, jnp.zeros((16, D))))
    closed = jax.make_jaxpr(checkpoint_scan(block, tiles=8))(w, x, mask=mask_of(x))
    cut = [eqn.outvars[0].aval.shape for eqn in jx.equations(closed.jaxpr) if eqn.primitive.name == "reshape"]
    assert ((8, 2, D) in cut, (2, 8, D) in cut) == ((True, False) if devices == 1 else (False, True))


def sizes(fn, *args):
    """How many entries each value has in the jaxpr of a function, those of inner jaxprs included."""
    closed = jax.make_jaxpr(fn)(*args)
    return {int(np.prod(var.aval.shape)) for eqn in jx.equations(closed.jaxpr) for var in eqn.outvars}


@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_logits_never_exist_whole(engine):
    w, x = random_like((W, jnp.zeros((64, D))))
    mask = mask_of(x)

    def largest(**knobs):
        stack = checkpoint_scan(block, engine=engine, **knobs)
        return max(sizes(jax.grad(lambda w, x: stack(w, x, mask=mask).sum(), (0, 1)), w, x))

    assert largest(stages="auto") == 64 * 64
    assert largest(tiles=8) < 64 * 64 / 2


def test_what_a_policy_keeps_is_kept_for_all_slices():
    w, x = random_like((W, X))
    whole, sliced = (
        explain(checkpoint_scan(block, stages="tags:first", tiles=t, policy="save:logits"), w, x, mask=mask_of(x))
        for t in (None, 4)
    )
    assert sliced.slices and not whole.slices
    kept = [
        [(v.name, v.shape, v.bytes) for v in found.values if v.fate == "kept" and v.op != "input"]
        for found in (whole, sliced)
    ]
    assert kept[0] == kept[1] and kept[0][0][:2] == ("logits", (T, T))
    assert whole.stored_bytes == sliced.stored_bytes


def test_what_a_policy_offloads_is_computed_whole():
    w, x = random_like((W, X))
    found = explain(checkpoint_scan(block, tiles=4, policy="offload:logits"), w, x, mask=mask_of(x))
    assert [(v.name, v.shape) for v in found.values if v.fate == "offloaded"] == [("logits", (T, T))]
    assert found.slices and any("name" in whole for piece in found.slices for whole in piece.whole)


@pytest.mark.usefixtures("x64")
def test_integers_made_in_slices():
    def naming(w, x):
        x = block(w, x, mask=jnp.ones((1, T)))
        return x, jnp.argmax(jnp.tanh(x @ w["up"]), axis=1)

    w, x = in_float64((W, X))

    def loss(w, x, **knobs):
        y, names = checkpoint_scan(naming, has_aux=True, **knobs)(w, x)
        return jnp.sum(y**2) + names.sum()

    got, want = jax.value_and_grad(partial(loss, tiles=5))(w, x), jax.value_and_grad(loss)(w, x)
    assert relative_error(got, want) < 1e-12


@pytest.mark.usefixtures("x64")
def test_aux_per_block_and_integers():
    def counting(w, carry, *, mask, scale, names):
        x, n = carry
        y = block(w, x, mask=mask, scale=scale) + jax.nn.one_hot(names, D, dtype=x.dtype)
        return (y, n + 1), jnp.sum(y * y, axis=1)

    w, x = in_float64((W, X))
    shared = dict(mask=mask_of(x), scale=jnp.linspace(0.5, 1.0, N), names=jnp.arange(T) % D)

    def loss(w, x, scale, tiles):
        stack = checkpoint_scan(counting, tiles=tiles, has_aux=True, per_block=("scale",))
        (y, n), aux = stack(w, (x, 0), **{**shared, "scale": scale})
        return jnp.sum(y**3) + jnp.sum(aux**2) + n

    got, want = (jax.value_and_grad(loss, (0, 1, 2))(w, x, shared["scale"], tiles) for tiles in (5, None))
    assert relative_error(got, want) < 1e-12


class DropoutBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.Dropout(0.5, deterministic=False)(nn.Dense(D)(jnp.tanh(nn.Dense(64)(x))))
        weights = nn.Dropout(0.5, deterministic=False)(jax.nn.softmax(x @ x.T))
        return x + weights @ x


def test_linen_with_the_same_dropout():
    x = random_like(X)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = checkpoint_scan(DropoutBlock, N)().init(rngs, x)

    def run(**knobs):
        stack = checkpoint_scan(DropoutBlock, N, **knobs)()
        loss = lambda v: jnp.sum(jnp.sin(stack.apply(v, x, rngs={"dropout": jax.random.key(2)})) ** 2)  # noqa: E731
        return jax.value_and_grad(loss)(variables)

    assert relative_error(run(tiles=4), run()) < 1e-5


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.first, self.second = nnx.Linear(D, 32, rngs=rngs), nnx.Linear(32, D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return x + self.dropout(self.second(jnp.sin(self.first(x))))


def test_nnx():
    x = random_like(X)

    def run(**knobs):
        stack = checkpoint_scan(NnxBlock, N, **knobs)(rngs=nnx.Rngs(0))
        found = nnx.value_and_grad(lambda stack: jnp.sum(stack(x) ** 2))(stack)
        np.testing.assert_array_equal(stack.calls[...], np.ones(N))
        return jax.tree.leaves(found)

    assert relative_error(run(tiles=4), run()) < 1e-5


@pytest.mark.usefixtures("x64")
def test_transformations_of_the_scan_engine():
    w, x = in_float64((W, X))
    w = jax.tree.map(lambda a: 0.3 * a, w)  # or second derivatives are of 1e10, and ill conditioned
    stack, plain = checkpoint_scan(block, tiles=5), partial(plain_loop, block)
    many = random_like(jnp.zeros((2, T, D), x.dtype))

    def all_of(fn):
        run = partial(fn, mask=mask_of(x))
        loss = lambda x: jnp.sum(jnp.sin(run(w, x)))  # noqa: E731
        return {
            "vmap": jax.vmap(jax.grad(loss))(many),
            "jvp": jax.jvp(lambda x: run(w, x), (x,), (many[0],)),
            "hessian times vector": jax.jvp(jax.grad(loss), (x,), (many[0],)),
            "grad of grad": jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(x),
        }

    for name, got in all_of(stack).items():
        assert relative_error(got, all_of(plain)[name]) < 1e-12, name


def test_shared_gradients_are_summed_in_float32():
    """No further from the gradients of a run in float64 than without slices, times 1.1."""
    w, x = random_like((W, jnp.zeros((512, D))))
    w, x = jax.tree.map(lambda a: a.astype("bfloat16"), (w, x))

    def run(dtype, **knobs):
        stack = checkpoint_scan(block, **knobs)
        given = jax.tree.map(lambda a: a.astype(dtype), (w, x))
        loss = lambda w, x: jnp.sum(jnp.sin(stack(w, x, mask=jnp.ones((1, 512), dtype)).astype("float32")))  # noqa: E731
        return jax.tree.map(lambda a: np.asarray(a, np.float64), jax.grad(loss)(*given))

    with jax.enable_x64(True):
        want = run("float64")

    def distance(got):
        return sum(np.linalg.norm(a - b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))

    assert distance(run("bfloat16", tiles=64)) < 1.1 * distance(run("bfloat16"))


@pytest.mark.parametrize("engine", ["scan", "reversal"])
@pytest.mark.parametrize("both", ["one product", "two"])
def test_a_value_of_fewer_bits_that_is_needed_in_slices_and_whole(both, engine, x64):
    """Its conversion stays before the loop, where only a value that is needed whole is converted inside."""

    def one(w, x):
        h = (x * w).astype("float32")
        logits = jnp.einsum("qc,kc->qk", h, h) if both == "one product" else jnp.tanh(h) @ h.T
        return x + jnp.exp(jnp.sin(jnp.tanh(logits))).sum(-1, keepdims=True).astype(x.dtype) / 100

    w, x = random_like((jax.ShapeDtypeStruct((3, 1, 4), float), jax.ShapeDtypeStruct((64, 4), float)))
    got = pull_back(checkpoint_scan(one, tiles=4, engine=engine), w, x)
    assert relative_error(got, pull_back(lambda w, x: plain_loop(one, w, x), w, x)) < 1e-5  # of float32 inside


def test_a_slice_that_is_none_does_not_go_on(monkeypatch):
    monkeypatch.setattr(tiled, "resized", lambda shape, axis, size: (*shape, 1))
    with pytest.raises(AssertionError, match=r"a slice of \(.*\) along"):
        checkpoint_scan(block, tiles=4)(W, X, mask=jnp.ones((1, T)))


@pytest.mark.parametrize(
    "move", [lambda x: jnp.roll(x, 2, axis=1), lambda x: jnp.roll(x, 1, 0), lambda x: jnp.fft.fftshift(x, 1)]
)
def test_rolled_values(move, x64):
    """`jnp.roll` names its axis by an integer of NumPy."""

    def one(w, x):
        return x + move(jnp.exp(jnp.sin(x * w)))

    w, x = random_like((jax.ShapeDtypeStruct((3, 1, 6), float), jax.ShapeDtypeStruct((12, 6), float)))
    got = pull_back(checkpoint_scan(one, tiles=3), w, x)
    assert relative_error(got, pull_back(lambda w, x: plain_loop(one, w, x), w, x)) < 1e-12


def test_functions_of_one_text_and_other_derivatives(x64):
    """What was found for one is not believed of the other."""

    def stack(rule):
        @jax.custom_jvp
        def act(x):
            return jnp.tanh(x)

        act.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), rule(tangents[0])))
        return lambda w, x: x + act(jnp.sin(x @ w) @ w.T)

    w, x = random_like((jax.ShapeDtypeStruct((3, 4, 40), float), jax.ShapeDtypeStruct((20, 4), float)))
    for rule in (lambda t: 2 * t, lambda t: jnp.cumsum(t, 0), lambda t: 3 * t):
        one = stack(rule)
        got = pull_back(checkpoint_scan(one, tiles=5), w, x)
        assert relative_error(got, pull_back(lambda w, x, one=one: plain_loop(one, w, x), w, x)) < 1e-12


def test_only_tangents_are_converted():
    """A float32 copy of weights in fewer bits would be more than what slices save where they are a vocabulary's."""
    w, x = jax.tree.map(lambda a: a.astype("bfloat16"), random_like((W, X)))
    stack = checkpoint_scan(block, tiles=4)
    forward = jax.make_jaxpr(lambda w, x: stack(w, x, mask=jnp.ones((1, T), "bfloat16")))(w, x)
    widened = [eqn for eqn in jx.equations(forward.jaxpr) if eqn.primitive.name == "convert_element_type"]
    assert not [e for e in widened if e.outvars[0].aval.shape in {a.shape[1:] for a in jax.tree.leaves(W)}]


def test_runs_of_a_block_are_those_of_stages():
    def counted_runs(**knobs):
        runs = []

        @jax.custom_jvp
        def counted(x):
            return jax.pure_callback(lambda x: (runs.append(1), x)[1], jax.ShapeDtypeStruct((), "float32"), x)

        counted.defjvp(lambda primals, tangents: (counted(*primals), tangents[0]))

        def one(w, x):
            x = checkpoint_name(jnp.sin(w * x) * counted(x[0]), "first")
            return jnp.sin(jnp.cos(w * x))

        stack = checkpoint_scan(one, stages="tags:first", **knobs)
        jax.block_until_ready(jax.jit(jax.grad(lambda w: stack(w, jnp.ones(T)).sum()))(jnp.ones(N)))
        return len(runs) / N

    assert counted_runs() == counted_runs(tiles=4) == 3


@pytest.mark.parametrize("tiles", [0, -1, 1.5, True, "many", (2,)])
def test_what_tiles_may_be(tiles):
    with pytest.raises(ValueError, match=r"tiles, the slices .*, must be None, 'auto' or an integer of at least 1"):
        checkpoint_scan(block, tiles=tiles)


def test_tiles_beside_a_plan():
    with pytest.raises(ValueError, match="plan='auto' sets all knobs, and tiles=4 is given beside it"):
        checkpoint_scan(block, tiles=4, plan="auto")


def test_nothing_to_slice_is_a_note_that_names_what_is_in_the_way():
    stack = checkpoint_scan(lambda w, x: jnp.linalg.inv(x * w) + jnp.sin(x), tiles=4)
    with pytest.warns(UserWarning, match=r"tiles=4 found nothing to slice: .* \(float32\[5,5\].*\) is computed whole"):
        stack(jnp.ones((3, 1, 1)), jnp.eye(5))


def test_tags_between_which_nothing_can_be_sliced_are_a_note():
    def one(w, x):
        return checkpoint_name(jnp.linalg.inv(x * w), "inverse") + jnp.sin(x)

    stack = checkpoint_scan(one, stages="tags:inverse", tiles=4)
    with pytest.warns(UserWarning, match=r"tiles=4 found nothing to slice: .* is computed whole"):
        gradient = jax.grad(lambda w: stack(w, 2 * jnp.eye(5)).sum())(jnp.ones((3, 1, 1)))
    assert bool(jnp.isfinite(gradient).all())


def test_slices_that_would_be_too_small_are_a_note():
    stack = checkpoint_scan(block, tiles="auto")
    with pytest.warns(UserWarning, match=r"tiles='auto' found nothing to slice: .* large enough to keep a GPU busy"):
        stack(W, X, mask=jnp.ones((1, T)))


def test_side_effects_are_not_sliced():
    def talking(w, x):
        jax.debug.print("x {}", x.sum())
        return jnp.sin(x @ w)

    with pytest.raises(ValueError, match=r"talking has side effects .*, and tiles slices only blocks without"):
        checkpoint_scan(talking, tiles=2)(jnp.ones((3, 4, 4)), jnp.ones((2, 4)))


def test_explain_names_the_axis_and_the_slices(monkeypatch):
    slice_small_values(monkeypatch, 16)
    w, x = random_like((W, X))
    found = explain(checkpoint_scan(block, stages="tags:first", tiles="auto"), w, x, mask=mask_of(x), target="h200")
    piece = found.slices[0]
    assert (piece.number, piece.value, piece.shape, piece.axis, piece.size) == (1, "first", (T, D), 0, T)
    assert piece.whole_bytes == T * T * 4 and piece.slice_bytes * piece.count >= piece.whole_bytes
    assert (
        f"piece 1: first[12,4] (test_tiled.py:{piece.source.partition(':')[2]}) in {piece.count} slices along axis 0"
        in str(found)
    )
    assert found.to_json()["slices"][0]["count"] == piece.count
    whole = explain(checkpoint_scan(block, stages="tags:first"), w, x, mask=mask_of(x), target="h200")
    assert found.forward_runs == pytest.approx(whole.forward_runs, rel=0.02)
