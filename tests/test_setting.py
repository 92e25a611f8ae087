"""The knobs: their defaults, what they are turned into, and what is refused before a block is seen."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxckpt import checkpoint_scan, policies
from jaxckpt._setting import Setting, make_setting


def setting(**knobs) -> Setting:
    defaults = {
        "length": 3,
        "blocks_per_ckpt": None,
        "policy": None,
        "has_aux": False,
        "per_block": (),
        "unroll": 1,
    }
    return make_setting(**{**defaults, **knobs})


@pytest.mark.parametrize(("blocks_per_ckpt", "policy"), [(None, "nothing"), (1, "everything"), (3, "everything")])
def test_the_default_policy_follows_the_chunks(blocks_per_ckpt, policy):
    assert setting(blocks_per_ckpt=blocks_per_ckpt).policy == policies.get(policy)


@pytest.mark.parametrize("blocks_per_ckpt", [None, 2])
@pytest.mark.parametrize("policy", ["nothing", "everything", "dots", "save:q+offload:k"])
def test_a_given_policy_stays(blocks_per_ckpt, policy):
    assert str(setting(blocks_per_ckpt=blocks_per_ckpt, policy=policy).policy) == policy


def test_a_setting_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        setting().length = 4


@pytest.mark.parametrize("knob", ["length", "blocks_per_ckpt", "unroll"])
@pytest.mark.parametrize("value", [2, np.int8(2), np.int64(2), np.uint32(2)])
def test_integers_become_pythons(knob, value):
    got = getattr(setting(**{knob: value}), knob)
    assert got == 2 and type(got) is int


def test_the_chunk_size_waits_for_the_parameters_where_the_length_is_unknown():
    assert setting(length=None, blocks_per_ckpt=100).blocks_per_ckpt == 100
    with pytest.raises(ValueError, match=r"between 1 and len\(blocks\), and an integer; got 0 of type int"):
        setting(length=None, blocks_per_ckpt=0)


@pytest.mark.parametrize(("unroll", "kept"), [(True, None), (False, 1)])
def test_unroll_may_be_a_flag_and_settings_tell_true_from_one(unroll, kept):
    assert setting(unroll=unroll).unroll == kept
    assert setting(unroll=True) != setting(unroll=1)


@pytest.mark.parametrize("unroll", [True, 2])
def test_the_reversal_engine_does_not_unroll(unroll):
    for knobs in ({"engine": "reversal"}, {"snapshots": 2}):
        with pytest.raises(ValueError, match=f"unroll={unroll} is of the scan engine; the reversal engine has one block"):
            setting(unroll=unroll, **knobs)
    assert setting(unroll=False, engine="reversal").unroll == 1


@pytest.mark.parametrize("version, engine", [((0, 10, 2), "reversal"), ((0, 11, 0), "reversal"), ((0, 11, 1), "scan")])
def test_the_engine_of_offload_carry_is_one_that_is_right(version, engine, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert setting(offload_carry=True).engine == engine
    assert setting(offload_carry=True, engine="scan").engine == "scan"
    assert setting().engine == setting(policy="offload:q").engine == "scan"


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_what_is_not_an_offload_carry_is_refused(value):
    with pytest.raises(ValueError, match=f"offload_carry, .*, must be a bool; got {value!r}"):
        setting(offload_carry=value)
    assert setting(offload_carry=np.True_).offload_carry is True


@pytest.mark.parametrize("k", [None, 1])
def test_a_policy_that_snapshots_ignore_is_a_note(k):
    with pytest.warns(
        UserWarning, match=r"snapshots=2 of single blocks: .* policy='save:q' changes nothing. Write blocks_per_ckpt"
    ):
        setting(snapshots=2, policy="save:q", blocks_per_ckpt=k)
    setting(snapshots=2, policy="nothing", blocks_per_ckpt=k)
    setting(snapshots=2, blocks_per_ckpt=k)
    setting(snapshots=2, policy="save:q", blocks_per_ckpt=2, length=4)


@pytest.mark.parametrize("unroll", [0, -1, 1.5, 2.0, "2", None, np.float32(2)])
def test_what_is_not_an_unroll_is_refused(unroll):
    with pytest.raises(ValueError) as caught:
        setting(unroll=unroll)
    assert f"got {unroll!r}" in str(caught.value)
    assert "must be True, False or an integer of at least 1" in str(caught.value)


@pytest.mark.parametrize("length", [0, -2, 2.0, True, False, "3", np.float64(3), [3]])
def test_what_is_not_a_length_is_refused(length):
    with pytest.raises(ValueError) as caught:
        setting(length=length)
    assert f"must be an integer of at least 1; got {length!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "names"), [("rate", ("rate",)), (["rate", "scale"], ("rate", "scale")), ((), ()), (iter(["rate"]), ("rate",))]
)
def test_per_block_is_a_tuple_of_names(given, names):
    assert setting(per_block=given).per_block == names


@pytest.mark.parametrize("per_block", [(1,), ["rate", None], 3, None, np.ones(2)])
def test_what_does_not_name_arguments_is_refused(per_block):
    with pytest.raises(TypeError) as caught:
        setting(per_block=per_block)
    assert "per_block must name keyword arguments, as in per_block=('rate',)" in str(caught.value)
    assert f"got {per_block!r}" in str(caught.value)


@pytest.mark.parametrize("has_aux", [True, 1, np.True_])
def test_has_aux_becomes_a_flag(has_aux):
    assert setting(has_aux=has_aux).has_aux is True


def test_the_knobs_are_keywords():
    with pytest.raises(TypeError, match="positional argument"):
        checkpoint_scan(lambda w, x: x, 3, 2)
