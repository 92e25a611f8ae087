"""`--mesh` and `--fsdp`: our models over several devices."""

import json

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxckpt.cli import main
from jaxckpt.cli._meshes import mesh_axes, of_parameter
from tests.support import on_eight_devices

ON_EIGHT_DEVICES = """
import sys
from jaxckpt.cli import main
for line in sys.argv[1:]:
    assert main(line.split()) == 0, line
"""
TINY = "--blocks 4 --tokens 16 --target cpu:8 --json"


def on_eight(*lines):
    """What commands print on eight simulated devices, as JSON."""
    done = on_eight_devices("-c", ON_EIGHT_DEVICES, *lines)
    assert done.returncode == 0, done.stderr
    rest, found = done.stdout.strip(), []
    while rest:
        told, end = json.JSONDecoder().raw_decode(rest)
        found.append(told)
        rest = rest[end:].strip()
    return found


def test_bytes_are_those_of_one_device():
    small = "--policies nothing --blocks-per-ckpt none"
    report = f"report {TINY} {small} --mesh"
    found = on_eight(f"{report} data=8", f"{report} data=8 --fsdp", f"{report} tensor=8", f"{report} data=4,tensor=2 --fsdp")
    peaks, sent = ([rows[0][field] for rows in found] for field in ("peak_bytes", "sent_bytes"))
    assert not any(row["error"] for rows in found for row in rows)
    assert max(peaks[1:]) < peaks[0] / 4  # parameters are all of it
    assert 0 < sent[2] < min(sent[0], sent[1])  # of 128 tokens, and not parameters


def test_a_plan_and_a_pairformer():
    plan = f"plan {TINY} --mesh data=4,tensor=2 --fsdp --budget"
    report = f"report --model pairformer {TINY} --policies nothing --blocks-per-ckpt none --mesh data=8"
    found, [row] = on_eight(f"{plan} 256MiB", report)
    assert found["chosen"]["peak_bytes"] <= 256 * 2**20 and found["target"] == "cpu:8"
    assert row["error"] is None and row["sent_bytes"] > 0


def test_explain(h200, capsys):
    lines = "explain --blocks 4 --tokens 256 --json --target h200:8 --mesh"
    found = []
    for mesh in ("data=8", "data=8 --fsdp", "tensor=8"):
        assert main([*lines.split(), *mesh.split()]) == 0
        found.append(json.loads(capsys.readouterr().out))
    data, fsdp, tensor = found
    assert data["sent_bytes"] == 0 < min(fsdp["sent_bytes"], tensor["sent_bytes"])
    assert data["stored_bytes"] == fsdp["stored_bytes"] == tensor["stored_bytes"] / 8


def test_how_parameters_are_split():
    path = [jax.tree_util.DictKey(key) for key in ("params", "wo", "kernel")]
    leaf = jax.ShapeDtypeStruct((4, 64, 32), "float32")
    both = {"data": 4, "tensor": 2}
    assert of_parameter(path, leaf, both, True) == P(None, "tensor", "data")
    assert of_parameter([*path[:1], jax.tree_util.DictKey("wi_0"), path[2]], leaf, both, True) == P(None, "data", "tensor")
    assert of_parameter(path, leaf, {"data": 8}, False) == P(None, None, None)
    assert of_parameter(path, leaf, {"data": 48}, True) == P(None, None, None)  # which does not divide them


@pytest.mark.parametrize("text", ["data", "data=0", "data=2,data=4", "batch=8", "data=8,", "8"])
def test_what_is_no_mesh(text, capsys):
    with pytest.raises(SystemExit):
        main(["report", "--mesh", text])
    assert f"argument --mesh: {text!r} is not a mesh such as data=8" in capsys.readouterr().err
    assert mesh_axes("tensor=2,data=4") == {"tensor": 2, "data": 4}


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ("report --mesh data=8 --target cpu", "--mesh has 8 devices and --target cpu has 1; write --target cpu:8"),
        ("plan --mesh data=8 --target cpu --budget 1GiB", "--mesh has 8 devices and --target cpu has 1"),
        ("explain --mesh data=8", "--mesh is of devices: write --target h200:8, say, beside it"),
        ("explain --mesh data=8 --target h200", "--mesh has 8 devices and --target h200 has 1; write --target h200:8"),
        ("report --fsdp --target cpu", "write --mesh data=8 --fsdp"),
        ("report --mesh tensor=1 --fsdp --target cpu", "--mesh has tensor only"),
        ("report --mesh data=1 --stack a:b --target cpu", "--mesh is of --model"),
        ("plan --mesh data=1 --step a:b --target cpu", "--mesh is of --model"),
    ],
)
def test_a_mesh_that_does_not_fit(options, wrong, capsys):
    assert main(options.split()) == 2
    assert wrong in capsys.readouterr().err


def test_a_batch_that_cannot_be_split():
    command = f"plan {TINY} --mesh data=8 --batch 12 --budget 1GiB"
    done = on_eight_devices("-m", "jaxckpt", *command.split())
    assert done.returncode == 2 and "a batch of 12 cannot be split over data=8; take multiples of 8" in done.stderr
