"""Steps whose arguments are NNX objects (modules, optimizers, streams of keys), which they change in place.

To JAX such an object is a tree of arrays, and what a function does to it is lost with the copy that was traced. `nnx.jit`
makes the changes results of the program; steps are measured and planned as it would run them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.errors import TraceContextError

from jaxckpt.flax.objects import is_object


def _is_leaf(leaf: object) -> bool:
    """NNX objects, and what `nnx.split` made of them, which is not changed in place."""
    return is_object(leaf) or isinstance(leaf, nnx.State)


def holds_objects(tree: Any) -> bool:
    """Whether an NNX object is among the leaves of `tree`."""
    return any(map(is_object, jax.tree.leaves(tree, is_leaf=_is_leaf)))


def split_objects(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """`tree` with states in place of its NNX objects, and the way back; what objects share is there once.

    What the objects of the tree that the way back makes were changed to, `nnx.state` tells, or `split_objects` again.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_leaf)
    where = [i for i, leaf in enumerate(leaves) if is_object(leaf)]
    graph, states = nnx.split(tuple(leaves[i] for i in where))
    others = [None if i in where else leaf for i, leaf in enumerate(leaves)]

    def whole(parts: Any) -> Any:
        states, others = parts
        out = list(others)
        for i, made in zip(where, nnx.merge(graph, states), strict=True):
            out[i] = made
        return jax.tree.unflatten(structure, out)

    return (states, others), whole


def map_leaves(fn: Callable[..., Any], tree: Any, *more: Any) -> Any:
    """`jax.tree.map` that keeps what NNX objects share; the trees have equal objects in equal places."""
    if not holds_objects(tree):
        return jax.tree.map(fn, tree, *more)
    parts, whole = split_objects(tree)
    return whole(jax.tree.map(fn, parts, *(split_objects(other)[0] for other in more)))


def jitted(fn: Callable[..., Any], args: Any) -> Any:
    """`fn`, if it is jitted, or else by `nnx.jit` where NNX objects are among its arguments, or by `jax.jit`."""
    if hasattr(fn, "lower"):
        return fn
    return nnx.jit(fn) if holds_objects(args) else jax.jit(fn)


def with_objects(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The same call, with the NNX objects that `fn` is bound to, as a method or a `functools.partial`, as arguments.

    A bound Linen module, or its method, becomes a function that has a hash.
    """
    owner = getattr(fn, "__self__", fn)
    if isinstance(owner, nn.Module) and owner.scope is not None:
        return functools.partial(fn), args
    if is_object(owner) and hasattr(fn, "__func__"):
        return fn.__func__, (owner, *args)
    if not isinstance(fn, functools.partial) or not holds_objects((fn.args, fn.keywords)):
        return fn, args
    if not fn.keywords and hasattr(fn.func, "lower"):
        return fn.func, (*fn.args, *args)
    held = {name: value for name, value in fn.keywords.items() if holds_objects(value)}
    free = {name: value for name, value in fn.keywords.items() if name not in held}
    places = [i for i, value in enumerate(fn.args) if holds_objects(value)]

    def call(given: list[Any], named: dict[str, Any], *args: Any) -> Any:
        bound = list(fn.args)
        for i, value in zip(places, given, strict=True):
            bound[i] = value
        return fn.func(*bound, *args, **free, **named)

    return call, ([fn.args[i] for i in places], held, *args)


@contextlib.contextmanager
def objects_are_arguments(fn: Callable[..., Any], what: str) -> Iterator[None]:
    """Says what to write where `fn` changes NNX objects that it closes over.

    Raises:
        ValueError: naming `what` was called with `fn`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, TraceContextError) and "different trace level" not in str(error):
            raise
        name = getattr(fn, "__name__", "step")
        raise ValueError(
            f"{what}: {name} changes NNX objects that it closes over, and a traced function cannot: pass all that it "
            f"changes, the model and the optimizer, as arguments, {what}(step, model, optimizer, ...)"
        ) from error
