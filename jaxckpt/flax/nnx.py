"""An NNX block to a pure block function, and an NNX stack around it.

The stack's class is a subclass of the block's that holds the block's own attributes with a layer axis in front of every
array, so that the paths of its state are the block's and `train()`, `eval()`, optimizers and filters work on it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxckpt._leaves import STACK_THEM, same_leaves, stacked_length
from jaxckpt._metadata import add_layer_axis, remove_layer_axis
from jaxckpt._params import stack_params
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine import check
from jaxckpt.engine.stack import per_block_of
from jaxckpt.flax.arguments import check_given_once, run_and_write_back, slots_of
from jaxckpt.flax.classes import stack_class
from jaxckpt.flax.objects import attributes, changed_static, is_equal, static_attributes, update_static, update_variables


@functools.lru_cache(1024)  # so that equal stacks are of one class
def nnx_stack(block: type[nnx.Module], setting: Setting) -> type[nnx.Module]:
    """The class of a stack of `block`s; its constructor takes the block's arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        vars(self).update(vars(_create(block, setting, args, kwargs)))

    return _stack_class(block, setting, {"__init__": __init__}, lambda *call: None)


def nnx_stack_from_list(blocks: list[nnx.Module], setting: Setting) -> nnx.Module:
    """The stack that holds the state of `blocks`, which must be one function with different parameters."""
    block = type(blocks[0])
    for i, other in enumerate(blocks):
        if type(other) is not block:
            raise TypeError(
                f"the blocks of a stack are of one class; block 0 is {block.__name__}, block {i} is "
                f"{type(other).__name__}. checkpoint_blocks runs callables that differ."
            )
    _check_unshared(blocks)
    graphdefs, states = zip(*(nnx.split(b) for b in blocks), strict=True)
    stacked = nnx.merge(graphdefs[0], stack_params(states, partition_name=setting.partition_name))
    setting = dataclasses.replace(setting, length=len(blocks))
    # Equal modules make a stack of the kind that the class makes, so that jit sees equal stacks as equal.
    if all(is_equal(graphdefs[0], other) for other in graphdefs):
        cls = nnx_stack(block, setting)
    else:
        cls = _stack_class(block, setting, {}, _SameFunction(block, blocks, setting))
    stack = object.__new__(cls)
    vars(stack).update(vars(stacked))
    return stack


def _stack_class(
    block: type[nnx.Module], setting: Setting, body: dict[str, Any], check_alike: Callable[..., None]
) -> type[nnx.Module]:
    method = check.method_of(block, setting.call)
    names = check.names_of(method, block.__name__, skip=1)

    def __call__(self, /, *carry: Any, **keywords: Any) -> Any:
        return _run(self, block, method, setting, names, check_alike, carry, keywords)

    return stack_class(block, setting.length, {**body, "__call__": __call__})


def _create(block: type[nnx.Module], setting: Setting, args: tuple, kwargs: dict[str, Any]) -> nnx.Module:
    """One module whose arrays have a layer axis: `setting.length` constructor calls in one, by `vmap` over the rng keys."""
    length = setting.length
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, nnx.Pytree))
    for leaf in leaves:
        if isinstance(leaf, nnx.Module) and not isinstance(leaf, nnx.Rngs):
            raise ValueError(
                f"{block.__name__} was given a {type(leaf).__name__}, and each of the {length} blocks would make its own "
                "copy of it. Create it in the block, or pass it to the stack as a keyword argument, which all blocks share."
            )
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, nnx.Rngs)]
    rngs = [leaves[i].split(length) for i in where]
    graphdefs = {}

    def one(states):
        given = list(leaves)
        for i, (graphdef, _), state in zip(where, map(nnx.split, rngs), states, strict=True):
            given[i] = nnx.merge(graphdef, state)
        args, kwargs = jax.tree.unflatten(tree, given)
        graphdefs["block"], state = nnx.split(block(*args, **kwargs))
        return state

    states = [nnx.split(r)[1] for r in rngs]
    stacked = jax.vmap(one, axis_size=length)(states)
    return nnx.merge(graphdefs["block"], add_layer_axis(stacked, setting.partition_name))


def _run(
    stack: nnx.Module,
    block: type[nnx.Module],
    method: Callable[..., Any],
    setting: Setting,
    names: check.Names,
    check_alike: Callable[..., None],
    carry: tuple,
    keywords: dict[str, Any],
) -> Any:
    check.call_fits(method, (stack,), carry, keywords, names)
    assert setting.length is not None
    per_block, shared = per_block_of(setting, setting.length, keywords, names)
    graphdef, state = nnx.split(stack)
    stacked_length(state, setting.length, f"{names.block}: the stack's state", STACK_THEM)
    check_alike(graphdef, jx.slice_types((state, per_block)), carry, shared)
    held = {
        path: (f"self{_dotted(path)}", slot) for path, slot in nnx.to_flat_state(state) if isinstance(slot, nnx.Variable)
    }
    given = slots_of(carry, keywords, names)
    static: dict[tuple, Any] = {}

    def call(x, carry, shared):
        nonlocal static
        state, per_block = x
        one = _one_block(block, setting, graphdef, state)
        returned, static = _and_static(method, one, *carry, **shared, **per_block)
        after = nnx.split(one)[1]
        check_given_once([held[path] for path in _changed(state, after) if path in held], given, names, what="")
        return returned, after

    xs, beside = (state, per_block), list(held.values())
    out = run_and_write_back(call, setting, setting.length, xs, carry, shared, names, held=beside)
    update_variables(stack, _changed(state, add_layer_axis(out.extra, setting.partition_name)))
    update_static((stack,), static)
    return (out.carry, out.aux) if setting.has_aux else out.carry


