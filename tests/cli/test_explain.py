import importlib
import json
import sys

import jax
import pytest
from flax import nnx

from jaxckpt.cli import main
from jaxckpt.cli._stacks import _of_user

SMALL = ["explain", "--blocks", "6", "--tokens", "8"]


@pytest.mark.parametrize("model", ["transformer", "pairformer", "evoformer"])
def test_our_models(model, capsys):
    assert main([*SMALL, "--model", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["length"] == 6 and found["policy"] == "nothing"
    assert found["stored_bytes"] == sum(v["bytes_per_block"] * v["times"] for v in found["values"] if v["fate"] == "kept")


def test_table_and_page(capsys, tmp_path):
    page = tmp_path / "page.html"
    knobs = ["--blocks-per-ckpt", "2", "--policy", "save:context", "--target", "h200", "--html", str(page)]
    assert main([*SMALL, *knobs]) == 0
    out = capsys.readouterr().out
    assert out.startswith("6 x TransformerBlock, blocks_per_ckpt=2, policy='save:context'")
    assert "by the time model of h200" in out
    assert "TransformerBlock" in page.read_text()


def test_a_stack_of_the_users(module, capsys):
    assert main(["explain", "--stack", f"{module}:make", "--policy", "dots"]) == 0
    assert "3 x <lambda>, policy='dots'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, said",
    [
        (["--policy", "dotz"], "dots"),
        (["--policy", "save:nonsense"], "nonsense"),
        (["--blocks-per-ckpt", "7"], "between 1 and len(blocks) = 6"),
        (["--target", "h20"], "did you mean 'h200'"),
        (["--target", "cpu"], "its rates are not known"),
        (["--html", "no/folder/page.html"], "there is no folder no/folder"),
        (["--stack", "no_such_module:make"], "takes package.module:function, and 'no_such_module:make' could not"),
        (["--stack", "json"], "takes package.module:function, and 'json' could not be imported"),
        (["--stack", "math:pi"], "takes package.module:function, and 'math:pi' is 3.14"),
    ],
)
def test_bad_input(options, said, capsys):
    assert main([*SMALL, *options]) == 2
    assert said in capsys.readouterr().err


def test_keyword_arguments_of_the_users_stack(module, capsys):
    assert main(["explain", "--stack", f"{module}:with_keywords", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 3


def test_a_function_that_makes_no_stack(module, capsys):
    assert main(["explain", "--stack", f"{module}:wrong"]) == 2
    assert "must return (stack, args)" in capsys.readouterr().err


def test_no_tokens(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--tokens", "0"])
    assert "'0' is not an integer of at least 1" in capsys.readouterr().err


def test_arrays_of_the_users_stack_are_not_kept(module):
    call = _of_user(f"{module}:nnx_stack", {"policy": "dots"})
    leaves = jax.tree.leaves((nnx.state(call.stack), call.args))
    assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert main(["explain", "--stack", f"{module}:nnx_stack"]) == 0


def test_no_chunks_by_name(capsys):
    told = []
    for options in ([], ["--blocks-per-ckpt", "none"], ["--blocks-per-ckpt", "2"]):
        assert main([*SMALL, "--json", *options]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] and told[0]["blocks_per_ckpt"] is None and told[2]["blocks_per_ckpt"] == 2


@pytest.mark.parametrize("options", [["--blocks", "6"], ["--tokens", "8"]], ids=" ".join)
def test_sizes_of_our_models_beside_a_stack_of_the_users(module, options, capsys):
    assert main(["explain", "--stack", f"{module}:make", *options]) == 2
    assert f"{options[0]} is of --model, and --stack says itself how large it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "source, stack, said",
    [
        ("", "mine", "'mine' could not be imported: a colon and the name of a function are missing"),
        ("def make(): pass", "mine", "a function are missing; there are mine:make"),
        ("def make(): pass", "mine:", "a function are missing; there are mine:make"),
        ("def make(): pass", "mine:mkae", "there is no mkae in it; there are mine:make"),
        ("x = 1\ny = nothing", "mine:make", "could not be imported: NameError: name 'nothing' is not defined (mine.py:2)"),
        ("def make(:", "mine:make", "could not be imported: SyntaxError: "),
        ("def make(**knobs):\n    return {}['a']", "mine:make", "--stack mine:make raised KeyError: 'a' (mine.py:2)"),
        ("def make():\n    pass", "mine:make", "--stack mine:make raised TypeError: make() got an unexpected keyword"),
    ],
)
def test_what_is_wrong_with_a_module_of_the_users(tmp_path, monkeypatch, capsys, source, stack, said):
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    importlib.invalidate_caches()
    assert main(["explain", "--stack", stack]) == 2
    err = capsys.readouterr().err
    assert err.startswith("explain: tracing") and said in err and "Traceback" not in err
    sys.modules.pop("mine", None)


def test_the_page_is_there_where_nobody_reads_the_table(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    monkeypatch.setattr("builtins.print", unread)
    assert main([*SMALL, "--html", str(page)]) == 141 and "TransformerBlock" in page.read_text()


def unread(*args, file=None, **keywords):
    if file is None:
        raise BrokenPipeError
