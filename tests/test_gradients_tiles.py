"""Values and gradients of every model in slices equal the plain loop over its blocks.

The full product of model, policy, engine, slices, other knobs and dropout is behind `-m full`; every run covers all pairs of
a part of it.
"""

import itertools
import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from tests.support import relative_error, slice_small_values
from tests.test_gradients_models import MODELS, pairwise_cover, quick_jit, reference, value_and_gradients

POLICIES = ["nothing", "everything", "dots", "cheap", "budget:0.4", "save:{}", "except:{}", "save:{}+dots_no_batch"]
OTHERS = [{}, {"blocks_per_ckpt": 2}, {"blocks_per_ckpt": 4}, {"snapshots": 2}, {"offload_carry": True}]


class Case(NamedTuple):
    model: str
    policy: str
    engine: str
    tiles: int | str
    other: int
    dropout: bool

    @property
    def knobs(self):
        knobs = dict(policy=self.policy.format(MODELS[self.model].tags[0]), engine=self.engine, tiles=self.tiles)
        return knobs | OTHERS[self.other]

    @property
    def is_allowed(self):
        other = OTHERS[self.other]
        if "snapshots" in other:
            return self.engine == "reversal" and self.policy == "nothing"
        return "offload_carry" not in other or self.policy == "nothing"


def pairs(case):
    return frozenset(itertools.combinations(enumerate(case), 2))


FULL = [
    case
    for parts in itertools.product(MODELS, POLICIES, ("scan", "reversal"), (2, 5, "auto"), range(len(OTHERS)), (False, True))
    if (case := Case(*parts)).is_allowed
]


def is_short(case):
    """Pair models take ten seconds of compiling each: in every run they are sliced under few settings."""
    if "transformer" in case.model:
        return case.policy in ("nothing", "dots", "cheap", "save:{}")
    return case.policy in ("nothing", "save:{}") and case.other in (0, 3)


SHORT = list(filter(is_short, FULL))
COVER = sorted(pairwise_cover(SHORT, pairs), key=lambda case: (list(MODELS).index(case.model), case.dropout))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """The models here are too small for slices that keep a GPU busy."""
    slice_small_values(monkeypatch)


def check(case):
    with jax.enable_x64(True):
        args, run_stack, want = reference(case.model, case.dropout, "float64")
        with warnings.catch_warnings():
            if not (case.policy == "nothing" and case.tiles == 5):  # in a few of these tiny blocks no slices are worth it
                warnings.filterwarnings("ignore", message=".*found nothing to slice")
            got = quick_jit(partial(value_and_gradients, partial(run_stack, case.knobs)))(args)
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}
        assert relative_error(got, want) < 1e-12


def name_of(case):
    return " ".join(map(str, (case.model, *case.knobs.items()))) + " dropout" * case.dropout


@pytest.mark.parametrize("case", COVER, ids=name_of)
def test_equals_the_plain_loop(case):
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", sorted(set(FULL) - set(COVER), key=FULL.index), ids=name_of)
def test_equals_the_plain_loop_in_full(case):
    check(case)
