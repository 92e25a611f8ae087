"""The scan engine: `jax.checkpoint` and `lax.scan`, so that every transformation of JAX works through a stack.

`N` blocks, `K` per chunk. Without chunks this is `scan(checkpoint(block, policy))`: what the policy keeps is alive for
all `N` blocks. With chunks it is `scan(checkpoint(scan(checkpoint(block, policy))))`: the forward pass keeps one carry
per chunk, and the backward pass re-runs a chunk and keeps what the policy says for its `K` blocks only (Chen et al.,
"Training deep nets with sublinear memory cost", 2016). A shorter last chunk runs after the scan of the others: chunks
in a Python loop would lose all saving on GPU, where XLA merges the accumulators of equal loops.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxckpt._setting import Setting
from jaxckpt.engine.apart import always, apart
from jaxckpt.engine.kernels import by_kernels, keeps_copies, written_by_kernels
from jaxckpt.engine.layout import copies_carries, row_major
from jaxckpt.engine.offload import CARRY, carry_to_host
from jaxckpt.policies.grammar import JaxPolicy, everything, nothing

Step = Callable[[Any, Any], tuple[Any, Any]]


def scan_blocks(
    step: Step,
    carry: list[Any],
    xs: list[jax.Array],
    length: int,
    setting: Setting,
    keep: JaxPolicy,
    carry_to_host: JaxPolicy = carry_to_host,
) -> tuple[Any, Any]:
    """Runs `carry, y = step(carry, x)` for each of `length` slices `x` of `xs`, checkpointed as `setting` says.

    Arguments:
        step: one block; what it closes over is shared by all blocks and never stored per block.
        xs: arrays `[N, ...]`.
        keep: the `jax.checkpoint` policy that `setting.policy` is for this block.
        carry_to_host: the one that takes what is tagged `CARRY` to the host; for `offload_carry`.
    Returns:
        The last carry, and the `y`s stacked to `[N, ...]`.
    """
    per_chunk, unroll = setting.blocks_per_ckpt, setting.unroll
    outer = functools.partial(_scan_from_host, carry_to_host) if setting.offload_carry else _scan
    if per_chunk == 1:
        # One block at a time is alive anyway: keeping less inside it would only run it a third time.
        per_chunk, keep = None, nothing
    step = _by_kernels(step, keep, copies_carries(setting))
    if per_chunk is None:
        return outer(step, keep, carry, xs, length, unroll)

    def chunk(count: int) -> Step:
        return lambda carry, xs: _scan(step, keep, carry, xs, count, unroll)

    chunks, rest = divmod(length, per_chunk)
    cut = chunks * per_chunk
    if not rest:
        whole = jax.tree.map(lambda x: x.reshape(chunks, per_chunk, *x.shape[1:]), xs)
        carry, ys = outer(chunk(per_chunk), nothing, carry, whole, chunks, 1)
        return carry, jax.tree.map(lambda y: y.reshape(length, *y.shape[2:]), ys)

    # A shorter last chunk. Scanning over `x[:cut]` would keep a copy of nearly all parameters through the whole step
    # (1192 instead of 392 MiB for 50 MLP blocks of 16 MiB in chunks of 6, JAX 0.10.2 compiled for H200). So each chunk
    # fetches its blocks from the whole of `xs`, and their gradients leave by zeros that cost nothing (744 MiB: the
    # gradients, which are written in two pieces, once the rest is gone).
    offsets = [_offsets(x) for x in xs]

    def fetched(count: int) -> Step:
        def run(carry, start_and_offsets):
            start, offsets = start_and_offsets
            parts = [lax.dynamic_slice_in_dim(lax.stop_gradient(x), start, count) for x in xs]
            return chunk(count)(carry, [p if o is None else p + o for p, o in zip(parts, offsets, strict=True)])

        return run

    head = jax.tree.map(lambda o: o[:cut].reshape(chunks, per_chunk, *o.shape[1:]), offsets)
    carry, ys = outer(fetched(per_chunk), nothing, carry, (jnp.arange(chunks) * per_chunk, head), chunks, 1)
    last = jax.tree.map(lambda o: o[cut:], offsets)
    carry, tail = _checkpoint(fetched(rest), nothing, prevent_cse=True)(carry, (cut, last))
    return carry, jax.tree.map(lambda y, t: jnp.concatenate([y.reshape(cut, *y.shape[2:]), t]), ys, tail)


def _by_kernels(step: Step, keep: JaxPolicy, pins_carry: bool) -> Step:
    # What the policy would keep as well is left alone, but for its cotangents.
    of_xs, of_carry = (written_by_kernels, list) if keeps_copies(keep) else (by_kernels, by_kernels)
    pin = row_major if pins_carry and of_carry is by_kernels else lambda x: x
    return lambda carry, x: step(list(map(pin, of_carry(carry))), of_xs(x))


def _offsets(x: jax.Array) -> jax.Array | None:
    """Zeros to add to slices of `x`, to which the gradient of `x` belongs; None where `x` has no gradient."""
    return _zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact) else None


@jax.custom_jvp
def _zeros_like(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


@_zeros_like.defjvp
def _(primals, tangents):
    return _zeros_like(*primals), tangents[0]


def _scan(step: Step, keep: JaxPolicy, carry: Any, xs: Any, length: int, unroll: int | None) -> tuple[Any, Any]:
    # A loop keeps the re-run apart from the forward pass by itself. Where XLA sees straight-line code instead, because the
    # loop runs once or blocks are left over beside it, the barrier is needed, or it merges the two and nothing is saved.
    per_body = length if unroll is None else unroll
    straight = length // per_body <= 1 or length % per_body != 0
    return lax.scan(_checkpoint(step, keep, prevent_cse=straight), carry, xs, length=length, unroll=per_body)


def _scan_from_host(
    to_host: JaxPolicy, step: Step, keep: JaxPolicy, carry: Any, xs: Any, length: int, unroll: int | None
) -> tuple[Any, Any]:
    """`_scan` with what enters each step in the host's memory; `keep` is `nothing`."""
    is_so = always()
    checkpointed = _checkpoint(step, keep, prevent_cse=False)

    def tagged(carry: Any, x: Any) -> tuple[Any, Any]:
        return apart(is_so, checkpointed, jax.tree.map(lambda leaf: checkpoint_name(leaf, CARRY), carry), x)

    return lax.scan(_checkpoint(tagged, to_host, prevent_cse=length == 1), carry, xs, length=length, unroll=unroll or length)


def _checkpoint(step: Step, keep: JaxPolicy, prevent_cse: bool) -> Step:
    return step if keep is everything else jax.checkpoint(step, policy=keep, prevent_cse=prevent_cse)
