"""How a piece of a block is computed in slices along an axis of its outputs, and how little memory that takes.

A piece is asked for its outputs in slices. Going backwards through its equations, each says which slices of its inputs it
needs (`jaxckpt.analysis.slices`); what is needed whole by any of them, or along two axes, or cannot be computed in slices,
is computed once, before the loop. So nothing in the loop is ever alive for more than one slice, forwards or backwards.
Attention's logits are the case in point: asked for its output in slices of queries, it needs keys and values whole, and
logits for these queries alone.

Under tensor parallelism heads are split, and gradients of what queries, keys and values are computed of are summed over
devices. If queries were computed in the loop, for its slices, theirs would be summed there, apart from the others: one sum
over devices more, and XLA makes one of the other two only together with it. So products of what is needed whole too are
computed before the loop there.

A value that is converted to fewer bits on its way into the loop is converted inside, again for each slice (XLA moves it out
again): the gradient that the slices sum is then one of the value before, in its own bits.
"""

import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from jaxckpt.analysis import flow
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.slices import Axes, Rule, rule

# The largest value of a slice has at least so many entries: one for each thread that an H200 runs at once (132 processors
# of 2048 threads), so that a slice keeps it busy.
LEAST_ENTRIES = 2**18
MOST = 64  # slices that are tried: published and measured, more save hardly any memory and take time
_MOST_SLICED = 3  # outputs that are sliced along an axis each: more are few bytes in a piece of many
_WORTH = 0.9  # of what a piece takes otherwise: slices that save less are not worth a loop
_SMALL_PIECE = 1 / 200  # of what autodiff wants of the block: pieces of less are left whole without trying
_SMALL = 1 / 20  # of the largest output of a piece: what is left whole without trying


class Place(NamedTuple):
    """An input of an equation of the block's jaxpr: equal programs have it at the same place, and not the same variable."""

    equation: int
    input: int

    def of(self, jaxpr: Any) -> Any:
        """The variable."""
        return jaxpr.eqns[self.equation].invars[self.input]


class Tiling(NamedTuple):
    """A piece in slices; equations are those of the block's jaxpr, by number.

    Fields:
        axes: of each output of the piece, the axis that it is sliced along; None for those that are computed whole.
        size: of that axis.
        before: the equations that are run once, before the loop.
        inside: those that are run for each slice, with what they need; or None where they are the same for all slices.
        entering: what enters the loop in slices, and along which axes.
        shared: what all slices are given whole.
    """

    axes: Axes
    size: int
    before: tuple[int, ...]
    inside: dict[int, Rule | None]
    entering: tuple[tuple[Place, int], ...]
    shared: tuple[Place, ...]


class Tiles(NamedTuple):
    """A tiling, and the number of slices."""

    tiling: Tiling
    count: int


