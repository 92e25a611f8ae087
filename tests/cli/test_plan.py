import functools
import json

import pytest

from jaxckpt.analysis.cost import CPU
from jaxckpt.cli import _stacks, main
from jaxckpt.memory import calibrate
from jaxckpt.models import TransformerBlock

MAKE = """
import jax, jax.numpy as jnp
from jaxckpt import checkpoint_scan

def make():
    stack = checkpoint_scan(lambda w, x: jnp.tanh(x @ w), plan="auto")
    step = jax.grad(lambda w, x: jnp.sum(stack(w, x)))
    return step, (jax.ShapeDtypeStruct((6, 32, 32), "float32"), jax.ShapeDtypeStruct((256, 32), "float32"))

def of_batch(size):
    step, (w, _) = make()
    return step, (w, jax.ShapeDtypeStruct((size, 32), "float32"))

def wrong_step(size=64, error=ValueError):
    def step(w, x):
        raise error("w and x do not go together")
    return step, of_batch(size)[1]

def step_with_a_bug(size=64):
    return wrong_step(size, AssertionError)

def no_step_of(size):
    assert size < 8, size

def no_step():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    code = main(["plan", "--target", "cpu", *arguments])
    return code, *capsys.readouterr()


def test_a_step_of_the_user(capsys, folder):
    code, out, _ = run(capsys, "--step", "mine:make", "--budget", "2MiB", "--out", "plan.json", "--plot", "front.svg")
    assert code == 0 and "forward runs" in out and "of 2.0 MiB on cpu" in out
    told = json.loads((folder / "plan.json").read_text())
    assert told["stacks"][""]["length"] == 6 and told["chosen"]["peak_bytes"] <= 2 * 2**20
    assert "budget" in (folder / "front.svg").read_text()


def test_a_model_as_json(capsys):
    code, out, _ = run(capsys, "--model", "transformer", "--blocks", "4", "--tokens", "16", "--budget", "2GiB", "--json")
    told = json.loads(out)
    assert code == 0 and told["chosen"]["peak_bytes"] <= told["budget_bytes"] == 2 * 2**30


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--step", "mine:make", "--budget", "1KiB"], "the least possible is"),
        (["--step", "mine:make", "--budget", "lots"], "a size is a number and a unit"),
        (["--step", "mine:no_step", "--budget", "1MiB"], "must return (step, args)"),
        (["--step", "mine:nothing", "--budget", "1MiB"], "--step takes package.module:function"),
        (["--step", "mine:make", "--budget", "1MiB", "--plot", "front.gif"], "--plot writes .svg"),
        (["--step", "mine:make", "--budget", "1MiB", "--out", "none/plan.json"], "there is no folder"),
        (["--step", "mine:make", "--budget", "1MiB", "--blocks", "2"], "--blocks is of --model, and --step says itself"),
        (["--step", "mine:make", "--budget", "1MiB", "--tokens", "2"], "--tokens is of --model, and --step says itself"),
        (["--step", "mine:make", "--budget", "1KiB"], "plan: --budget 1.0 KiB (1024 bytes) is less than"),
        (["--step", "mine:make", "--budget", "lots"], "plan: --budget: a size is a number and a unit"),
        (["--step", "mine:make"], "plan: --budget is missing: the memory of 'cpu' is not known; write --budget 16GiB"),
        (["--step", "mine:make", "--budget", "1MiB", "--time"], "mine:make must return arrays in place of"),
        (
            ["--time", "--target", "h200"],
            "--time runs the step, and --target h200 is only described: take --target attached",
        ),
        (["--time", "--objective", "memory"], "--time chooses the fastest, and --objective memory the least memory"),
        (["--plans", "3"], "--plans is of --batch, which lists the sizes"),
        (["--batch", "8", "--model", "pairformer"], "--batch: a pairformer of ours has no batch"),
        (["--batch", "8", "--objective", "memory"], "--batch makes plans for time, and --objective memory is of one batch"),
        (["--batch", "8", "--time"], "--time looks at one batch, and --batch at several"),
        (["--step", "mine:of_batch", "--batch", "64", "--budget", "1KiB"], "That is for a batch of 64"),
        (["--step", "mine:make", "--batch", "64", "--budget", "1MiB"], "--step mine:make raised TypeError: make() takes 0"),
        (["--step", "mine:wrong_step", "--batch", "64", "256", "--budget", "1MiB"], "plan: w and x do not go together"),
        (
            ["--step", "mine:no_step_of", "--batch", "64", "--budget", "1MiB"],
            "--step mine:no_step_of raised AssertionError: 64",
        ),
        (["--batch", "2", "--calibrate", "--target", "h200"], "calibrating measures a device, and 'h200' is only described"),
        (["--calibrate", "--target", "h200"], "calibrating measures a device, and 'h200' is only described; take --target"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input(capsys, folder, arguments, said):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and said in err and out == ""


def test_the_largest_batch(capsys, folder):
    arguments = ["--step", "mine:of_batch", "--batch", "64", "256", "1024", "99999", "--budget", "2MiB"]
    code, out, _ = run(capsys, *arguments, "--out", "plan.json", "--plot", "batches.svg")
    assert code == 0 and "a batch of 1024 in 2.0 MiB on cpu" in out and "does not fit" in out
    assert "batch" in (folder / "batches.svg").read_text()
    code, out, _ = run(capsys, *arguments, "--json", "--plans", "2")
    told = json.loads(out)
    assert code == 0 and told["largest"] == 1024 and len(told["tried"]) == 2
    planned = next(row for row in told["tried"] if row["size"] == 1024)["plan"]
    assert json.loads((folder / "plan.json").read_text())["stacks"] == planned["stacks"]


@pytest.mark.parametrize("batch", [[], ["--batch", "64", "256"]])
def test_a_bug_in_the_step_has_its_traceback(capsys, folder, batch):
    with pytest.raises(AssertionError, match="w and x do not go together"):
        run(capsys, "--step", "mine:step_with_a_bug", *batch, "--budget", "1MiB")


def test_rates_are_measured_for_batches_too(capsys, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(calibrate, "_measured", lambda target: CPU._replace(memory_bandwidth=1e7, fresh_bandwidth=1e7))
    arguments = ["--step", "mine:of_batch", "--batch", "256", "--budget", "2MiB", "--json"]
    guessed, measured = (json.loads(run(capsys, *arguments, *more)[1])["tried"][0] for more in ([], ["--calibrate"]))
    assert measured["examples_per_second"] < guessed["examples_per_second"] / 2


def test_a_batch_of_our_transformer(capsys, monkeypatch):
    small = functools.partial(TransformerBlock, d_model=8, num_heads=2, d_ff=16)
    monkeypatch.setitem(_stacks.MODELS, "transformer", _stacks.Model(small, lambda tokens: [(tokens, 8)], 2))
    code, out, _ = run(capsys, "--blocks", "2", "--tokens", "8", "--budget", "8MiB", "--batch", "2", "4", "--json")
    assert code == 0 and json.loads(out)["largest"] == 4


def test_a_model_that_is_run(capsys, monkeypatch):
    small = functools.partial(TransformerBlock, d_model=8, num_heads=2, d_ff=16)
    monkeypatch.setitem(_stacks.MODELS, "transformer", _stacks.Model(small, lambda tokens: [(tokens, 8)], 2))
    code, out, _ = run(capsys, "--blocks", "2", "--tokens", "8", "--budget", "1MiB", "--time", "--json")
    told = json.loads(out)
    assert code == 0 and told["chosen"]["measured_seconds"] > 0


def test_the_plan_is_saved_where_nobody_reads_the_table(folder, monkeypatch):
    def unread(*args, file=None, **keywords):
        if file is None:
            raise BrokenPipeError

    monkeypatch.setattr("builtins.print", unread)
    arguments = ["plan", "--target", "cpu", "--step", "mine:make", "--budget", "2MiB", "--out", "plan.json"]
    assert main(arguments) == 141 and json.loads((folder / "plan.json").read_text())["stacks"]


def test_the_number_of_compilations(capsys, folder):
    code, out, _ = run(capsys, "--step", "mine:make", "--budget", "2MiB", "--compilations", "1", "--json")
    told = json.loads(out)
    assert code == 0 and told["compilations"] == 1 and len(told["candidates"]) == 1 and "untried" in told
    with pytest.raises(SystemExit):
        run(capsys, "--step", "mine:make", "--compilations", "0")
    assert "'0' is not an integer of at least 1" in capsys.readouterr().err
