"""Random blocks under random settings: values and gradients equal those of a Python loop, in float64.

A case is drawn from its seed, which a failure prints: `python -c "from tests.fuzz import draw_case; print(draw_case(17))"`.
"""

import re
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from tests.fuzz import Case, draw_case, loop_of, outcome, stack_of
from tests.support import QUICK

IN_EVERY_RUN, IN_FULL, TOGETHER = 50, 2000, 50

# Why a case may be refused, as our errors say it: nothing that is drawn is.
REFUSED: tuple[str, ...] = ()

# What a setting may be warned of.
WARNED = ("found nothing to cut; the block stays whole", "is reversed from its input, and policy=")


def ran(fn: Any, case: Case) -> Any:
    run, leaves = outcome(fn, case)
    return jax.device_get(jax.jit(run, compiler_options=QUICK)(leaves))


def difference(got: Any, want: Any) -> float:
    """The largest, relative to the largest number of what is wanted."""
    pairs = [(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True) if w.size]
    assert all(g.dtype == w.dtype and g.shape == w.shape for g, w in pairs)
    return np.max([np.abs(g - w).max() for g, w in pairs]) / np.max([np.abs(w).max() for _, w in pairs])


def wrong_with(seed: int) -> str | None:
    """What is wrong with the case of a seed, in words."""
    case = draw_case(seed)
    want = ran(loop_of(case), case)
    try:
        with warnings.catch_warnings():
            for said in WARNED:
                warnings.filterwarnings("ignore", f".*{re.escape(said)}")
            got = ran(stack_of(case), case)
    except Exception as error:
        return None if any(said in str(error) for said in REFUSED) else f"{type(error).__name__}: {error}\n{case}"
    if any((g != w).any() for g, w in zip(got[2], want[2], strict=True)):
        return f"integers or keys differ\n{case}"
    found = difference(got[:2], want[:2])
    return None if found < 1e-12 else f"differs by {found:.1e}\n{case}"


@pytest.mark.parametrize("seed", range(IN_EVERY_RUN))
def test_a_random_stack_equals_the_loop(seed, x64):
    assert (wrong := wrong_with(seed)) is None, wrong


@pytest.mark.full
@pytest.mark.parametrize("first", range(IN_EVERY_RUN, IN_EVERY_RUN + IN_FULL, TOGETHER))
def test_many_random_stacks_equal_the_loop(first, x64):
    wrong = [found for seed in range(first, first + TOGETHER) if (found := wrong_with(seed))]
    jax.clear_caches()
    assert not wrong, "\n\n".join(wrong)
