"""`checkpoint`: `jax.checkpoint` with named policies, pieces and slices, for what is no stack."""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxckpt._equinox import check_no_module
from jaxckpt._plan import Plan, StackPlan
from jaxckpt._setting import Setting, make_setting
from jaxckpt.engine import check
from jaxckpt.flax import single
from jaxckpt.flax.calls import run_function
from jaxckpt.flax.linen import bound_module, closed_over_modules, is_bound
from jaxckpt.policies.grammar import JaxPolicy, Policy


def checkpoint(
    fn: Any,
    *,
    policy: str | JaxPolicy | Policy | None = None,
    stages: int | str | None = None,
    tiles: int | str | None = None,
    plan: "Plan | StackPlan | str | os.PathLike[str] | None" = None,
) -> Callable[..., Any]:
    """`fn`, whose values are not kept for the backward pass but as told, and computed again there.

    For what is no stack of equal blocks: a head with its loss, an embedding, one odd block. It is called as `fn` is; what is
    no array among arguments and results (None, flags, strings, objects) is static. Without `stages` and `tiles` it is the
    program that `jax.checkpoint` makes.

    Arguments:
        fn: a function, or a method to decorate; a Linen class (a class of the same fields and variables is returned, as by
            `nn.remat`), an instance of one (unbound: another instance; bound: a function); an NNX class or module (the same
            kind, which shares the module's variables and submodules, and has its own attributes from then on; what it
            changes is written back).
        policy: what is kept (see `jaxckpt.policies`); "nothing" by default.
        stages: pieces that `fn` is cut into, each checkpointed by itself: None, "auto", an integer (pieces at most), or
            "tags:NAMES" to cut behind tagged values. While `fn` is differentiated, what crosses the cuts is kept.
        tiles: slices that a piece is computed in: None, "auto", or an integer (slices at most). Implies stages="auto" where
            `stages` is not given.
        plan: all of these from a plan: "auto:NAME" under `jaxckpt.plan`, which chooses them with those of the step's stacks
            (by default as `checkpoint(fn)`); or a plan, its file, or "FILE:NAME", as for `checkpoint_scan`.
    Raises:
        TypeError: `fn` cannot be called; or, at the call, it is given a `jax.Ref`, or closes over one.
        ValueError: a knob that is not allowed; or, at the call, tags that are not there, side effects, and what `fn` writes
            in a bound Linen module or an NNX object that it closes over (one that it is given may be written).

    A vocabulary's head, whose logits `[tokens, words]` never exist whole:

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss_of(kernel, x, labels):
    ...     return optax.softmax_cross_entropy_with_integer_labels(x @ kernel, labels).mean()
    >>> head = checkpoint(loss_of, tiles=4)
    >>> kernel, x, labels = jnp.ones((8, 1000)), jnp.ones((64, 8)), jnp.zeros(64, int)
    >>> jax.grad(head)(kernel, x, labels).shape
    (8, 1000)
    """
    setting = make_setting(None, None, policy, False, (), 1, stages, tiles=tiles, plan=plan)
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        return single.linen_class(fn, setting)
    if isinstance(fn, nn.Module) and fn.scope is None:
        return single.linen_instance(fn, setting)
    if isinstance(fn, type) and issubclass(fn, nnx.Module):
        return single.nnx_class(fn, setting)
    if isinstance(fn, nnx.Module):
        return single.nnx_instance(fn, setting)
    if not callable(fn):
        raise TypeError(f"checkpoint takes a function, a Flax module or a class of them; got {fn!r:.200}")
    check_no_module(fn, fn)
    return _of_function(fn, setting)


def _of_function(fn: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    inner = fn.func if isinstance(fn, functools.partial) else fn
    names = check.Names(getattr(inner, "__name__", None) or type(inner).__name__, ())

    def run(*args: Any, **keywords: Any) -> Any:
        if (module := bound_module(fn)) is not None:
            return single.run_linen(single.unbound(fn), module, args, keywords, setting, names)
        if args and is_bound(args[0]):  # a method that was decorated
            return single.run_linen(fn, args[0], args[1:], keywords, setting, names)
        if modules := [leaf for leaf in jax.tree.leaves((args, keywords), is_leaf=is_bound) if is_bound(leaf)]:
            ignoring = lambda _, *args, **keywords: fn(*args, **keywords)  # noqa: E731
            return single.run_linen(ignoring, modules[0], args, keywords, setting, names)
        if modules := closed_over_modules(fn):
            return single.run_closure(fn, modules, args, keywords, setting, names)
        return run_function(fn, args, keywords, setting, names)

    # Flax marks methods by attributes; those of an object are its own.
    return functools.wraps(fn, updated=("__dict__",) if inspect.isfunction(fn) else ())(run)
