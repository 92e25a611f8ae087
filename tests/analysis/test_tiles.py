"""What is sliced of a piece, what is computed before the loop, and in how many slices."""

import jax
import jax.numpy as jnp
import pytest

from jaxckpt.analysis import inlining, numbering
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.tiles import Tiler, Tilings, entries
from tests.support import slice_small_values

N, D = 12, 4


def attention(w, x):
    q, k, v = (x @ w[i] for i in range(3))
    return jax.nn.softmax(q @ k.T) @ v


def traced(fn, *shapes, dtype="float32"):
    return inlining.merged(inlining.inlined(jx.trace(lambda *args: [fn(*args)], *[jnp.zeros(s, dtype) for s in shapes])))


def tiler_of(flat, most=None):
    return Tiler(Tilings(flat.jaxpr, numbering.residual_bytes(flat)), most)


def made_by(flat, numbers):
    """The primitives of equations, with the shapes of what they make."""
    return {(flat.jaxpr.eqns[i].primitive.name, flat.jaxpr.eqns[i].outvars[0].aval.shape) for i in numbers}


def test_attention_needs_keys_and_values_whole():
    flat = traced(attention, (3, D, D), (N, D))
    found = tiler_of(flat, 3)
    _, best = found.best(0, len(flat.jaxpr.eqns))
    assert best is not None and best.count == 3 and best.tiling.axes == (0,) and best.tiling.size == N
    before = made_by(flat, best.tiling.before)
    assert ("dot_general", (N, D)) in before and not any(shape == (N, N) for _, shape in before)
    assert ("exp", (N, N)) in made_by(flat, best.tiling.inside)
    assert not set(best.tiling.before) & set(best.tiling.inside)


def test_a_slice_is_wanted_and_not_the_whole():
    flat = traced(attention, (3, D, D), (N, D))
    found = tiler_of(flat, N)
    end = len(flat.jaxpr.eqns)
    whole, (least, best) = sum(found.wanted), found.best(0, end)
    assert best is not None and least < whole / 2
    assert [found.bytes(best.tiling, n) for n in (1, 2, 4)] == sorted(found.bytes(best.tiling, n) for n in (1, 2, 4))[::-1]


def test_as_few_slices_as_will_do():
    flat = traced(attention, (3, D, D), (N, D))
    found = tiler_of(flat, N)
    end = len(flat.jaxpr.eqns)
    tiling = found.best(0, end)[1].tiling
    assert found.fewest(0, end, sum(found.wanted)) is None  # it fits as it is
    for count in (2, 3, 6):
        assert found.fewest(0, end, found.bytes(tiling, count)).count == count
    assert found.fewest(0, end, 0).count == N  # the most, where none will do


@pytest.mark.parametrize("least, count", [(1, N), (N * N // 4, 4), (N * N // 2, 2), (N * N, None)])
def test_slices_keep_a_gpu_busy(monkeypatch, least, count):
    slice_small_values(monkeypatch, least)
    flat = traced(attention, (3, D, D), (N, D))
    best = tiler_of(flat).best(0, len(flat.jaxpr.eqns))[1]
    assert (best and best.count) == count


def test_what_is_asked_for_along_two_axes_is_whole():
    def fn(x):
        y = jnp.sin(x)
        return jnp.cos(y) + jnp.cos(y.T)

    flat = traced(fn, (N, N))
    tiling = tiler_of(flat).tilings.tiling(0, len(flat.jaxpr.eqns), (0,), N)
    assert made_by(flat, tiling.before) == {("sin", (N, N))}
    assert {axis for _, axis in tiling.entering} == {0, 1}


def test_what_stays_whole_is_before_the_loop():
    flat = traced(lambda x: jnp.cos(jnp.sin(x)), (N, D))
    found = Tilings(flat.jaxpr, numbering.residual_bytes(flat), stays_whole={0})
    assert found.tiling(0, 2, (0,), N).before == (0,)
    assert Tilings(flat.jaxpr, found.wanted, stays_whole={1}).tiling(0, 2, (0,), N) is None  # what is asked for itself


def test_conversions_to_fewer_bits_are_made_in_the_loop():
    def head(w, x):
        return jnp.sin(x @ w.astype("bfloat16")).astype("float32").sum(-1)

    flat = traced(lambda w, x: head(w, x.astype("bfloat16")), (D, 64), (N, D))
    best = tiler_of(flat, 3).fewest(0, len(flat.jaxpr.eqns), 0)
    narrowed = [i for i, found in best.tiling.inside.items() if found is None]
    assert made_by(flat, narrowed) == {("convert_element_type", (D, 64))}
    (weights,) = best.tiling.shared
    assert weights.of(flat.jaxpr) is flat.jaxpr.invars[0]


def test_places_are_those_of_equal_programs():
    first, second = (traced(attention, (3, D, D), (N, D)) for _ in range(2))
    tiling = tiler_of(first, 3).best(0, len(first.jaxpr.eqns))[1].tiling
    for place, _ in tiling.entering:
        assert place.of(second.jaxpr).aval == place.of(first.jaxpr).aval
        assert place.of(second.jaxpr) is not place.of(first.jaxpr)


@pytest.mark.parametrize(
    "size, count, found", [(12, 3, (4, 3, 0)), (12, 5, (3, 4, 0)), (7, 5, (2, 3, 1)), (7, 2, (4, 1, 3))]
)
def test_entries_of_slices(size, count, found):
    assert entries(size, count) == found
    each, whole, rest = found
    assert each * whole + rest == size and rest < each and whole + bool(rest) <= count
