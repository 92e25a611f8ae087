import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jaxckpt import checkpoint_scan
from jaxckpt.analysis.jaxpr import equations
from tests.support import random_like

CARRY, HIDDEN, WEIGHT = (2, 4), (2, 6), (4, 6)
UNROLLS = [1, 2, True]


def block(w, x, *, mix):
    """Two products, with values of other shapes between them: the tag `h` is `HIDDEN`, what leaves is `CARRY`."""
    h = checkpoint_name(jnp.tanh(x @ w), "h")
    return jnp.sin(h @ mix)


def inputs(length):
    w, x, mix = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((length, *WEIGHT), CARRY, (6, 4)))
    return random_like((w, x, mix))


def stored(fn, *args):
    """The shapes of the floats that the forward pass of `fn` makes and stores for its backward pass, parameters apart."""
    jaxpr = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(fn, *args)[1]))(*args).jaxpr
    made = dict.fromkeys(v for v in jaxpr.outvars if not isinstance(v, Literal) and v not in jaxpr.invars)
    return Counter(v.aval.shape for v in made if jnp.issubdtype(v.aval.dtype, jnp.inexact) and v.aval.shape[-2:] != WEIGHT)


def stored_by(length, **knobs):
    stack = checkpoint_scan(block, **knobs)
    return stored(lambda w, x, mix: stack(w, x, mix=mix), *inputs(length))


def carries(stored_shapes, shape=CARRY):
    """How many values of `shape` there are, in arrays with any number of leading axes."""
    return sum(n * math.prod(s[: -len(shape)]) for s, n in stored_shapes.items() if s[-len(shape) :] == shape)


@pytest.mark.parametrize("policy, unroll", [("everything", 1), ("nothing", 2), ("dots", True), ("save:h", 1)])
@pytest.mark.parametrize("length, k", [(1, 1), (6, 1), (6, 2), (6, 6), (7, 2), (7, 3), (7, 6), (7, 7)])
def test_chunks_store_one_carry_each_whatever_the_policy(length, k, policy, unroll):
    found = stored_by(length, blocks_per_ckpt=k, policy=policy, unroll=unroll)
    assert carries(found) == math.ceil(length / k)
    assert sum(found.values()) == (1 if length % k == 0 else 2), found


@pytest.mark.parametrize("unroll", UNROLLS)
@pytest.mark.parametrize(
    "policy, per_block",
    [
        ("nothing", [CARRY]),
        ("save:h", [CARRY, HIDDEN]),
        ("except:h", [CARRY]),
        ("dots", [CARRY, CARRY, HIDDEN]),
        ("dots_no_batch", [CARRY, CARRY, HIDDEN]),
        ("dots+save:h", [CARRY, CARRY, HIDDEN, HIDDEN]),
        ("offload:h", [CARRY, HIDDEN]),
    ],
)
def test_without_chunks_each_block_stores_its_carry_and_what_the_policy_says(policy, per_block, unroll):
    found = stored_by(5, policy=policy, unroll=unroll)
    assert found == Counter((5, *shape) for shape in per_block)


def test_everything_stores_more_than_any_policy():
    found = stored_by(5, policy="everything")
    assert all(shape[0] == 5 for shape in found)
    assert carries(found) > 1 * 5 and carries(found, HIDDEN) >= 1 * 5


@pytest.mark.parametrize("k", [None, 2, 7])
@pytest.mark.parametrize("policy", ["everything", "nothing"])
def test_shared_inputs_are_never_stacked(k, policy):
    def with_bias(w, x, *, mix, bias):
        return block(w, x, mix=mix) * jnp.exp(bias).mean() + x * mix.mean()

    bias = jnp.ones((9, 11))
    stack = checkpoint_scan(with_bias, blocks_per_ckpt=k, policy=policy)
    found = stored(lambda w, x, mix, bias: stack(w, x, mix=mix, bias=bias), *inputs(7), bias)
    assert not [shape for shape in found if len(shape) > 2 and shape[-2:] in ((6, 4), bias.shape)]


def _with_inputs_passed(a, s, z, w):
    return jnp.tanh(a @ w @ s) * z.mean(), s, z


PASSING = {
    "plainly": lambda w, a, s, z: _with_inputs_passed(a, s, z, w),
    "in jit": lambda w, a, s, z: jax.jit(_with_inputs_passed)(a, s, z, w),
    "in checkpoint": lambda w, a, s, z: jax.checkpoint(_with_inputs_passed)(a, s, z, w),
    "in jit in checkpoint": lambda w, a, s, z: jax.checkpoint(jax.jit(_with_inputs_passed))(a, s, z, w),
    "in named_call": lambda w, a, s, z: jax.named_call(_with_inputs_passed, name="inner")(a, s, z, w),
}


@pytest.mark.parametrize("how", PASSING)
@pytest.mark.parametrize("k", [None, 1, 2, 3, 7])
def test_carries_passed_through_are_never_stacked(how, k):
    w, a, s, z = (jnp.ones(shape) for shape in ((7, *WEIGHT), CARRY, (6, 4), (3, 5)))
    found = stored(checkpoint_scan(PASSING[how], blocks_per_ckpt=k), w, a, s, z)
    assert carries(found) == math.ceil(7 / (k or 1))
    assert carries(found, s.shape) == carries(found, z.shape) == 0


