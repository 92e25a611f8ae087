"""Stacks over eight simulated devices: gradients are those of a plain loop on one, and nothing is sent for pieces alone."""

import json

import pytest

from tests.support import on_eight_devices

MESHES = ["data", "fsdp", "tensor", "fsdp x tensor"]
KNOBS = {
    "stages": {"stages": "auto"},
    "tiles": {"tiles": 4},
    "offload": {"offload_carry": True},
    "cheap": {"policy": "cheap"},
}


def on_eight(cases):
    """What `on_eight_devices` finds for each case."""
    return said_by("tests.engine.on_eight_devices", json.dumps(cases))


def said_by(module, *args):
    """What a program for eight devices prints last, as JSON."""
    done = on_eight_devices("-m", module, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def every(model, mesh, **more):
    """All engines and knobs."""
    return [
        dict(model=model, mesh=mesh, knobs={"engine": e, **k}, **more) for e in ("scan", "reversal") for k in KNOBS.values()
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_gradients(mesh):
    """Half of them, the others of the next mesh."""
    cases = every("transformer", mesh)
    cases = [dict(case, dropout=bool(i % 2), says=bool(i // 2 % 2)) for i, case in enumerate(cases)]
    cases = cases[MESHES.index(mesh) % 2 :: 2]
    assert [case for case, (error, _) in zip(cases, on_eight(cases), strict=True) if not error < 1e-12] == []


@pytest.mark.full
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize(
    ("model", "mesh"), [*(("transformer", mesh) for mesh in MESHES), ("pairformer", "data"), ("pairformer", "fsdp")]
)
def test_gradients_in_full(model, mesh, dropout, says):
    cases = every(model, mesh, dropout=dropout, says=says)
    assert [case for case, (error, _) in zip(cases, on_eight(cases), strict=True) if not error < 1e-12] == []


def test_front_ends():
    cases = [
        dict(model=model, mesh="fsdp", knobs=knobs) for model in ("linen", "nnx") for knobs in ({"tiles": 4}, {"stages": 2})
    ]
    assert max(error for error, _ in on_eight(cases)) < 1e-12


def test_nothing_is_sent_for_pieces_alone():
    """Gradients of a block's parameters are summed once, in one or two collectives, and no device waits for another."""
    settings = [{}, {"stages": "auto"}, {"stages": "auto", "engine": "reversal"}, {"tiles": 4}, {"tiles": 4, "snapshots": 2}]
    models = [("transformer", "data"), ("transformer, one example each", "data"), ("transformer", "fsdp")]
    cases = [dict(model=model, mesh=mesh, knobs=knobs, says=True) for model, mesh in models for knobs in settings]
    found = on_eight(cases)
    assert max(error for error, _ in found) < 1e-12
    *of_data, (whole, *others) = (found[i : i + len(settings)] for i in range(0, len(found), len(settings)))
    for (_, by_hand), *rest in of_data:
        assert [sent["all-reduce"][1] for _, sent in rest] == [by_hand["all-reduce"][1]] * len(rest)
        assert all(
            sent.keys() == {"all-reduce"} and sent["all-reduce"][0] <= 2 * by_hand["all-reduce"][0] for _, sent in rest
        )
    assert [sent["all-reduce"][1] for _, sent in others] == [whole[1]["all-reduce"][1]] * len(others)
    assert max(sent["all-gather"][1] for _, sent in others) <= 1.5 * whole[1]["all-gather"][1]


@pytest.mark.full
def test_stages_of_a_pipeline():
    assert max(said_by("tests.engine.pipelines")) < 1e-12
