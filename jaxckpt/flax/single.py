"""Flax modules that are checkpointed by themselves, and stay modules: of Linen as `nn.remat` lifts them, and of NNX."""

import functools
import types
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
from flax import nnx
from flax.core import lift
from flax.linen import transforms

from jaxckpt._setting import Setting
from jaxckpt.engine import check
from jaxckpt.flax.calls import run_call, run_function
from jaxckpt.flax.linen import fields_of, variables_of


@functools.lru_cache(1024)  # so that equal modules are equal
def linen_class(block: type[nn.Module], setting: Setting) -> type[nn.Module]:
    """The class with the fields and variables of `block`; its name is that of `nn.remat`, `CheckpointBlock`."""
    _check_callable(block)
    return cast(type[nn.Module], transforms.lift_transform(_lifted(setting, check.Names(block.__name__, ())), block))


def linen_instance(block: nn.Module, setting: Setting) -> nn.Module:
    """A module like `block`; an explicit name goes over to it at top level."""
    name = {"name": block.name} if block.parent is None else {}
    return linen_class(type(block), setting)(**fields_of(block, type(block)), **name)


def run_linen(
    fn: Callable[..., Any], module: nn.Module, args: tuple, keywords: dict[str, Any], setting: Setting, names: check.Names
) -> Any:
    """`fn(module, *args, **keywords)` of a bound module, whose variables `fn` may make, read and write."""
    return transforms.lift_transform(_lifted(setting, names), fn)(module, *args, **keywords)


def run_closure(
    fn: Callable[..., Any],
    modules: list[nn.Module],
    args: tuple,
    keywords: dict[str, Any],
    setting: Setting,
    names: check.Names,
) -> Any:
    """`fn(*args, **keywords)` of a function that closes over bound modules, and reads them only.

    Raises:
        ValueError: it writes one, which would be lost.
    """
    if any(module.is_initializing() for module in modules):
        return fn(*args, **keywords)
    before = variables_of(modules)
    out = run_function(fn, args, keywords, setting, names)
    written = [key[1] for key, leaf in variables_of(modules).items() if before.get(key) is not leaf]
    if written:
        raise ValueError(
            f"{names.block} writes {', '.join(written)} of a Linen module that it closes over, and that could not leave "
            "what is checkpointed: give it the module as an argument, checkpoint(lambda module, x: ...)(module, x)"
        )
    return out


def unbound(fn: Any) -> Callable[..., Any]:
    """A function `(module, *args, **keywords)` of a bound module, its method, or a `functools.partial` of either."""
    if isinstance(fn, functools.partial):
        inner = unbound(fn.func)
        return lambda module, *args, **keywords: inner(module, *fn.args, *args, **{**fn.keywords, **keywords})
    return fn.__func__ if isinstance(fn, types.MethodType) else lambda module, *args, **keywords: module(*args, **keywords)


def _check_callable(block: type) -> None:
    if not check.has_call(block):
        raise TypeError(
            f"{block.__name__} has no method __call__: write checkpoint(module.method), or checkpoint(lambda module, x: ...)"
        )


def _lifted(setting: Setting, names: check.Names) -> Callable[..., Any]:
    """The transform of Flax's functions of scopes. Variables and random numbers go in as arguments, as in `nn.remat`."""

    def checkpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
        def inner(scope_of: Any, variables_of: Any, variables: Any, rngs: Any, *args: Any, **keywords: Any) -> Any:
            def run(_: Any, given: Any) -> Any:
                variables, rngs, args, keywords = given
                scopes = scope_of(variables, rngs)
                out = fn(scopes, *args, **keywords)
                return out, variables_of(scopes)

            given = variables, rngs, args, keywords
            if any(scope.get_flag("initializing", False) for scope in jax.tree.leaves(scope_of(variables, rngs))):
                return run(None, given)  # parameters are made, and nothing is differentiated
            return run_call(run, [], given, setting, names)

        return lift.pack(inner, (True,), (True,), (True,), name="checkpoint", enable_kwargs=True)

    return checkpoint


@functools.lru_cache(1024)  # so that equal modules are of one class
def nnx_class(block: type[nnx.Module], setting: Setting) -> type[nnx.Module]:
    """The subclass of `block` that is checkpointed when it is called."""
    _check_callable(block)
    method, names = block.__call__, check.Names(block.__name__, ())

    def __call__(self: nnx.Module, *args: Any, **keywords: Any) -> Any:
        def run(_: Any, given: Any) -> Any:
            module, args, keywords = given
            return method(module, *args, **keywords)

        return run_call(run, [], (self, args, keywords), setting, names)

    doc = f"A checkpointed `{block.__name__}`; made by `jaxckpt.checkpoint`."
    return type(f"Checkpoint{block.__name__}", (block,), {"__call__": __call__, "__doc__": doc})


def nnx_instance(module: nnx.Module, setting: Setting) -> nnx.Module:
    """A checkpointed module with the variables and attributes of `module` itself."""
    made = object.__new__(nnx_class(type(module), setting))
    vars(made).update(vars(module))
    return made
