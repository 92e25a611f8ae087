"""What devices send, read off compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxckpt import checkpoint_scan, measure, targets
from jaxckpt.memory.collectives import Collective, calls, collectives

# Two loops, a branch, operations in two parts, tuples; as XLA prints it for GPUs, without fields that nobody reads.
TEXT = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%async (x: bf16[128,64]) -> bf16[32,64] {
  ROOT %scatter = bf16[32,64]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%inner (p: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %g = ((bf16[32,64]{1,0:T(8)}, f32[2]), (bf16[128,64]{1,0}, f32[8])) all-gather-start(%a), replica_groups=[2,4]<=[4,2]T(1,0)
  %d = (bf16[128,64]{1,0}, f32[8]{0}) all-gather-done(%g)
  %s = ((bf16[128,64]), bf16[32,64], s32[]) async-start(%d), calls=%async
  %e = bf16[32,64] async-done(%s), calls=%async
}

%outer (p: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %while.1 = (s32[], bf16[128,64]) while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %both = (f32[16]{0}, f32[16]{0}) all-reduce(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%small (p: f32[64]) -> f32[64] {
  ROOT %r = ((f32[64]), f32[64]) all-reduce-start(%p), replica_groups={}, to_apply=%add
}

%large (p: f32[64]) -> f32[64] {
  %s = (f32[512]{0}, f32[512]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %while.2 = (s32[], bf16[128,64]) while(%p), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %branch = f32[64] conditional(%i, %p, %p), branch_computations={%small, %large}
  %old = f32[64]{0} all-reduce-start(%q), replica_groups={}, to_apply=%add
  %unknown = (s32[]) while(%p), condition=%c, body=%small
}
"""


def test_a_program_with_all_of_them():
    whole = 128 * 64 * 2
    assert collectives(TEXT, 8) == (
        Collective("all-gather", 15, round(15 * 3 / 4 * (whole + 32))),
        Collective("reduce-scatter", 15, round(15 * 3 / 4 * whole)),
        Collective("collective-permute", 1, 2048),
        Collective("all-reduce", 5 + 2, round(5 * 2 * 1 / 2 * 128 + 2 * 2 * 7 / 8 * 256)),
    )


IN_GROUPS = """
ENTRY %main (w: f32[64,8], x: f32[64]) -> f32[64] {
  %w = f32[64,8]{1,0} parameter(1), metadata={op_name="inputs[0]"}
  %x.1 = f32[64]{0} parameter(0), metadata={op_name="inputs[1]"}
  %half = bf16[64,8]{1,0} fusion(%w), kind=kLoop, calls=%convert
  %g = bf16[64,32]{1,0} all-gather(%half), @, dimensions={1}, metadata={op_name="jit(f)/jaxckpt_equation_3/dot"}
  %h = f32[64]{0} fusion(%x.1, /*index=1*/%g), kind=kLoop, calls=%product
  %r = (f32[64]{0}, f32[64]{0}) all-reduce-start(%h), replica_groups={}, to_apply=%add
  ROOT %d = f32[64]{0} all-reduce-done(%r)
}
"""


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{1,5},{0,4}}", (1, 5)),
        ("replica_groups=[2,8]<=[16]", tuple(range(8))),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("replica_groups=[4,4]<=[2,2,4]T(1,0,2)", (0, 1, 2, 3)),
        ("replica_groups=mesh['data'=4,'tensor'=4] {'data'}", (0, 4, 8, 12)),
        ("replica_groups=mesh['data'=4,'tensor'=4] {'tensor','data'}", tuple(range(16))),
        ("replica_groups=mesh['data'=4,'tensor'=4] {'tensor':(1)2}", (0, 2)),
        ("replica_groups=mesh['data'=4,'tensor'=4] {'data':(2)2,'tensor'}", tuple(range(8))),
        ("source_target_pairs={{0,1},{1,2},{7,8},{8,0}}", (7, 8)),  # which crosses hosts
        ("replica_groups={{0,1},{7,8}}", (7, 8)),
        ("channel_id=1", tuple(range(16))),
    ],
)
def test_what_collectives_join(written, group):
    """However XLA writes it down: lists, numbers in order, axes of a mesh and parts of them."""
    gather, reduce = calls(IN_GROUPS.replace("@", written), 16)
    assert gather.group == group and reduce.group == tuple(range(16))
    assert gather.sent_bytes == (len(group) - 1) / len(group) * 64 * 32 * 2


def test_what_collectives_depend_on():
    gather, reduce = calls(IN_GROUPS, 16)
    assert gather.inputs == {"inputs[0]"} and reduce.inputs == {"inputs[0]", "inputs[1]"}
    assert gather.scope == "jit(f)/jaxckpt_equation_3/dot"


@pytest.mark.parametrize(
    ("written", "bandwidth"),
    [
        ("replica_groups=[2,8]<=[16]", 450e9),  # of one host
        ("replica_groups=[1,16]<=[16]", 400e9),  # eight from each, each with its own link to the network
        ("replica_groups=[8,2]<=[2,8]T(1,0)", 50e9),  # one from each
    ],
)
def test_seconds_by_the_links_that_are_crossed(written, bandwidth):
    call = calls(IN_GROUPS.replace("@", written), 16)[0]
    assert call.seconds(targets.get("h200").gpu) == pytest.approx(call.sent_bytes / bandwidth)


def test_nothing_is_sent():
    assert collectives("ENTRY %main (p: f32[64]) -> f32[64] {\n  ROOT %r = f32[64] add(%p, %p)\n}", 1) == ()


@pytest.mark.parametrize("engine", ["scan", "reversal"])
def test_a_stack_whose_parameters_are_split(h200, engine):
    """Each block's are gathered twice, and its gradients scattered."""
    mesh = targets.get("h200:8").mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    where = NamedSharding(mesh, P(None, "data"))
    stack = checkpoint_scan(lambda w, x: x + jnp.sin(x @ w), engine=engine)
    w = jax.ShapeDtypeStruct((6, 256, 256), "float32", sharding=where)
    x = jax.ShapeDtypeStruct((1024, 256), "float32", sharding=NamedSharding(mesh, P("data")))
    step = jax.jit(jax.grad(lambda w, x: (stack(w, x) ** 2).sum()), out_shardings=where)
    found = measure(step, w, x, target="h200:8")
    sent = round(7 / 8 * 256 * 256 * 4)
    assert {c.kind: (c.number, c.sent_bytes) for c in found.collectives} == {
        "all-gather": (12, 12 * sent),
        "reduce-scatter": (6, 6 * sent),
    }
    assert found.sent_bytes == 18 * sent and "each device sends 3.9 MiB: 12 all-gather (2.6 MiB), 6 reduce" in str(found)
    assert found.to_json()["collectives"][0] == {"kind": "all-gather", "number": 12, "sent_bytes": 12 * sent}
