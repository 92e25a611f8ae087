"""`jaxckpt plan`: the fastest setting of a training step's stacks that fits into a budget of memory."""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt import plan
from jaxckpt._plan import Plan
from jaxckpt.cli._errors import EXPECTED, fail
from jaxckpt.cli._meshes import add_mesh_options, check_mesh, on_mesh
from jaxckpt.cli._stacks import MODELS, add_stack_options, chosen_stack, made_by, positive, refuse_sizes
from jaxckpt.cli.plots import OfBatch, Point, check_plot, draw_batches, draw_memory_against_runs
from jaxckpt.cli.report import gradient
from jaxckpt.memory import targets
from jaxckpt.planning.batch import PLANS, Batches, batches
from jaxckpt.planning.rounds import COMPILATIONS


def add_parser(commands: Any) -> None:
    about = "find the fastest setting that fits into a budget of memory"
    parser = commands.add_parser("plan", help=about, description=about)
    add_stack_options(parser, stack=False).add_argument(
        "--step",
        metavar="MODULE:MAKE",
        help="a training step of yours in place of --model: MAKE() returns (step, args); stacks in it that are built with "
        "plan='auto' or plan='auto:NAME' are planned; jax.ShapeDtypeStructs do for arrays",
    )
    add_mesh_options(parser)
    parser.add_argument("--budget", help="of each device, such as 40GiB (default: its memory)")
    parser.add_argument("--target", default="attached", help=f"attached, cpu, {', '.join(targets.gpu_names())}, or a file")
    parser.add_argument("--objective", choices=("time", "memory"), default="time", help="default: %(default)s")
    parser.add_argument("--time", action="store_true", help="run the best few on the attached device, and choose by that")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the attached device's rates for the time model, once"
    )
    parser.add_argument(
        "--compilations",
        type=positive,
        default=COMPILATIONS,
        help="of the whole step, at most (default: %(default)s); the plan says what they left untried",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="SIZE",
        help="the largest of these batches that fits, and the throughput that the time model expects of some; of --model "
        "transformer, or of --step, whose MAKE(SIZE) is called then",
    )
    parser.add_argument(
        "--plans", type=positive, help=f"that are made for --batch, at most (default: {PLANS}), each as long as without"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="save the plan (of the largest batch), for checkpoint_scan(..., plan=FILE)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what was compiled, or batches (.svg, .png or .pdf)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        if options.plot is not None:
            check_plot(options.plot)
        if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
            wrong = "that is a folder" if options.out.is_dir() else f"there is no folder {options.out.parent}"
            raise ValueError(f"--out {options.out}: {wrong}; write the path of a file, such as plan.json")
        if options.time:
            _check_time(options)
        check_mesh(options, [targets.get(options.target)])
        if options.plans and not options.batch:
            raise ValueError("--plans is of --batch, which lists the sizes that a batch may have")
        found = _planned(options) if options.batch is None else _batches(options)
        chosen = found if isinstance(found, Plan) else found[found.largest.size]
        if options.out is not None:  # files first: whoever reads the table may not read on
            chosen.save(options.out)
        if options.plot is not None:
            _draw(options.plot, found) if isinstance(found, Plan) else _draw_batches(options.plot, found)
    except EXPECTED as error:
        return fail("plan", error)
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    return 0


def _planned(options: argparse.Namespace) -> Plan:
    step, args = _step(options)
    knobs = ("budget", "target", "objective", "time", "calibrate", "compilations")
    return plan(step, *args, **{name: getattr(options, name) for name in knobs})


def _batches(options: argparse.Namespace) -> Batches:
    if options.time:
        raise ValueError("--time looks at one batch, and --batch at several: leave one of them away")
    if options.objective == "memory":
        raise ValueError("--batch makes plans for time, and --objective memory is of one batch: leave one of them away")
    if options.step is None and MODELS[options.model].batch is None and not (options.mesh or {}).get("data"):
        raise ValueError(f"--batch: a {options.model} of ours has no batch; take --model transformer, or --step")
    knobs = ("budget", "target", "calibrate", "compilations")
    how = {name: getattr(options, name) for name in knobs}
    return batches(lambda size: _step(options, size), options.batch, options.plans or PLANS, **how)


def _check_time(options: argparse.Namespace) -> None:
    """What `--time` needs, before memory is taken for it."""
    if not targets.get(options.target).is_present:
        raise ValueError(f"--time runs the step, and --target {options.target} is only described: take --target attached")
    if options.objective == "memory":
        raise ValueError("--time chooses the fastest, and --objective memory the least memory: leave one of them away")


def _step(options: argparse.Namespace, batch: int | None = None) -> tuple[Any, tuple[Any, ...]]:
    """The step and its arguments, for a batch of that size if one is given."""
    if options.step is None:
        call = chosen_stack(options, batch, plan="auto")
        fn, *args = gradient(on_mesh(call, options, targets.get(options.target)), options.mesh is not None)
        return fn, _arrays(tuple(args), options.target) if options.time else tuple(args)
    refuse_sizes(options, "--step")
    made = made_by(options.step, "--step", *([] if batch is None else [batch]))
    if not isinstance(made, tuple) or len(made) != 2 or not callable(made[0]) or not isinstance(made[1], tuple):
        raise TypeError(
            f"{options.step} must return (step, args), args a tuple of what the step is called with; got {made!r:.200}"
        )
    if options.time and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(made[1])):
        raise ValueError(f"--time runs the step: {options.step} must return arrays in place of jax.ShapeDtypeStructs")
    return made


def _arrays(shapes: Any, target: str) -> Any:
    """Arrays of these shapes on the target, all of one small number: how long a step takes does not depend on it."""
    with jax.default_device(targets.get(target).devices[0]):
        return jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype, device=x.sharding), shapes)


def _title(found: Plan) -> str:
    return f"{', '.join(f'{s.length} x {s.block}' for s in found.stacks.values())}, JAX {found.jax_version}"


def _draw(path: Path, found: Plan) -> None:
    """What was compiled, and the budget."""
    points = [Point(c.forward_runs, c.peak_bytes, c.setting) for c in found.candidates if c.peak_bytes is not None]
    title = _title(found)
    draw_memory_against_runs(path, title, {found.target: points}, {found.target: found.budget_bytes or 0}, "budget")


def _draw_batches(path: Path, found: Batches) -> None:
    """What fits, and the budget."""
    plans = [(batch, batch.plan) for batch in found.tried if batch.plan is not None]
    points = [OfBatch(b.size, b.examples_per_second or 0.0, p.peak_bytes, p.chosen.forward_runs) for b, p in plans]
    largest = found[found.largest.size]
    draw_batches(path, _title(largest), points, largest.budget_bytes)
