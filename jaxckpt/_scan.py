"""`checkpoint_scan`: the knobs are checked here, and the block is sent to the front end of its kind."""

import dataclasses
import os
import typing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
from flax import nnx

from jaxckpt._equinox import OF_LIST, check_no_module, is_equinox
from jaxckpt._function import function_stack
from jaxckpt._metadata import LAYERS
from jaxckpt._plan import Plan, StackPlan
from jaxckpt._setting import Setting, check_blocks_per_ckpt, make_setting
from jaxckpt.flax.linen import linen_stack, linen_stack_instance
from jaxckpt.flax.nnx import nnx_stack, nnx_stack_from_list
from jaxckpt.policies.grammar import JaxPolicy, Policy


def checkpoint_scan(
    block: Any,
    length: int | None = None,
    *,
    blocks_per_ckpt: int | None = None,
    policy: str | JaxPolicy | Policy | None = None,
    has_aux: bool = False,
    per_block: Sequence[str] = (),
    unroll: int | bool = 1,
    stages: int | str | None = None,
    tiles: int | str | None = None,
    snapshots: int | None = None,
    offload_carry: bool = False,
    engine: str | None = None,
    partition_name: str | None = LAYERS,
    call: Callable[..., Any] | None = None,
    plan: "Plan | StackPlan | str | os.PathLike[str] | None" = None,
) -> Callable[..., Any]:
    """A stack of `length` equal blocks, run by one `lax.scan` and checkpointed as told.

    The stack is of the same kind as the block and is called as the block is. Positional arguments are the carry: the
    block returns as many values, of the same structure, shapes and dtypes. Keyword arguments are shared by all blocks:
    arrays among them are differentiated, everything else (None, flags, strings, numbers, objects) is static.

    Arguments:
        block: a Linen class (a constructor of a Linen stack is returned) or instance (a stack); an NNX class (a
            constructor that takes `rngs`), or a list of NNX modules (a stack holding their state); or any other callable
            `f(params, *carry, **shared)` (a function of `params` with a leading axis `[N, ...]` on every leaf). Parameters
            that are integers, flags or keys have no gradient.
        length: the number of blocks `N`. Needed for classes and instances; for a function the parameters tell it.
        blocks_per_ckpt: for how many consecutive blocks the values that `policy` keeps are alive at once. None: for the
            whole stack. `K`: the forward pass keeps the input of each chunk of `K` blocks, the backward pass re-runs one
            chunk after the other; the last chunk may be shorter.
        policy: what each block keeps for the backward pass, by name (see `jaxckpt.policies.describe()`), or a
            `jax.checkpoint` policy function. Default: "nothing", or "everything" where `blocks_per_ckpt` is given, which
            is what OpenFold's `checkpoint_blocks` does.
        has_aux: the block returns `(carry, aux)`, and the stack `(carry, aux stacked on axis 0)`.
        per_block: names of keyword arguments with a leading axis `N`, one slice per block.
        unroll: how many blocks stand in one loop body, as in `lax.scan`.
        stages: cuts each block itself into pieces that are checkpointed one by one, where few bytes are alive, so that
            not all that its backward pass wants is alive at once; all but the last are run once more. "auto" finds the
            cuts, an integer is the number of pieces at most, "tags:z1,z2" cuts behind what `checkpoint_name` tagged so.
            Under the policy "everything" what crosses the cuts is kept.
        tiles: computes pieces in slices along an axis of what they return, so that one slice's values are alive at once.
            "auto": as few slices as will do, each large enough to keep a GPU busy; an integer: at most so many slices of a
            piece. Implies `stages="auto"` where `stages` is not given; see `jaxckpt.analysis.tiles`.
        snapshots: how many inputs of chunks (of single blocks, where `blocks_per_ckpt` is not given) are stored at once,
            from 1 to the number of chunks; the others are made again from the nearest one, in the fewest runs possible
            (Griewank and Walther, Algorithm 799: Revolve, 2000). None: all of them. Implies `engine="reversal"`.
        offload_carry: inputs of chunks, or snapshots, are stored in pinned host memory.
        engine: who runs the backward pass. "scan": `jax.checkpoint` and `lax.scan`; all transformations of JAX work.
            "reversal": one loop over chunks, in less memory for the same knobs; no forward mode, no second derivatives.
            Default: "scan", but where `snapshots` is given, or `offload_carry` on a JAX before 0.11.1.
        partition_name: the name of the layer axis in the partitioning metadata of Flax's parameters, for logical rules to
            translate, as `nn.scan` takes it under `nn.PARTITION_NAME`; None where names are those of mesh axes, and the
            layers are not split.
        call: how a module is run as a block, where not by its `__call__`: a function `call(layer, *carry, **shared)`. In
            Linen the layer is bound, so that its other methods work too. Stacks are equal if they have the same function.
        plan: all of the knobs in one: what `jaxckpt.plan` found, or the file it was saved to ("plan.json:NAME" where it
            has several stacks). "auto", or "auto:NAME" for one of several stacks, is for a step that is to be planned; it
            stands for the default knobs until the step is run under a plan.

    Returns:
        The stack, or its constructor where `block` is a class.

    Raises:
        ValueError: a knob out of range, an unknown policy; at the first call also a `save:` name that tags nothing,
            parameters whose leading axis is not `length`, a side effect in the block, a missing rng, a tag of `stages` that
            is not there.
        NotImplementedError: on a JAX before 0.11.1, when a stack that offloads through `lax.scan` is lowered for a GPU;
            `offload_carry` with the reversal engine under `jax.vmap`.
        TypeError: a block of the wrong kind; at the first call a block that does not return the carry it was given, or
            a keyword argument that it does not take.

    >>> import jax, jax.numpy as jnp
    >>> stack = checkpoint_scan(lambda w, x: jnp.tanh(x @ w), blocks_per_ckpt=2)
    >>> weights = jax.random.normal(jax.random.key(0), (6, 8, 8))
    >>> jax.grad(lambda w: stack(w, jnp.ones(8)).sum())(weights).shape
    (6, 8, 8)
    """
    setting = make_setting(
        length,
        blocks_per_ckpt,
        policy,
        has_aux,
        per_block,
        unroll,
        stages,
        snapshots,
        offload_carry,
        engine,
        plan,
        partition_name,
        tiles,
    )
    setting = dataclasses.replace(setting, call=_checked_call(call))
    if isinstance(block, (list, tuple, nnx.List)):
        return _from_list(list(block), setting)
    if isinstance(block, nn.Module):
        return linen_stack_instance(block, _with_length(setting, block))
    if isinstance(block, nnx.Module):
        raise TypeError(
            f"{type(block).__name__} is one NNX module and holds the parameters of one block; pass the class and a "
            f"length, checkpoint_scan({type(block).__name__}, N)(..., rngs=rngs), or a list of N modules"
        )
    if not callable(block):
        raise TypeError(f"block must be a Flax module class, a list of NNX modules or a function; got {block!r}")
    cls, bind = _class_of(block)
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return bind(linen_stack(cls, _with_length(setting, cls)))
    if isinstance(cls, type) and issubclass(cls, nnx.Module):
        return bind(nnx_stack(cls, _with_length(setting, cls)))
    check_no_module(block, cls)
    if call is not None:
        raise TypeError(
            "call says how a module is run, and a function is run as it is: write it into the function, "
            "checkpoint_scan(lambda params, *carry, **shared: ...)"
        )
    return function_stack(block, setting)


