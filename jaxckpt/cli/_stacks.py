"""The stacks that a subcommand can look at: jaxckpt's own models at the sizes of the papers, and the user's."""

import argparse
import importlib
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxckpt import checkpoint_scan
from jaxckpt.models import EvoformerBlock, PairformerBlock, TransformerBlock


class Call(NamedTuple):
    """A stack and what it is called with, of a Linen stack the variables first."""

    stack: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]


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
    parser.add_argument("--blocks", type=_positive, default=48, help="of --model (default: %(default)s)")
    parser.add_argument("--tokens", type=_positive, default=384, help="of --model (default: %(default)s)")
    return which


def chosen_stack(options: argparse.Namespace, **knobs: Any) -> Call:
    """The stack that the options name, with these knobs of `checkpoint_scan`.

    Raises:
        ValueError: a knob out of range, or `--stack` does not lead to a function.
        TypeError: the user's function does not return a stack and what it is called with.
    """
    if options.stack is not None:
        return _of_user(options.stack, knobs)
    block, shapes = MODELS[options.model](options.tokens)
    stack = checkpoint_scan(block, options.blocks, **knobs)(dtype=jnp.bfloat16)
    carry = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    return Call(stack, (jax.eval_shape(stack.init, jax.random.key(0), *carry), *carry), {})


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
    sys.path.insert(0, "")  # as 'python -m' has it; the command 'jaxckpt' does not
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} takes package.module:function, and {where!r} could not be imported: {error}") from error
    if not callable(make):
        raise TypeError(f"{option} takes package.module:function, and {where!r} is {make!r:.200}, which is no function")
    return make


def _of_user(where: str, knobs: dict[str, Any]) -> Call:
    make = imported(where, "--stack")
    made = make(**knobs)
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)
