"""The knobs of a stack as one frozen value, checked where they are given."""

import operator
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from jaxckpt import policies
from jaxckpt._metadata import LAYERS, check_partition_name
from jaxckpt._plan import Knobs, Plan, StackPlan, stack_of
from jaxckpt.policies.grammar import JaxPolicy, Policy, Term

ENGINES = ("scan", "reversal")
FIXED_IN = (0, 11, 1)  # the JAX that offloads through `lax.scan` rightly, see `jaxckpt.engine.offload`
Tiles = None | Literal["auto"] | int  # slices of a piece at most
Stages = None | Literal["auto"] | int | tuple[str, ...]  # pieces at most, or the tags to cut behind


@dataclass(frozen=True)
class Setting:
    """How a stack of blocks is run and checkpointed; every executor takes one.

    `length` is None where the parameters tell it at the call. The other fields are the arguments of `checkpoint_scan`.
    """

    length: int | None
    blocks_per_ckpt: int | None
    policy: Policy
    has_aux: bool
    per_block: tuple[str, ...]
    unroll: int | None  # None: all. Not True, which equals 1: stacks are cached by their settings
    stages: Stages
    snapshots: int | None
    offload_carry: bool
    engine: str
    tiles: Tiles = None
    partition_name: str | None = LAYERS
    first: "tuple[int, Setting] | None" = None  # so many blocks come first, under a setting of their own
    call: Callable[..., Any] | None = None  # how a module is run, where not by its `__call__`
    plan: StackPlan | str | None = None  # that the knobs are of; or, of a stack that is to be planned, its name


def make_setting(
    length: int | None,
    blocks_per_ckpt: int | None,
    policy: str | Policy | JaxPolicy | None,
    has_aux: bool,
    per_block: Sequence[str],
    unroll: int | bool,
    stages: int | str | None = None,
    snapshots: int | None = None,
    offload_carry: bool = False,
    engine: str | None = None,
    plan: "Plan | StackPlan | str | os.PathLike[str] | None" = None,
    partition_name: str | None = LAYERS,
    tiles: int | str | None = None,
) -> Setting:
    """The checked knobs, with the default policy filled in: what each is allowed to be stands in its error."""
    check_partition_name(partition_name)
    if plan is not None:
        given = dict(blocks_per_ckpt=blocks_per_ckpt, policy=policy, snapshots=snapshots, stages=stages, engine=engine)
        given |= dict(offload_carry=offload_carry or None, tiles=tiles)
        found = _planned(plan, length, has_aux, per_block, unroll, given)
        return replace(found, partition_name=partition_name)
    if length is not None and (not is_integer(length) or length < 1):
        raise ValueError(f"length, the number of blocks, must be an integer of at least 1; got {length!r}")
    if blocks_per_ckpt is not None:
        check_blocks_per_ckpt(blocks_per_ckpt, length)
        blocks_per_ckpt = operator.index(blocks_per_ckpt)
    if snapshots is not None:
        check_snapshots(snapshots, length, blocks_per_ckpt)
    if snapshots is not None and blocks_per_ckpt in (None, 1) and policy and not policies.get(policy).keeps_nothing:
        warnings.warn(
            f"snapshots={snapshots!r} of single blocks: each is reversed from its input, and policy={policy!r} changes "
            "nothing. Write blocks_per_ckpt=2 or more for chunks in which it says what is kept, or leave it away",
            stacklevel=3,
        )
    if policy is None:
        policy = "nothing" if blocks_per_ckpt is None else "everything"
    policy = policies.get(policy)
    if not isinstance(offload_carry, (bool, np.bool_)):
        raise ValueError(
            f"offload_carry, whether what enters each chunk goes to the host, must be a bool; got {offload_carry!r}"
        )
    if offload_carry and blocks_per_ckpt is None and snapshots is None and not policy.keeps_nothing:
        raise ValueError(
            f"offload_carry=True moves what enters each chunk to the host, and policy={str(policy)!r} keeps values of all "
            "blocks beside that: write policy='nothing', or blocks_per_ckpt=K, or snapshots=s, or policy='offload:NAMES' "
            "for tagged values"
        )
    if not isinstance(unroll, bool) and (not is_integer(unroll) or unroll < 1):
        raise ValueError(
            f"unroll, the number of blocks in one loop body, must be True, False or an integer of at least 1; got {unroll!r}"
        )
    names = (per_block,) if isinstance(per_block, str) else tuple(per_block) if isinstance(per_block, Iterable) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise TypeError(f"per_block must name keyword arguments, as in per_block=('rate',); got {per_block!r}")
    return Setting(
        length=None if length is None else operator.index(length),
        blocks_per_ckpt=blocks_per_ckpt,
        policy=policy,
        has_aux=bool(has_aux),
        per_block=names,
        unroll=None if unroll is True else max(operator.index(unroll), 1),
        stages=_stages(stages),
        snapshots=None if snapshots is None else operator.index(snapshots),
        offload_carry=bool(offload_carry),
        engine=_engine(engine, unroll, snapshots, bool(offload_carry)),
        tiles=_tiles(tiles),
        partition_name=partition_name,
    )


