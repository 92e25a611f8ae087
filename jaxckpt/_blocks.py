"""`checkpoint_blocks`: the original's contract, for a Python list of callables that may differ from one another.

OpenFold, `openfold/utils/checkpointing.py` (AlQuraishi Laboratory, 2021), after AlphaFold 2, supplement 1.11.8.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxckpt import policies
from jaxckpt._setting import check_blocks_per_ckpt
from jaxckpt.analysis import tagging
from jaxckpt.engine import refs
from jaxckpt.engine.choice import with_choice
from jaxckpt.engine.single import checkpointed
from jaxckpt.flax.calls import Call, traced_call
from jaxckpt.flax.linen import bound_module, variables_of
from jaxckpt.policies.grammar import JaxPolicy, everything, nothing


def checkpoint_blocks(
    blocks: Sequence[Callable[..., Any]],
    args: Any,
    blocks_per_ckpt: int | None,
    *,
    policy: "str | JaxPolicy | policies.Policy" = "everything",
) -> tuple[Any, ...]:
    """Runs `blocks` one after the other, each on what the one before returned, checkpointed in chunks.

    Arguments:
        blocks: callables; each takes by position what the one before returned. They may differ. Parameters reach a block
            by closure, and gradients flow to them.
        args: the arguments of the first block. What is not exactly a `tuple` (a list or a NamedTuple too) is one
            argument. Leaves that are not arrays pass through untouched.
        blocks_per_ckpt: blocks per chunk, in [1, len(blocks)]; the last chunk may be shorter. None: no checkpointing.
        policy: what each block keeps while its chunk is differentiated (see `jaxckpt.policies`).

    Returns:
        What the last block returned, always as a tuple.

    Raises:
        TypeError: `blocks` is no list of callables.
        ValueError: `blocks_per_ckpt` is not an integer in [1, len(blocks)], or `policy` is unknown; a bound Linen
            module among the blocks writes its variables, or a block one that it closes over, of an NNX module.
        TypeError: a block is given a `jax.Ref`, or closes over one.

    Bound Linen modules are blocks too, in a parent's `@nn.compact` for instance. `init` runs them without chunks, which it
    does not need; what they write when applied (`batch_stats`, `sow`) cannot leave a chunk and is refused.

    State of NNX modules (dropout's counters, statistics, `sow`) goes on as in a plain loop. Give the modules themselves,
    their methods or `functools.partial`s of them: what a lambda hides cannot be changed.

    >>> import jax.numpy as jnp
    >>> checkpoint_blocks([jnp.sin, jnp.cos, jnp.sin], jnp.zeros(2), blocks_per_ckpt=2)[0].shape
    (2,)
    """
    args = _wrap(args)
    _check_blocks(blocks, blocks_per_ckpt)
    if blocks_per_ckpt is None:
        return _run(blocks, args)
    check_blocks_per_ckpt(blocks_per_ckpt, len(blocks))
    blocks_per_ckpt = operator.index(blocks_per_ckpt)  # a small NumPy integer would overflow in start + blocks_per_ckpt
    policy = policies.get(policy)
    modules = [module for module in map(bound_module, blocks) if module is not None]
    if any(module.is_initializing() for module in modules):
        return _run(blocks, args)
    refs.check_given("checkpoint_blocks", [("the argument", args)])
    before = variables_of(modules)
    tags = _tags(blocks, args) if policy.reads_tags else ()
    keep = functools.partial(_chosen, policy, tags) if policy.chooses else policy.for_tags(tags)
    if blocks_per_ckpt == 1:
        keep = everything  # one block at a time is alive anyway: keeping less inside it would only run it a third time
    for start in range(0, len(blocks), blocks_per_ckpt):
        args = _checkpoint(blocks[start : start + blocks_per_ckpt], nothing, inner=keep)(*args)
    for name, leaf in variables_of(modules).items():
        if before.get(name) is not leaf:
            raise ValueError(
                f"checkpoint_blocks: a bound Linen module writes {name[1]}, and what is written in a checkpointed chunk is "
                "lost. Write checkpoint_scan(Block, N), which gives back what blocks write, or blocks_per_ckpt=None"
            )
    return args


def _check_blocks(blocks: Any, blocks_per_ckpt: object) -> None:
    """Refuses what is no list of callables; without chunks, as in the original, all that can be gone through will do."""
    is_list = hasattr(blocks, "__len__") and hasattr(blocks, "__getitem__") and not isinstance(blocks, (str, Mapping))
    if not is_list and (blocks_per_ckpt is not None or not isinstance(blocks, Iterable)):
        one = getattr(blocks, "__name__", None) or type(blocks).__name__
        instead = (
            f"write checkpoint_blocks([{one}], args, K) for one, or checkpoint_scan for a stack of equal blocks"
            if callable(blocks)
            else "write list(blocks)"
        )
        raise TypeError(f"checkpoint_blocks takes a list of callables, one for each block; got {blocks!r:.200}: {instead}")
    if blocks_per_ckpt is not None and not all(map(callable, blocks)):
        i, other = next((i, block) for i, block in enumerate(blocks) if not callable(block))
        raise TypeError(f"checkpoint_blocks takes a list of callables, and blocks[{i}] is {other!r:.200}")


def _wrap(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)


def _run(blocks: Sequence[Callable[..., Any]], args: tuple[Any, ...]) -> tuple[Any, ...]:
    for block in blocks:
        args = _wrap(block(*args))
    return args


def _checkpoint(
    blocks: Sequence[Callable[..., Any]], keep: "JaxPolicy | functools.partial[Any]", inner: Any = everything
) -> Callable[..., Any]:
    """`jax.checkpoint` of blocks, whose arguments and results may hold leaves that are not arrays.

    Arguments:
        keep: the policy; or, as a `partial`, what makes one, and the jaxpr it is for, from the function's jaxpr.
        inner: the policy of each block by itself.
    """
    if keep is everything:
        return functools.partial(_as_one, blocks)
    return functools.partial(_as_checkpoint, blocks, keep, inner)


def _as_one(blocks: Sequence[Callable[..., Any]], *args: Any) -> tuple[Any, ...]:
    return _run(blocks, args)


def _as_checkpoint(blocks: Sequence[Callable[..., Any]], keep: Any, inner: Any, *args: Any) -> tuple[Any, ...]:
    call = _traced(lambda blocks, args: _run([_checkpoint([block], inner) for block in blocks], args), blocks, args)
    closed, policy = keep(call.closed) if isinstance(keep, functools.partial) else (call.closed, keep)
    return call.returned(checkpointed(closed, policy, call.arrays))


def _traced(run: Callable[..., Any], blocks: Sequence[Callable[..., Any]], args: tuple[Any, ...]) -> Call:
    return traced_call(run, blocks, args, "checkpoint_blocks: a block")


def _tags(blocks: Sequence[Callable[..., Any]], args: tuple[Any, ...]) -> frozenset[str]:
    """The tags of all blocks together."""
    return tagging.tags(_traced(_run, blocks, args).closed)


def _chosen(policy: policies.Policy, tags: Iterable[str], closed: Any) -> tuple[Any, JaxPolicy]:
    """A block's jaxpr with what the policy chooses of it tagged, and the `jax.checkpoint` policy that keeps it."""
    assert policy.chooses is not None
    closed, chosen, _ = with_choice(closed, policy.chooses)
    return closed, policy.for_tags(tags, chosen)