def _one_block(block: type[nnx.Module], setting: Setting, graphdef: Any, state: Any) -> Any:
    """One block, of its own class and not the stack's: where it calls itself, or is called, it runs alone."""
    one = nnx.merge(graphdef, remove_layer_axis(state, setting.partition_name))
    object.__setattr__(one, "__class__", block)
    return one


def _and_static(method: Callable[..., Any], block: Any, *carry: Any, **keywords: Any) -> tuple[Any, dict[tuple, Any]]:
    """What a block returns, and the static attributes that it changes, which all blocks of a stack have in common."""
    before = attributes((block,))
    returned = method(block, *carry, **keywords)
    return returned, changed_static(before, (block,))


def _changed(before: nnx.State, after: nnx.State) -> dict[tuple, Any]:
    """The variables that blocks changed, and those they made (`sow`), by path."""
    old = dict(nnx.to_flat_state(before))
    return {path: new for path, new in nnx.to_flat_state(after) if path not in old or not same_leaves(old[path], new)}


def _dotted(path: tuple) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def _check_unshared(blocks: list[nnx.Module]) -> None:
    owner: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for path, node in nnx.iter_graph(block):
            if isinstance(node, nnx.Variable) and owner.setdefault(id(node), i) != i:
                keep = (
                    "rngs.fork() gives each block a stream of its own"
                    if isinstance(node, nnx.RngState)
                    else ("Pass what blocks share as a keyword argument")
                )
                raise ValueError(
                    f"blocks {owner[id(node)]} and {i} share the variable {'.'.join(map(str, path))}; stacking would make "
                    f"two of it. {keep}."
                )


class _SameFunction:
    """Refuses modules that are different functions of their parameters.

    Modules may differ in static attributes that do not matter, such as a layer's number; whether they do matter, their
    jaxprs tell. Each distinct set of attributes is traced in the stack's present mode (`train()`, `eval()`), once per mode
    and signature of the call. They are compared and not hashed: a configuration may have no hash.
    """

    def __init__(self, block: type[nnx.Module], blocks: list[nnx.Module], setting: Setting):
        self.block, self.setting, self.method = block, setting, check.method_of(block, setting.call)
        self.seen: list[tuple[Any, str]] = []
        first, *others = map(static_attributes, blocks)
        differences = (
            {key: (first.get(key), value) for key, value in o.items() if not is_equal(first.get(key), value)} for o in others
        )
        distinct: list[tuple[int, dict]] = []
        for i, difference in enumerate(differences, 1):
            if difference and not any(is_equal(difference, known) for _, known in distinct):
                distinct.append((i, difference))
        self.distinct = distinct

    def __call__(self, graphdef: Any, x: Any, carry: tuple, shared: dict[str, Any]) -> None:
        types = jax.tree.map(lambda leaf: jax.typeof(leaf) if hasattr(leaf, "dtype") else leaf, (x, carry, shared))
        signature = (graphdef, str(types))
        if any(is_equal(signature, known) for known in self.seen):
            return
        reference = self._trace(graphdef, {}, x, carry, shared)
        for i, difference in self.distinct:
            other = self._trace(graphdef, difference, x, carry, shared)
            if not (jx.same_program(reference[0], other[0]) and is_equal(reference[1], other[1])):
                raise ValueError(
                    f"blocks 0 and {i} of the list are different functions: their {self.block.__name__}s differ in "
                    "a static attribute that changes what they compute, and one loop runs one function. Use "
                    "checkpoint_blocks, or a stack for each kind."
                )
        self.seen.append(signature)

    def _trace(self, graphdef: Any, difference: dict, x: Any, carry: tuple, shared: dict[str, Any]) -> tuple[Any, dict]:
        """The program of a block with other static attributes, and those that it changes."""
        static = {}

        def forward(x, carry):
            nonlocal static
            state, per_block = x
            module = _one_block(self.block, self.setting, graphdef, state)
            for (path, name), (first, value) in difference.items():
                node = module
                for key in path:
                    node = node[key] if isinstance(key, int) else getattr(node, key)
                if is_equal(vars(node).get(name), first):  # otherwise it was set for all blocks since
                    vars(node)[name] = value
            returned, static = _and_static(self.method, module, *carry, **shared, **per_block)
            return nnx.as_pure(returned)

        return jx.trace(forward, x, carry), static
