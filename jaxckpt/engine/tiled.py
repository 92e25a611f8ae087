"""A piece of a block, computed in slices.

On one device a slice holds neighbours: nothing is moved to cut an outer axis into slices, nor to join them. Where a program
may be split over devices, slice `t` of `T` holds every `T`-th entry, `t, t + T, t + 2 T, ...`: an axis that is split stays
split as it is, and no device sends anything (neighbours of a sharded batch on eight devices: six all-to-alls, and 6.9 and
not 3.8 GiB each). On one device that would take 4 percent longer (4 Pairformer blocks of 128 tokens on a CPU, JAX 0.12) and
more memory (48 of 768 tokens, `snapshots=5, tiles="auto"`: 4.0 and not 3.6 GiB, compiled for H200). Where no number of
slices divides the axis, what is left over is one shorter last slice.

Each slice is a `jax.checkpoint`, and the slices are a `lax.scan`: forwards a slice's values are gone with it, backwards it
is run again and differentiated before the one before. What all slices share gets a gradient from each: they are summed in
float32 where the shared value has fewer bits. Only tangents are converted for that, in a `custom_jvp` around the loop; a
float32 copy of the value itself would be more than what slices save where it is a vocabulary's matrix.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxckpt._leaves import replaced
from jaxckpt.analysis import slices
from jaxckpt.analysis.numbering import Scope, run_equation
from jaxckpt.analysis.slices import Rule
from jaxckpt.analysis.slices_table import resized
from jaxckpt.analysis.tiles import Tiles, entries
from jaxckpt.policies.grammar import JaxPolicy

Flat = Callable[..., list[Any]]


def in_slices(
    jaxpr: Any, outvars: Sequence[Any], tiles: Tiles, strided: bool, keep: JaxPolicy, scope: Scope | None = None
) -> Flat:
    """A function of what the loop of a tiling is given, `[*entering, *shared]`; it returns what the loop makes, whole.

    Arguments:
        jaxpr: of the block, whose equations the tiling numbers.
        outvars: of the piece.
        strided: whether the entries of a slice are as far apart as there are slices, and not neighbours.
        keep: the `jax.checkpoint` policy of each slice.
        scope: of each equation, by its number.
    """
    tiling = tiles.tiling
    each, count, rest = entries(tiling.size, tiles.count)
    apart, stride = (1, count) if strided else (each, 1)  # of two slices, and of two entries of one
    out = [(var, axis) for var, axis in zip(outvars, tiling.axes, strict=True) if axis is not None]
    axes = [axis for _, axis in tiling.entering]
    of_entering: list[tuple[Any, int | None]] = [(place.of(jaxpr), axis) for place, axis in tiling.entering]
    of_shared: list[tuple[Any, int | None]] = [(place.of(jaxpr), None) for place in tiling.shared]
    scoped = scope or (lambda number: contextlib.nullcontext())

    def body(size: int, stride: int, x: tuple[Any, list[Any]], shared: list[Any]) -> list[Any]:
        first, entering = x
        given = dict(zip([*of_entering, *of_shared], [*entering, *shared], strict=True))
        values: dict[Any, Any] = {}

        def read(var: Any, axis: int | None) -> Any:
            if isinstance(var, core.Literal):
                return var.val
            return values[var] if var in values else given[var, axis]

        for i, found in tiling.inside.items():
            eqn = jaxpr.eqns[i]
            wished = found.inputs if found else [None] * len(eqn.invars)
            inputs = [read(var, axis) for var, axis in zip(eqn.invars, wished, strict=True)]
            with scoped(i):
                made = slices.run(eqn, found, inputs, size, first, stride) if found else run_equation(eqn, inputs)
            _check(eqn, found, made, size)
            values.update(zip(eqn.outvars, made, strict=True))
        return [values[var] for var, _ in out]

    def run(*inputs: Any) -> list[Any]:
        entering, shared = inputs[: len(tiling.entering)], list(inputs[len(tiling.entering) :])
        stacked = [_split(x, axis, each, count, strided) for x, axis in zip(entering, axes, strict=True)]
        loop = _loop(functools.partial(body, each, stride), keep, count)
        found = loop((jnp.arange(0, count * apart, apart), stacked), shared)
        whole = [_joined(y, axis, strided) for y, (_, axis) in zip(found, out, strict=True)]
        if not rest:
            return whole
        begin = each * count
        left = [lax.slice_in_dim(x, begin, begin + rest, axis=axis) for x, axis in zip(entering, axes, strict=True)]
        last = _loop(functools.partial(body, rest, 1), keep, 1)((jnp.array([begin]), [x[None] for x in left]), shared)
        pairs = zip(whole, last, out, strict=True)
        return [lax.concatenate([head, tail[0]], dimension=axis) for head, tail, (_, axis) in pairs]

    return run


def _check(eqn: Any, found: Rule | None, made: Sequence[Any], size: int) -> None:
    """What is no slice of the whole, in a program of many, must not go on as one."""
    axes = found.outputs if found else [None] * len(made)
    for var, value, axis in zip(eqn.outvars, made, axes, strict=True):
        if value is not None and value.shape != resized(var.aval.shape, axis, size):
            raise AssertionError(f"{eqn.primitive}: a slice of {var.aval.shape} along {axis} is {value.shape}")


def _split(x: Any, axis: int, each: int, count: int, strided: bool) -> Any:
    """`[count, ..., each, ...]`: slices of the first `each * count` entries."""
    x = lax.slice_in_dim(x, 0, each * count, axis=axis)
    sizes = (each, count) if strided else (count, each)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]), axis + strided, 0)


def _joined(stacked: Any, axis: int, strided: bool) -> Any:
    """The opposite of `_split`."""
    x = jnp.moveaxis(stacked, 0, axis + strided)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _loop(body: Callable[[Any, list[Any]], list[Any]], keep: JaxPolicy, count: int) -> Callable[[Any, list[Any]], list[Any]]:
    """A function `(xs, shared)` that runs `body` for each slice of `xs`."""
    checkpoint = functools.partial(jax.checkpoint, policy=keep, prevent_cse=count == 1)

    @jax.custom_jvp
    def run(xs: Any, shared: list[Any]) -> list[Any]:
        each = checkpoint(body)
        return lax.scan(lambda _, x: (None, each(x, shared)), None, xs)[1]

    def jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
        leaves, tree = jax.tree.flatten(primals)
        count_xs = len(jax.tree.leaves(primals[0]))
        dots = jax.tree.leaves(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
        moving = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]
        of_xs = [i for i in moving if i < count_xs]
        of_shared = [i for i in moving if i >= count_xs]

        @checkpoint
        def one(x: list[Any], x_dots: list[Any], shared: list[Any], shared_dots: list[Any]):
            given = [*x, *shared]
            narrow = [dot.astype(leaves[i].dtype) for i, dot in zip(of_shared, shared_dots, strict=True)]

            def fn(*values: Any) -> list[Any]:
                return body(*jax.tree.unflatten(tree, replaced(given, moving, values)))

            return jax.jvp(fn, [given[i] for i in moving], [*x_dots, *narrow])

        wide = [_widened(dots[i]) for i in of_shared]
        xs = leaves[:count_xs], [dots[i] for i in of_xs]
        scanned = lambda _, x: (None, one(*x, leaves[count_xs:], wide))  # noqa: E731
        return lax.scan(scanned, None, xs)[1]

    run.defjvp(jvp, symbolic_zeros=True)
    return run


def _widened(tangent: Any) -> Any:
    """In float32 where it has fewer bits, so that gradients are summed in it."""
    is_narrow = jnp.issubdtype(tangent.dtype, jnp.floating) and tangent.dtype.itemsize < 4
    return tangent.astype(jnp.float32) if is_narrow else tangent
