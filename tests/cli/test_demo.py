import argparse
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxckpt.cli import demo, main
from tests.support import relative_error

TINY = demo.Size(d_model=8, num_heads=2, d_ff=12, batch=2, length=16)
ABOUT = {"device", "devices", "python", "jax", "flax", "jaxckpt", "text_bytes", "blocks", "steps", *demo.Size._fields}


def result(setting, losses):
    return demo.Result(setting, None, "nothing", 3 * 2**20, 5 * 2**20, 0.25, losses, 2e-7)


def run(capsys, as_json=False, size=TINY, budget=None, devices=None):
    code = demo.run(argparse.Namespace(steps=2, blocks=3, json=as_json, budget=budget, devices=devices), size)
    return code, *capsys.readouterr()


@pytest.fixture
def results(monkeypatch):
    """A list of results that the demo takes for its own."""
    results = [result("first", [5.0, 4.0, 3.0]), result("second", [5.0, 4.00005, 3.0])]
    monkeypatch.setattr(demo, "train_all", lambda *args: results)
    return results


@pytest.fixture
def quick_compile():
    """Without LLVM's expensive passes, which would be a third of this test's time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_end_to_end_as_json(capsys, quick_compile):
    code, out, err = run(capsys, as_json=True)
    told = json.loads(out)
    assert code == 0 and told["problems"] == []
    assert set(told) == {*ABOUT, "settings", "problems"}
    assert (told["blocks"], told["steps"], told["d_model"]) == (3, 2, TINY.d_model)
    assert [s["setting"] for s in told["settings"]] == ["no checkpointing", "per block", "chunks of 3", "dots"]
    for setting in told["settings"]:
        assert set(setting) == set(demo.Result._fields)
        assert len(setting["losses"]) == 2 and setting["losses"][1] < setting["losses"][0]
        assert 0 < setting["temp_bytes"] < setting["total_bytes"] and setting["seconds_per_step"] > 0
        assert setting["gradient_difference"] < 1e-5
    plain, per_block, *_ = (setting["temp_bytes"] for setting in told["settings"])
    assert per_block < plain
    assert "compiling per block" in err and "step 2 of 2" in err


ON_EIGHT_DEVICES = """
import argparse, sys
from jaxckpt.cli import demo
from tests.cli.test_demo import TINY
sys.exit(demo.run(argparse.Namespace(steps=2, blocks=3, json=True, budget="1GiB", devices=8), TINY))
"""


def test_on_several_devices():
    """One device and eight have the same losses; what each of the eight holds is less."""
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    names = ["one device", "no checkpointing", "per block", "chunks of 3", "dots", "plan for 1GiB"]
    assert [s["setting"] for s in told["settings"]] == names and told["devices"] == 8 and told["batch"] == 8
    alone, plain, *_ = told["settings"]
    assert plain["total_bytes"] < alone["total_bytes"]
    assert all(s["gradient_difference"] < 1e-5 for s in told["settings"])


def test_devices_that_are_not_there(capsys):
    code, _, err = run(capsys, devices=1000)
    assert code == 2 and "--devices 1000: there are" in err and "device_count=1000" in err


def test_table(results, capsys):
    code, out, err = run(capsys)
    assert code == 0 and not err
    header, first, second = (line for line in out.splitlines() if line.startswith(("setting", "first", "second")))
    assert header.split()[:5] == ["setting", "temp", "MiB", "total", "MiB"]
    assert first.split() == ["first", "3.0", "5.0", "0.250", "5.0000", "3.0000", "2e-07"]
    assert len(header) == len(first) == len(second)
    assert f"jax {jax.__version__}" in out and "3 blocks of 8 channels" in out


@pytest.mark.parametrize(
    "losses, message",
    [
        ([5.0, 4.0, 3.0002], "second: the losses are 2.0e-04 away from those of first"),
        ([5.0, 4.1, 3.0], "second: the losses are 1.0e-01 away"),
        ([5.0, 4.0, 5.0], "second: the loss did not fall, from 5.0000 to 5.0000"),
        ([5.0, 4.0, float("nan")], "second: the loss did not fall, from 5.0000 to nan"),
        ([5.0, float("nan"), 3.0], "second: the losses are nan away"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_losses_that_are_not_sound_fail(results, capsys, losses, message, as_json):
    results[1] = result("second", losses)
    code, out, err = run(capsys, as_json)
    assert code == 1
    assert message in err and "first: " not in err
    if as_json:
        assert any(message in problem for problem in json.loads(out)["problems"])


def test_text_is_the_python_files_in_order(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("b.py", "a.py", "c.txt", "folder/d.py"):
        (tmp_path / name).write_text(f"# {name}\n")
    assert demo.read_text(tmp_path).tobytes() == b"# a.py\n# b.py\n"


def test_no_standard_library_source(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    code, out, err = run(capsys)
    assert code == 1 and not out
    assert "source of Python's standard library" in err and str(tmp_path) in err


def test_batches_are_windows_of_the_text():
    text = np.arange(200, dtype=np.uint8)
    batches = demo.draw_batches(text, 50, TINY)
    assert batches.shape == (50, TINY.batch, TINY.length + 1) and batches.dtype == np.int32
    assert (np.diff(batches, axis=-1) == 1).all()
    assert len(np.unique(batches[..., 0])) > 20
    np.testing.assert_array_equal(batches, demo.draw_batches(text, 50, TINY))


def test_first_gradient_is_the_gradient():
    optimizer = optax.adamw(1e-3, weight_decay=0.1)
    params = {"w": jnp.arange(1.0, 4.0)}
    gradient = jax.grad(lambda p: jnp.sin(p["w"]).sum())(params)
    _, after = optimizer.update(gradient, optimizer.init(params), params)
    found = demo.first_gradient(demo.State(params, after))
    assert relative_error(jax.tree.map(lambda leaf: leaf / 0.1, found), gradient) < 1e-6


@pytest.mark.parametrize("donate", [True, False])
def test_donated_memory_is_counted_once(donate):
    x = jnp.ones(1024)
    program = jax.jit(lambda x: x + 1, donate_argnums=(0,) if donate else ()).lower(x).compile()
    memory = demo.memory_of(program)
    assert memory["total_bytes"] - memory["temp_bytes"] == (1 if donate else 2) * x.nbytes


@pytest.mark.parametrize("other, error", [([1.0, 2.0, 4.0], 0.0), ([1.0, 2.5, 4.0], 0.125), ([1.0, 2.0, 3.0], 0.25)])
def test_relative_difference(other, error):
    reference = [np.array([1.0, 2.0]), np.array([4.0])]
    assert demo.relative_difference([np.array(other[:2]), np.array(other[2:])], reference) == error


def test_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "run", lambda options: seen.append(options) or 7)
    assert main(["demo"]) == main(["demo", "--steps", "2", "--blocks", "3", "--json"]) == 7
    default, given = seen
    assert (default.steps, default.blocks, default.json) == (10, 12, False)
    assert (given.steps, given.blocks, given.json) == (2, 3, True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--blocks", "2"], "--blocks: at least 3 is needed, since one of the settings is chunks of 3; got 2"),
        (["--steps", "1"], "--steps: at least 2 is needed, since the loss has to fall; got 1"),
        (["--steps", "-5"], "got -5"),
        (["--steps", "1e2"], "--steps: an integer of at least 2 is needed; got '1e2'"),
        (["--layers", "4"], "unrecognized arguments: --layers 4"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(["demo", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_trained_under_a_plan(capsys, quick_compile):
    code, out, _ = run(capsys, as_json=True, budget="1MiB")
    told = json.loads(out)
    assert code == 0 and told["problems"] == []
    plain, *_, planned = told["settings"]
    assert planned["setting"] == "plan for 1MiB" and planned["total_bytes"] <= 2**20
    assert np.allclose(planned["losses"], plain["losses"], atol=1e-4)


@pytest.mark.parametrize("budget, said", [("1KiB", "the least possible is"), ("lots", "a size is a number and a unit")])
def test_budgets_that_cannot_be(capsys, quick_compile, budget, said):
    code, out, err = run(capsys, budget=budget)
    assert code == 2 and said in err and out == ""
