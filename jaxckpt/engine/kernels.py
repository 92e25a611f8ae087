"""What a loop stores in stacked arrays, read and written by kernels and never by bare copies.

Since JAX 0.11 XLA copies asynchronously what the body of a loop only copies, such as the gradient of a norm's scale on the
way to its place, and orders a body in which there is such a copy by latency and not by memory: it puts off products for the
parameters' gradients, and what they read stays alive. A slice that is selected by a condition which XLA cannot know is no
bare copy, and where something is computed with it, it costs nothing.

Compiled for H200 with JAX 0.12.0.1, 24 transformer blocks of 1024 channels, 8 x 2048 tokens, with a gradient each: 5.52 GiB
of temporaries without, 3.99 with, as on JAX 0.10.2; a branch for each reversal of a block takes 4.17.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray

from jaxckpt.engine.apart import always
from jaxckpt.engine.one_gpu import identity_but_on_one_gpu
from jaxckpt.policies.grammar import JaxPolicy, everything

COPIES_ASYNCHRONOUSLY_FROM = LAYS_OUT_MASKS_UNTIL = (0, 11)  # versions of JAX


def by_kernels(leaves: list[Any]) -> list[Any]:
    """`leaves`, which are no bare copies of slices, nor are their cotangents, if the program is for one GPU."""
    return [by_kernel_p.bind(leaf) if _may_be_copied(leaf) else leaf for leaf in leaves]


def to_be_written(leaves: list[Any]) -> list[Any]:
    """`leaves`, which are no bare copies when they are put in their places."""
    return [write_p.bind(leaf) if _may_be_copied(leaf) else leaf for leaf in leaves]


def written_by_kernels(leaves: list[Any]) -> list[Any]:
    """`leaves` as they are, whose cotangents are no bare copies."""
    return [_written(leaf) if _may_be_copied(leaf) else leaf for leaf in leaves]


def masks_of_its_own(leaves: list[Any], keep: JaxPolicy) -> list[Any]:
    """`leaves` that all blocks share; XLA of JAX 0.10 must not lay out those that are masks for all blocks at once.

    Where it does, it computes an attention's weights once more where their gradient is computed, in one kernel with it, and
    keeps one matrix more alive: 28 layers of Qwen3-0.6B's shape, 4 x 2048 tokens, take 3.14 GiB and not 2.70.
    """
    if jax.__version_info__ >= LAYS_OUT_MASKS_UNTIL or keeps_copies(keep):
        return leaves
    return [own_mask_p.bind(leaf) if leaf.dtype == bool else leaf for leaf in leaves]


def keeps_copies(keep: JaxPolicy) -> bool:
    """Whether a policy would keep what `by_kernels` makes."""
    return keep is everything or bool(keep(by_kernel_p, ShapedArray((1,), jnp.float32)))


def _may_be_copied(leaf: Any) -> bool:
    return jax.__version_info__ >= COPIES_ASYNCHRONOUSLY_FROM and jnp.issubdtype(leaf.dtype, jnp.inexact)


@jax.custom_jvp
def _written(x: Any) -> Any:
    return x


@_written.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], by_kernel_p.bind(tangents[0])


def _selected(x: jax.Array) -> jax.Array:
    return lax.select(always(), x, jnp.zeros_like(x))


own_mask_p = identity_but_on_one_gpu("jaxckpt_own_mask", lax.optimization_barrier)
# Without the barrier, the selection would be done where a product is computed that is to be written, and the rest be a copy.
write_p = identity_but_on_one_gpu("jaxckpt_write_by_kernel", lambda x: _selected(lax.optimization_barrier(x)))
by_kernel_p = identity_but_on_one_gpu("jaxckpt_by_kernel", _selected, transposed=write_p)
