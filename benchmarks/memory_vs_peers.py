"""How much memory does one training step of the same stack need under each system that can checkpoint it?

Compiles the loss of a stack and its gradients by the stacked parameters for GPUs that need not be in the machine. Every
system gets the same pure function of one Flax block and the same parameters, checkpoints it in its own way, and must first
reproduce loss and gradients of a plain loop over a small stack (float32, on the CPU). No number is of a run on a GPU.

    JAX_PLATFORMS=cpu python benchmarks/memory_vs_peers.py                         # Pairformer of 768 tokens, for H200
    JAX_PLATFORMS=cpu python benchmarks/memory_vs_peers.py --workloads transformer-2048 --targets h200 a100-80gb
    JAX_PLATFORMS=cpu python benchmarks/memory_vs_peers.py --full                  # everything, in several calls

A call starts no compilation after `--minutes`; the next call goes on where it stopped, as long as JAX's version is the same.
Peers: pip install dm-haiku equinox && pip install --pre haliax
"""
# pyright: reportMissingImports=false

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

import jaxckpt
from jaxckpt import checkpoint_scan, measure, targets
from jaxckpt.models import PairformerBlock, TransformerBlock

HERE = Path(__file__).parent
GIB = 2**30
TOLERANCE = 1e-4
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}
Carry = tuple[Any, ...]
Forward = Callable[[Any, Carry, dict[str, Any]], Carry]


@dataclasses.dataclass(frozen=True)
class Stack:
    """`length` blocks of one kind: what is compiled.

    Fields:
        block: an unbound Linen module.
        chunk: the number of blocks per chunk for the systems that have chunks; it divides `length`.
        carry, shared: shapes of the positional and of the keyword arguments.
    """

    title: str
    block: nn.Module
    length: int
    chunk: int
    carry: Carry
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return self.length // self.chunk

    def apply(self, params: Any, *carry: Any, **shared: Any) -> Any:
        """The pure function of one block."""
        return self.block.apply({"params": params}, *carry, **shared)

    def step(self, params: Any, carry: Carry, shared: dict[str, Any]) -> Carry:
        """The same, with a tuple for the carry and a dict for what the blocks share."""
        return as_tuple(self.apply(params, *carry, **shared))

    def arguments(self) -> tuple[Any, Carry, dict[str, Any]]:
        """Shapes of the stacked parameters, the carry and the shared arguments."""
        one = jax.eval_shape(self.block.init, jax.random.key(0), *self.carry, **self.shared)["params"]
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.length, *leaf.shape), leaf.dtype), one)
        return stacked, self.carry, self.shared


def as_tuple(out: Any) -> Carry:
    return out if isinstance(out, tuple) else (out,)


class System(NamedTuple):
    """One way to run a stack. `build` makes `forward(stacked params, carry, shared)` of a `Stack`."""

    name: str
    setting: str
    build: Callable[[Stack], Forward]
    package: str = "jax"
    keeps_dots: bool = False  # then how often a block runs depends on what is in it
    is_slow: bool = False  # to compile


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    path = options.out / "memory_vs_peers.json"
    rows = {key(row): row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    wanted = [job for job in jobs(options) if options.again or is_missing(rows.get(key(identity(*job))))]
    end = time.monotonic() + 60 * options.minutes
    for job in (bar := tqdm(wanted, unit="row", dynamic_ncols=True)):
        if time.monotonic() > end:
            bar.write(f"{options.minutes:g} minutes are over: call again for the other {len(wanted) - bar.n} rows")
            break
        bar.set_description(" ".join(identity(*job)[field] for field in ("workload", "target", "system", "setting")))
        row = measured(*job, checks=rows.values())
        rows[key(row)] = row
        write(path, [*rows.values()])
    asked = {(name, target) for name, target, _ in jobs(options)}
    print("\n\n".join(tables([row for row in rows.values() if (row["workload"], row["target"]) in asked])))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=workloads(), default=["pairformer-768"])
    parser.add_argument("--targets", nargs="+", default=["h200"], help="names or files, see jaxckpt.targets")
    parser.add_argument("--systems", nargs="+", help="only those whose name or setting contains one of these")
    parser.add_argument("--full", action="store_true", help="all workloads, for H200 and A100 80 GB, slow systems too")
    parser.add_argument("--again", action="store_true", help="also what was measured with this version of JAX before")
    parser.add_argument("--minutes", type=float, default=8, help="start nothing after them")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.full:
        options.workloads, options.targets = list(workloads()), ["h200", "a100-80gb"]
    return options