class Tilings:
    """Ways to slice the pieces of one inlined jaxpr, whatever the number of slices; what its equations need is asked once.

    Arguments:
        wanted: for each equation the bytes that autodiff wants of it, see `numbering.residual_bytes`.
        stays_whole: equations that are not computed in slices although they could be, by number.
        groups: of each variable that has one the axis of groups of examples, or of all: slices would cut across devices.
        splits_more: whether the compiler splits something beside the groups over devices, such as heads.
    """

    def __init__(
        self,
        jaxpr: Any,
        wanted: Sequence[int],
        stays_whole: Collection[int] = frozenset(),
        groups: Mapping[Any, int] | None = None,
        splits_more: bool = False,
    ):
        self.jaxpr, self.wanted, self.stays_whole, self.groups = jaxpr, wanted, stays_whole, groups or {}
        self.splits_more = splits_more
        self.rule = functools.cache(self._rule)
        self.of = functools.cache(self._of)
        self.small = sum(wanted) * _SMALL_PIECE
        self.ends = flow.last_uses(jaxpr)
        self.variables = [jx.variables(eqn.invars) for eqn in jaxpr.eqns]
        self.entries = [max((math.prod(v.aval.shape) for v in eqn.outvars), default=0) for eqn in jaxpr.eqns]

    def _rule(self, number: int, output: int, axis: int) -> Rule | None:
        if number in self.stays_whole:
            return None
        eqn = self.jaxpr.eqns[number]
        return rule(eqn, output, axis, used=[k for k, var in enumerate(eqn.outvars) if var in self.ends])

    def outputs(self, begin: int, end: int) -> list[Any]:
        """What a piece makes and what follows uses."""
        made = dict.fromkeys(var for eqn in self.jaxpr.eqns[begin:end] for var in eqn.outvars)
        return [var for var in made if self.ends.get(var, -1) >= end]

    def _of(self, begin: int, end: int) -> list[Tiling]:
        """Those of a piece that can be worth it; none of a small piece."""
        wanted = sum(self.wanted[begin:end])
        if wanted < self.small:
            return []
        axes = self._axes(self.outputs(begin, end))
        found = (self.tiling(begin, end, *along, limit=wanted * _WORTH) for along in axes)
        return [tiling for tiling in found if tiling is not None]

    def obstacles(self, begin: int, end: int) -> list[int]:
        """The equations of a piece that were asked for slices and cannot be computed in any, the largest first."""
        found: set[int] = set()
        for axes, size in self._axes(self.outputs(begin, end)):
            self.tiling(begin, end, axes, size, obstacles=found)
        return sorted(found, key=lambda i: -self.entries[i])

    def _axes(self, out: Sequence[Any]) -> Iterator[tuple[Axes, int]]:
        """The axes along which outputs of a piece may be sliced, all of one size."""
        largest = max((jx.nbytes(var.aval) for var in out), default=0)
        large = [var for var in out if jx.nbytes(var.aval) > largest * _SMALL]
        if len(large) > _MOST_SLICED:
            return
        axes_of = lambda var: [i for i in range(len(var.aval.shape)) if i != self.groups.get(var)]  # noqa: E731
        choices = [(*axes_of(var), None) if var in large else (None,) for var in out]
        for axes in itertools.product(*choices):
            sizes = {var.aval.shape[axis] for var, axis in zip(out, axes, strict=True) if axis is not None}
            if len(sizes) == 1 and (size := sizes.pop()) > 1:
                yield axes, size

    def tiling(
        self,
        begin: int,
        end: int,
        axes: Axes,
        size: int,
        limit: float = math.inf,
        obstacles: set[int] | None = None,
    ) -> Tiling | None:
        """The piece with its outputs sliced along `axes`, of `size` each.

        None where an output that was to be sliced is needed whole, or more than `limit` bytes are wanted whole. Equations
        that have no rule for the slices that they are asked for are added to `obstacles`.
        """
        out = self.outputs(begin, end)
        asked: dict[Any, set[int | None]] = {}
        for var, axis in zip(out, axes, strict=True):
            asked.setdefault(var, set()).add(axis)
        before: list[int] = []
        inside: dict[int, Rule | None] = {}
        whole = 0
        for i in reversed(range(begin, end)):
            eqn = self.jaxpr.eqns[i]
            wishes = [(k, asked[var]) for k, var in enumerate(eqn.outvars) if var in asked]
            if not wishes:
                continue
            found = self._common(i, wishes)
            if found is None:
                if obstacles is not None and all(None not in wished for _, wished in wishes):
                    obstacles.add(i)
                before.append(i)
                whole += self.wanted[i]
                if whole > limit:
                    return None
                for var in self.variables[i]:
                    asked.setdefault(var, set()).add(None)
                continue
            inside[i] = found
            for var, axis in zip(eqn.invars, found.inputs, strict=True):
                if not isinstance(var, core.Literal):
                    asked.setdefault(var, set()).add(axis)
        if self.splits_more:
            first = self._products_before(before, inside)
            before, inside = sorted([*before, *first], reverse=True), {i: at for i, at in inside.items() if i not in first}
        made = {var for i in inside for var in self.jaxpr.eqns[i].outvars}
        if not all(axis is None or var in made for var, axis in zip(out, axes, strict=True)):
            return None
        return self.made_of(axes, size, before[::-1], dict(sorted(inside.items())))

    def _products_before(self, before: Sequence[int], inside: Mapping[int, Rule | None]) -> list[int]:
        """Products inside, of what is needed whole too and of what all slices share."""
        made = {var for i in inside for var in self.jaxpr.eqns[i].outvars}
        whole = {var for i in before for var in self.variables[i]}
        products = [i for i in inside if self.jaxpr.eqns[i].primitive.name == "dot_general"]
        return [i for i in products if made.isdisjoint(self.variables[i]) and not whole.isdisjoint(self.variables[i])]

    def _common(self, number: int, wishes: Sequence[tuple[int, set[int | None]]]) -> Rule | None:
        """The one rule by which an equation gives all slices that are asked of it."""
        (output, first), *_ = wishes
        if any(len(axes) > 1 or None in axes for _, axes in wishes):
            return None
        (axis,) = first
        found = self.rule(number, output, axis)
        if found is None or any({found.outputs[k]} != axes for k, axes in wishes):
            return None
        return found

    def made_of(self, axes: Axes, size: int, before: Sequence[int], inside: dict[int, Rule | None]) -> Tiling:
        """The tiling that runs these equations before its loop and inside."""
        made = {var for i in inside for var in self.jaxpr.eqns[i].outvars}
        given: dict[tuple[Any, int | None], Place] = {}
        for i, found in inside.items():
            invars = self.jaxpr.eqns[i].invars
            for k, (var, axis) in enumerate(zip(invars, found.inputs if found else [None] * len(invars), strict=True)):
                if not isinstance(var, core.Literal) and var not in made:
                    given.setdefault((var, axis), Place(i, k))
        entering = tuple((place, axis) for (_, axis), place in given.items() if axis is not None)
        shared = tuple(place for (_, axis), place in given.items() if axis is None)
        return Tiling(axes, size, tuple(before), inside, entering, shared)


