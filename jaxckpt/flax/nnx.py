"""An NNX block to a pure block function, and an NNX stack around it.

The stack's class is a subclass of the block's that holds the block's own attributes with a layer axis in front of every
array, so that the paths of its state are the block's and `train()`, `eval()`, optimizers and filters work on it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxckpt._function import check_differentiable
from jaxckpt._params import STACK_THEM, stack_params, stacked_length
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine import check
from jaxckpt.engine.stack import per_block_of, run_stack
from jaxckpt.flax.metadata import add_layer_axis, remove_layer_axis


def nnx_stack(block: type[nnx.Module], setting: Setting) -> type[nnx.Module]:
    """The class of a stack of `block`s; its constructor takes the block's arguments."""

    def __init__(self, *args: Any, **kwargs: Any):
        vars(self).update(vars(_create(block, setting.length, args, kwargs)))

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
    stacked = nnx.merge(graphdefs[0], stack_params(states))
    distinct = {graphdef: i for i, graphdef in reversed(list(enumerate(graphdefs)))}
    check_alike = _SameFunction(block, states[0], distinct) if len(distinct) > 1 else lambda *call: None
    setting = dataclasses.replace(setting, length=len(blocks))
    stack = object.__new__(_stack_class(block, setting, {}, check_alike))
    vars(stack).update(vars(stacked))
    return stack


def _stack_class(
    block: type[nnx.Module], setting: Setting, body: dict[str, Any], check_alike: Callable[..., None]
) -> type[nnx.Module]:
    names = check.names_of(block.__call__, block.__name__, skip=1)

    def __call__(self, *carry: Any, **keywords: Any) -> Any:
        return _run(self, block, setting, names, check_alike, carry, keywords)

    doc = f"A checkpointed stack of {setting.length} `{block.__name__}`s; made by `jaxckpt.checkpoint_scan`."
    body = {**body, "__call__": __call__, "__doc__": doc, "__module__": block.__module__}
    return type(f"Scan{block.__name__}", (block,), body)


def _create(block: type[nnx.Module], length: int | None, args: tuple, kwargs: dict[str, Any]) -> nnx.Module:
    """One module whose arrays have a layer axis: `length` constructor calls in one, by `vmap` over the rng keys."""
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, nnx.Rngs))
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
    return nnx.merge(graphdefs["block"], add_layer_axis(stacked))


def _run(
    stack: nnx.Module,
    block: type[nnx.Module],
    setting: Setting,
    names: check.Names,
    check_alike: Callable[..., None],
    carry: tuple,
    keywords: dict[str, Any],
) -> Any:
    check.call_fits(block.__call__, (stack,), carry, keywords, names)
    assert setting.length is not None
    per_block, shared = per_block_of(setting, setting.length, keywords, names)
    graphdef, state = nnx.split(stack)
    stacked_length(state, setting.length, f"{names.block}: the stack's state", STACK_THEM)
    check_differentiable(nnx.filter_state(state, nnx.Param), names.block)
    check_alike(carry, shared, jx.slice_types(per_block))

    def call(x, carry, shared):
        state, per_block = x
        one = nnx.merge(graphdef, remove_layer_axis(state))
        returned = block.__call__(one, *carry, **shared, **per_block)
        return returned, nnx.split(one)[1]

    out = run_stack(call, setting, setting.length, (state, per_block), carry, shared, names)
    _write_back(stack, state, add_layer_axis(out.extra))
    return (out.carry, out.aux) if setting.has_aux else out.carry


def _write_back(stack: nnx.Module, before: nnx.State, after: nnx.State) -> None:
    """Updates the variables that the blocks changed, and adds those they made (`sow`); leaves all others untouched."""
    old = dict(nnx.to_flat_state(before))
    changed = {}
    for path, variable in nnx.to_flat_state(after):
        if path not in old:
            parent: Any = stack
            for key in path[:-1]:
                parent = parent[key] if isinstance(key, int) else getattr(parent, str(key))
            setattr(parent, str(path[-1]), variable)
        elif any(a is not b for a, b in zip(*map(jax.tree.leaves, (old[path], variable)), strict=False)):
            changed[path] = variable
    if changed:
        nnx.update(stack, nnx.from_flat_state(changed))


def _check_unshared(blocks: list[nnx.Module]) -> None:
    owner: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for path, node in nnx.iter_graph(block):
            if isinstance(node, nnx.Variable) and owner.setdefault(id(node), i) != i:
                raise ValueError(
                    f"blocks {owner[id(node)]} and {i} share the variable {'.'.join(map(str, path))}; stacking would make "
                    "two of it. Pass what blocks share as a keyword argument."
                )


class _SameFunction:
    """Refuses modules that are different functions of their parameters.

    Modules may differ in static attributes that do not matter, such as a layer's number; whether they do matter, their
    jaxprs tell. Each distinct graphdef is traced, once per signature of the call.
    """

    def __init__(self, block: type[nnx.Module], state: nnx.State, graphdefs: dict[Any, int]):
        self.block, self.graphdefs = block, graphdefs
        self.state = jax.eval_shape(lambda s: s, state)
        self.seen: set[str] = set()

    def __call__(self, carry: tuple, shared: dict[str, Any], per_block: dict[str, Any]) -> None:
        signature = str(jax.tree.map(lambda leaf: jax.typeof(leaf) if hasattr(leaf, "dtype") else leaf, (carry, shared)))
        if signature in self.seen:
            return
        programs = [(i, self._trace(graphdef, carry, shared, per_block)) for graphdef, i in self.graphdefs.items()]
        programs.sort(key=lambda program: program[0])
        (first, reference), *others = programs
        for i, program in others:
            if not jx.same_program(reference, program):
                raise ValueError(
                    f"blocks {first} and {i} of the list are different functions: their {self.block.__name__}s differ in "
                    "a static attribute that changes what they compute, and one loop runs one function. Use "
                    "checkpoint_blocks, or a stack for each kind."
                )
        self.seen.add(signature)

    def _trace(self, graphdef: Any, carry: tuple, shared: dict[str, Any], per_block: dict[str, Any]) -> Any:
        def forward(state, carry, per_block):
            return nnx.as_pure(self.block.__call__(nnx.merge(graphdef, state), *carry, **shared, **per_block))

        return jx.trace(forward, self.state, carry, per_block)