def jobs(options: argparse.Namespace) -> list[tuple[str, str, System]]:
    """What is asked for, slow systems last."""
    return [
        (name, target, system)
        for slow in (False, True)
        for name in options.workloads
        for target in options.targets
        for system in systems(workloads()[name])
        if system.is_slow == slow <= options.full
        and any(part in f"{system.name} {system.setting}" for part in options.systems or [""])
    ]


# --- what is compiled ---------------------------------------------------------------------------------------------------


def workloads() -> dict[str, Stack]:
    return {
        "tiny": pairformer(12, 24, 6),
        **{f"pairformer-{tokens}": pairformer(48, tokens, 6) for tokens in (384, 512, 768)},
        "transformer-2048": transformer(24, 8, 2048, 1024, 4),
    }


def pairformer(blocks: int, tokens: int, chunk: int) -> Stack:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    return Stack(
        f"Pairformer, {blocks} blocks, {tokens} tokens, bf16",
        PairformerBlock(dtype=jnp.bfloat16),
        blocks,
        chunk,
        (shape((tokens, 384)), shape((tokens, tokens, 128))),
        {"pair_mask": shape((tokens, tokens))},
    )


def transformer(blocks: int, batch: int, tokens: int, width: int, chunk: int) -> Stack:
    return Stack(
        f"transformer, {blocks} blocks of {width} channels, {batch} x {tokens} tokens, bf16",
        TransformerBlock(width, num_heads=16, d_ff=4 * width, dtype=jnp.bfloat16),
        blocks,
        chunk,
        (jax.ShapeDtypeStruct((batch, tokens, width), jnp.bfloat16),),
    )


