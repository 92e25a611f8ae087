"""What does a training step hold on each of eight GPUs, and what do they send, under each setting and each way to split it?

Compiles the loss of a stack and its gradients by the stacked parameters for eight GPUs that need not be in the machine.
Data: the batch is split. FSDP: the parameters too. Tensor: heads and hidden channels. What `flax`'s `nn.scan(nn.remat)`
sends, written by hand, stands beside. Collectives are read off the compiled program, see `jaxckpt/memory/collectives.py`. No
number is of a run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/on_meshes.py --workloads transformer pairformer --minutes 60
    JAX_PLATFORMS=cpu python benchmarks/on_meshes.py --workloads 7b-64 --target h200:64   # and 7b-8, 7b-512
"""

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from _results import RESULTS, load, save, write_section
from _systems import Stack, System, loss_and_gradients, systems
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxckpt import measure, targets
from jaxckpt.cli._meshes import of_parameter
from jaxckpt.memory.collectives import KINDS
from jaxckpt.models import PairformerBlock, TransformerBlock

# By name: the axes of the mesh, whether parameters are split over the batch's, and how blocks say that the carry is split.
MESHES = {
    "data 8": ({"data": 8}, False, PartitionSpec("data")),
    "FSDP 8": ({"data": 8}, True, PartitionSpec("data")),
    "tensor 8": ({"tensor": 8}, False, PartitionSpec(None)),
    "tensor 8, carries too": ({"tensor": 8}, False, PartitionSpec(None, "tensor")),
    "FSDP 4 x tensor 2": ({"data": 4, "tensor": 2}, True, PartitionSpec("data")),
    "FSDP 4 x tensor 2, carries too": ({"data": 4, "tensor": 2}, True, PartitionSpec("data", "tensor")),
    "FSDP 64": ({"data": 64}, True, PartitionSpec("data")),
    "FSDP 512": ({"data": 512}, True, PartitionSpec("data")),
}
LARGE = {f"7b-{devices}": devices for devices in (8, 64, 512)}  # a sequence for each device
OF_WORKLOAD = {
    "transformer": [mesh for mesh in MESHES if mesh not in ("FSDP 64", "FSDP 512")],
    "pairformer": ["data 8", "FSDP 8"],
    **{name: [f"FSDP {devices}"] for name, devices in LARGE.items()},
}
SYSTEMS = {
    "flax nn.scan(nn.remat)": ["nothing", "dots", "everything"],
    "jaxckpt": [
        *(f"blocks_per_ckpt=None, {policy}" for policy in ("nothing", "dots", "everything", "cheap")),
        'blocks_per_ckpt=None, nothing, engine="reversal"',
        'blocks_per_ckpt=None, dots, engine="reversal"',
        "blocks_per_ckpt=4, nothing",
        "snapshots=5",
        'stages="auto", nothing',
        'stages="auto", nothing, engine="reversal"',
        'tiles="auto", nothing',
        'snapshots=5, tiles="auto"',
        'offload_carry, engine="reversal"',
    ],
}
KEYS = ("workload", "mesh", "system", "setting", "target", "jax")
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=OF_WORKLOAD, default=["transformer"])
    parser.add_argument("--meshes", nargs="+", choices=MESHES, help="by default all of a workload's")
    parser.add_argument("--systems", nargs="+", default=[""], help="only those whose name or setting contains one of these")
    parser.add_argument("--target", default="h200:8")
    parser.add_argument("--again", action="store_true", help="also what was compiled with this version of JAX before")
    parser.add_argument("--minutes", type=float, default=6, help="start nothing after them")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.out / "on_meshes.json"
    rows = {tuple(row[key] for key in KEYS): row for row in load(path, "rows")}
    jobs = [
        (workload, mesh, system)
        for workload in options.workloads
        for mesh in OF_WORKLOAD[workload]
        for system in systems(stacks()[workload])
        if mesh in (options.meshes or MESHES)
        and system.setting in SYSTEMS.get(system.name, ())
        and any(part in f"{system.name} {system.setting}" for part in options.systems)
    ]
    key_of = lambda workload, mesh, system: (workload, mesh, *system[:2], options.target, jax.__version__)  # noqa: E731
    wanted = [job for job in jobs if options.again or key_of(*job) not in rows]
    begin = time.monotonic()
    for job in (bar := tqdm(wanted, unit="row", dynamic_ncols=True)):
        if time.monotonic() > begin + 60 * options.minutes:
            bar.write(f"the time is over: call again for the other {len(wanted) - bar.n} rows")
            break
        key = key_of(*job)
        bar.set_description(" ".join(key[:4]))
        rows[key] = {**dict(zip(KEYS, key, strict=True)), **row_of(*job, target=options.target)}
        save(path, "rows", [rows[key] for key in sorted(rows)])
    write_section("on_meshes", "\n\n".join([INTRODUCTION, *tables(list(rows.values()))]), options.out)
    asked = {key_of(*job) for job in jobs}
    print("\n\n".join(tables([row for key, row in rows.items() if key in asked])))


