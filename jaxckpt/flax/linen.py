"""A Linen block to a pure block function, and a Linen stack around it.

The stack's class is a subclass of the block's, with the same fields, whose variables have the tree, names and shapes
that `nn.scan(Block, variable_axes={...: 0}, split_rngs={...: True}, length=N)` would give them, so that checkpoints move
between the two and between settings.
"""

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import errors

from jaxckpt._leaves import STACK_THEM, named_leaves, stacked_length
from jaxckpt._metadata import add_layer_axis, remove_layer_axis
from jaxckpt._setting import Setting
from jaxckpt.engine import check
from jaxckpt.engine.stack import per_block_of
from jaxckpt.flax.arguments import run_and_write_back
from jaxckpt.flax.classes import stack_class


@functools.lru_cache(1024)  # so that equal stacks are equal modules
def linen_stack(block: type[nn.Module], setting: Setting) -> type[nn.Module]:
    """The class of a stack of `block`s, whose fields are the block's."""
    method = check.method_of(block, setting.call)
    names = check.names_of(method, block.__name__, skip=1)

    def __call__(self, /, *carry: Any, **keywords: Any) -> Any:
        return _run(self, block, method, setting, names, carry, keywords)

    # The block's own `setup` must not run in the stack's scope: its parameters have no layer axis.
    body = {"__call__": __call__, "setup": nn.Module.setup}
    return stack_class(block, setting.length, body, passed_on=[field.name for field in dataclasses.fields(block)])


def linen_stack_instance(block: nn.Module, setting: Setting) -> nn.Module:
    """The stack of `setting.length` modules like `block`; an explicit name goes over to it at top level."""
    name = {"name": block.name} if block.parent is None else {}
    return linen_stack(type(block), setting)(**fields_of(block, type(block)), **name)


def _run(
    stack: nn.Module,
    block: type[nn.Module],
    method: Callable[..., Any],
    setting: Setting,
    names: check.Names,
    carry: tuple,
    keywords: dict[str, Any],
) -> Any:
    scope = stack.scope
    if scope is None:
        raise ValueError(f"{names.block}: call stack.init or stack.apply; a Linen module outside them has no variables")
    check.call_fits(method, (stack,), carry, keywords, names)
    assert setting.length is not None
    per_block, shared = per_block_of(setting, setting.length, keywords, names)
    variables = flax.core.unfreeze(cast(dict, stack.variables))
    stacked_length(variables, setting.length, f"{names.block}: the stack's variables", STACK_THEM)
    _check_unbound(keywords, names)
    # Block i draws from fold_in(stack.make_rng(name), i): the same in the re-run, and whatever the chunks.
    rngs = {name: _per_block_keys(stack.make_rng(name), setting.length) for name in scope.rngs}
    fields = fields_of(stack, block)

    def call(x, carry, shared):
        variables, rngs, per_block = x

        def one(own):
            own.path = scope.path  # what `module.path`, tabulate and Flax's errors show
            return method(block(**fields, parent=own), *carry, **shared, **per_block)

        # A scope of the block's own, with the flags and the mutable collections of the stack's: one path for init and
        # apply, and `sow`, `capture_intermediates` and mutable statistics work as in a module that is not stacked.
        run = flax.core.apply(one, mutable=scope.mutable, flags=scope.flags)
        try:
            out = run(remove_layer_axis(variables, setting.partition_name), rngs=rngs)
        except errors.InvalidRngError as error:
            raise ValueError(_missing_rng(names, error)) from error
        return out if scope.mutable is not False else (out, {})

    xs, initializes = (variables, rngs, per_block), stack.is_initializing()
    out = run_and_write_back(call, setting, setting.length, xs, carry, shared, names, initializes=initializes)
    for collection, tree in add_layer_axis(flax.core.unfreeze(out.extra), setting.partition_name).items():
        for key, value in tree.items():
            stack.put_variable(collection, key, value)
    return (out.carry, out.aux) if setting.has_aux else out.carry


def _per_block_keys(key: jax.Array, length: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(length))


def is_bound(value: Any) -> bool:
    """Whether `value` is a bound Linen module."""
    return isinstance(value, nn.Module) and value.scope is not None


def closed_over_modules(fn: Any) -> list[nn.Module]:
    """The bound Linen modules that a function closes over."""
    fn = fn.func if isinstance(fn, functools.partial) else fn
    cells = [cell for cell in getattr(fn, "__closure__", None) or () if cell != types.CellType()]
    found = [cell.cell_contents for cell in cells]
    return [leaf for leaf in jax.tree.leaves(found, is_leaf=is_bound) if is_bound(leaf)]


def variables_of(modules: Sequence[nn.Module]) -> dict[tuple[int, str], Any]:
    """The variables of bound modules, by module and path."""
    return {(i, path): leaf for i, module in enumerate(modules) for path, leaf in named_leaves(module.variables)}


def bound_module(block: Any) -> nn.Module | None:
    """The bound Linen module that `block`, a module, its method or a `functools.partial` of either, runs."""
    block = block.func if isinstance(block, functools.partial) else block
    block = getattr(block, "__self__", block)
    return block if is_bound(block) else None


def _check_unbound(keywords: dict[str, Any], names: check.Names) -> None:
    """Refuses modules among the shared arguments: inside the loop they would change a parent's variables."""
    for name, value in keywords.items():
        for leaf in jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, nn.Module)):
            if isinstance(leaf, nn.Module) and leaf.scope is not None:
                raise ValueError(
                    f"{names.block}: the argument {name!r} holds a {type(leaf).__name__} that is bound to another module. "
                    "One loop over blocks cannot use its variables and random numbers: pass what it returns or its "
                    "parameters as arrays, or create it inside the block"
                )


def fields_of(module: nn.Module, block: type[nn.Module]) -> dict[str, Any]:
    """The constructor arguments of `block` in `module`, with modules among them cut loose from where they are bound."""

    copies: dict[int, nn.Module] = {}

    def unbound(value):
        if not isinstance(value, nn.Module) or value.scope is None:
            return value
        if value.parent is not module:
            raise ValueError(
                f"{type(module).__name__}: the field of type {type(value).__name__} is bound to another module, whose "
                "parameters cannot be stacked; create it inside the block, or pass it with parent=None"
            )
        return copies.setdefault(id(value), value.unbind()[0])  # one module in two fields stays one

    values = {f.name: getattr(module, f.name) for f in dataclasses.fields(block) if f.init}
    return {
        name: jax.tree.map(unbound, value, is_leaf=lambda leaf: isinstance(leaf, nn.Module))
        for name, value in values.items()
        if name not in ("parent", "name")
    }


def _missing_rng(names: check.Names, error: Exception) -> str:
    found = re.search(r'for "([^"]+)"', str(error))
    stream = found[1] if found else "dropout"
    if stream == "params":
        return f"{names.block} makes parameters: write stack.init(key, ...), or stack.init({{'params': key, ...}}, ...)"
    return (
        f"{names.block} draws random numbers from {stream!r}, which were not passed: write "
        f"stack.apply(variables, ..., rngs={{{stream!r}: key}}), or make the block deterministic"
    )