@functools.cache
def small(kind: str) -> Stack:
    """Two chunks of two tiny blocks of the same kind in float32, to compare values on."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if kind == "PairformerBlock":
        block = PairformerBlock(16, 8, c_hidden_mul=8, num_heads_pair=2, head_dim_pair=4, num_heads_single=2)
        return Stack("small", block, 4, 2, (shape((6, 16)), shape((6, 6, 8))), {"pair_mask": shape((6, 6))})
    return Stack("small", TransformerBlock(16, num_heads=2, d_ff=32), 4, 2, (shape((2, 6, 16)),))


def loss_and_gradients(forward: Forward, params: Any, carry: Carry, shared: dict[str, Any]) -> Any:
    def loss(params: Any) -> Any:
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in forward(params, carry, shared))

    return jax.value_and_grad(loss)(params)


# --- the systems --------------------------------------------------------------------------------------------------------


def systems(stack: Stack) -> list[System]:
    k, m, n = stack.chunk, stack.chunks, stack.length
    haiku_remat = {"": {}, "prevent_cse=False": {"prevent_cse": False}, "dots": {"policy": POLICIES["dots"]}}
    ours = [(None, "everything"), (None, "dots"), (None, "dots_no_batch"), (None, "nothing")]
    ours += [(2, "everything"), (k, "everything"), (k, "dots"), (k, "nothing")]
    return [
        System("no checkpointing", "lax.scan", plain_scan),
        *(
            System("jaxckpt", f"blocks_per_ckpt={count}, {name}", our_stack(count, name), "jaxckpt", "dots" in name)
            for count, name in ours
        ),
        System("Python loop", "jax.checkpoint of each block", checkpointed_loop, is_slow=True),
        *(
            System("flax nn.scan(nn.remat)", name, functools.partial(flax_scan, policy), "flax", "dots" in name)
            for name, policy in POLICIES.items()
        ),
        System("flax nn.remat_scan", f"lengths=({n}, 1)", lambda s: flax_remat_scan(s, (s.length, 1)), "flax"),
        System("flax nn.remat_scan", f"lengths=({m}, {k})", lambda s: flax_remat_scan(s, (s.chunks, s.chunk)), "flax"),
        System("flax nn.remat_scan", f"lengths=({m}, {k}, 1)", lambda s: flax_remat_scan(s, (s.chunks, s.chunk, 1)), "flax"),
        *(
            System("haiku layer_stack + hk.remat", name, functools.partial(haiku_stack, **remat), "dm-haiku", name == "dots")
            for name, remat in haiku_remat.items()
        ),
        System("equinox checkpointed scan", "checkpoints=None", equinox_scan, "equinox"),
        System("equinox checkpointed scan", f"checkpoints={k}", lambda s: equinox_scan(s, s.chunk), "equinox"),
        System("equinox checkpointed scan", 'checkpoints="all"', lambda s: equinox_scan(s, "all"), "equinox"),
        System("haliax Stacked", "True", lambda s: haliax_stacked(s, True), "haliax"),
        System("haliax Stacked", '"recompute"', lambda s: haliax_stacked(s, "recompute"), "haliax"),
        System("haliax Stacked", '"nested"', lambda s: haliax_stacked(s, "nested"), "haliax"),
        System("haliax Stacked", f"simple, nested={m}", haliax_nested, "haliax"),
    ]


def our_stack(count: int | None, policy: str) -> Callable[[Stack], Forward]:
    def build(stack: Stack) -> Forward:
        run = checkpoint_scan(stack.apply, blocks_per_ckpt=count and min(count, stack.chunk), policy=policy)
        return lambda params, carry, shared: as_tuple(run(params, *carry, **shared))

    return build


def plain_scan(stack: Stack) -> Forward:
    return lambda params, carry, shared: lax.scan(lambda c, p: (stack.step(p, c, shared), None), carry, params)[0]


def checkpointed_loop(stack: Stack) -> Forward:
    return functools.partial(loop, jax.checkpoint(stack.step), stack.length)


def loop(step: Forward, length: int, params: Any, carry: Carry, shared: dict[str, Any]) -> Carry:
    for i in range(length):
        carry = step(jax.tree.map(lambda leaf, i=i: leaf[i], params), carry, shared)
    return carry


class FlaxBody(nn.Module):
    """What `nn.scan` wants: a module that returns `(carry, output)`."""

    block: nn.Module

    def __call__(self, carry, shared):
        return as_tuple(self.block(*carry, **shared)), None


def flax_scan(policy: Any, stack: Stack) -> Forward:
    body = nn.scan(
        nn.remat(FlaxBody, policy=policy, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=stack.length,
    )(stack.block)
    return lambda params, carry, shared: body.apply({"params": {"block": params}}, carry, shared)[0]


class FlaxCarryBody(nn.Module):
    """What `nn.remat_scan` wants: a module of the carry alone."""

    block: nn.Module
    shared: dict[str, Any]

    def __call__(self, carry):
        return as_tuple(self.block(*carry, **self.shared))


def flax_remat_scan(stack: Stack, lengths: tuple[int, ...]) -> Forward:
    def forward(params, carry, shared):
        body = nn.remat_scan(FlaxCarryBody, lengths=lengths)(stack.block, shared)
        nested = jax.tree.map(lambda leaf: leaf.reshape(*lengths, *leaf.shape[1:]), params)
        return body.apply({"params": {"block": nested}}, carry)

    return forward


def haiku_stack(stack: Stack, **remat: Any) -> Forward:
    import haiku as hk

    shapes, tree = jax.tree.flatten(stack.arguments()[0])

    def run(carry, shared):
        def block(carry):
            leaves = [
                hk.get_parameter(f"p{i}", leaf.shape[1:], leaf.dtype, hk.initializers.Constant(0))
                for i, leaf in enumerate(shapes)
            ]
            return stack.step(tree.unflatten(leaves), carry, shared)

        return hk.layer_stack(stack.length)(hk.remat(block, **remat))(carry)

    transformed = hk.transform(run)

    def forward(params, carry, shared):
        names = jax.eval_shape(transformed.init, jax.random.key(0), carry, shared)
        leaves = jax.tree.leaves(params)
        own = {module: {name: leaves[int(name[1:])] for name in inside} for module, inside in names.items()}
        return transformed.apply(own, None, carry, shared)

    return forward


def equinox_scan(stack: Stack, checkpoints: Any = None) -> Forward:
    from equinox import internal as eqxi

    def forward(params, carry, shared):
        def body(carry, block):
            return stack.step(block.params, carry, shared), None

        xs = equinox_block()(params)
        return eqxi.scan(body, carry, xs, stack.length, kind="checkpointed", checkpoints=checkpoints)[0]

    return forward


def haliax_stacked(stack: Stack, policy: Any) -> Forward:
    import haliax

    def forward(params, carry, shared):
        stacked = haliax.nn.Stacked(equinox_block()(params), haliax.Axis("layers", stack.length), checkpoint_policy(policy))
        return stacked.fold_via(lambda block, carry: stack.step(block.params, carry, shared))(carry)

    return forward


def haliax_nested(stack: Stack) -> Forward:
    from haliax import ScanCheckpointPolicy

    return haliax_stacked(stack, ScanCheckpointPolicy(simple=True, nested=stack.chunks))


def checkpoint_policy(policy: Any) -> Any:
    from haliax import ScanCheckpointPolicy

    return ScanCheckpointPolicy.from_bool_or_str(policy) if isinstance(policy, (bool, str)) else policy


@functools.cache
def equinox_block() -> Any:
    import equinox

    class Block(equinox.Module):
        params: Any

    return Block


# --- a row of the result ------------------------------------------------------------------------------------------------


def identity(name: str, target: str, system: System) -> dict[str, Any]:
    fields = {"workload": name, "target": target, "system": system.name, "setting": system.setting}
    return {**fields, "jax": jax.__version__}


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[field] for field in ("workload", "target", "system", "setting", "jax"))


def is_missing(row: dict[str, Any] | None) -> bool:
    return row is None or row.get("error") == "not installed"


def measured(name: str, target: str, system: System, checks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    stack = workloads()[name]
    row = {**identity(name, target, system), "title": stack.title, "block": type(stack.block).__name__}
    try:
        row["package"] = f"{system.package} {version(system.package)}"
        row |= checked(row, system, stack, checks)
        found = measure(functools.partial(loss_and_gradients, system.build(stack)), *stack.arguments(), target=target)
    except importlib.metadata.PackageNotFoundError:
        return {**row, "error": "not installed"}
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    sizes = found.to_json()
    fields = ("device", "peak_bytes", "temp_bytes", "argument_bytes", "output_bytes", "host_bytes", "memory_bytes")
    return {**row, **{field: sizes[field] for field in fields}, "compile_seconds": round(found.compile_seconds, 1)}


def checked(row: dict[str, Any], system: System, stack: Stack, checks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The gradients' error and the counted runs, from a row of the same system and block if there is one."""
    same = ("block", "system", "setting", "jax", "package")
    for other in checks:
        if "forward_runs" in other and all(row[field] == other[field] for field in same):
            return {field: other[field] for field in ("gradient_error", "forward_runs")}
    error = gradient_error(system, stack)
    return {"gradient_error": error, "forward_runs": None if system.keeps_dots else forward_runs(system, stack)}


