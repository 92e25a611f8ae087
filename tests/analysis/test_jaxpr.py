import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

from jaxckpt import checkpoint_scan
from jaxckpt.analysis import flow, inlining, tagging
from jaxckpt.analysis import jaxpr as jx
from tests.support import random_like


def tagged(x):
    return jnp.sin(checkpoint_name(jnp.cos(x), "here"))


@jax.custom_vjp
def tagged_in_rule(x):
    return jnp.sin(x)


def _forward(x):
    kept = checkpoint_name(jnp.cos(x), "here")
    return jnp.sin(x), kept


tagged_in_rule.defvjp(_forward, lambda kept, ct: (ct * kept,))


@jax.custom_vjp
def tagged_in_primal(x):
    return tagged(x)


tagged_in_primal.defvjp(lambda x: (tagged(x), x), lambda x, ct: (ct,))


@jax.custom_jvp
def with_custom_jvp(x):
    return tagged(x)


with_custom_jvp.defjvp(lambda primals, tangents: (with_custom_jvp(*primals), tangents[0]))

NESTED = {
    "plainly": tagged,
    "in jit": jax.jit(tagged),
    "in scan": lambda x: lax.scan(lambda c, _: (tagged(c), None), x, length=2)[0],
    "in while": lambda x: lax.while_loop(lambda c: c[0] < 1, tagged, x),
    "in cond": lambda x: lax.cond(x[0] > 0, tagged, jnp.sin, x),
    "in checkpoint": jax.checkpoint(tagged),
    "in jit in checkpoint in scan": lambda x: lax.scan(lambda c, _: (jax.checkpoint(jax.jit(tagged))(c), None), x, length=2)[
        0
    ],
    "in vmap": jax.vmap(tagged),
    "in custom_jvp": with_custom_jvp,
    "in custom_vjp": tagged_in_primal,
    "in a custom_vjp's forward rule": tagged_in_rule,
    "in a rule in jit": jax.jit(tagged_in_rule),
    "in a rule in scan": lambda x: lax.scan(lambda c, _: (tagged_in_rule(c), None), x, length=2)[0],
    "in a rule in checkpoint": jax.checkpoint(tagged_in_rule),
}


@pytest.mark.parametrize("where", NESTED)
def test_tags_are_found(where):
    closed = jx.trace(NESTED[where], jnp.ones(3))
    assert tagging.tags(closed) == {"here"}


def test_all_tags_of_a_block_and_none_of_a_block_without():
    def fn(x, i):
        return checkpoint_name(x, "a") + jax.jit(lambda x: checkpoint_name(x, "b"))(x) + tagged_in_rule(x), i

    assert tagging.tags(jx.trace(fn, jnp.ones(3), 1)) == {"a", "b", "here"}
    assert tagging.tags(jx.trace(jnp.sin, jnp.ones(3))) == frozenset()


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, ct: (ct * 0.5,))


@jax.custom_jvp
def halved(x):
    return x


halved.defjvp(lambda primals, tangents: (primals[0], 0.5 * tangents[0]))

A, B = jnp.ones(3), jnp.ones(3)
in_checkpoint = jax.checkpoint(lambda a, b: (b, a * 2))
in_jit = jax.jit(lambda a, b: (b, a * 2))


@pytest.mark.parametrize(
    "fn, source",
    [
        (lambda a, b: (a, b), [0, 1]),
        (lambda a, b: (b, a), [1, 0]),
        (lambda a, b: (a, a), [0, 0]),
        (lambda a, b: (a + 0 * b, b), [None, 1]),
        (in_jit, [1, None]),
        (in_checkpoint, [1, None]),
        (jax.jit(in_checkpoint), [1, None]),
        (jax.checkpoint(in_jit), [1, None]),
        (lambda a, b: in_jit(*in_jit(b, a)), [None, None]),
        (lambda a, b: in_jit(in_jit(a, b)[0], a), [0, None]),
        (lambda a, b: (in_jit(a, 1.0)[0], b), [None, 1]),
        (lambda a, b: (jnp.ones(3), b), [None, 1]),
        (lambda a, b: (1.0, b), [None, 1]),
        (lambda a, b: (clipped(a), b), [None, 1]),
        (lambda a, b: (halved(a), b), [None, 1]),
        (lambda a, b: (jax.jit(clipped)(a), b), [None, 1]),
        (lambda a, b: (lax.stop_gradient(a), b), [None, 1]),
        (lambda a, b: (checkpoint_name(a, "tag"), b), [None, 1]),
        (lambda a, b: (lax.cond(a[0] > 0, lambda a, b: a, lambda a, b: b, a, b), b), [None, 1]),
    ],
)
def test_forwarded(fn, source):
    assert flow.forwarded(jx.trace(fn, A, B).jaxpr) == source


