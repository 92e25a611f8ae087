"""One trace of one block: its jaxpr, and how the arguments of the stack stand in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxckpt._leaves import is_array, replaced
from jaxckpt._setting import Setting
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.engine import check, refs

Block = Callable[[Any, tuple, dict[str, Any]], tuple[Any, Any]]


class Traced(NamedTuple):
    """What one trace of a block tells."""

    closed: Any  # its jaxpr: slices of `xs`, carry and shared arrays in, carry and the rest out
    x_leaves: list[Any]  # of `xs`
    carry: list[Any]  # leaves as the blocks will be given them, Python numbers promoted
    carry_names: list[str]
    carry_tree: Any
    arrays: list[Any]  # the array leaves of `shared`
    rest_tree: Any  # structure of (aux, extra)
    parameters: list[int]  # which of the block's inputs are

    @property
    def carried(self) -> range:
        """Which of the block's inputs are the carry."""
        return range(len(self.x_leaves), len(self.x_leaves) + len(self.carry))


def trace_block(
    block: Block, setting: Setting, xs: tuple, carry: tuple, shared: dict[str, Any], names: check.Names
) -> Traced:
    """Traces `block` on one slice of `xs`, and checks that it returns the carry that it was given.

    Raises:
        TypeError, ValueError: see `jaxckpt.engine.check` and `jaxckpt.engine.refs`.
    """
    # Python numbers become arrays here, weakly typed as before, so that a passed-through one comes back as an array.
    leaves, carry_in_tree = jax.tree.flatten(jax.tree.map(jnp.asarray, carry))
    x_leaves, x_tree = jax.tree.flatten(xs)
    shared_leaves, shared_tree = jax.tree.flatten(shared)
    where = [i for i, leaf in enumerate(shared_leaves) if is_array(leaf)]
    arrays = [shared_leaves[i] for i in where]
    trees = {}

    def flat(*inputs):
        x = jax.tree.unflatten(x_tree, inputs[: len(x_leaves)])
        c = jax.tree.unflatten(carry_in_tree, inputs[len(x_leaves) : len(x_leaves) + len(leaves)])
        given = replaced(shared_leaves, where, inputs[len(x_leaves) + len(leaves) :])
        keywords = jax.tree.unflatten(shared_tree, given)
        returned, extra = block(x, c, keywords)
        check.unchanged(keywords, jax.tree.unflatten(shared_tree, given), names)
        out, aux = check.returned(returned, c, setting.has_aux, names)
        trees["carry"], trees["rest"] = jax.tree.structure(out), jax.tree.structure((aux, extra))
        return jax.tree.leaves(out) + jax.tree.leaves((aux, extra))

    slices = jx.slice_types(x_leaves)
    closed = jx.trace(flat, *slices, *leaves, *arrays)
    refs.check_closed_over(names.block, closed)
    while (promoted := check.settle_carry(carry, leaves, closed.out_avals[: len(leaves)], names)) is not None:
        leaves = promoted
        closed = jx.trace(flat, *slices, *leaves, *arrays)
    own = jax.tree.leaves(xs[:-1])  # without the per-block arguments
    parameters = [i for i, leaf in enumerate(own) if _is_parameter(leaf.dtype)]
    return Traced(closed, x_leaves, leaves, names.leaves(carry), trees["carry"], arrays, trees["rest"], parameters)


def _is_parameter(dtype: Any) -> bool:
    """Whether a block's own array is one, quantized ones too, and no key, as which numbers of 32 bits serve, and no flag."""
    is_small = jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits <= 8
    return bool(is_small or jnp.issubdtype(dtype, jnp.inexact))
