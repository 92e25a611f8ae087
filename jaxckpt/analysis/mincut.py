"""What to keep of a block's values and what to compute again: minimum cuts of a graph of values and equations.

Whoever keeps a set of values pays for its bytes; what the backward pass wants and is not kept is computed again, from what
is kept and from the block's inputs, which are there anyway. For a price per byte, the set of least `seconds + price * bytes`
is a minimum cut (Picard, "Maximal closure of a graph", 1976): the source leads to what is wanted; from each value an edge of
capacity `price * bytes` leads to the equation that makes it (cut: the value is kept); from each equation an edge of capacity
`seconds` leads to the sink (cut: the equation is run again) and edges that are never cut lead to the values it needs.

The cuts for all prices are the corners of the lower convex hull of (bytes, seconds). They are found without a grid of
prices: the price at which two known corners are worth the same either gives a better cut between them, or there is none
(Eisner and Severance, "Mathematical techniques for efficient record segmentation", 1976). Maximum flows are SciPy's, whose
capacities have 31 bits: sums are rounded to a billionth.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_WHOLE = 2**29  # what all capacities that can be cut on the way to the sink add up to
_NEVER = 2**30  # the capacity of an edge that is not cut; twice that is still no overflow
_SLACK = 1e-9  # by how much of its worth a cut must be better than others to count


class Graph(NamedTuple):
    """Values and equations, both by number.

    Fields:
        sizes: bytes of each value; None where it cannot be kept.
        made_by: of each value, the equation.
        seconds: of each equation.
        needs: of each equation, the values that it is computed from, without those that are there anyway.
        wanted: the values that the backward pass wants.
    """

    sizes: Sequence[int | None]
    made_by: Sequence[int]
    seconds: Sequence[float]
    needs: Sequence[Sequence[int]]
    wanted: Sequence[int]


class Cut(NamedTuple):
    """A set of values to keep.

    Fields:
        kept: the values, and bytes their size.
        again: the equations that are run again for what is wanted, and seconds their cost.
    """

    kept: frozenset[int]
    again: frozenset[int]
    bytes: int
    seconds: float


def hull(graph: Graph) -> list[Cut]:
    """The corners of the lower convex hull of (bytes, seconds), from keeping nothing to running the least again."""
    corners = [nothing_kept(graph), _cut(graph, [0.0] * len(graph.sizes), graph.seconds)]
    i = 0
    while i < len(corners) - 1:
        a, b = corners[i : i + 2]
        if a.seconds > b.seconds and b.bytes > a.bytes:
            price = (a.seconds - b.seconds) / (b.bytes - a.bytes)
            found = _cut(graph, [price * (size or 0) for size in graph.sizes], graph.seconds)
            worth = a.seconds + price * a.bytes
            if found.seconds + price * found.bytes < worth * (1 - _SLACK):
                corners.insert(i + 1, found)
                continue
        i += 1
    return lower_hull(corners, lambda cut: (cut.bytes, cut.seconds))


def nothing_kept(graph: Graph) -> Cut:
    """The cut that keeps nothing."""
    return _priced(graph, frozenset(), again_for(graph, frozenset()))


def least_bytes(graph: Graph, dear: Sequence[bool]) -> Cut:
    """The fewest bytes under which no dear equation is run again, or as few of them as can be."""
    whole = sum(size or 0 for size in graph.sizes) or 1
    # One dear equation outweighs all bytes.
    prices = [(size or 0) / (2 * whole) for size in graph.sizes]
    return _cut(graph, prices, [float(yes) for yes in dear])


def front(graph: Graph, halvings: int = 8) -> list[Cut]:
    """Cuts of which none needs fewer bytes and fewer seconds than another, by bytes: the hull, and what is found between.

    The least seconds within a budget are a knapsack's problem. Here the last corner of the hull within the budget is taken,
    what it keeps is given away for nothing, and the same is done with what is left of the budget, as long as that saves a
    thousandth; for the bytes of the last corner, halved again and again.
    """
    corners = hull(graph)
    found = list(corners)
    for k in range(1, halvings + 1):
        found += _towards(graph, corners[-1].bytes >> k)
    best: list[Cut] = []
    for cut in sorted(found, key=lambda cut: (cut.bytes, cut.seconds)):
        if not best or cut.seconds < best[-1].seconds:
            best.append(cut)
    return best


def _towards(graph: Graph, budget: int) -> list[Cut]:
    """Cuts within a budget, each of fewer seconds than the one before."""
    found = [nothing_kept(graph)]
    while True:
        kept = found[-1].kept
        left = budget - found[-1].bytes
        sizes = [0 if v in kept else None if size is None or size > left else size for v, size in enumerate(graph.sizes)]
        corner = [cut for cut in hull(graph._replace(sizes=sizes)) if cut.bytes <= left][-1]
        cut = _priced(graph, corner.kept, corner.again)
        if cut.seconds >= found[-1].seconds * 0.999:
            return found
        found.append(cut)


def _cut(graph: Graph, prices: Sequence[float], costs: Sequence[float]) -> Cut:
    """The minimum cut; of several the one that runs least again."""
    values, equations = len(graph.sizes), len(graph.seconds)
    source, sink, equation = values + equations, values + equations + 1, values
    scale = _WHOLE / (sum(costs) or 1.0)

    edges = [(source, v, _NEVER) for v in dict.fromkeys(graph.wanted)]
    for v, size in enumerate(graph.sizes):
        capacity = _NEVER if size is None else min(round(scale * prices[v]), _NEVER)
        edges.append((v, equation + graph.made_by[v], capacity))
    for e in range(equations):
        edges.append((equation + e, sink, round(scale * costs[e])))
        edges += [(equation + e, v, _NEVER) for v in dict.fromkeys(graph.needs[e])]
    begin, end, capacity = np.array(edges, np.int32).reshape(-1, 3).T
    network = coo_array((capacity, (begin, end)), shape=(sink + 1, sink + 1)).tocsr()
    left = network - maximum_flow(network, source, sink).flow
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, source, return_predecessors=False).tolist())

    again = frozenset(e for e in range(equations) if equation + e in reached)
    kept = frozenset(v for v in range(values) if v in reached and graph.made_by[v] not in again)
    return _priced(graph, kept, again)


def _priced(graph: Graph, kept: frozenset[int], again: frozenset[int]) -> Cut:
    return Cut(kept, again, sum(graph.sizes[v] or 0 for v in kept), sum(graph.seconds[e] for e in sorted(again)))


def again_for(graph: Graph, kept: frozenset[int]) -> frozenset[int]:
    """What is run again for what is wanted, where these values are kept."""
    again: set[int] = set()
    left = list(graph.wanted)
    while left:
        v = left.pop()
        if v not in kept and (e := graph.made_by[v]) not in again:
            again.add(e)
            left += graph.needs[e]
    return frozenset(again)


def lower_hull(found: Iterable[Any], point: Callable[[Any], tuple[float, float]]) -> list[Any]:
    """Those that are corners of the lower convex hull, by their bytes; `point` is the bytes and seconds of one."""
    corners: list[Any] = []
    for one in sorted(found, key=point):
        if corners and point(one)[1] >= point(corners[-1])[1]:
            continue
        while len(corners) > 1 and _is_above(point(corners[-1]), point(corners[-2]), point(one)):
            corners.pop()
        corners.append(one)
    return corners


def _is_above(point: tuple[float, float], a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether it lies on or above the line from `a` to `b`, as good as."""
    line = (a[1] - point[1]) * (b[0] - a[0]) - (a[1] - b[1]) * (point[0] - a[0])
    return line <= _SLACK * a[1] * (b[0] - a[0])