def merged(fn, *args):
    return inlining.merged(inlining.inlined(jx.trace(fn, *args)))


@pytest.mark.parametrize(
    "fn, left",
    [
        (lambda a, b: jnp.sin(a) * jnp.sin(a), ["sin", "mul"]),
        (lambda a, b: jnp.sin(a + b) + jnp.cos(a + b), ["add", "sin", "cos", "add"]),
        (lambda a, b: jnp.sin(a + b) + jnp.sin(b + a), ["add", "sin", "add", "sin", "add"]),  # equal, but not as they stand
        (lambda a, b: a * 0.0 + a * -0.0, ["mul", "mul", "add"]),
        (lambda a, b: a.astype("float16").sum() + a.astype("bfloat16").sum(), None),
        (lambda a, b: checkpoint_name(a, "one") + checkpoint_name(a, "two"), None),
        (lambda a, b: jax.jit(jnp.sin)(a) + jax.jit(jnp.sin)(a), ["sin", "add"]),
        (lambda a, b: lax.rng_uniform(0.0, 1.0, (3,)) * 0 + lax.rng_uniform(0.0, 1.0, (3,)) * 0, None),  # two draws
        (lambda a, b: clipped(a) + clipped(a), None),  # what has a derivative of its own is left alone
    ],
)
def test_what_is_computed_twice_is_merged(fn, left):
    before, after = inlining.inlined(jx.trace(fn, A, B)), merged(fn, A, B)
    if left is None:
        assert len(after.jaxpr.eqns) == len(before.jaxpr.eqns)
    else:
        assert [eqn.primitive.name for eqn in after.jaxpr.eqns] == left
    assert jx.as_function(after)(A, B)[0].tolist() == jx.as_function(before)(A, B)[0].tolist()


def test_merged_equations_are_known_by_number():
    before = inlining.inlined(jx.trace(lambda a, b: (jnp.sin(a) + b) * (jnp.sin(a) + b), A, B))
    after, numbers = inlining.merge(before)
    assert [eqn.primitive.name for eqn in before.jaxpr.eqns] == ["sin", "add", "sin", "add", "mul"]
    assert [eqn.primitive.name for eqn in after.jaxpr.eqns] == ["sin", "add", "mul"] and numbers == [0, 1, 0, 1, 2]


def test_what_is_computed_otherwise_is_not_merged():
    def fn(a):
        key = jax.random.key(0)
        with jax.threefry_partitionable(True):
            first = jax.random.bits(key, (5,))
        with jax.threefry_partitionable(False):
            return first, jax.random.bits(key, (5,))

    assert [eqn.primitive.name for eqn in merged(fn, A).jaxpr.eqns].count("random_bits") == 2


def test_side_effects_are_not_merged():
    def fn(a):
        jax.debug.print("{}", a)
        jax.debug.print("{}", a)
        return a

    assert len(merged(fn, A).jaxpr.eqns) == 2


@pytest.mark.parametrize("identity, factor", [(clipped, 0.5), (halved, 0.5), (lax.stop_gradient, 0.0), (lambda z: z, 1.0)])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("k", [None, 2])
def test_an_identity_with_a_gradient_of_its_own_keeps_it(identity, factor, jit, k):
    """Hoisted out of the loop like a true pass-through it would lose its gradient."""

    def block(w, x, z):
        return jnp.tanh(w * x), (jax.jit(identity) if jit else identity)(z)

    w, x, z = random_like((jnp.zeros((3, 4)), jnp.zeros(4), jnp.zeros(4)))
    stack = checkpoint_scan(block, blocks_per_ckpt=k)
    gradient = jax.grad(lambda z: stack(w, x, z)[1].sum())(z)
    np.testing.assert_array_equal(gradient, np.full(4, factor**3, np.float32))


def named_callback(x):
    return np.asarray(x)


def with_io_callback(x):
    return io_callback(named_callback, x, x)


@pytest.mark.parametrize(
    "fn, found",
    [
        (jnp.sin, []),
        (lambda x: jax.debug.callback(lambda _: None, x), []),
        (lambda x: jax.debug.callback(lambda _: None, x, ordered=True), []),
        (lambda x: jax.debug.print("{}", x), []),
        (lambda x: jax.pure_callback(named_callback, x, x), []),
        (with_io_callback, ["io_callback(named_callback)"]),
        (lambda x: io_callback(named_callback, x, x, ordered=True), ["io_callback(named_callback)"]),
        (jax.jit(with_io_callback), ["io_callback(named_callback)"]),
        (lambda x: lax.scan(lambda c, _: (with_io_callback(c), None), x, length=2), ["io_callback(named_callback)"]),
    ],
)
def test_impure_effects(fn, found):
    assert jx.impure_effects(jx.trace(fn, A)) == found


