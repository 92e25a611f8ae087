"""Blocks that are cut into pieces: gradients, what is kept, how often is run, and what is refused."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint, checkpoint_scan, explain
from tests.support import QUICK, plain_loop, random_like, relative_error

N = 4


def block(w, x, *, mask, scale=1.0):
    x = checkpoint_name(x + jnp.sin(jnp.sin(x @ w["up"]) @ w["down"]) * mask, "first")
    return x + scale * jnp.tanh(jax.nn.relu(x @ w["up"]) @ w["down"])


W = {"up": jnp.zeros((N, 6, 24)), "down": jnp.zeros((N, 24, 6))}
SETTINGS = [
    {},
    {"policy": "everything"},
    {"policy": "dots"},
    {"policy": "save:first"},
    {"blocks_per_ckpt": 2, "policy": "nothing"},
    {"blocks_per_ckpt": 2},
    {"blocks_per_ckpt": 3, "policy": "dots"},
    {"blocks_per_ckpt": 1},
    {"unroll": True},
]


def gradients(fn, *args, **shared):
    """The value and all gradients, for a random cotangent."""

    def run(args, shared):
        value, vjp = jax.vjp(lambda args, shared: fn(*args, **shared), args, shared)
        return value, vjp(random_like(value, seed=1))

    return jax.jit(run, compiler_options=QUICK)(args, shared)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stages", ["auto", 2, "tags:first"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equals_the_plain_loop(setting, stages):
    w, x = random_like(jax.tree.map(lambda a: a.astype("float64"), (W, jnp.zeros((5, 6)))))
    mask = random_like(jnp.zeros((5, 1)), seed=3)
    got = gradients(checkpoint_scan(block, stages=stages, **setting), w, x, mask=mask)
    want = gradients(lambda w, x, mask: plain_loop(block, w, x, mask=mask), w, x, mask=mask)
    assert relative_error(got, want) < 1e-12


@pytest.mark.usefixtures("x64")
def test_aux_per_block_and_integers_in_the_carry():
    def counting(w, carry, *, scale):
        x, n = carry
        y = block(w, x, mask=jnp.ones_like(x), scale=scale)
        return (y, n + 1), jnp.sum(y * y)

    w, x = random_like(jax.tree.map(lambda a: a.astype("float64"), (W, jnp.zeros((5, 6)))))
    scale = jnp.linspace(0.5, 1.0, N)
    settings = {"has_aux": True, "per_block": ("scale",)}

    def loss(w, x, scale, stages):
        stack = checkpoint_scan(counting, stages=stages, blocks_per_ckpt=2, policy="nothing", **settings)
        (y, n), aux = stack(w, (x, 0), scale=scale)
        return jnp.sum(y**3) + jnp.sum(aux) + n

    got, want = (jax.value_and_grad(loss, argnums=(0, 1, 2))(w, x, scale, stages) for stages in ("auto", None))
    assert relative_error(got, want) < 1e-12


class DropoutBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = checkpoint_name(x + nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x)), "first")
        return nn.BatchNorm(use_running_average=False)(x + nn.Dropout(0.5, deterministic=False)(jnp.sin(nn.Dense(8)(x))))


def test_linen_with_dropout_and_batch_statistics():
    x = random_like(jnp.zeros((4, 8)))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}

    def run(stages):
        stack = checkpoint_scan(DropoutBlock, 3, stages=stages)()
        variables = stack.init(rngs, x)

        def loss(params):
            given = {**variables, "params": params}
            y, updates = stack.apply(given, x, rngs={"dropout": jax.random.key(2)}, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y) ** 2), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    assert relative_error(run("tags:first"), run(None)) < 1e-5


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.first, self.second = nnx.Linear(8, 32, rngs=rngs), nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        x = checkpoint_name(x + self.second(jnp.sin(self.first(x))), "first")
        return x + self.second(jnp.cos(self.first(x)))


def test_nnx():
    x = random_like(jnp.zeros((4, 8)))

    def run(stages):
        stack = checkpoint_scan(NnxBlock, 3, stages=stages)(rngs=nnx.Rngs(0))
        return nnx.value_and_grad(lambda stack: jnp.sum(stack(x) ** 2))(stack)

    got, want = run("auto"), run(None)
    assert relative_error(jax.tree.leaves(got), jax.tree.leaves(want)) < 1e-5


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_values_that_vary_over_devices_and_values_that_do_not(engine):
    def both(w, x, *, mask):
        scale = jnp.sin(mask)  # the same on all devices, and crosses the cut
        return block(w, x, mask=scale, scale=scale)

    w, x, mask = random_like(jax.tree.map(lambda a: a.astype("float64"), (W, jnp.zeros((5, 6)), jnp.zeros((1, 6)))))
    stack = checkpoint_scan(both, stages="tags:first", engine=engine)
    shard_map = jax.shard_map(
        lambda w, x, mask: stack(w, x, mask=mask),
        mesh=jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(P(), P("data"), P()),
        out_specs=P("data"),
    )
    got = gradients(shard_map, w, x, mask)
    assert relative_error(got, gradients(lambda w, x, mask: plain_loop(both, w, x, mask=mask), w, x, mask)) < 1e-12


@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_collectives_are_no_side_effect(engine):
    def mixing(w, x, *, mask):
        return block(w, x + jax.lax.pmean(x, "batch"), mask=mask)

    w, x = random_like((W, jnp.zeros((2, 5, 6))))
    loss = lambda x, stages: checkpoint_scan(mixing, stages=stages, engine=engine)(w, x, mask=jnp.ones((5, 1))).sum()  # noqa: E731
    got, want = (jax.vmap(jax.grad(loss), (0, None), axis_name="batch")(x, stages) for stages in ("tags:first", None))
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("piece, in_stages", [(0, 3), (1, 2)])  # nothing is entered behind the last piece
def test_runs_of_a_block(piece, in_stages):
    def counted_runs(**knobs):
        runs = []

        @jax.custom_jvp
        def counted(x):
            return jax.pure_callback(lambda x: (runs.append(1), x)[1], jax.ShapeDtypeStruct((), "float32"), x)

        counted.defjvp(lambda primals, tangents: (counted(*primals), tangents[0]))

        def block(w, x):
            x = checkpoint_name(jnp.sin(w * (counted(x) if piece == 0 else x)), "first")
            return jnp.sin(w * (counted(x) if piece == 1 else x))

        stack = checkpoint_scan(block, **knobs)
        jax.block_until_ready(jax.jit(jax.grad(lambda w: stack(w, jnp.float32(0.5))))(jnp.ones(N)))
        return len(runs) / N

    assert counted_runs() == 2
    assert counted_runs(stages="tags:first") == in_stages
    assert counted_runs(stages="tags:first", policy="everything") == 2
    assert counted_runs(stages="tags:first", policy="save:first") == 2  # what enters the second piece is kept


def layers(w, x):
    for name in ("first", "second"):
        x = checkpoint_name(jnp.sin(x @ w), name)
    return jnp.tanh(x @ w)


def kept(fn, *args):
    """What differentiating `fn` keeps, without its inputs: the number of entries of each."""
    pull = jax.make_jaxpr(lambda *args: jax.vjp(fn, *args)[1])(*args).jaxpr
    return sorted(var.aval.size for var in pull.outvars if var not in pull.invars)


LAYERS = jnp.ones((N, 6, 6)), jnp.ones((5, 6))


@pytest.mark.parametrize("engine", ["scan", "reversal"])
@pytest.mark.parametrize("stages", [None, "tags:first", "tags:first,second"])
def test_what_is_kept_for_later_pieces_is_kept_once(engine, stages):
    stack = checkpoint_scan(layers, policy="save:first,second", stages=stages, engine=engine)
    assert kept(stack, *LAYERS) == [N * 5 * 6] * 3


def of_own_tags(prim, *_, **params):
    return {"first": True, "second": False}[params["name"]] if prim.name == "name" else False


@pytest.mark.parametrize("engine", ["scan", "reversal"])
@pytest.mark.parametrize(
    "policy, count", [(jax.checkpoint_policies.save_any_names_but_these("first", "second"), 1), (of_own_tags, 3)]
)
def test_policies_that_are_functions_and_may_know_their_own_tags_only(policy, count, engine):
    stack = checkpoint_scan(layers, policy=policy, stages="tags:first", engine=engine)
    assert kept(stack, *LAYERS) == [N * 5 * 6] * count


@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_a_mask_that_is_kept_and_crosses_a_cut_is_no_array_per_block(engine):
    def masked(w, x, *, m):
        mask = checkpoint_name(m > 0, "mask")
        x = jnp.where(mask, jnp.sin(x @ w), 0.0)
        return jnp.where(mask, jnp.tanh(x @ w), 0.0)

    stack = checkpoint_scan(masked, policy="save:mask", stages="tags:mask", engine=engine)
    assert kept(lambda w, x: stack(w, x, m=x), *LAYERS) == [5 * 6, N * 5 * 6]


def test_what_is_no_stack_offloads_beside_stages():
    def fn(w, x):
        return jnp.tanh(checkpoint_name(jnp.sin(x @ w), "first") @ w).sum()

    pull = jax.make_jaxpr(lambda *args: jax.vjp(checkpoint(fn, policy="offload:first", stages="tags:first"), *args)[1])
    whole = jnp.ones((10, 10))
    found = pull(whole, whole).jaxpr
    spaces = [str(var.aval) for var in found.outvars if var not in found.invars]
    assert len(spaces) == 1 and "host" in spaces[0]


def test_explain_counts_the_pieces():
    shared = {"mask": jnp.ones((5, 1))}
    args = random_like((W, jnp.zeros((5, 6))))
    whole, cut = (
        explain(checkpoint_scan(block, stages=stages), *args, target="h200", **shared) for stages in (None, "tags:first")
    )
    assert (whole.pieces, cut.pieces) == (1, 2)
    assert whole.stored_bytes == cut.stored_bytes
    assert whole.forward_runs < cut.forward_runs < 2 * whole.forward_runs - 1
    assert "each in 2 pieces" in str(cut)
    kept = explain(checkpoint_scan(block, stages="tags:first", policy="everything"), *args, target="h200", **shared)
    assert kept.stored_bytes == 2 * whole.stored_bytes  # the carry, and what crosses the cut
    assert kept.wanted_bytes == whole.wanted_bytes


@pytest.mark.parametrize("first, again", [(1, 1 / 4), (2, 2 / 4), (3, 3 / 4)])
def test_explain_counts_what_is_before_the_last_piece(first, again):
    def layers(w, x):
        for i in range(4):
            x = jnp.sin(x @ w)
            x = checkpoint_name(x, "cut") if i + 1 == first else x
        return x

    args = jnp.ones((3, 64, 64)), jnp.ones((64, 64))
    whole, cut = (explain(checkpoint_scan(layers, stages=stages), *args, target="h200") for stages in (None, "tags:cut"))
    assert cut.forward_runs == pytest.approx(whole.forward_runs + again)


@pytest.mark.parametrize("stages", [0, -1, 2.0, True, "always", "tags:", "tags:a,,b", ("first",)])
def test_what_stages_may_be(stages):
    with pytest.raises(ValueError, match=r"must be None, 'auto', an integer of at least 1 .* or tags to cut behind"):
        checkpoint_scan(block, stages=stages)


def test_unknown_tags():
    with pytest.raises(ValueError, match="block: stages: nothing in the block is tagged 'last'; its tags are: first"):
        checkpoint_scan(block, stages="tags:last")(W, jnp.zeros((5, 6)), mask=jnp.ones((5, 1)))


@jax.custom_vjp
def own(x):
    return checkpoint_name(jnp.sin(x), "inside")


own.defvjp(lambda x: (own(x), x), lambda x, ct: (ct * jnp.cos(x),))
looped = lambda x: jax.lax.fori_loop(0, 2, lambda _, x: checkpoint_name(jnp.sin(x), "inside"), x)  # noqa: E731


@pytest.mark.parametrize("within", [looped, own], ids=["a loop", "a derivative of its own"])
def test_tags_inside_of_what_is_not_cut(within):
    stack = checkpoint_scan(lambda w, x: jnp.cos(within(x) @ w), stages="tags:inside")
    with pytest.raises(ValueError, match=r"stages: 'inside' tags a value inside of a loop.*tag a value outside of it"):
        stack(jnp.ones((3, 4, 4)), jnp.ones((2, 4)))


def test_nothing_to_cut_is_a_note():
    stack = checkpoint_scan(lambda w, x: x @ w, stages="auto")
    with pytest.warns(UserWarning, match="stages='auto' found nothing to cut; the block stays whole") as noted:
        stack(jnp.ones((3, 4, 4)), jnp.ones((2, 4)))
    assert noted[0].filename == __file__


def test_empty_values_are_not_awaited():
    def looped(w, x):
        body = lambda c, _: (jnp.sin(c @ w), (jnp.cos(c), jnp.sin(c[:0])))  # noqa: E731
        c, (whole, empty) = jax.lax.scan(body, x, None, length=3)
        return x + jnp.sin(checkpoint_name(whole, "a")).sum(0) @ w + c + empty.sum()

    args = random_like((jnp.zeros((N, 6, 6)), jnp.zeros((2, 6))))
    got, want = (gradients(fn, *args) for fn in (checkpoint_scan(looped, stages="tags:a"), partial(plain_loop, looped)))
    assert relative_error(got, want) < 1e-5


def test_side_effects_are_not_cut():
    def talking(w, x):
        jax.debug.print("x {}", x.sum())
        return jnp.sin(x @ w)

    with pytest.raises(ValueError, match=r"talking has side effects .*, and stages cuts only blocks without"):
        checkpoint_scan(talking, stages=2)(jnp.ones((3, 4, 4)), jnp.ones((2, 4)))