@dataclasses.dataclass(frozen=True)
class StackOnMesh(Stack):
    """Blocks that say how what they return is split, as blocks for several devices do."""

    sharding: Any = None

    def apply(self, params: Any, *carry: Any, **shared: Any) -> Any:
        out = super().apply(params, *carry, **shared)
        return out if self.sharding is None else jax.lax.with_sharding_constraint(out, self.sharding)


def stacks() -> dict[str, StackOnMesh]:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    block = TransformerBlock(2048, num_heads=16, d_ff=8192, dtype=jnp.bfloat16)
    pairs = PairformerBlock(dtype=jnp.bfloat16)
    of_pairs = shape((8, 512, 384)), shape((8, 512, 512, 128))
    large = TransformerBlock(4096, num_heads=32, d_ff=11008, dtype=jnp.bfloat16)
    return {
        "transformer": StackOnMesh(
            "24 blocks of a transformer, 16 x 2,048 x 2,048", block, 24, 4, (shape((16, 2048, 2048)),)
        ),
        "pairformer": StackOnMesh("48 Pairformer blocks, 8 x 512 tokens", pairs, 48, 6, of_pairs),
        **{
            name: StackOnMesh(f"32 blocks of a transformer, {n} x 4,096 x 4,096", large, 32, 4, (shape((n, 4096, 4096)),))
            for name, n in LARGE.items()
        },
    }


def row_of(workload: str, mesh: str, system: System, target: str) -> dict[str, Any]:
    stack, arguments, out = on_mesh(workload, mesh, target)
    step = jax.jit(functools.partial(loss_and_gradients, system.build(stack)), out_shardings=out)
    try:
        found = measure(step, *arguments, target=target).to_json()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    fields = ("device", "peak_bytes", "temp_bytes", "host_bytes", "collectives", "compile_seconds")
    return {field: found[field] for field in fields}


def on_mesh(workload: str, mesh: str, target: str) -> tuple[StackOnMesh, tuple[Any, Any, Any], Any]:
    """A stack, its arguments on a mesh of the target's devices, and the shardings of the loss and the gradients."""
    stack, (axes, fsdp, of_carry) = stacks()[workload], MESHES[mesh]
    on = targets.get(target).mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))

    def split(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, spec))

    stack = dataclasses.replace(stack, sharding=NamedSharding(on, of_carry))
    params, carry, shared = stack.arguments()
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: split(leaf, of_parameter(path, leaf, axes, fsdp)), params)
    carry = tuple(split(leaf, of_carry) for leaf in carry)
    return stack, (params, carry, shared), (None, jax.tree.map(lambda leaf: leaf.sharding, params))


INTRODUCTION = """## Eight GPUs: bytes on each, and what they send

`on_meshes.py` compiles the loss and the parameters' gradients for eight GPUs that are only described; nothing was run. Bytes
are of one device. Collectives are those of one step, loops multiplied by how often they run: their number, and in brackets
the GiB that each device sends for them, in a ring. Parameters are float32, products bfloat16. FSDP: parameters are split
over the devices that split the batch. Tensor: heads and hidden channels are split; "carries too": what enters a block is
split along tokens over the same devices, and so stored. Blocks say how what they return is split, by
`with_sharding_constraint`."""


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One for each workload, mesh and version of JAX, rows sorted by temporaries."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (-list(OF_WORKLOAD).index(row["workload"]), *(row[k] for k in ("mesh", "jax")))):
        groups.setdefault((row["workload"], row["mesh"], row["target"], row["jax"]), []).append(row)
    return [table(*group, rows) for group, rows in groups.items()]


def table(workload: str, mesh: str, target: str, jax_version: str, rows: list[dict[str, Any]]) -> str:
    lines = [f"### {stacks()[workload].title}; {mesh}; compiled for {target} with JAX {jax_version}", ""]
    kinds = [kind for kind in KINDS if any(c["kind"] == kind for row in rows for c in row.get("collectives", ()))]
    titles = ["system", "setting", "temp GiB", "peak GiB", *kinds, "sent GiB"]
    lines += [f"| {' | '.join(titles)} |", f"|---|---|{'--:|' * (len(titles) - 2)}"]
    for row in sorted(rows, key=lambda row: (row.get("temp_bytes", float("inf")), row["system"], row["setting"])):
        cells = (
            [row["error"].replace("|", "/")]
            if "error" in row
            else [f"{row[k] / GIB:.2f}" for k in ("temp_bytes", "peak_bytes")]
        )
        of_kind = {c["kind"]: c for c in row.get("collectives", ())}
        cells += [f"{c['number']} ({c['sent_bytes'] / GIB:.2f})" if (c := of_kind.get(kind)) else "" for kind in kinds]
        cells.append(f"{sum(c['sent_bytes'] for c in of_kind.values()) / GIB:.2f}")
        lines.append(f"| {' | '.join([row['system'], row['setting'], *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