def _checked_call(call: Any) -> Callable[..., Any] | None:
    """`call`, which stacks of classes are known by."""
    if call is not None and not callable(call):
        raise TypeError(f"call, how a module is run, must be a function such as lambda layer, x: layer(x); got {call!r}")
    try:
        hash(call)
    except TypeError as error:
        raise TypeError(f"call, how a module is run, must have a hash, as functions do: {error}") from None
    return call


def _class_of(block: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The class behind `functools.partial(Block, c_z=128)` or `Block[int]`, and how to put the arguments back."""
    block = typing.get_origin(block) or block
    if isinstance(block, partial) and isinstance(cls := typing.get_origin(block.func) or block.func, type):
        return cls, lambda stack: partial(stack, *block.args, **block.keywords)
    return block, lambda stack: stack


def _from_list(blocks: list[Any], setting: Setting) -> Any:
    if not blocks:
        raise ValueError("checkpoint_scan was given an empty list of blocks; a stack has at least one")
    if all(isinstance(block, nnx.Module) for block in blocks):
        if setting.length not in (None, len(blocks)):
            raise ValueError(f"length={setting.length} is in conflict with the list of {len(blocks)} modules; omit it")
        if setting.blocks_per_ckpt is not None:
            check_blocks_per_ckpt(setting.blocks_per_ckpt, len(blocks))
        return nnx_stack_from_list(blocks, setting)
    other = next(block for block in blocks if not isinstance(block, nnx.Module))
    kind = type(other).__name__
    if isinstance(other, nn.Module):
        raise TypeError(
            f"a list of Linen modules has no parameters to stack. Write checkpoint_scan({kind}, {len(blocks)})(...) for "
            "equal blocks, or checkpoint_blocks for a list of bound modules that differ"
        )
    if is_equinox(other):
        raise TypeError(f"a list of blocks must hold NNX modules, and {kind} is one of Equinox: write {OF_LIST}")
    raise TypeError(
        f"a list of blocks must hold NNX modules; got {kind}. For functions write checkpoint_scan(f)(stack_params(trees), "
        "x), or checkpoint_blocks(blocks, args, blocks_per_ckpt) for callables that differ"
    )


def _with_length(setting: Setting, block: Any) -> Setting:
    if setting.length is None:
        name = block.__name__ if isinstance(block, type) else type(block).__name__
        raise ValueError(f"length is missing: write checkpoint_scan({name}, N) with the number of blocks")
    return setting
