"""Minimum cuts against all sets of values that could be kept, on small random graphs."""

import itertools
import random

import pytest

from jaxckpt.analysis.mincut import Graph, front, hull, least_bytes, nothing_kept


def random_graph(seed):
    """Up to seven equations of one or two values each, one of four of which cannot be kept."""
    rng = random.Random(seed)
    made_by, needs = [], []
    for e in range(rng.randint(2, 7)):
        needs.append(rng.sample(range(len(made_by)), min(len(made_by), rng.randint(0, 3))))
        made_by += [e] * rng.choice([1, 1, 1, 1, 2])
    sizes = [None if rng.random() < 0.25 else rng.randint(0, 40) for _ in made_by]
    seconds = [rng.choice([0, rng.randint(1, 30), rng.random()]) for _ in needs]
    return Graph(sizes, made_by, seconds, needs, rng.sample(range(len(made_by)), rng.randint(1, min(4, len(made_by)))))


def all_cuts(graph):
    """Bytes, seconds and the equations that are run again, for each set of values that could be kept."""
    keepable = [v for v, size in enumerate(graph.sizes) if size is not None]
    for count in range(len(keepable) + 1):
        for kept in itertools.combinations(keepable, count):
            again = needed(graph, kept)
            yield sum(graph.sizes[v] for v in kept), sum(graph.seconds[e] for e in again), again


def needed(graph, kept):
    again, left = set(), list(graph.wanted)
    while left:
        v = left.pop()
        if v not in kept:
            again.add(graph.made_by[v])
            left += graph.needs[graph.made_by[v]]
    return again


def corners(points):
    """Of the lower convex hull, by bytes, from the fewest bytes to the fewest seconds."""
    at = min(points)
    found = [at]
    while right := [p for p in points if p[0] > at[0] and p[1] < at[1] - 1e-12]:
        steepest = max((at[1] - p[1]) / (p[0] - at[0]) for p in right)
        at = max(p for p in right if (at[1] - p[1]) / (p[0] - at[0]) > steepest * (1 - 1e-9))
        found.append(at)
    return found


@pytest.mark.parametrize("seeds", [range(k, k + 50) for k in range(0, 300, 50)], ids=str)
def test_hull_is_that_of_all_sets(seeds):
    for seed in seeds:
        graph = random_graph(seed)
        want = corners([(b, s) for b, s, _ in all_cuts(graph)])
        got = hull(graph)
        # Values of no bytes are free to keep: the first corner may lie left of "nothing kept", straight above it or under.
        assert [(c.bytes, pytest.approx(c.seconds)) for c in got] == want, seed
        assert all(needed(graph, c.kept) == c.again for c in got), seed


def test_fewest_bytes_without_dear_equations():
    for seed in range(100):
        graph = random_graph(seed)
        rng = random.Random(-seed)
        dear = [rng.random() < 0.4 for _ in graph.needs]
        want = min((sum(dear[e] for e in again), b) for b, _, again in all_cuts(graph))
        got = least_bytes(graph, dear)
        assert (sum(dear[e] for e in got.again), got.bytes) == want, seed
        assert needed(graph, got.kept) == got.again, seed


def test_front_lies_between_the_hull_and_the_best_there_is():
    worse = []
    for seed in range(150):
        graph = random_graph(seed)
        sets, corners, found = list(all_cuts(graph)), hull(graph), front(graph)
        assert all(a.bytes < b.bytes and a.seconds > b.seconds for a, b in itertools.pairwise(found)), seed
        assert all(needed(graph, c.kept) == c.again for c in found), seed
        for budget in (0, 10, 30, 60, 100):
            least = min(s for b, s, _ in sets if b <= budget)
            got = [c.seconds for c in found if c.bytes <= budget][-1]
            assert least <= got + 1e-9, seed
            assert got <= [c.seconds for c in corners if c.bytes <= budget][-1] + 1e-9, seed
            worse.append(got > least + 0.001 * nothing_kept(graph).seconds)
    assert sum(worse) < 0.2 * len(worse)  # a knapsack, so not always the least


def test_front_has_more_than_the_hull():
    """Three equal values of which the hull has all or none, since together they spare an equation."""
    graph = Graph([8, 8, 8], [0, 0, 1], [4.0, 4.5], [[], []], [0, 1, 2])
    assert [c.bytes for c in front(graph)] == [0, 8, 24]


def test_a_graph_that_wants_nothing():
    assert [(c.bytes, c.seconds) for c in hull(Graph([4], [0], [1.0], [[]], []))] == [(0, 0)]
