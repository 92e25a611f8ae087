"""Values and gradients of the Flax stacks equal those of the torch stacks, whatever the setting on either side."""

import functools
import itertools

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


def product() -> list[tuple]:
    """Every model, policy and chunk size. Chunks of one are the same program under all policies but those that offload."""
    cases = []
    for model in MODELS:
        # MaxText's recipes speak of a transformer's tags only.
        names = [name for name in distinct_policies() if model == "transformer" or not policies.get(name).reads_tags]
        cases.extend(itertools.product((model,), names, [k for k in PER_CKPT if k != 1]))
        cases.extend((model, name, 1) for name in names if name == "nothing" or policies.get(name).may_offload)
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


def compare(model, per_ckpt, policy, dtype="float64", **how):
    got = parity.run_flax(posed(model, dtype, **how), blocks_per_ckpt=per_ckpt, policy=policy)
    want = wanted(model, per_ckpt, dtype, **how)
    assert {leaf.dtype for leaf in got.values} == {np.dtype(dtype)}
    assert errors(got, want).within(TOLERANCE[dtype]), errors(got, want)


def shortened(is_long) -> list:
    """The product, of which what takes minutes of compiling is only in the full run."""
    return [pytest.param(*case, marks=[pytest.mark.full] if is_long(*case) else []) for case in product()]


def is_long_in_float64(model, policy, per_ckpt) -> bool:
    """Pair models in chunks of 3 and 6 blocks, but under two policies."""
    return model != "transformer" and per_ckpt in (3, 6) and policy not in ("nothing", "everything")


def is_long_in_float32(model, policy, per_ckpt) -> bool:
    """Pair models in chunks."""
    return model != "transformer" and per_ckpt is not None


@pytest.mark.parametrize(("model", "policy", "per_ckpt"), shortened(is_long_in_float64))
def test_float64_with_dropout(model, policy, per_ckpt):
    compare(model, per_ckpt, policy, with_dropout=True)


@pytest.mark.parametrize(("model", "policy", "per_ckpt"), shortened(is_long_in_float32))
def test_float32(model, policy, per_ckpt):
    compare(model, per_ckpt, policy, "float32")


@pytest.mark.parametrize("model", MODELS)
def test_chunks_of_one_are_one_program_under_every_policy(model):
    names = {policy for name, policy, _ in product() if name == model and not policies.get(policy).may_offload}
    assert len(names) >= 4
    assert len({str(parity.trace_flax(posed(model), blocks_per_ckpt=1, policy=name).jaxpr) for name in names}) == 1


@pytest.mark.parametrize(
    ("model", "policy", "per_ckpt"),
    [
        ("transformer", "dots", 4),
        ("evoformer", "dots", 5),
        ("pairformer", "save:tri_mul_*,attention_context", None),
        ("evoformer", "except:tri_*,pair_transition", 2),
    ],
)
def test_shorter_last_chunks_and_tags_of_the_pair_models(model, policy, per_ckpt):
    compare(model, per_ckpt, policy, with_dropout=True)


MASKS = [("transformer", ()), ("pairformer", ()), ("pairformer", ("mask",)), ("evoformer", ("msa_mask",))]


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
    ours, theirs = bfloat16_errors(model, length=4, torch_per_ckpt=2, blocks_per_ckpt=1)
    with capsys.disabled():
        print(f"\nbfloat16, {model}: Flax {ours}, torch {theirs}")
    assert min(theirs) > 1e-3, "torch did not compute in bf16"
    assert min(ours) > 1e-3, "Flax did not compute in bf16"
    assert ours.values <= 1.5 * theirs.values and ours.gradients <= 1.5 * theirs.gradients
