"""`jaxckpt explain`: what one block of a stack keeps and runs again under a setting, value by value."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from jaxckpt import explain as explain_stack
from jaxckpt._progress import Progress
from jaxckpt.cli._errors import EXPECTED, fail
from jaxckpt.cli._meshes import add_mesh_options, check_mesh, on_mesh
from jaxckpt.cli._stacks import add_stack_options, chosen_stack, chunk_size, number_or_text, slices
from jaxckpt.memory import targets


def add_parser(commands: Any) -> None:
    about = "show what one block keeps, re-runs and offloads under a setting: value, source line, bytes, time to re-run"
    parser = commands.add_parser("explain", help=about, description=about)
    add_stack_options(parser)
    parser.add_argument("--blocks-per-ckpt", type=chunk_size, metavar="K", help="blocks of a chunk, or 'none' (default)")
    parser.add_argument("--stages", type=number_or_text, help="'auto', a number of pieces, or tags:NAMES to cut behind")
    parser.add_argument("--tiles", type=slices, help="'auto', the slices of a piece at most, or 'none' (default)")
    parser.add_argument("--policy", help="see 'jaxckpt policies' (default: that of checkpoint_scan)")
    parser.add_argument(
        "--target",
        help=f"whose times to show: {', '.join(targets.gpu_names())}, or a file; of several devices (h200:8) those of one, "
        "and what it sends",
    )
    add_mesh_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the table as a page, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        if options.html is not None and not options.html.parent.is_dir():
            raise ValueError(f"--html {options.html}: there is no folder {options.html.parent}")
        if options.target is not None and targets.get(options.target).gpu is None:
            raise ValueError(f"--target {options.target}: its rates are not known; times are shown for GPUs by name or file")
        if options.mesh is not None and options.target is None:
            raise ValueError(f"--mesh is of devices: write --target h200:{math.prod(options.mesh.values())}, say, beside it")
        where = None if options.target is None else targets.get(options.target)
        check_mesh(options, [] if where is None else [where])
        with Progress("explain") as progress:
            progress.doing("tracing the stack")
            knobs = {name: getattr(options, name) for name in ("blocks_per_ckpt", "policy")}
            knobs |= {name: value for name in ("stages", "tiles") if (value := getattr(options, name)) is not None}
            call = chosen_stack(options, **knobs)
            if where is not None:
                call = on_mesh(call, options, where)
            found = explain_stack(call.stack, *call.args, target=where, **call.keywords)
        if options.html is not None:  # first: whoever reads the table may not read on
            options.html.write_text(found.to_html())
    except EXPECTED as error:
        return fail("explain", error)
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    return 0
