"""NNX objects that callables hold or are given, for functions that are traced apart from where they were made.

NNX refuses to change a variable inside of another trace than its own. So the traced function has copies, whose state goes
in and out as arrays, and the objects are given what the copies became.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import errors, nnx
from jax.core import Tracer

from jaxckpt._leaves import is_array, replaced, same_leaves


class Objects:
    """The NNX objects that `blocks` hold (modules, their methods, `functools.partial`s of them) and those in `args`.

    `arrays` are those of their state and those in `args`.
    """

    def __init__(self, blocks: Sequence[Callable[..., Any]], args: Any):
        self.blocks = [_parts(block) for block in blocks]
        self.arg_leaves, self.arg_tree = jax.tree.flatten(args, is_leaf=is_object)
        of_args = [leaf for leaf in self.arg_leaves if is_object(leaf)]
        self.originals = (*(part for parts, _ in self.blocks for part in parts), *of_args)
        self.graphdef, state = nnx.split(self.originals)
        leaves, self.state_tree = jax.tree.flatten(state)
        self.leaves = [*leaves, *(leaf for leaf in self.arg_leaves if not is_object(leaf))]
        self.where = [i for i, leaf in enumerate(self.leaves) if is_array(leaf)]
        self.arrays = [self.leaves[i] for i in self.where]

    def copied(self, arrays: list[Any]) -> tuple[list[Callable[..., Any]], Any, "Copies"]:
        """Blocks and arguments with copies of the objects, made of other arrays."""
        leaves = iter(replaced(self.leaves, self.where, arrays))
        state = jax.tree.unflatten(self.state_tree, [next(leaves) for _ in range(self.state_tree.num_leaves)])
        copies = Copies(self.graphdef, state)
        objects = iter(copies.objects)
        blocks = [rebuild([next(objects) for _ in parts]) for parts, rebuild in self.blocks]
        args = [next(objects) if is_object(leaf) else next(leaves) for leaf in self.arg_leaves]
        return blocks, jax.tree.unflatten(self.arg_tree, args), copies

    def returned(self, results: Any) -> Any:
        """What `Copies.marked` made of results, with the objects themselves."""
        return jax.tree.map(lambda leaf: self.originals[leaf.index] if isinstance(leaf, _Copy) else leaf, results)


@dataclass(frozen=True)
class _Copy:
    index: int


class Copies:
    """The copies of one trace."""

    def __init__(self, graphdef: Any, state: Any):
        self.before = {path: jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(state)}
        self.objects = nnx.merge(graphdef, state)
        self.attributes = attributes(self.objects)

    def changed(self) -> dict[tuple, Any]:
        """The variables that are new, or hold something else than at first, by path."""
        now = nnx.to_flat_state(nnx.split(self.objects)[1])
        return {path: new for path, new in now if path not in self.before or not same_leaves(self.before[path], new)}

    def changed_static(self) -> dict[tuple, Any]:
        """See the function of that name."""
        return changed_static(self.attributes, self.objects)

    def marked(self, results: Any) -> Any:
        """Results of the trace, with the copies among them marked."""
        at = {id(copy): _Copy(i) for i, copy in enumerate(self.objects)}
        return jax.tree.map(lambda leaf: at.get(id(leaf), leaf), results, is_leaf=lambda leaf: id(leaf) in at)


@contextlib.contextmanager
def written_apart(who: str) -> Iterator[None]:
    """Says what to write where a function that `who` calls changes an object that it hides, in a lambda above all."""
    try:
        yield
    except errors.TraceContextError as error:
        raise ValueError(
            f"{who} changes an NNX object that it closes over, a counter of random numbers or statistics, and the change "
            "could not leave what is checkpointed. Pass the module itself, its method, or functools.partial(module, ...), "
            "whose state is written back"
        ) from error


def update_variables(root: Any, changed: dict[Any, Any]) -> None:
    """Updates variables below `root`, by path, and adds those that are new (`sow`)."""
    if not changed:
        return
    known = {path for path, _ in nnx.to_flat_state(nnx.split(root)[1])}
    for path, variable in changed.items():
        if path not in known:
            setattr(_at(root, path[:-1]), str(path[-1]), variable)
    if old := {path: variable for path, variable in changed.items() if path in known}:
        nnx.update(root, nnx.from_flat_state(old))


def update_static(root: Any, changed: dict[tuple, Any]) -> None:
    """Sets attributes that are not arrays below `root`, by path and name."""
    for (path, name), value in changed.items():
        setattr(_at(root, path), name, value)


def attributes(root: Any) -> dict[tuple, Any]:
    """The attributes of NNX objects below `root`, by path and name."""
    return {
        (path, name): value
        for path, node in nnx.iter_graph(root)
        if isinstance(node, nnx.Pytree)
        for name, value in vars(node).items()
        if not name.startswith("_pytree")
    }


def static_attributes(root: Any) -> dict[tuple, Any]:
    """Those of the attributes that hold no arrays, to NNX."""
    return {key: value for key, value in attributes(root).items() if _kind(value) is _STATIC}


def changed_static(before: dict[tuple, Any], objects: Sequence[Any]) -> dict[tuple, Any]:
    """The static attributes of `objects` that are new or hold something else than `before`, by path and name.

    They are compared, and not hashed: a configuration may have no hash.

    Raises:
        ValueError: naming an attribute that was changed in a way that `update_static` and `update_variables` cannot repeat.
    """
    now, changed = attributes(objects), {}
    for key in before | now:
        old, new = before.get(key, _MISSING), now.get(key, _MISSING)
        was, kind = _kind(old), _kind(new)
        if was is kind and (kind is not _STATIC or (type(old) is type(new) and is_equal(old, new))):
            continue
        if was not in (_MISSING, _STATIC) or kind not in (nnx.Variable, _STATIC) or _holds_tracer(new, kind):
            raise ValueError(_lost(key, new, objects))
        if kind is _STATIC:
            changed[key] = new
    return changed


_MISSING, _STATIC = object(), object()


def _kind(value: Any) -> Any:
    """How NNX takes what an attribute holds: as an object of a class, a variable, an array, or as static."""
    if isinstance(value, nnx.Pytree):
        return type(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        return jax.Array
    return nnx.Variable if isinstance(value, nnx.Variable) else _MISSING if value is _MISSING else _STATIC


def _holds_tracer(value: Any, kind: Any) -> bool:
    """Whether an array that is being traced stands in a static value, and would outlive the trace."""
    return kind is _STATIC and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def _lost(key: tuple, new: Any, objects: Sequence[Any]) -> str:
    if new is _MISSING:
        how = "is deleted"
    elif _kind(new) is jax.Array or _holds_tracer(new, _kind(new)):
        how = "is set to what holds arrays"
    else:
        how = f"becomes of type {type(new).__name__}"
    return (
        f"{attribute_name(objects, key)} {how} while a block runs, and that would be lost: make all that a block has in its "
        "__init__, and hold arrays that it changes in an nnx.Variable"
    )


def attribute_name(objects: Sequence[Any], key: tuple) -> str:
    """An attribute by its path and name, as one would write it: `Block.linear.mode`."""
    (first, *path), name = key
    return ".".join(map(str, [type(objects[first]).__name__, *path, name]))


def is_equal(a: Any, b: Any) -> bool:
    """Whether two static values are equal; where they cannot say so, arrays in a configuration above all, they are not."""
    try:
        return a is b or bool(a == b)
    except (TypeError, ValueError):
        return False


def _at(root: Any, path: tuple) -> Any:
    for key in path:
        root = root[key] if isinstance(key, int) else getattr(root, str(key))
    return root


def is_object(value: Any) -> bool:
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def _is_whole(value: Any) -> bool:
    return is_object(value) or callable(value)


def _parts(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The objects in a leaf, and a function that makes it with others in their places."""
    if is_object(value):
        return [value], lambda parts: parts[0]
    if isinstance(value, types.MethodType) and is_object(value.__self__):
        return [value.__self__], lambda parts: types.MethodType(value.__func__, parts[0])
    if isinstance(value, functools.partial):
        leaves, tree = jax.tree.flatten((value.func, value.args, value.keywords), is_leaf=_is_whole)
        found = [_parts(leaf) for leaf in leaves]

        def rebuild(parts):
            left = iter(parts)
            func, args, keywords = jax.tree.unflatten(tree, [make([next(left) for _ in own]) for own, make in found])
            return functools.partial(func, *args, **keywords)

        return [part for own, _ in found for part in own], rebuild
    return [], lambda parts: value
