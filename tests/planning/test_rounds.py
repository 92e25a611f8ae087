"""The order in which settings are compiled, against compilers that are made up: no model is right about them."""

import math
import random

import pytest

from jaxckpt._plan import Knobs
from jaxckpt.planning.model import Asked, Option
from jaxckpt.planning.peaks import Combination, Known, Peaks, kind
from jaxckpt.planning.rounds import COMPILATIONS, fastest, least, untried

FIXED = 1000


class MadeUp:
    """Peaks and blocks drawn at random about what the model says; the worse the model, the wider."""

    def __init__(self, seed, combinations, error, refused=(), bias=0.1):
        draw = random.Random(seed)
        model = Peaks(FIXED, Known()).predicted
        self.peaks = {c: round(model(c) * math.exp(draw.gauss(bias, error))) for c in combinations}
        self.blocks = {
            o.of_block: Asked(o.kept_bytes, round(draw.uniform(0.2, 1.2) * o.block_bytes))
            for (o,) in (c.options for c in combinations)
        }
        self.never, self.refused, self.compiled = set(refused), set(), []

    def peak(self, c, predicted):
        if kind(c) in self.never:
            self.refused.add(kind(c))
            return math.inf
        self.compiled.append(c)
        return self.peaks[c]

    def block(self, i, option):
        return self.blocks[option.of_block]

    def blocks_of(self, combinations):
        return {(0, o.of_block): self.blocks[o.of_block] for (o,) in (c.options for c in combinations)}


def combinations_of(seed, number=60):
    """Settings of one stack that need less memory the slower they are, as a rule."""
    draw = random.Random(seed)
    made = []
    for i in range(number):
        stored = round(100_000 * math.exp(-4 * i / number) * draw.uniform(0.7, 1.3))
        stages, chunk = draw.choice([None, "auto"]), draw.choice([None, None, 2, 4])
        knobs = Knobs(chunk, "planned", (f"value{i}",), stages=stages, engine="reversal" if chunk else "scan")
        made.append(Combination((Option(knobs, stored, stored // 10, 1, 4000 + i, 1 + i / number, 1 + i / number),)))
    return made


@pytest.mark.parametrize("error", [0.0, 0.03, 0.3, 1.0])
def test_more_memory_is_never_slower_and_nothing_is_compiled_beyond_the_number(error):
    for seed in range(8):
        combinations = combinations_of(seed)
        number = 1 + (5 * seed) % 12
        found = []
        for limit in sorted(random.Random(seed).uniform(3_000, 150_000) for _ in range(10)):
            compiler = MadeUp(seed, combinations, error)
            best = fastest(limit, combinations, FIXED, compiler, number)
            found.append(math.inf if best is None else best.seconds)
            assert best is None or compiler.peaks[best] <= limit
            assert len(compiler.compiled) == len(set(compiler.compiled)) <= number
        assert found == sorted(found, reverse=True)


def test_more_memory_is_never_slower_near_the_least():
    """Where much is compiled in vain."""
    for seed in range(8):
        combinations = combinations_of(seed, 300)
        least_peak = min(MadeUp(seed, combinations, 0.1, bias=0.3).peaks.values())
        found = []
        for limit in sorted(least_peak * (1 + i / 20) for i in range(10)):
            best = fastest(limit, combinations, FIXED, MadeUp(seed, combinations, 0.1, bias=0.3), COMPILATIONS)
            found.append(math.inf if best is None else best.seconds)
        assert found == sorted(found, reverse=True)


def test_a_good_model_needs_few_compilations():
    for seed in range(8):
        combinations = combinations_of(seed)
        for limit in (8_000, 30_000, 90_000):
            compiler = MadeUp(seed, combinations, 0.02)
            best = fastest(limit, combinations, FIXED, compiler, 8)
            assert best is not None and len(compiler.compiled) <= 6
            within = min(c.seconds for c in combinations if compiler.peaks[c] <= limit)
            assert best.seconds <= 1.15 * within


def test_nothing_more_is_compiled_where_the_limit_is_nearly_used_up():
    """And what is left then is not said to be left untried."""
    ended = 0
    for seed in range(40):
        combinations = combinations_of(seed, 300)
        limit = random.Random(seed).uniform(8_000, 90_000)
        compiler = MadeUp(seed, combinations, 0.0)
        best = fastest(limit, combinations, FIXED, compiler, 64)
        assert best is not None
        if compiler.peaks[best] < 0.97 * limit or compiler.compiled[-1] != best:
            continue
        ended += 1
        known = Known({c: compiler.peaks[c] for c in compiler.compiled}, compiler.blocks_of(compiler.compiled))
        left = untried(limit, combinations, best, Peaks(FIXED, known))
        assert all(c.seconds < 0.99 * best.seconds for c in left)
    assert ended > 5


def test_more_compilations_find_no_less():
    for seed in range(5):
        combinations = combinations_of(seed, 100)
        for limit in (8_000, 30_000, 90_000):
            made = [fastest(limit, combinations, FIXED, MadeUp(seed, combinations, 0.05), n) for n in (4, 64)]
            assert made[1] is not None and (made[0] is None or made[1].seconds <= 1.02 * made[0].seconds)


def test_what_cannot_be_run_is_left_out():
    combinations = combinations_of(0)
    refused = {kind(c) for c in combinations if c.options[0].knobs.engine == "reversal"}
    compiler = MadeUp(0, combinations, 0.05, refused)
    best = fastest(20_000, combinations, FIXED, compiler, 8)
    assert best is not None and kind(best) not in refused
    assert kind(least(combinations, FIXED, compiler, 8, Known())) not in refused


def test_the_least_is_nearly_the_least():
    for seed in range(8):
        combinations = combinations_of(seed)
        compiler = MadeUp(seed, combinations, 0.02)
        assert compiler.peaks[least(combinations, FIXED, compiler, 8, Known())] <= 1.25 * min(compiler.peaks.values())
        assert len(compiler.compiled) <= 8


def test_what_was_left_untried_is_said():
    combinations = combinations_of(3, 200)
    compiler = MadeUp(3, combinations, 0.0)
    best = fastest(30_000, combinations, FIXED, compiler, 1)
    assert best is not None and len(compiler.compiled) == 1
    left = untried(30_000, combinations, best, Peaks(FIXED, Known({best: compiler.peaks[best]})))
    assert left and all(c.seconds < best.seconds for c in left)
    assert left == sorted(left, key=lambda c: c.seconds)
