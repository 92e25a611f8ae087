"""Values and gradients of the Flax stacks equal those of the torch stacks, whatever the setting on either side."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch", reason="parity needs the extra 'test'")

from jaxckpt import policies
from jaxckpt.policies.builtin import builtins
from tests.support import assert_no_zero_leaf
from torch_ref import parity
from torch_ref.parity import TOLERANCE, errors
from torch_ref.problems import LENGTH, MODELS, bfloat16_errors, problem, torch_stack

PER_CKPT = (None, 1, 2, 3, LENGTH)
PAIR_TAGS = ("save:tri_mul_*,attention_context", "except:tri_*,pair_transition")


def distinct_policies() -> list[str]:
    """The built-in names that keep different things of a transformer block: of aliases and equal recipes the first."""
    tags = (
        *("decoder_layer_input", "query_proj", "key_proj", "value_proj", "context"),
        *("out_proj", "mlpwi_0", "mlpwi_1", "mlpwo"),
    )
    found = {}
    for name in builtins():
        terms = policies.get(name).terms
        kept = frozenset(
            (term.rule or term.verb, tag) for term in terms for tag in tags if not term.globs or tag in term.globs
        )
        found.setdefault(kept, name)
    return list(found.values())


def cover() -> list:
    """Every model, chunk size and policy. In every run each policy of a model, and each chunk size; the rest is `full`."""
    cases = []
    for model in MODELS:
        # MaxText's recipes speak of a transformer's tags only.
        rules = [name for name in distinct_policies() if model == "transformer" or not policies.get(name).reads_tags]
        names = [*rules, *(PAIR_TAGS if model != "transformer" else ())]
        for i, policy in enumerate(names):
            for j, per_ckpt in enumerate(PER_CKPT):
                often = (i + j) % len(PER_CKPT) in ((0, 2) if model == "transformer" else (0,))
                marks = () if often else pytest.mark.full
                cases.append(pytest.param(model, per_ckpt, policy, marks=marks, id=f"{model}-{per_ckpt}-{policy}"))
    return cases


@functools.cache
def posed(model, dtype="float64", **how):
    return problem(model, np.dtype(dtype), **how)


@functools.cache
def wanted(model, per_ckpt, dtype="float64", **how):
    """Torch's result under its own `checkpoint_blocks`."""
    given = posed(model, dtype, **how)
    want = parity.run_torch(torch_stack(model, given), given, per_ckpt)
    assert_no_zero_leaf(want._asdict())
    return want


@pytest.mark.parametrize(("model", "per_ckpt", "policy"), cover())
def test_float64_with_dropout(model, per_ckpt, policy):
    got = parity.run_flax(posed(model, with_dropout=True), blocks_per_ckpt=per_ckpt, policy=policy)
    want = wanted(model, per_ckpt, with_dropout=True)
    assert errors(got, want).within(TOLERANCE["float64"]), errors(got, want)


WITHOUT_DROPOUT = {
    "transformer": [(None, "everything"), (1, "nothing"), (2, "minimal_with_context"), (3, "dots"), (4, "save_out_proj")],
    "pairformer": [(None, PAIR_TAGS[0]), (2, "dots")],
    "evoformer": [(1, "nothing"), (LENGTH, "dots_no_batch")],
}
MASKS = [("transformer", ()), ("pairformer", ()), ("pairformer", ("mask",)), ("evoformer", ("msa_mask",))]


@pytest.mark.parametrize(
    ("model", "per_ckpt", "policy"), [(model, *setting) for model, found in WITHOUT_DROPOUT.items() for setting in found]
)
def test_float32(model, per_ckpt, policy):
    got = parity.run_flax(posed(model, "float32"), blocks_per_ckpt=per_ckpt, policy=policy)
    want = wanted(model, per_ckpt, "float32")
    assert {leaf.dtype for leaf in got.values} == {np.dtype("float32")}
    assert errors(got, want).within(TOLERANCE["float32"]), errors(got, want)


@pytest.mark.parametrize(("model", "masks"), MASKS)
def test_float64_without_dropout_and_with_fewer_masks(model, masks):
    got = parity.run_flax(posed(model, masks=masks), policy="nothing")
    want = wanted(model, 2, masks=masks)
    assert errors(got, want).within(TOLERANCE["float64"]), errors(got, want)


@pytest.mark.parametrize("model", MODELS)
def test_torch_is_the_same_under_every_setting(model):
    """The reference itself: one result, whatever its own chunks."""
    for per_ckpt in PER_CKPT[1:]:
        found = errors(wanted(model, per_ckpt, with_dropout=True), wanted(model, None, with_dropout=True))
        assert found.within(1e-14), (per_ckpt, found)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_as_good_as_torchs(model, capsys):
    ours, theirs = bfloat16_errors(model, torch_per_ckpt=2, blocks_per_ckpt=1)
    with capsys.disabled():
        print(f"\nbfloat16, {model}: Flax {ours}, torch {theirs}")
    assert min(theirs) > 1e-3, "torch did not compute in bf16"
    assert min(ours) > 1e-3, "Flax did not compute in bf16"
    assert ours.values <= 1.5 * theirs.values and ours.gradients <= 1.5 * theirs.gradients