def _planned(
    plan: "Plan | StackPlan | str | os.PathLike[str]",
    length: int | None,
    has_aux: bool,
    per_block: Sequence[str],
    unroll: int | bool,
    others: dict[str, Any],
) -> Setting:
    """The knobs that a plan pins; for "auto", the default ones, until the stack is run under a plan."""
    said = f"plan={plan!r}" if isinstance(plan, (str, os.PathLike)) else "plan="
    given = {**others, "unroll": unroll if unroll is True or unroll != 1 else None}
    if found := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
        raise ValueError(f"{said} sets all knobs, and {', '.join(found)} is given beside it: leave one of them away")
    if not isinstance(plan, (str, os.PathLike, Plan, StackPlan)):
        raise TypeError(f"plan must be 'auto', 'auto:NAME', a plan of jaxckpt.plan or its file; got {plan!r}")
    setting = make_setting(length, None, None, has_aux, per_block, 1)
    if isinstance(plan, str) and plan.partition(":")[0] == "auto":
        return replace(setting, plan=plan.partition(":")[2])
    stack = stack_of(plan)
    if length is not None and length != stack.length:
        raise ValueError(f"the plan is for {stack.length} x {stack.block}, and length is {length}: plan again")
    return replace(with_knobs(setting, stack.knobs), plan=stack)


def with_knobs(setting: Setting, knobs: Knobs) -> Setting:
    """`setting` with the knobs of a plan.

    Raises:
        ValueError: they are not allowed, as in a file that was edited.
    """
    policy = knobs.policy if knobs.policy != "planned" else Policy((Term("planned", chooses=True, values=knobs.kept),))
    try:
        found = make_setting(
            setting.length,
            knobs.blocks_per_ckpt,
            policy,
            setting.has_aux,
            setting.per_block,
            1,
            knobs.stages,
            knobs.snapshots,
            knobs.offload_carry,
            knobs.engine,
            tiles=knobs.tiles,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"a plan says {knobs}, which is not allowed: {error}. Run jaxckpt.plan again") from None
    first = None if knobs.first is None else (knobs.first[0], with_knobs(setting, knobs.first[1]))
    return replace(found, plan=setting.plan, partition_name=setting.partition_name, call=setting.call, first=first)


def _stages(given: object) -> Stages:
    if given is None or (isinstance(given, str) and given == "auto"):
        return given  # pyright: ignore[reportReturnType]
    if is_integer(given) and given >= 1:  # pyright: ignore[reportOperatorIssue]
        return None if given == 1 else operator.index(given)  # pyright: ignore[reportArgumentType]
    if isinstance(given, str) and given.startswith("tags:"):
        tags = tuple(tag.strip() for tag in given.removeprefix("tags:").split(","))
        if all(tags):
            return tags
    raise ValueError(
        "stages, the pieces that a block is cut into, must be None, 'auto', an integer of at least 1 (pieces at most) or "
        f"tags to cut behind, as in 'tags:z1,z2'; got {given!r}"
    )


def _tiles(given: object) -> Tiles:
    if given is None or (isinstance(given, str) and given == "auto"):
        return given  # pyright: ignore[reportReturnType]
    if is_integer(given) and given >= 1:  # pyright: ignore[reportOperatorIssue]
        return None if given == 1 else operator.index(given)  # pyright: ignore[reportArgumentType]
    raise ValueError(
        "tiles, the slices in which pieces of a block are computed, must be None, 'auto' or an integer of at least 1 "
        f"(slices at most); got {given!r}"
    )


def _engine(given: object, unroll: int | bool, snapshots: object, offload_carry: bool) -> str:
    """The engine that is asked for, or that the other knobs need."""
    if given is not None and given not in ENGINES:
        raise ValueError(f"engine, which runs the backward pass, must be {' or '.join(map(repr, ENGINES))}; got {given!r}")
    is_needed = snapshots is not None or (offload_carry and jax.__version_info__ < FIXED_IN)
    engine = str(given or ("reversal" if is_needed else "scan"))
    if engine == "scan" and snapshots is not None:
        raise ValueError(f"snapshots={snapshots!r} is of the reversal engine: leave engine='scan' away, or snapshots")
    if engine == "reversal" and (unroll is True or unroll > 1):
        why = "" if given else f", which offload_carry=True takes on JAX {jax.__version__}," if offload_carry else ""
        raise ValueError(
            f"unroll={unroll!r} is of the scan engine; the reversal engine{why} has one block in each loop body"
        )
    return engine


def is_integer(value: object) -> bool:
    """Whether `value` is an integer; NumPy's are, `True` and `2.0` are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_snapshots(value: object, length: int | None, blocks_per_ckpt: int | None) -> None:
    """Refuses a number of snapshots that is not an integer from 1 to the number of chunks."""
    chunks = None if length is None else -(-length // (blocks_per_ckpt or 1))
    if is_integer(value) and value >= 1 and (chunks is None or value <= chunks):  # pyright: ignore[reportOperatorIssue]
        return
    upper = "the number of chunks" if chunks is None else f"the number of chunks, {chunks}"
    raise ValueError(
        f"snapshots, the inputs of chunks that are stored at once, must be an integer between 1 and {upper}; got {value!r} "
        f"of type {type(value).__name__}. Write None to store all of them."
    )


def check_blocks_per_ckpt(value: object, length: int | None) -> None:
    """Refuses a chunk size that is not an integer in [1, length]; the upper end waits where `length` is unknown."""
    if is_integer(value) and value >= 1 and (length is None or value <= length):  # pyright: ignore[reportOperatorIssue]
        return
    shown = f"{value!r} of type {type(value).__name__}"
    upper = "" if length is None else f" = {length}"
    raise ValueError(
        f"blocks_per_ckpt must be between 1 and len(blocks){upper}, and an integer; got {shown}. "
        "Write None to keep values for the whole stack instead of chunk by chunk."
    )
