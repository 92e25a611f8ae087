"""The runs of stacks in a program, looked at while it is traced."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import nnx

from jaxckpt._leaves import split_arrays
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine.planned import observed
from jaxckpt.engine.run import Run

T = TypeVar("T")


def observe(call: Callable[[list[Any]], Any], arrays: list[Any], see: Callable[[Run], None]) -> None:
    """Traces `call(arrays)` and calls `see` with each run of a stack as it is traced, those inside of blocks left out."""
    with observing(see):
        jax.eval_shape(call, arrays)


@contextlib.contextmanager
def observing(see: Callable[[Run], None]) -> Iterator[None]:
    """Calls `see` with each run of a stack that is traced meanwhile, those inside of blocks left out."""
    token = observed.set(see)
    try:
        with _untraced(object()):  # or what is jitted inside, and was traced before, would not run the stack again
            yield
    finally:
        observed.reset(token)


def call_of(stack: Any, args: tuple, keywords: dict[str, Any]) -> tuple[Callable[[list[Any]], list[Any]], list[Any]]:
    """A function of arrays that calls what is to be explained, for the arrays of its results; and these arrays."""
    if isinstance(stack, nnx.Module):
        graph, state = nnx.split(stack)
        fn = lambda state, *args, **keywords: nnx.merge(graph, state)(*args, **keywords)  # noqa: E731
        return call_of(fn, (state, *args), keywords)
    if isinstance(stack, nn.Module) and not (args and isinstance(args[0], Mapping)):
        raise TypeError(
            f"a Linen module is explained with its variables first, explain(stack, variables, x); got {args!r:.200}"
        )
    fn = stack.apply if isinstance(stack, nn.Module) else stack
    if not callable(fn) or isinstance(fn, type):
        raise TypeError(f"explain takes a stack, what checkpoint made, or a function that runs one; got {stack!r}")
    arrays, with_arrays = split_arrays((args, keywords))

    def call(arrays: list[Any]) -> list[Any]:
        args, keywords = with_arrays(arrays)
        return [leaf for leaf in jax.tree.leaves(fn(*args, **keywords)) if isinstance(leaf, jax.Array)]

    return call, arrays


def look_at_run(stack: Any, args: tuple, keywords: dict[str, Any], look: Callable[[Run], T]) -> T:
    """What `look` finds of the one run of a stack when `stack` is called, while that is traced."""
    call, arrays = call_of(stack, args, keywords)
    told: list[tuple[Run, T | None]] = []

    def see(run: Run) -> None:
        # Here, where axes that have names, as in `shard_map`, are bound.
        can_be = run.refusal is None and not any(map(jx.is_batched, itertools.chain(*run.leaves)))
        told.append((run, look(run) if can_be else None))

    observe(call, arrays, see)
    told = [(run, found) for run, found in told if run.is_stack] or told
    seen = [run for run, _ in told]
    if not seen:
        name = getattr(stack, "__name__", type(stack).__name__)
        raise TypeError(f"{name} ran nothing that checkpoint_scan or checkpoint made, so there is nothing to explain")
    if len(seen) > 1:
        found = ", ".join(f"{run.length} x {run.names.block}" if run.is_stack else run.names.block for run in seen)
        what = "stacks" if seen[0].is_stack else "functions under checkpoint"
        raise ValueError(f"several {what} were run ({found}); explain one of them at a time, with what it is called with")
    if seen[0].refusal is not None:
        raise seen[0].refusal
    (_, found), *_ = told
    if found is None:
        what = "the stack of " if seen[0].is_stack else ""
        raise ValueError(
            f"{what}{seen[0].names.block} was run under vmap, where its bytes are those of one example; explain it by "
            "itself, called with the whole batch"
        )
    return found


_untraced = jax.make_user_context(None)