def test_equations_reach_into_every_nested_jaxpr():
    def fn(x):
        x = jax.jit(jnp.sin)(x)
        x = jax.checkpoint(jnp.cos)(x)
        x = lax.cond(x[0] > 0, jnp.tanh, jnp.exp, x)
        x, _ = lax.scan(lambda c, _: (jnp.log(c), None), x, length=2)
        return clipped(lax.while_loop(lambda c: c[0] < 0, jnp.sqrt, x))

    names = {eqn.primitive.name for eqn in jx.equations(jx.trace(fn, A).jaxpr)}
    assert {"sin", "cos", "tanh", "exp", "log", "sqrt", "scan", "while", "cond"} <= names


def test_as_function_runs_the_program_under_transformations():
    def fn(a, b):
        return {"sum": a + b, "product": (jnp.sin(a) * b,)}

    run = jx.as_function(jx.trace(fn, A, B))
    values = jax.tree.leaves(fn(A, 2 * B))
    assert all(map(np.array_equal, run(A, 2 * B), values))
    gradients = [jax.grad(lambda a, f=f: sum(map(jnp.sum, jax.tree.leaves(f(a, 2 * B)))))(A) for f in (run, fn)]
    np.testing.assert_allclose(*gradients)
    assert jax.vmap(run)(A, B)[0].shape == (3,)


def test_traced_values_that_a_function_closes_over_become_constants():
    def outer(scale):
        return jx.as_function(jx.trace(lambda a: a * scale, A))(A)[0].sum()

    assert jax.jit(jax.grad(outer))(2.0) == 3.0


@pytest.mark.parametrize(
    "leaf", [jnp.zeros((5, 2, 3)), np.zeros((5, 2, 3), np.float32), jax.ShapeDtypeStruct((5, 2, 3), "bfloat16")]
)
def test_slice_types(leaf):
    one = jx.slice_types({"leaf": leaf})["leaf"]
    assert (one.shape, one.dtype) == ((2, 3), leaf.dtype)


def test_slice_types_of_keys():
    one = jx.slice_types(jax.random.split(jax.random.key(0), 4))
    assert one.shape == () and jnp.issubdtype(one.dtype, jax.dtypes.prng_key)


KEY, SAME_KEY, OTHER_KEY = jax.random.key(0), jax.random.key(0), jax.random.key(1)
TABLE, SAME_TABLE, OTHER_TABLE = np.arange(3.0, dtype=np.float32), np.arange(3.0, dtype=np.float32), np.ones(3, np.float32)


def doubled(x):
    return 2 * x


@pytest.mark.parametrize(
    "a, b, same",
    [
        (doubled, lambda y: 2 * y, True),
        (doubled, lambda y: 3 * y, False),
        (doubled, lambda y: y + y, False),
        (lambda x: x * TABLE, lambda x: x * SAME_TABLE, True),
        (lambda x: x * TABLE, lambda x: x * OTHER_TABLE, False),
        (lambda x: x * jax.random.uniform(KEY), lambda x: x * jax.random.uniform(SAME_KEY), True),
        (lambda x: x * jax.random.uniform(KEY), lambda x: x * jax.random.uniform(OTHER_KEY), False),
        (lambda x: jax.pure_callback(named_callback, x, x), lambda x: jax.pure_callback(named_callback, x, x), True),
        (lambda x: clipped(x), lambda x: clipped(x), True),
    ],
)
def test_same_program(a, b, same):
    assert jx.same_program(jx.trace(a, A), jx.trace(b, A)) is same


def test_programs_of_other_types_differ():
    assert not jx.same_program(jx.trace(doubled, A), jx.trace(doubled, jnp.ones(4)))
    assert not jx.same_program(jx.trace(doubled, A), jx.trace(doubled, A.astype(jnp.bfloat16)))


@pytest.mark.parametrize("closed_over, given", [(0, 1), (1, 1), (3, 2), (1, 30)])
def test_what_a_custom_vjp_closes_over_cannot_be_differentiated(closed_over, given):
    tables = [np.full(3, 2.0 + i, np.float32) for i in range(closed_over)]

    def function(*xs):
        return sum(xs) * sum(tables, jnp.ones(3))

    run = jax.custom_vjp(function)
    run.defvjp(lambda *xs: (function(*xs), xs), lambda xs, ct: jax.vjp(function, *xs)[1](ct))
    (eqn,) = [e for e in jx.trace(run, *[jnp.ones(3)] * given).jaxpr.eqns if e.primitive.name.startswith("custom_vjp")]
    calls = []

    def bound(*inputs):
        calls.append(inputs)
        return list(eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params)))

    assert len(eqn.invars) == closed_over + given
    assert jx.differentiable(bound, [var.aval for var in eqn.invars]) == list(range(closed_over, closed_over + given))
    assert len(calls) <= 1 + 2 * closed_over * np.ceil(np.log2(len(eqn.invars) + 1))
