"""`jaxckpt report`: memory against recomputation for many settings of one stack, as a table and as a picture."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxckpt import explain, measure
from jaxckpt._leaves import split_arrays
from jaxckpt._progress import Progress
from jaxckpt._table import aligned
from jaxckpt.cli._errors import EXPECTED, fail
from jaxckpt.cli._meshes import add_mesh_options, check_mesh, on_mesh
from jaxckpt.cli._stacks import Call, add_stack_options, chosen_stack, chunk_near_sqrt, chunk_size, slices
from jaxckpt.cli.plots import Point, check_plot, draw_memory_against_runs, pareto
from jaxckpt.memory import targets
from jaxckpt.memory.explanation import Explanation

GIB = 2**30
POLICIES = ("everything", "dots", "dots_no_batch", "nothing")
RATES = "h200"  # whose rates weigh what is run again, where no target's are known


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting on one target; the numbers are None where `error` says why."""

    target: str
    blocks_per_ckpt: int | None
    policy: str
    tiles: int | str | None = None
    peak_bytes: int | None = None
    temp_bytes: int | None = None
    host_bytes: int | None = None
    memory_bytes: int | None = None
    sent_bytes: int | None = None
    forward_runs: float | None = None
    compile_seconds: float | None = None
    error: str | None = None

    @property
    def setting(self) -> str:
        chunks = "" if self.blocks_per_ckpt is None else f"K={self.blocks_per_ckpt}, "
        return chunks + self.policy + ("" if self.tiles is None else f", tiles={self.tiles}")


