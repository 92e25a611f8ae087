"""`jaxckpt explain`: what one block of a stack keeps and runs again under a setting, value by value."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxckpt import checkpoint_scan
from jaxckpt import explain as explain_stack
from jaxckpt.memory import targets
from jaxckpt.models import EvoformerBlock, PairformerBlock, TransformerBlock


def _transformer(tokens: int) -> tuple[Any, list[tuple[int, ...]]]:
    return partial(TransformerBlock, d_model=1024, num_heads=8, d_ff=4096), [(8, tokens, 1024)]


def _pairformer(tokens: int) -> tuple[Any, list[tuple[int, ...]]]:
    return PairformerBlock, [(tokens, 384), (tokens, tokens, 128)]


def _evoformer(tokens: int) -> tuple[Any, list[tuple[int, ...]]]:
    return EvoformerBlock, [(128, tokens, 256), (tokens, tokens, 128)]


# With the sizes of the papers: 8 sequences of the transformer, 128 of the Evoformer's alignment.
MODELS: dict[str, Callable[[int], tuple[Any, list[tuple[int, ...]]]]] = {
    "transformer": _transformer,
    "pairformer": _pairformer,
    "evoformer": _evoformer,
}


def add_parser(commands: Any) -> None:
    about = "show what one block keeps, re-runs and offloads under a setting: value, source line, bytes, time to re-run"
    parser = commands.add_parser("explain", help=about, description=about)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=MODELS, default="transformer", help="one of jaxckpt's own (default: %(default)s)")
    which.add_argument(
        "--stack",
        metavar="MODULE:MAKE",
        help="a function of yours: MAKE(blocks_per_ckpt=..., policy=...) returns the stack and a tuple of what it is called "
        "with, arrays or jax.ShapeDtypeStructs (of a Linen stack the variables first)",
    )
    parser.add_argument("--blocks", type=int, default=48, help="of --model (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=384, help="of --model (default: %(default)s)")
    parser.add_argument("--blocks-per-ckpt", type=int, metavar="K")
    parser.add_argument("--policy", help="see 'jaxckpt policies' (default: that of checkpoint_scan)")
    parser.add_argument("--target", help=f"whose times to show: {', '.join(targets.gpu_names())}, or a file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the table as a page, too")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    knobs = {"blocks_per_ckpt": options.blocks_per_ckpt, "policy": options.policy}
    try:
        if options.stack is None:
            stack, args = of_model(options.model, options.blocks, options.tokens, knobs)
        else:
            stack, args = of_user(options.stack, knobs)
        found = explain_stack(stack, *args, target=options.target)
    except (ValueError, TypeError, OSError) as error:
        print(f"jaxckpt explain: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    if options.html is not None:
        options.html.write_text(found.to_html())
    return 0


def of_model(name: str, blocks: int, tokens: int, knobs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """A stack of one of `MODELS` that computes in bfloat16, and shapes to call it with."""
    block, shapes = MODELS[name](tokens)
    stack = checkpoint_scan(block, blocks, **knobs)(dtype=jnp.bfloat16)
    carry = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return stack, (jax.eval_shape(stack.init, jax.random.key(0), *carry), *carry)


def of_user(where: str, knobs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """What the user's function makes.

    Raises:
        ValueError: `where` does not lead to a function.
        TypeError: the function does not return a stack and a tuple.
    """
    module, _, name = where.partition(":")
    sys.path.insert(0, "")  # as 'python -m' has it; the command 'jaxckpt' does not
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--stack {where!r} is not of the form package.module:function: {error}") from None
    made = make(**knobs)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], tuple):
        raise TypeError(
            f"{where} must return (stack, args) with a tuple of what the stack is called with; got {made!r:.200}"
        )
    return made
