import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan
from jaxckpt.cli import main, report
from jaxckpt.cli._stacks import Call, chunk_near_sqrt


def rows_of(capsys, *options):
    assert main(["report", "--target", "cpu", "--json", *options]) == 0
    return {(row["blocks_per_ckpt"], row["policy"]): row for row in json.loads(capsys.readouterr().out)}


def test_our_model(capsys):
    options = ["--model", "transformer", "--blocks", "4", "--tokens", "8", "--policies", "everything", "nothing"]
    rows = rows_of(capsys, *options)
    assert list(rows) == [(None, "everything"), (None, "nothing"), (2, "everything"), (2, "nothing")]
    assert [round(row["forward_runs"]) for row in rows.values()] == [1, 2, 2, 3]
    assert rows[None, "nothing"]["temp_bytes"] < rows[None, "everything"]["temp_bytes"]
    assert not any(row["error"] for row in rows.values())


def test_tiles(capsys):
    options = ["--blocks", "4", "--tokens", "64", "--policies", "nothing", "--blocks-per-ckpt", "none"]
    options += ["--tiles", "none", "4"]
    assert main(["report", "--target", "cpu", "--json", *options]) == 0
    whole, sliced = json.loads(capsys.readouterr().out)
    assert (whole["tiles"], sliced["tiles"]) == (None, 4) and not sliced["error"]
    assert sliced["temp_bytes"] != whole["temp_bytes"] and sliced["forward_runs"] > whole["forward_runs"]
    assert main(["report", "--target", "cpu", *options]) == 0
    assert "nothing, tiles=4" in capsys.readouterr().out


def test_a_stack_of_the_users_as_a_table_and_a_picture(module, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "front.svg"
    options = ["--stack", f"{module}:with_keywords", "--blocks-per-ckpt", "none", "3", "--policies", "nothing", "dots"]
    assert main(["report", "--target", "cpu", "--plot", str(picture), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 x block, gradients of its parameters, JAX ")
    lines = out.splitlines()
    assert {"nothing", "dots", "K=3, nothing", "K=3, dots"} <= {line[2:].split("  ")[0] for line in lines}
    assert any(line.startswith("* ") for line in lines)
    assert "<svg" in picture.read_text()


def test_a_setting_that_fails_does_not_lose_the_others(module, capsys, monkeypatch):
    real, calls = report.measure, []

    def measure(*args, **keywords):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("the compiler gave up\nand said much more")
        return real(*args, **keywords)

    monkeypatch.setattr(report, "measure", measure)
    rows = rows_of(capsys, "--stack", f"{module}:make", "--blocks-per-ckpt", "none", "--policies", "dots", "nothing")
    assert rows[None, "dots"]["error"] == "RuntimeError: the compiler gave up"
    assert rows[None, "nothing"]["peak_bytes"] > 0


def test_an_interrupt_prints_what_there_is(module, capsys, monkeypatch):
    real, calls = report.measure, []

    def measure(*args, **keywords):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    monkeypatch.setattr(report, "measure", measure)
    options = ["--stack", f"{module}:make", "--target", "cpu", "--policies", "dots", "nothing", "--json"]
    assert main(["report", *options]) == 130
    assert [row["policy"] for row in json.loads(capsys.readouterr().out)] == ["dots"]


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (RuntimeError, 1)])
def test_a_picture_is_left_alone_where_nothing_was_measured(module, capsys, monkeypatch, tmp_path, error, code):
    pytest.importorskip("matplotlib")

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(report, "measure", fails)
    picture = tmp_path / "front.svg"
    picture.write_text("the one of yesterday")
    options = ["--stack", f"{module}:make", "--target", "cpu", "--policies", "dots", "--plot", str(picture)]
    assert main(["report", *options]) == code
    assert picture.read_text() == "the one of yesterday"
    out, err = capsys.readouterr()
    assert f"nothing was measured, and {picture} is left as it was" in err
    assert ("interrupted: 0 of " in err) == (code == 130) and ("forward runs" in out) == (code == 1)


def test_where_nothing_could_be_measured(module, capsys, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(report, "measure", fails)
    assert main(["report", "--stack", f"{module}:make", "--target", "cpu", "--policies", "dots"]) == 1
    assert "RuntimeError: no" in capsys.readouterr().out


def test_a_number_of_blocks_that_is_none(module, capsys):
    with pytest.raises(SystemExit):
        main(["report", "--stack", f"{module}:make", "--blocks-per-ckpt", "many"])
    assert "'many' is not a number of blocks, nor 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--policies", "dotz"], "did you mean 'dots'"),
        (["--policies", "save:nonsense"], "nonsense"),
        (["--blocks-per-ckpt", "7"], "between 1 and len(blocks) = 3"),
        (["--target", "h20"], "did you mean 'h200'"),
        (["--plot", "picture.bmp"], "--plot writes .svg, .png, .pdf; got picture.bmp"),
        (["--plot", "no/folder/picture.svg"], "there is no folder no/folder"),
    ],
)
def test_bad_input_is_said_before_anything_is_compiled(module, options, said, capsys, monkeypatch):
    monkeypatch.setattr(report, "measure", lambda *_, **__: pytest.fail("compiled"))
    assert main(["report", "--stack", f"{module}:make", *options]) == 2
    assert said in capsys.readouterr().err


def test_without_matplotlib(module, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["report", "--stack", f"{module}:make", "--plot", "picture.svg"]) == 2
    assert 'pip install "jaxckpt[plot]"' in capsys.readouterr().err


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=True):
        return nn.Dropout(0.5, deterministic=not train)(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear, self.norm = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def linen_call():
    x = jnp.ones((2, 4))
    stack = checkpoint_scan(LinenBlock, 3)()
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    keywords = {"train": True, "rngs": {"dropout": jax.random.key(1)}, "mutable": ["batch_stats"]}
    return Call(stack, (stack.init(rngs, x), x), keywords)


@pytest.mark.parametrize(
    "call, leaves",
    [
        (lambda: Call(checkpoint_scan(lambda w, x: x @ w), (jnp.ones((3, 4, 4)), jnp.ones((2, 4))), {}), 1),
        (linen_call, 4),
        (lambda: Call(checkpoint_scan(NnxBlock, 3)(rngs=nnx.Rngs(0)), (jnp.ones((2, 4)),), {}), 4),
    ],
    ids=["function", "linen", "nnx"],
)
def test_gradients_of_the_parameters_and_of_nothing_else(call, leaves):
    fn, params, values = report.gradient(call())
    loss, gradients = jax.jit(fn)(params, values)
    assert loss.shape == () and len(jax.tree.leaves(gradients)) == leaves
    assert all(g.shape[0] == 3 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("length, chunk", [(1, 1), (2, 1), (12, 3), (24, 4), (36, 6), (48, 6), (7, 2), (47, 6)])
def test_chunk_near_the_square_root(length, chunk):
    assert chunk_near_sqrt(length) == chunk
