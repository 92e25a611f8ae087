"""What `explain` tells of one of several devices: bytes, times, and what it sends."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint, checkpoint_scan, explain, measure, targets
from jaxckpt._plan import Knobs, under
from jaxckpt.cli._meshes import of_parameter
from jaxckpt.models import TransformerBlock

N, WIDTH, HIDDEN, BATCH = 6, 256, 1024, 4096
MIB = 2**20
# The axes of a mesh, how the two parameters are split, and how the batch.
MESHES = {
    "data": ({"data": 8}, P(), P(), P("data")),
    "fsdp": ({"data": 8}, P(None, "data"), P(None, None, "data"), P("data")),
    "tensor": ({"tensor": 8}, P(None, None, "tensor"), P(None, "tensor"), P()),
    "both": ({"data": 4, "tensor": 2}, P(None, "data", "tensor"), P(None, "tensor", "data"), P("data")),
}


def block(w, x):
    return x + jnp.sin(x @ w["up"]) @ w["down"]


def deep(w, x):
    """A block that is worth slices."""
    return x + jnp.sin(jnp.sin(jnp.sin(x @ w["up"]))) @ w["down"]


def on_mesh(kind, dtype="bfloat16"):
    axes, up, down, of_batch = MESHES[kind]
    mesh = targets.get("h200:8").mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    given = lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    w = {"up": given((N, WIDTH, HIDDEN), up), "down": given((N, HIDDEN, WIDTH), down)}
    return mesh, w, given((BATCH, WIDTH), of_batch)


def of_product(found):
    """The rows of the carry, and of what is computed of the first product."""
    carry, hidden = found.values[0], found.values[-1]
    assert (carry.op, hidden.op, hidden.shape[1:]) == ("input", "sin", (HIDDEN,))
    return carry, hidden


@pytest.mark.parametrize(
    ("kind", "of_carry", "of_hidden"), [("data", 8, 8), ("fsdp", 8, 8), ("tensor", 1, 8), ("both", 4, 8)]
)
def test_bytes_and_times_are_those_of_one_device(h200, kind, of_carry, of_hidden):
    _, w, x = on_mesh(kind)
    stack = checkpoint_scan(block)
    one, whole = (explain(stack, w, x, target=target) for target in ("h200:8", "h200"))
    for mine, all_of_it, parts in zip(of_product(one), of_product(whole), (of_carry, of_hidden), strict=True):
        assert mine.bytes_per_block == all_of_it.bytes_per_block / parts
        assert (mine.shape, mine.fate) == (all_of_it.shape, all_of_it.fate)
    assert one.stored_bytes == whole.stored_bytes / of_carry
    assert of_product(one)[1].seconds == pytest.approx(of_product(whole)[1].seconds / 8)


PARAMETERS = 2 * WIDTH * HIDDEN * 2


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("data", 0),
        ("fsdp", 7 / 8 * PARAMETERS),
        ("tensor", 2 * 7 / 8 * BATCH * WIDTH * 2),
        ("both", 3 / 4 * PARAMETERS / 2 + BATCH / 4 * WIDTH * 2),
    ],
)
def test_what_a_run_of_a_block_sends(h200, kind, sent):
    """Parameters are gathered where they are split with the batch; products along what is split are summed."""
    _, w, x = on_mesh(kind)
    found = explain(checkpoint_scan(block), w, x, target="h200:8")
    assert found.sent_bytes == pytest.approx(sent)
    assert found.to_json()["sent_bytes"] == found.sent_bytes
    assert ("sent by each device in one run of a block" in str(found)) == bool(sent)
    assert explain(checkpoint_scan(block), w, x, target="h200").sent_bytes == 0


def test_the_column_says_which_values(h200):
    def blocks(w, x):
        return x + jnp.sin(jnp.sin(x @ w["up"]) @ w["down"])

    _, w, x = on_mesh("tensor")
    found = explain(checkpoint_scan(blocks, policy="dots"), w, x, target="h200:8")
    sent = {v.shape: v.sent_bytes for v in found.values if v.op == "dot_general"}
    assert sent == {(BATCH, HIDDEN): 0, (BATCH, WIDTH): round(2 * 7 / 8 * BATCH * WIDTH * 2)}
    assert str(found).splitlines()[2].endswith("sends")
    assert "in one run of a block: 3.5 MiB: dot_general (test_on_several_devices.py:" in str(found)
    assert "<th>sends</th>" in found.to_html()
    alone = explain(checkpoint_scan(blocks, policy="dots"), w, x, target="h200")
    assert "sends" not in str(alone) and "sends" not in alone.to_html()


def test_collectives_that_a_block_names(h200):
    """Inside of `shard_map` shapes are those of one device, and the jaxpr says what is sent; no target is needed."""
    mesh, w, x = on_mesh("tensor")

    def blocks(w, x):
        return x + jnp.sin(lax.psum(jnp.sin(x @ w["up"]) @ w["down"], "tensor"))

    specs = {"up": P(None, None, "tensor"), "down": P(None, "tensor")}
    stack = checkpoint_scan(blocks, policy="everything")
    stack = jax.shard_map(stack, mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False)
    for found in (explain(stack, w, x), explain(stack, w, x, target="h200:8")):
        (summed,) = found.sends
        assert summed.name.startswith("psum") and summed.bytes == 2 * 7 / 8 * BATCH * WIDTH * 2 == found.sent_bytes
        assert [v.bytes_per_block for v in found.values if v.shape[-1] == HIDDEN // 8] == [BATCH * HIDDEN * 2 // 8] * 2


@pytest.mark.parametrize("knobs", [{"offload_carry": True}, {"blocks_per_ckpt": 2}, {"snapshots": 2}, {"policy": "dots"}])
def test_knobs(h200, knobs):
    """Whatever is kept: an eighth of it, at the same share of the time."""
    _, w, x = on_mesh("data")
    one, whole = (explain(checkpoint_scan(block, **knobs), w, x, target=target) for target in ("h200:8", "h200"))
    for name in ("stored_bytes", "host_bytes", "chunk_bytes", "wanted_bytes"):
        assert getattr(one, name) == getattr(whole, name) / 8
    assert one.forward_runs == pytest.approx(whole.forward_runs)
    assert [v.bytes for v in one.values] == [v.bytes / 8 for v in whole.values]


def test_slices(h200):
    """Of a block that says how its batch is split: what is gathered for groups of examples is told too."""
    mesh, w, x = on_mesh("fsdp")
    of_batch = NamedSharding(mesh, P("data"))
    constrained = lambda w, x: lax.with_sharding_constraint(block(w, x), of_batch)  # noqa: E731
    one = explain(checkpoint_scan(constrained, tiles=2), w, x, target="h200:8")
    assert len(one.slices) == 1 and one.stored_bytes == N * BATCH * WIDTH * 2 / 8
    assert one.sent_bytes == pytest.approx(7 / 8 * PARAMETERS)


def test_a_plan_of_which_the_first_blocks_differ(h200):
    mesh, w, x = on_mesh("fsdp")
    of_batch = NamedSharding(mesh, P("data"))
    stack = checkpoint_scan(lambda w, x: lax.with_sharding_constraint(block(w, x), of_batch), plan="auto:s")
    knobs = Knobs(policy="everything", engine="reversal", first=(2, Knobs(tiles=2, engine="reversal")))
    with under({"s": knobs}):
        one = explain(stack, w, x, target="h200:8")
    first, others = one.parts
    assert (first.length, others.length) == (2, 4) and len(first.slices) == 1
    assert first.stored_bytes == 2 * BATCH * WIDTH * 2 / 8 and others.stored_bytes > 4 * BATCH * HIDDEN * 2 / 8
    assert first.sent_bytes == others.sent_bytes == one.sent_bytes == pytest.approx(7 / 8 * PARAMETERS)


def test_what_is_no_stack_and_a_module(h200):
    _, w, x = on_mesh("data")
    one, whole = (
        explain(checkpoint(block), jax.tree.map(lambda s: s.update(shape=s.shape[1:], sharding=None), w), x, target=t)
        for t in ("h200:8", "h200")
    )
    assert one.wanted_bytes == whole.wanted_bytes / 8 > 0

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + jnp.sin(self.dense(x))

    stack = nnx.eval_shape(lambda: checkpoint_scan(Block, N)(rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct(x.shape, "float32", sharding=x.sharding)
    one, whole = (explain(stack, x, target=target) for target in ("h200:8", "h200"))
    assert one.stored_bytes == whole.stored_bytes / 8 > 0


def test_where_it_cannot_be_told(h200):
    """In `shard_map` along some axes only; the bytes are those of all devices, and that is said."""
    mesh, w, x = on_mesh("both")
    stack = jax.shard_map(
        checkpoint_scan(block),
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )
    with pytest.warns(
        UserWarning, match=r"how values are split over 'h200:8' cannot be told \(it runs in shard_map along some"
    ):
        found = explain(stack, w, x, target="h200:8")
    assert of_product(found)[1].bytes_per_block == BATCH // 4 * HIDDEN * 2


def test_a_carry_is_brought_back_to_how_it_was_given(h200):
    """A product of which the columns are split leaves a part on each device, and the next block is given the whole."""
    mesh = on_mesh("tensor")[0]
    given = lambda shape, spec: jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, spec))  # noqa: E731
    stack = checkpoint_scan(lambda w, x: jnp.tanh(x @ w))
    args = given((4, WIDTH, WIDTH), P(None, None, "tensor")), given((1024, WIDTH), P())
    found, compiled = explain(stack, *args, target="h200:8"), measure(stack, *args, target="h200:8")
    assert found.sent_bytes == sum(c.sent_bytes for c in compiled.collectives) / 4 == 7 / 8 * 1024 * WIDTH * 2


@pytest.mark.parametrize("size", [1, 2, 8])
def test_named_collectives_are_of_so_many_devices(h200, size):
    mesh = targets.get("h200:8").mesh((size, 8 // size), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def block(w, x):
        summed = lax.psum(x @ w, "a")
        return lax.cond(x[0, 0] > 0, lambda y: lax.psum(y, "a"), lambda y: lax.psum(lax.psum(y, "a"), "a"), x + summed)

    stack = jax.shard_map(checkpoint_scan(block), mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    found = explain(stack, jax.ShapeDtypeStruct((N, 8, 8), "float32"), jax.ShapeDtypeStruct((64, 8), "float32"))
    assert found.sent_bytes == 3 * 2 * (size - 1) / size * 64 * 8 * 4  # of the dearer branch


def test_collectives_in_a_block_are_counted_once(h200):
    """Of a `shard_map` in it: the compiler puts them in, and the jaxpr has them."""
    mesh, w, x = on_mesh("tensor")
    specs = (P(None, "tensor"), P("tensor"))
    summed = lambda up, down, x: lax.psum(x @ up @ down, "tensor")  # noqa: E731
    inner = jax.shard_map(summed, mesh=mesh, in_specs=(*specs, P()), out_specs=P(), check_vma=False)
    stack = checkpoint_scan(lambda w, x: x + jnp.sin(inner(w["up"], w["down"], x)))
    found = explain(stack, w, x, target="h200:8")
    sent = 2 * 7 / 8 * BATCH * WIDTH * 2
    assert found.sent_bytes == pytest.approx(sent)
    assert sent / 4.5e11 < found.forward_seconds < 1.5 * sent / 4.5e11


def test_parameters_are_gathered_for_blocks_with_checkpoints_too(h200):
    _, w, x = on_mesh("fsdp")
    plain, own = (explain(checkpoint_scan(b), w, x, target="h200:8") for b in (block, jax.checkpoint(block)))
    assert own.sent_bytes == plain.sent_bytes > 0
    assert own.forward_seconds == pytest.approx(plain.forward_seconds)


def test_a_head_under_vmap_beside_a_stack(h200):
    """It is not what is explained."""
    _, w, x = on_mesh("data")
    head = checkpoint(lambda x: jnp.sin(x).sum())
    stack = checkpoint_scan(block)
    found = explain(lambda w, x: jax.vmap(head)(stack(w, x)), w, x, target="h200:8")
    assert found.stored_bytes == N * BATCH * WIDTH * 2 / 8


def test_inside_of_a_traced_function(h200):
    _, w, x = on_mesh("data")
    with pytest.warns(UserWarning, match="explain is called inside of a function that is being traced"):
        jax.eval_shape(lambda w, x: explain(checkpoint_scan(block), w, x, target="h200:8") and x, w, x)


def test_errors_of_the_user_are_errors(h200):
    mesh = targets.get("h200:4").mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), "bfloat16", sharding=NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="lies on 4 devices, and target 'h200:8' has 8"):
        explain(checkpoint_scan(block), on_mesh("data")[1], x, target="h200:8")


def test_a_page_of_parts_has_cells_for_all_columns(h200):
    _, w, x = on_mesh("tensor")
    stack = checkpoint_scan(lambda w, x: x + jnp.sin(jnp.sin(x @ w["up"]) @ w["down"]), plan="auto:s")
    knobs = Knobs(policy="dots", engine="reversal", first=(2, Knobs(engine="reversal")))
    with under({"s": knobs}):
        found = explain(stack, w, x, target="h200:8")
    assert [any(v.sent_bytes for v in part.values) for part in found.parts] == [False, True]
    rows = [row for row in found.to_html().split("<tr")[1:] if "colspan" not in row]
    assert len({row.count("<td>") or row.count("<th>") for row in rows}) == 1


def test_slices_of_a_split_batch_send_nothing(h200):
    """Although the same function was traced before for one device, where slices hold neighbours."""
    _, w, x = on_mesh("data")
    step = jax.jit(jax.grad(lambda w, x: checkpoint_scan(deep, tiles=8)(w, x).sum()))
    measure(step, *jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (w, x)), target="h200")
    with pytest.warns(UserWarning, match="nothing in it says how its batch is split"):
        found = measure(step, w, x, target="h200:8")
    assert {call.kind for call in found.collectives} == {"all-reduce"}


@pytest.mark.parametrize("is_set", [False, True])
def test_slices_of_a_batch_that_only_jit_splits_send_nothing(h200, is_set):
    """Nothing that is traced says on which mesh that is: the target does, or `jax.set_mesh`."""
    mesh, w, x = on_mesh("data")
    w, x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (w, x))
    split = (P(), P("data")) if is_set else (NamedSharding(mesh, P()), NamedSharding(mesh, P("data")))
    step = jax.jit(jax.grad(lambda w, x: checkpoint_scan(deep, tiles=8)(w, x).sum()), in_shardings=split)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mesh that is set something is known, and of the other nothing
        found = measure(step, w, x, target="h200:8")
    assert {call.kind for call in found.collectives} == {"all-reduce"}


def test_slices_of_queries_send_no_more_where_heads_are_split(h200):
    """The gradient of what queries, keys and values are computed of is summed over devices once."""
    axes, module, shape = {"data": 4, "tensor": 2}, TransformerBlock(256, num_heads=4, d_ff=512), (8, 512, 256)
    mesh = targets.get("h200:8").mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, "bfloat16", sharding=sharding)  # noqa: E731
    one = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))["params"]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(leaf, NamedSharding(mesh, of_parameter(path, leaf, axes, True))),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), one),
    )
    batch = NamedSharding(mesh, P("data"))

    def sent(**knobs):
        block = lambda p, x: lax.with_sharding_constraint(module.apply({"params": p}, x), batch)  # noqa: E731
        loss = lambda p, x: checkpoint_scan(block, **knobs)(p, x).astype("float32").sum()  # noqa: E731
        found = measure(jax.grad(loss), params, place(jnp.zeros(shape), batch), target="h200:8")
        return sum(call.sent_bytes for call in found.collectives)

    assert sent(tiles=8) <= 1.02 * sent(stages="auto")
