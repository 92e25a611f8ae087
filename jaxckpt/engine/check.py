"""What a block must be to be stacked, checked on one trace of it; each error says what to write instead."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxckpt._leaves import same_leaves
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import sources
from jaxckpt.engine.types import is_explicit


class Names(NamedTuple):
    """How errors speak of a block: its name, and those of its positional arguments after the parameters."""

    block: str
    carry: tuple[str, ...]

    def leaf(self, position: int, path: Any) -> str:
        name = self.carry[position] if position < len(self.carry) else f"carry {position}"
        return f"{name}{jax.tree_util.keystr(path)}"

    def leaves(self, carry: tuple) -> list[str]:
        """The names of all leaves of the carry, in order."""
        return [self.leaf(i, path) for i, c in enumerate(carry) for path, _ in jax.tree_util.tree_leaves_with_path(c)]


def method_of(block: type, call: Callable[..., Any] | None) -> Callable[..., Any]:
    """How a module of a class is run: `call`, or its `__call__`."""
    if call is not None:
        return call
    if not has_call(block):
        raise TypeError(
            f"{block.__name__} has no method __call__, which is what a stack runs: say what it runs instead, "
            "checkpoint_scan(..., call=lambda layer, x: layer.forward(x))"
        )
    return block.__call__


def has_call(block: type) -> bool:
    """Whether a class has a method `__call__`; its metaclass has one too, which makes instances."""
    return any("__call__" in vars(cls) for cls in block.__mro__)


def names_of(fn: Callable[..., Any], block: str, skip: int) -> Names:
    """Names read off the signature of `fn`, without its first `skip` parameters (`self`, the parameters)."""
    try:
        parameters = list(_signature(fn).parameters.values())[skip:]
    except (TypeError, ValueError):
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return Names(block, tuple(p.name for p in parameters if p.kind in positional))


def call_fits(fn: Callable[..., Any], leading: Sequence[Any], carry: tuple, keywords: dict[str, Any], names: Names):
    """Refuses a call that the block's signature does not take, before anything is traced."""
    if not carry:
        raise TypeError(
            f"{names.block}: no carry was given. The carry is passed by position, as in stack(..., x, z, mask=mask); "
            "keyword arguments are shared by all blocks and are not carried from one to the next."
        )
    try:
        signature = _signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*leading, *carry, **keywords)
    except TypeError as error:
        parameters = list(signature.parameters.values())
        by_name = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        unknown = [name for name in keywords if name not in {p.name for p in by_name}]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            filled = parameters[: len(leading) + len(carry)]
            shared = [p.name for p in by_name if p.kind is p.KEYWORD_ONLY or p not in filled] or ["none"]
            raise TypeError(
                f"{names.block} takes no keyword argument {', '.join(map(repr, unknown))}; beside the carry it takes: "
                f"{', '.join(shared)}"
            ) from None
        raise TypeError(
            f"{names.block}{signature} cannot be called with {len(carry)} carried argument(s) by position and the "
            f"keyword arguments {sorted(keywords)}: {error}. Positional arguments are the carry, keyword arguments are "
            "shared by all blocks."
        ) from None


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    """What `fn` takes. A decorator that copies the name of what it wraps, but adds or takes away arguments, has its own."""
    own = inspect.signature(fn, follow_wrapped=False)
    catch_all = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in own.parameters.values())
    return inspect.signature(fn) if catch_all else own