class Runs:
    """Counts forward runs of a block, by a callback on a value of the carry: on others it would leave the loop."""

    def __init__(self):
        self.count = 0

    def __call__(self, w, x):
        jax.debug.callback(self._add_one, x.sum())
        return jnp.tanh(x @ w)

    def _add_one(self, _):
        self.count += 1

    def per_block(self, length, **knobs):
        w, x = random_like((jnp.zeros((length, 4, 4)), jnp.zeros(CARRY)))
        stack = checkpoint_scan(self, **knobs)
        jax.block_until_ready(jax.jit(jax.grad(lambda w: stack(w, x).sum()))(w))
        jax.effects_barrier()
        return self.count / length


@pytest.mark.parametrize(
    "length, k, unroll", [(1, 1, 1), (6, 1, 2), (6, 2, 1), (6, 2, 2), (6, 6, True), (7, 3, 1), (7, 4, 2)]
)
@pytest.mark.parametrize("policy, more_than_one", [("everything", 2), ("nothing", 3), ("dots", 3)])
def test_forward_runs_with_chunks(length, k, policy, more_than_one, unroll):
    runs = Runs().per_block(length, blocks_per_ckpt=k, policy=policy, unroll=unroll)
    assert runs == (2 if k == 1 else more_than_one)


@pytest.mark.parametrize("length, unroll", [(1, 1), (5, 1), (5, 2), (5, True)])
@pytest.mark.parametrize("policy, runs", [("everything", 1), ("nothing", 2), ("dots", 2)])
def test_forward_runs_without_chunks(length, policy, runs, unroll):
    assert Runs().per_block(length, policy=policy, unroll=unroll) == runs


@pytest.mark.parametrize("k, runs", [(None, 2), (3, 2)])
def test_forward_runs_under_the_default_policy(k, runs):
    assert Runs().per_block(6, blocks_per_ckpt=k) == runs


def test_one_block_per_chunk_is_one_program_whatever_the_policy():
    def program(policy):
        stack = checkpoint_scan(block, blocks_per_ckpt=1, policy=policy)
        return str(jax.make_jaxpr(jax.grad(lambda w, x, mix: stack(w, x, mix=mix).sum()))(*inputs(5)))

    assert program("everything") == program("nothing") == program("dots")


def elementwise_chain(w, x):
    """A block whose residuals are several times its carry."""
    for _ in range(4):
        x = jnp.sin(x) * x
    return x @ w


@pytest.fixture(scope="module")
def step():
    """Lowers the gradient of a stack of `elementwise_chain`s; each only once, since compiling is most of the time."""
    lowered = {}

    def lower(length, k=None, policy=None, unroll=1):
        key = (length, k, policy, unroll)
        if key not in lowered:
            stack = checkpoint_scan(elementwise_chain, blocks_per_ckpt=k, policy=policy, unroll=unroll)
            grad = jax.jit(jax.grad(lambda w, x: stack(w, x).sum(), argnums=(0, 1)))
            lowered[key] = grad.trace(jnp.ones((length, 4, 4)), jnp.ones((256, 4)))
        return lowered[key]

    return lower


def temporaries(traced):
    """Compiled temporary memory, in carries of 4 KiB."""
    return traced.lower().compile().memory_analysis().temp_size_in_bytes / (256 * 4 * 4)


@pytest.mark.parametrize("length, k", [(24, 4), (24, 5), (23, 5)])
def test_compiled_memory_follows_the_knobs(step, length, k):
    everything, nothing = temporaries(step(length, policy="everything")), temporaries(step(length, policy="nothing"))
    chunks = temporaries(step(length, k=k, policy="everything"))
    nested = temporaries(step(length, k=k, policy="nothing"))
    # All residuals of all blocks; one carry per block; one per chunk and one chunk's residuals, or carries. What one
    # block needs for its own backward pass, about 13 carries here, comes on top.
    assert everything > 8 * length
    assert length <= nothing <= length + 16
    assert nothing < chunks < everything * (k + 1) / length + length / k
    assert length / k <= nested <= length / k + k + 16


@pytest.mark.parametrize(
    "length, k, unroll", [(4, None, 2), (4, None, True), (5, None, 3), (7, None, 4), (7, 7, 4), (9, None, 5)]
)
def test_unrolling_does_not_undo_checkpointing(step, length, k, unroll):
    everything = temporaries(step(length, policy="everything", unroll=True))
    assert temporaries(step(length, k=k, policy="nothing", unroll=unroll)) < 0.7 * everything


@pytest.mark.parametrize(
    "k, policy",
    [(None, "everything"), (None, "nothing"), (None, "dots"), (1, None), (5, "everything"), (5, "nothing"), (3, None)],
)
def test_programs_do_not_grow_with_depth(step, k, policy):
    shallow, deep = step(10, k, policy), step(1000, k, policy)
    assert len(list(equations(deep.jaxpr.jaxpr))) == len(list(equations(shallow.jaxpr.jaxpr)))
    # Longer numbers, and nothing else.
    assert len(deep.lower().as_text()) < 1.05 * len(shallow.lower().as_text())


@pytest.mark.parametrize("k", [None, 4])
def test_compiled_programs_do_not_grow_with_depth(step, k):
    shallow, deep = (len(step(n, k, "nothing").lower().compile().as_text()) for n in (12, 1200))
    assert deep < 1.05 * shallow