def version(package: str) -> str:
    return jaxckpt.__version__ if package == "jaxckpt" else importlib.metadata.version(package)


def gradient_error(system: System, stack: Stack) -> float:
    """The largest difference from the plain loop, of loss and gradients of a small stack, to the largest entry."""
    kind = type(stack.block).__name__
    tiny, want = small(kind), plain_loop(kind)
    got = run(functools.partial(loss_and_gradients, system.build(tiny)), tiny)
    errors = [largest(jax.tree.map(jnp.subtract, a, b)) / largest(b) for a, b in zip(got, want, strict=True)]
    if not all(error <= TOLERANCE for error in errors):
        raise ValueError(f"loss and gradients differ from the plain loop's by {errors}")
    return max(errors)


def run(fn: Callable[..., Any], stack: Stack) -> Any:
    """`fn` on the CPU, compiled in little time."""
    arguments = values(stack)
    return jax.jit(fn).lower(*arguments).compile(QUICKLY)(*arguments)


def largest(tree: Any) -> float:
    return float(jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)])))


@functools.cache
def plain_loop(kind: str) -> Any:
    stack = small(kind)
    forward = functools.partial(loop, stack.step, stack.length)
    loss, gradients = run(functools.partial(loss_and_gradients, forward), stack)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients)), "a gradient is zero, and proves nothing"
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradients)))
    return loss, gradients


