"""The stacks that a subcommand can look at: jaxckpt's own models at the sizes of the papers, and the user's."""

import argparse
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt import checkpoint_scan
from jaxckpt.models import EvoformerBlock, PairformerBlock, TransformerBlock


class Call(NamedTuple):
    """A stack and what it is called with, of a Linen stack the variables first."""

    stack: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]


class Model(NamedTuple):
    """A model of ours: its block, the shapes of one example's carry by the number of tokens, and how many examples.

    Without `batch` there is one, and the carry has no axis for it.
    """

    block: Any
    carry: Callable[[int], list[tuple[int, ...]]]
    batch: int | None = None


# With the sizes of the papers: 8 sequences of the transformer, 128 of the Evoformer's alignment.
MODELS = {
    "transformer": Model(partial(TransformerBlock, d_model=1024, num_heads=8, d_ff=4096), lambda n: [(n, 1024)], 8),
    "pairformer": Model(PairformerBlock, lambda n: [(n, 384), (n, n, 128)]),
    "evoformer": Model(EvoformerBlock, lambda n: [(128, n, 256), (n, n, 128)]),
}


BLOCKS, TOKENS = 48, 384


def add_stack_options(parser: argparse.ArgumentParser, stack: bool = True) -> Any:
    """`--model` with its `--blocks` and `--tokens`, or, unless that is not wanted, `--stack`; the group of these two."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=MODELS, default="transformer", help="one of jaxckpt's own (default: %(default)s)")
    parser.set_defaults(stack=None)
    if stack:
        which.add_argument(
            "--stack",
            metavar="MODULE:MAKE",
            help="a function of yours: MAKE(blocks_per_ckpt=..., policy=...) returns the stack, a tuple of what it is "
            "called with (of a Linen stack the variables first), and, if it takes any, a dict of keyword arguments; "
            "jax.ShapeDtypeStructs do for arrays",
        )
    parser.add_argument("--blocks", type=positive, help=f"of --model (default: {BLOCKS})")
    parser.add_argument("--tokens", type=positive, help=f"of --model (default: {TOKENS})")
    return which


def chunk_size(text: str) -> int | None:
    """What `--blocks-per-ckpt` takes: a number of blocks, or 'none' for no chunks."""
    return _number_or_none(text, f"{text!r} is not a number of blocks, nor 'none'")


def number_or_text(text: str) -> int | str:
    """A number where it is one; what else is allowed, the knob says."""
    return int(text) if text.lstrip("-").isdecimal() else text


def refuse_sizes(options: argparse.Namespace, option: str) -> None:
    """Raises ValueError where sizes of `--model` are given beside a stack or a step of the user's that can be imported."""
    imported(getattr(options, option.removeprefix("--")), option)
    for name in ("blocks", "tokens"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is of --model, and {option} says itself how large it is: leave one of them away")


def slices(text: str) -> int | str | None:
    """What `--tiles` takes: a number of slices at most, 'auto', or 'none'."""
    is_auto = text.lower() == "auto"
    return "auto" if is_auto else _number_or_none(text, f"{text!r} is not a number of slices, nor 'auto' or 'none'")


def _number_or_none(text: str, wrong: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(wrong)
    return int(text)


def chosen_stack(options: argparse.Namespace, batch: int | None = None, **knobs: Any) -> Call:
    """The stack that the options name, with these knobs of `checkpoint_scan`.

    Arguments:
        batch: examples, of our models; by default their own number, or the next that the axis data of `--mesh` divides.

    Raises:
        ValueError: a knob out of range, or `--stack` does not lead to a function.
        TypeError: the user's function does not return a stack and what it is called with.
    """
    if options.stack is not None:
        refuse_sizes(options, "--stack")
        return _of_user(options.stack, knobs)
    model = MODELS[options.model]
    axes = getattr(options, "mesh", None) or {}
    data = axes.get("data")
    if batch is None:
        batch = model.batch if data is None else -(-(model.batch or 1) // data) * data
    elif batch % (data or 1):
        raise ValueError(f"a batch of {batch} cannot be split over data={data}; take multiples of {data}")
    if axes:
        knobs["call"] = partial(_constrained, AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes)))
    stack = checkpoint_scan(model.block, options.blocks or BLOCKS, **knobs)(dtype=jnp.bfloat16)
    shapes = model.carry(options.tokens or TOKENS)
    carry = [jax.ShapeDtypeStruct(shape if batch is None else (batch, *shape), jnp.bfloat16) for shape in shapes]
    return Call(stack, (jax.eval_shape(stack.init, jax.random.key(0), *carry), *carry), {})


def _constrained(mesh: Any, layer: Any, *carry: Any, **shared: Any) -> Any:
    """What a block returns, and how its batch is split."""
    where = NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.shape else None))
    return jax.lax.with_sharding_constraint(layer(*carry, **shared), where)


def chunk_near_sqrt(length: int) -> int:
    """The divisor of `length` that is nearest to its square root, the smaller of two; the root itself for primes."""
    divisors = [k for k in range(2, length) if length % k == 0]
    return min(divisors, key=lambda k: (max(k, length // k), k), default=math.isqrt(length))


def imported(where: str, option: str) -> Callable[..., Any]:
    """The function that `package.module:function` names.

    Raises:
        ValueError, TypeError: it cannot be imported, or is no function.
    """
    module, _, name = where.partition(":")
    wrong = f"{option} takes package.module:function, and {where!r}"
    sys.path.insert(0, "")  # as 'python -m' has it; the command 'jaxckpt' does not
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module does
        raise ValueError(f"{wrong} could not be imported: {_said(error)}") from error
    if not hasattr(found, name):
        functions = [f"{module}:{key}" for key, value in vars(found).items() if inspect.isfunction(value)]
        listed = f"; there are {', '.join(functions[:10])}" if functions else ""
        what = f"there is no {name} in it" if name else "a colon and the name of a function are missing"
        raise ValueError(f"{wrong} could not be imported: {what}{listed}")
    make = getattr(found, name)
    if not callable(make):
        raise TypeError(f"{wrong} is {make!r:.200}, which is no function")
    return make


def made_by(where: str, option: str, *args: Any, **knobs: Any) -> Any:
    """What the user's function returns.

    Raises:
        ValueError: it cannot be imported, or raised something, which the error names with its place.
    """
    make = imported(where, option)
    try:
        return make(*args, **knobs)
    except Exception as error:
        raise ValueError(f"{option} {where} raised {_said(error)}") from error


def _said(error: BaseException) -> str:
    """An error in one line, with the last place in the user's code that it passed."""
    ours = os.path.dirname(jaxckpt.__file__) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((ours, "<"))]
    frames = [f for f in frames if "site-packages" not in f.filename and f.filename != importlib.__file__]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _of_user(where: str, knobs: dict[str, Any]) -> Call:
    made = made_by(where, "--stack", **knobs)
    kinds = (object, tuple, dict)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not all(map(isinstance, made, kinds)):
        raise TypeError(
            f"{where} must return (stack, args), args a tuple of what the stack is called with, or (stack, args, "
            f"keywords); got {made!r:.200}"
        )
    return _as_shapes(Call(made[0], made[1], made[2] if len(made) == 3 else {}))


def _as_shapes(call: Call) -> Call:
    """The same without the arrays, of which one set per setting might not fit."""

    def shape_of(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf

    stack = call.stack
    if isinstance(stack, nnx.Module):
        graph, state = nnx.split(stack)
        stack = nnx.merge(graph, jax.tree.map(shape_of, state))
    return Call(stack, *jax.tree.map(shape_of, (call.args, call.keywords)))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