class Tiler:
    """The best slices of pieces.

    Arguments:
        most: the slices of a piece at most; None for as many as keep each of them large.
    """

    def __init__(self, tilings: Tilings, most: int | None = None):
        self.tilings, self.given_most = tilings, most
        self.jaxpr, self.wanted = tilings.jaxpr, tilings.wanted
        self.best = functools.cache(self._best)

    def _best(self, begin: int, end: int) -> tuple[int, Tiles | None]:
        """The least that autodiff wants of a piece at once, and how it is sliced for that; None where it stays whole."""
        least, best = sum(self.wanted[begin:end]), None
        for tiling in self.tilings.of(begin, end):
            if (count := self._most(tiling)) >= 2 and (found := self.bytes(tiling, count)) < least * _WORTH:
                least, best = found, Tiles(tiling, count)
        return least, best

    def wants(self, begin: int, end: int) -> int:
        """The least that autodiff wants of a piece at once."""
        return self.best(begin, end)[0]

    def fewest(self, begin: int, end: int, room: int) -> Tiles | None:
        """As few slices as bring what autodiff wants of a piece into `room`; None where it is so anyway, or cannot be."""
        found = self.best(begin, end)[1]
        if found is None or sum(self.wanted[begin:end]) <= room:
            return None
        fits = (count for count in range(2, found.count) if self.bytes(found.tiling, count) <= room)
        count = _rounded(next(fits, found.count), found.tiling.size, found.count)
        return Tiles(self._with_conversions(found.tiling, self.tilings.outputs(begin, end)), count)

    def bytes(self, tiling: Tiling, count: int) -> int:
        """What autodiff wants of a piece at once, in `count` slices: the whole values, one slice, and what enters it."""
        whole = sum(self.wanted[i] for i in tiling.before)
        entering = sum(jx.nbytes(place.of(self.jaxpr).aval) for place, _ in tiling.entering)  # as a stack of slices
        return whole + entering + math.ceil(sum(self.wanted[i] for i in tiling.inside) / count)

    def _most(self, tiling: Tiling) -> int:
        """The slices that are worth trying; a number that divides the axis, where there is one that is not much smaller."""
        large = max(self.tilings.entries[i] for i in tiling.inside) // LEAST_ENTRIES
        most = min(tiling.size, min(MOST, large) if self.given_most is None else self.given_most)
        return max((n for n in range(most // 2 + 1, most + 1) if tiling.size % n == 0), default=most)

    def _with_conversions(self, tiling: Tiling, out: Sequence[Any]) -> Tiling:
        """With conversions to fewer bits in the loop, where only the loop uses the result, and all of it."""
        before, inside = list(tiling.before), dict(tiling.inside)
        sliced = {place.of(self.jaxpr) for place, _ in tiling.entering}
        for i in tiling.before[::-1]:
            (var, *more), rest = self.jaxpr.eqns[i].outvars, [k for k in before if k != i]
            is_used = var in out or var in sliced or any(var in self.tilings.variables[k] for k in rest)
            if not more and not is_used and _narrows(self.jaxpr.eqns[i]):
                before.remove(i)
                inside[i] = None
        return self.tilings.made_of(tiling.axes, tiling.size, before, dict(sorted(inside.items())))


def _rounded(count: int, size: int, most: int) -> int:
    """The next number of slices that divides `size`, where there is one near; else there is one shorter slice more."""
    divisors = [n for n in range(count, min(most, 2 * count) + 1) if size % n == 0]
    return min(divisors, default=count)


def _narrows(eqn: Any) -> bool:
    if eqn.primitive.name != "convert_element_type" or isinstance(eqn.invars[0], core.Literal):
        return False
    given, made = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return jnp.issubdtype(given, jnp.floating) and jnp.issubdtype(made, jnp.floating) and made.itemsize < given.itemsize


def entries(size: int, count: int) -> tuple[int, int, int]:
    """Entries of a slice, number of such slices, and entries of a shorter last one (or 0): `count` slices at most."""
    each = -(-size // count)
    return each, size // each, size % each
