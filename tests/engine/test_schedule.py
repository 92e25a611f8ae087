import functools

import pytest

from jaxckpt.engine.schedule import least_advances, repetitions, reversal_schedule


@functools.cache
def fewest(length, free):
    """By trying every split; the input of the first step is stored, `free` other slots are not in use."""
    if length == 1 or free == 0:
        return length * (length - 1) // 2
    return min(j + fewest(length - j, free - 1) + fewest(j, free) for j in range(1, length))


CASES = [(length, snapshots) for length in range(1, 65) for snapshots in range(1, length + 1)]


def test_the_closed_form_is_the_least_of_all_splits():
    for length, snapshots in CASES:
        assert least_advances(length, snapshots) == fewest(length, snapshots - 1), (length, snapshots)


def test_schedules_take_the_fewest_advances():
    for length, snapshots in CASES:
        schedule = reversal_schedule(length, snapshots)
        assert schedule.advances == sum(schedule.runs()) == least_advances(length, snapshots), (length, snapshots)
        assert max(schedule.runs()) == repetitions(length, snapshots)


def test_a_schedule_can_be_executed():
    """Every reversal starts from a snapshot that is there, of the step it says, in a slot that exists."""
    for length, snapshots in CASES:
        held = {0: 0}
        steps = []
        for r in reversal_schedule(length, snapshots).reversals:
            assert held[r.slot] == r.start <= r.step
            for step, slot in r.stores:
                assert r.start < step < r.step and 0 < slot < snapshots
                held[slot] = step
            steps.append(r.step)
        assert steps == list(range(length))[::-1]


@pytest.mark.parametrize("snapshots", [1, 2, 3, 17, 64, 2000, 4096])
def test_long_stacks(snapshots):
    schedule = reversal_schedule(4096, snapshots)
    assert schedule.advances == least_advances(4096, snapshots)


def test_one_snapshot_for_each_step_advances_once():
    assert reversal_schedule(7, 7).runs() == [1, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("snapshots", [0, -1, 9])
def test_a_number_of_snapshots_that_cannot_be(snapshots):
    with pytest.raises(ValueError, match=f"snapshots must be between 1 and the number of steps, 8; got {snapshots}"):
        reversal_schedule(8, snapshots)


def test_describe_draws_what_happens():
    lines = reversal_schedule(6, 3).describe().splitlines()
    assert lines[0] == f"6 steps, 3 snapshots: {least_advances(6, 3)} advances"
    assert [line.index("<") for line in lines[1:]] == [5, 4, 3, 2, 1, 0]
