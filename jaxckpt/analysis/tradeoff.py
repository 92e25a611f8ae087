"""What a block can keep for its backward pass and what that saves: bytes against seconds, from one trace of the block.

Every value of the block is tagged, and autodiff of the tagged block says which values the backward pass wants and how each
is computed from others: the graph of `jaxckpt.analysis.mincut`. Tags survive autodiff, so that a set of them, kept by
`jax.checkpoint`'s own policies, is exactly the set that was chosen. What a derivative's rule computes beside the block's own
values has no tag and cannot be kept. What depends on parameters alone and is as large, such as a weight that is gathered
from all devices, is not to be kept: with every block's weights whole on every device nobody would have had to split them. A
norm of a weight may be kept.
"""

import functools
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jax.extend import core

from jaxckpt._recent import Recent
from jaxckpt.analysis import flow, inlining, tagging
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import cost, is_dear
from jaxckpt.analysis.mincut import Cut, Graph, again_for, front, hull, least_bytes


@dataclass(frozen=True)
class Choice:
    """A set of values to keep.

    Fields:
        names: their tags, in the order in which the block computes them.
        bytes: of one block, beside its inputs.
        rerun_seconds: what one block's backward pass computes again, by the time model.
        largest_bytes: what autodiff wants of the largest part that is computed again in one go: kept values part what is
            run again into pieces that need not be alive at once.
    """

    names: tuple[str, ...]
    bytes: int
    rerun_seconds: float
    largest_bytes: int


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """Of one block, beside its inputs.

    Fields:
        forward_seconds: of one run.
    """

    graph: Graph
    names: tuple[str, ...]  # of each value; "" where it has no tag
    dear: tuple[bool, ...]  # of each equation
    wanted: dict[int, int]  # the values that are wanted, each once whatever its tags, with their bytes
    forward_seconds: float

    @property
    def wanted_bytes(self) -> int:
        """All that autodiff keeps where nothing is run again."""
        return sum(self.wanted.values())

    @functools.cached_property
    def corners(self) -> tuple[Choice, ...]:
        """Those of the convex hull, from keeping nothing to the fewest seconds."""
        return tuple(map(self._choice, hull(self.graph)))

    @functools.cached_property
    def choices(self) -> tuple[Choice, ...]:
        """All that are worth choosing, corners among them: each more bytes and fewer seconds than the one before."""
        return tuple(map(self._choice, front(self.graph)))

    @functools.cached_property
    def cheap(self) -> Choice:
        """The fewest bytes under which nothing dear is run again."""
        return self._choice(least_bytes(self.graph, self.dear))

    @functools.cached_property
    def floor_seconds(self) -> float:
        """What derivatives compute beside the block's own values: it is run under any setting, also where all is kept."""
        return self._seconds({v for v, name in enumerate(self.names) if name})

    def again_seconds(self, kept: Container[int]) -> float:
        """What one block's backward pass runs again of the block, where the values of these equations are kept.

        The one definition of it: without `floor_seconds`.
        """
        values = {v for v, name in enumerate(self.names) if name and tagging.equation_of(name) in kept}
        return max(0.0, self._seconds(values) - self.floor_seconds)

    def _seconds(self, kept: Collection[int]) -> float:
        return sum(self.graph.seconds[e] for e in sorted(again_for(self.graph, frozenset(kept))))

    def within(self, budget: int) -> Choice:
        """The choice of the fewest seconds within so many bytes."""
        return [choice for choice in self.choices if choice.bytes <= budget][-1]

    def _choice(self, cut: Cut) -> Choice:
        names = tuple(self.names[v] for v in sorted(cut.kept) if self.names[v])
        return Choice(names, cut.bytes, cut.seconds, self._largest(cut))

    def _largest(self, cut: Cut) -> int:
        """The bytes wanted of the largest part of what is run again that hangs together by values that are not kept."""
        part = {e: e for e in cut.again}

        def root(e: int) -> int:
            while part[e] != e:
                part[e] = part[part[e]]
                e = part[e]
            return e

        for e in cut.again:
            for v in self.graph.needs[e]:
                if v not in cut.kept and (maker := self.graph.made_by[v]) in part:
                    part[root(maker)] = root(e)
        sizes: dict[int, int] = {}
        for v, size in self.wanted.items():
            if (maker := self.graph.made_by[v]) in part:
                sizes[root(maker)] = sizes.get(root(maker), 0) + size
        return max(sizes.values(), default=0)


_recent: Recent[Tradeoff] = Recent()


def tradeoff_of(closed: Any, rates: Any, parameters: Sequence[int]) -> Tradeoff:
    """The trade of a block.

    Arguments:
        closed: its inlined jaxpr; equal ones are looked at once.
        rates: see `jaxckpt.analysis.cost`.
        parameters: which of its inputs are.
    """
    question = jx.text(closed), str(rates), tuple(parameters), _fixed(closed)
    return _recent.of(question, lambda: _tradeoff(closed, rates, parameters))


def _tradeoff(closed: Any, rates: Any, parameters: Sequence[int]) -> Tradeoff:
    tagged = jx.as_function(tagging.with_tags(closed))
    forward = lambda *inputs: jax.tree.leaves(jx.vjp_of_inexact(tagged, inputs)[1])  # noqa: E731
    whole = inlining.inlined(jx.trace(forward, *closed.in_avals))
    traced = whole.jaxpr
    there = {*traced.invars, *traced.constvars}
    of_parameters = _like_parameters(traced, parameters, _fixed(whole))
    value: dict[Any, int] = {}
    sizes: list[int | None] = []
    made_by, names, needs, base = [], [], [], []
    for e, eqn in enumerate(traced.eqns):
        needs.append(_values(eqn.invars, value))
        tag = tagging.tag_of(eqn)
        is_ours = tag is not None and tagging.is_value_name(tag)
        for var in eqn.outvars:
            value[var] = len(sizes)
            # What a tag passes on is one value with it.
            base.append(base[needs[e][0]] if tag is not None and needs[e] else len(sizes))
            sizes.append(jx.nbytes(var.aval) if is_ours and var not in of_parameters else None)
            names.append(tag if is_ours else "")
            made_by.append(e)
    wanted = _values([var for var in traced.outvars if isinstance(var, core.Literal) or var not in there], value)
    by_base = {base[v]: var for var, v in value.items() if v in set(wanted)}
    return Tradeoff(
        graph=Graph(sizes, made_by, [cost(eqn, rates).seconds for eqn in traced.eqns], needs, wanted),
        names=tuple(names),
        dear=tuple(map(is_dear, traced.eqns)),
        forward_seconds=sum(cost(eqn, rates).seconds for eqn in closed.jaxpr.eqns),
        wanted={value[var]: jx.nbytes(var.aval) for var in by_base.values()},
    )


def _fixed(closed: Any) -> tuple[int, ...]:
    """Which constants are the same in every run."""
    return tuple(i for i, value in enumerate(closed.consts) if not isinstance(value, Tracer))


def _like_parameters(jaxpr: Any, parameters: Sequence[int], fixed: Sequence[int]) -> set[Any]:
    """The variables that depend on parameters alone, and have no fewer numbers than the smallest of them."""
    found = flow.dependent_alone(jaxpr, parameters, fixed)
    least = lambda own: min(jaxpr.invars[i].aval.size for i in own)  # noqa: E731
    return {var for var, own in found.items() if getattr(var.aval, "size", 0) >= least(own)}


def _values(vars: Any, value: dict[Any, int]) -> list[int]:
    """The numbers of those that are computed in the block."""
    return list(dict.fromkeys(value[var] for var in jx.variables(vars) if var in value))