def values(stack: Stack) -> Any:
    """Random values of the stack's arguments."""
    shapes, tree = jax.tree.flatten(stack.arguments())
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tree.unflatten(0.5 * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, shapes, strict=True))


class CountedBlock(nn.Module):
    """A scalar block that counts its runs, through a value so that no run is left out or hoisted."""

    count: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x):
        @jax.custom_jvp
        def counted(x):
            return jax.pure_callback(self.count, jax.ShapeDtypeStruct((), jnp.float32), x)

        counted.defjvp(lambda primals, tangents: (counted(*primals), *tangents))
        return jnp.sin(self.param("w", nn.initializers.ones, ()) * counted(x))


def forward_runs(system: System, stack: Stack) -> float:
    """How often the schedule runs a block in one training step, counted in a stack of the same length."""
    runs = []

    def count(x):
        runs.append(x)
        return x

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    counted = dataclasses.replace(stack, block=CountedBlock(count), carry=(scalar,), shared={})
    jax.block_until_ready(run(functools.partial(loss_and_gradients, system.build(counted)), counted))
    return round(len(runs) / stack.length, 2)


# --- tables -------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the JSON, and the tables into the README between their marks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": sorted(rows, key=key)}, indent=1) + "\n")
    readme = path.parent.parent / "README.md"
    begin, end = "<!-- memory_vs_peers -->", "<!-- end of memory_vs_peers -->"
    before, _, rest = readme.read_text().partition(begin) if readme.exists() else ("# Benchmarks\n\n", "", "")
    shown = [row for row in rows if row["workload"] != "tiny"]
    section = "\n\n".join([INTRODUCTION, *tables(shown)])
    readme.write_text(f"{before.rstrip()}\n\n{begin}\n\n{section}\n\n{end}{rest.partition(end)[2] or chr(10)}")


INTRODUCTION = """## Memory of one training step, by system

`memory_vs_peers.py` gives every system the same block and the same stacked parameters. Loss and gradients of each equal
those of a plain loop on a small stack. Bytes are what the compiler allocates for the loss and the parameters' gradients,
compiled for the GPU that is named; nothing was run on one. Peak: temporaries, arguments and outputs; "too large" where that
is more than the GPU's memory, though XLA itself then tried to recompute. Forward runs: how often each block is run in one
step, counted; blank where that depends on the block. Policies: of `jax.checkpoint`, by the names of this package. Compile
times are of one noisy machine."""


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One table per workload, target and version of JAX, rows sorted by peak."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["workload"], row["target"], row["jax"])):
        groups.setdefault((row["title"], row["target"], row["jax"]), []).append(row)
    return [table(*group, rows) for group, rows in groups.items()]


def table(title: str, target: str, jax_version: str, rows: list[dict[str, Any]]) -> str:
    device = targets.get(target).devices[0].device_kind
    lines = [f"### {title}; compiled for {device} with JAX {jax_version}", ""]
    lines += ["| system | setting | peak GiB | temp GiB | forward runs | compile s |", "|---|---|--:|--:|--:|--:|"]
    ordered = sorted(rows, key=lambda row: (row.get("peak_bytes", float("inf")), row["system"], row["setting"]))
    return "\n".join(lines + ["| " + " | ".join([row["system"], row["setting"], *cells(row)]) + " |" for row in ordered])


def cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [row["error"].replace("|", "/"), "", "", ""]
    too_large = ", too large" if row["memory_bytes"] and row["peak_bytes"] > row["memory_bytes"] else ""
    runs = "" if row["forward_runs"] is None else f"{row['forward_runs']:.2f}"
    sizes = [f"{row['peak_bytes'] / GIB:.2f}{too_large}", f"{row['temp_bytes'] / GIB:.2f}"]
    return [*sizes, runs, f"{row['compile_seconds']:.0f}"]


if __name__ == "__main__":
    main()