def layers_whole(xs: Any, names: Names) -> None:
    """Refuses explicit sharding of the axis along which the loop goes; `xs` is a tuple of trees."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(xs):
        aval = jax.typeof(leaf)
        if is_explicit(aval) and (axis := aval.sharding.spec[0]) is not None:
            name = jax.tree_util.keystr(path[1:]) or "the stacked array"
            raise TypeError(
                f"{names.block}: {name} is {aval.str_short(mesh_axis_types=False)}, its blocks split over the mesh axis "
                f"{axis}, and with explicit sharding one loop cannot go along a split axis. Split another axis of the "
                f"array, or make the mesh axis {axis} Auto (jax.make_mesh(..., axis_types=...))."
            )


def carry_given(carry: tuple, names: Names) -> None:
    """Refuses leaves in the carry that are not arrays or numbers."""
    for position, value in enumerate(carry):
        for path, leaf in jax.tree_util.tree_leaves_with_path(value):
            if _type(leaf) is None:
                raise TypeError(
                    f"{names.block}: the carry holds arrays, but {names.leaf(position, path)} is {leaf!r} of type "
                    f"{type(leaf).__name__}; pass it as a keyword argument, which all blocks share"
                )


def returned(value: Any, carry: tuple, has_aux: bool, names: Names) -> tuple[Any, Any]:
    """`(carry, aux)` of what a block returned; refuses another structure than the carry it was given."""
    given = carry[0] if len(carry) == 1 else carry
    aux = None
    if has_aux:
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"{names.block}: with has_aux=True a block returns (carry, aux); got {shape_of(value)}")
        value, aux = value
    if jax.tree.structure(value) != jax.tree.structure(given):
        raise TypeError(_other_structure(value, given, carry, names))
    for part, tree in (("the carry", value), ("aux", aux)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if _type(leaf) is None:
                raise TypeError(
                    f"{names.block} returned {leaf!r} of type {type(leaf).__name__} in {part}"
                    f"{jax.tree_util.keystr(path)}; blocks return arrays"
                )
    return value, aux


def unchanged(shared: dict[str, Any], before: dict[str, Any], names: Names) -> None:
    """Refuses a block that changed a shared argument in place, as an NNX module among them allows."""
    for name, value in shared.items():
        if not same_leaves(value, before[name]):
            raise ValueError(
                f"{names.block} changes the state of its argument {name!r} (a counter of random numbers, statistics), which "
                "all blocks share: each would start from the same state, and the change would be lost. Give each block its "
                f"own, per_block=({name!r},) and rngs.split(N) in the call; or make it part of the block, or of the carry, "
                "or pass values that it computes"
            )


def settle_carry(carry: tuple, leaves: list[Any], out_types: Sequence[Any], names: Names) -> list[Any] | None:
    """None if the block returned the types it was given; otherwise leaves to trace it again with.

    Python numbers take the dtype that the block gives them, as in `lax.scan`. Under `shard_map` a carry that is equal on
    all devices is marked as varying where the block makes it so.
    """
    settled = list(leaves)
    for k, (name, leaf, out) in enumerate(zip(names.leaves(carry), leaves, out_types, strict=True)):
        given = jax.typeof(leaf)
        if given.shape != out.shape or (given.dtype != out.dtype and not given.weak_type):
            raise TypeError(_other_type(name, given, out, names))
        if given.dtype != out.dtype:
            settled[k] = lax.convert_element_type(leaf, jnp.result_type(leaf, out.dtype))
        elif missing := jx.varying(out) - jx.varying(given):
            settled[k] = lax.pcast(leaf, tuple(missing), to="varying")
        elif given.sharding != out.sharding and is_explicit(out):
            raise TypeError(_other_sharding(name, given, out, names))
    return None if all(a is b for a, b in zip(settled, leaves, strict=True)) else settled


def effects(
    closed: Any, setting: Setting, names: Names, instead: str = "Return the value instead (has_aux=True stacks it per block)"
) -> None:
    """Refuses side effects where the block is run more than once, and ordered ones where it stands in a branch."""
    if setting.offload_carry and (ordered := [text for text in jx.effects(closed) if text.startswith("Ordered")]):
        raise ValueError(
            f"{names.block} has a side effect in order, {', '.join(ordered)}, and offload_carry=True runs it in a branch of "
            "its own, which can have none. Write ordered=False, or leave offload_carry away."
        )
    runs_once = setting.blocks_per_ckpt is None and setting.snapshots is None and setting.policy.keeps_everything
    found = [] if runs_once else jx.impure_effects(closed)
    if found:
        raise ValueError(
            f"{names.block} has a side effect, {', '.join(found)}, and what is checkpointed is run again in the backward "
            f"pass, so it would happen twice. {instead}, or use jax.debug.callback, which may run again."
        )


def warn(message: str) -> None:
    """A warning at the user's line, which stands behind frames of this library, JAX and Flax."""
    frame, depth = inspect.currentframe(), 1
    while frame is not None and sources.is_in_library(frame.f_code.co_filename):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, stacklevel=depth)


def _other_structure(value: Any, given: Any, carry: tuple, names: Names) -> str:
    said = f"{names.block} was given the carry {shape_of(given)} and returned {shape_of(value)}. "
    if value is None:
        return said + "Is its return statement missing?"
    if isinstance(value, tuple) and len(carry) == 1:
        if len(value) == 1:
            return said + "One carry in, one carry out: return x, not (x,)."
        return said + (
            "What is carried is passed by position: stack(..., x, z), not stack(..., x, z=z). A per-block output that "
            "is not carried is announced with has_aux=True."
        )
    return said + (
        "A block returns as many values as it is given by position, each of the same structure; flags, masks and what else "
        "all blocks share are passed by keyword."
    )


def _other_type(leaf: str, given: Any, out: Any, names: Names) -> str:
    said = f"{names.block} was given {leaf} as {_short(given)} and returned it as {_short(out)}. "
    if given.shape != out.shape:
        return said + "A carry keeps its shape from block to block."
    return said + (
        f"A carry keeps its dtype from block to block: cast what the block returns, {leaf}.astype('{given.dtype}'), "
        f"or give the first block {leaf}.astype('{out.dtype}')."
    )


def _other_sharding(leaf: str, given: Any, out: Any, names: Names) -> str:
    pairs = zip(given.sharding.spec, out.sharding.spec, strict=True)
    axes = sorted({str(a) for pair in pairs if pair[0] != pair[1] for a in pair if a is not None})
    return (
        f"{names.block} was given {leaf} as {given.str_short(mesh_axis_types=False)} and returned it as "
        f"{out.str_short(mesh_axis_types=False)}: with explicit sharding the carry keeps its sharding from block to "
        f"block. Reshard what the block returns, jax.sharding.reshard({leaf}, {given.sharding.spec}), or make the mesh "
        f"axis {', '.join(axes)} Auto (jax.make_mesh(..., axis_types=...))."
    )


def _type(leaf: Any) -> Any:
    try:
        return jax.typeof(leaf)
    except TypeError:
        return None


def _short(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def shape_of(tree: Any) -> str:
    """`tree` with types for its leaves: `(float32[4], {'h': float32[2]})`."""
    return str(jax.tree.map(lambda leaf: _Word(_short(t) if (t := _type(leaf)) else repr(leaf)), tree))


class _Word(str):
    __repr__ = str.__str__