def add_parser(commands: Any) -> None:
    about = "compile a stack under many settings and show memory against recomputation, as a table and as a picture"
    parser = commands.add_parser("report", help=about, description=about)
    add_stack_options(parser)
    add_mesh_options(parser)
    parser.add_argument(
        "--blocks-per-ckpt",
        nargs="+",
        type=chunk_size,
        metavar="K",
        help="chunk sizes to try, 'none' for no chunks (default: none, and the divisor of the length nearest to its root)",
    )
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="POLICY", help=f"default: {' '.join(POLICIES)}")
    parser.add_argument(
        "--tiles",
        nargs="+",
        type=slices,
        default=[None],
        metavar="T",
        help="slices of pieces to try: 'none', 'auto', or a number at most (default: none)",
    )
    parser.add_argument(
        "--target", nargs="+", default=["attached"], help=f"attached, cpu, {', '.join(targets.gpu_names())}, or files"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture (.svg, .png or .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        if options.plot is not None:
            check_plot(options.plot)
        where = [targets.get(name) for name in options.target]
        check_mesh(options, where)
        _ = [target.devices for target in where]  # a missing plugin is said before anything is compiled
        rates = next((target for target in where if target.gpu), targets.get(RATES))
        with Progress("report", unit="stack") as progress:
            progress.doing("tracing the stacks")
            chunks = options.blocks_per_ckpt
            if not chunks:
                plain = explained(chosen_stack(options, blocks_per_ckpt=None, policy="nothing"), target=None)
                chunks = dict.fromkeys([None, chunk_near_sqrt(plain.length)])
            settings = [(k, p, t) for k in chunks for p in options.policies for t in dict.fromkeys(options.tiles)]
            calls = [
                chosen_stack(options, blocks_per_ckpt=k, policy=policy, **({} if tiles is None else {"tiles": tiles}))
                for k, policy, tiles in settings
            ]
            found = [explained(call, rates) for call in calls]
    except EXPECTED as error:
        return fail("report", error)
    title = f"{found[0].length} x {found[0].block}, gradients of its parameters, JAX {jax.__version__}"
    rows: list[Row] = []
    interrupted = False
    jobs = [
        (Row(target.name, k, policy, tiles, forward_runs=explanation.forward_runs), call, target)
        for target in where
        for (k, policy, tiles), call, explanation in zip(settings, calls, found, strict=True)
    ]
    try:
        with Progress("report", len(jobs), "setting") as progress:
            for row, call, target in jobs:
                progress.doing(f"compiling {row.setting} for {row.target}")
                rows.append(measured(row, on_mesh(call, options, target), target, options.mesh is not None))
                progress.advance()
    except KeyboardInterrupt:  # what has been measured is not lost
        interrupted = True
        print(f"interrupted: {len(rows)} of {len(jobs)} settings were measured", file=sys.stderr)
    if options.plot is not None:  # first: whoever reads the table may not read on
        if any(map(_point, rows)):
            draw(options.plot, title, rows)
        else:
            print(f"jaxckpt report: nothing was measured, and {options.plot} is left as it was", file=sys.stderr)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    elif rows:
        below = EXPLAINED.format(rates=rates.name) + f" {SENT}" * any(row.sent_bytes for row in rows)
        print("\n\n".join([title, *tables(rows), below]))
    return 130 if interrupted else int(all(row.error for row in rows))


def measured(row: Row, call: Call, target: targets.Target, is_split: bool = False) -> Row:
    """Compiles the gradient of the stack's parameters for the target and reads its sizes."""
    try:
        found = measure(*gradient(call, is_split), target=target)
    except Exception as error:  # what one setting does not allow must not lose the others
        return dataclasses.replace(row, error=f"{type(error).__name__}: {error}".splitlines()[0])
    return dataclasses.replace(
        row,
        peak_bytes=found.peak_bytes,
        temp_bytes=found.temp_bytes,
        host_bytes=found.host_bytes,
        memory_bytes=found.memory_bytes,
        sent_bytes=found.sent_bytes,
        compile_seconds=round(found.compile_seconds, 1),
    )


def explained(call: Call, target: Any) -> Explanation:
    return explain(call.stack, *call.args, target=target, **call.keywords)


def gradient(call: Call, is_split: bool = False) -> tuple[Any, ...]:
    """A function for `measure` and its arguments: the gradients by the parameters of the sum of the squared outputs.

    Arguments:
        is_split: the parameters lie on a mesh, and so should their gradients.
    """
    stack, args, keywords = call
    if isinstance(stack, nnx.Module):
        graph, params, state = nnx.split(stack, nnx.Param, ...)
        forward = lambda params, state, *args, **keywords: nnx.merge(graph, params, state)(*args, **keywords)  # noqa: E731
        args = (state, *args)
    elif isinstance(stack, nn.Module):
        state = dict(args[0])
        params = state.pop("params")
        forward = lambda params, state, *args, **kw: stack.apply({"params": params, **state}, *args, **kw)  # noqa: E731
        args = (state, *args[1:])
    else:
        forward, params, args = stack, args[0], args[1:]
    arrays, with_arrays = split_arrays((args, keywords))

    def loss(params: Any, arrays: list[Any]) -> jax.Array:
        args, keywords = with_arrays(arrays)
        out = jax.tree.leaves(forward(params, *args, **keywords))
        squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in out if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jnp.stack(squares).sum()

    step = jax.value_and_grad(loss)
    if is_split:  # gradients lie as parameters do, or XLA may return them whole
        step = jax.jit(step, out_shardings=(None, jax.tree.map(lambda leaf: leaf.sharding, params)))
    return step, params, arrays


def tables(rows: list[Row]) -> list[str]:
    """For each target the settings, the one of least memory first; a star marks the Pareto front."""
    parts = []
    for target, group in _by_target(rows).items():
        front = pareto([point for row in group if (point := _point(row))])
        sends = any(row.sent_bytes for row in group)
        lines = [["  setting", "peak GiB", "temp GiB", *["sent GiB"] * sends, "forward runs", "compile s", ""]]
        for row in sorted(group, key=lambda row: (row.peak_bytes is None, row.peak_bytes)):
            lines.append([f"{'*' if _point(row) in front else ' '} {row.setting}", *_cells(row, sends)])
        memory = max(row.memory_bytes or 0 for row in group)
        title = f"{target}, {memory / GIB:.0f} GiB of memory" if memory else target
        parts.append("\n".join([title, *aligned(lines, right=range(1, 5 + sends))]))
    return parts


EXPLAINED = """*: no other setting needs less memory without running more. K: blocks_per_ckpt.
peak: temporaries, arguments and outputs of each device. forward runs: of a block in one training step, parts of it by the
time model of {rates}; 1: nothing is run again."""
SENT = "sent: by each device to others in one step."


def _cells(row: Row, sends: bool) -> tuple[str, ...]:
    runs = "" if row.forward_runs is None else f"{row.forward_runs:.2f}"
    if row.peak_bytes is None or row.temp_bytes is None:
        return "", "", *[""] * sends, runs, "", row.error or ""
    notes = []
    if row.memory_bytes and row.peak_bytes > row.memory_bytes:
        notes.append(f"{(row.peak_bytes - row.memory_bytes) / GIB:.1f} GiB too large")
    if row.host_bytes:
        notes.append(f"{row.host_bytes / GIB:.1f} GiB in the host")
    sizes = [row.peak_bytes, row.temp_bytes, *[row.sent_bytes or 0] * sends]
    return *(f"{size / GIB:.2f}" for size in sizes), runs, f"{row.compile_seconds:.1f}", ", ".join(notes)


def draw(path: Path, title: str, rows: list[Row]) -> None:
    """The picture of what could be measured."""
    groups = _by_target(rows).items()
    points = {target: [point for row in group if (point := _point(row))] for target, group in groups}
    memory = {target: max(row.memory_bytes or 0 for row in group) for target, group in groups}
    draw_memory_against_runs(path, title, points, memory)


def _by_target(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.target, []).append(row)
    return groups


def _point(row: Row) -> Point | None:
    if row.peak_bytes is None or row.forward_runs is None:
        return None
    return Point(row.forward_runs, row.peak_bytes, row.setting)
