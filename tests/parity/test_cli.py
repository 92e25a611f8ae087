import importlib.util

import pytest

from jaxckpt.cli import main, parity


@pytest.fixture
def missing(monkeypatch):
    """Makes a module impossible to find."""
    find = importlib.util.find_spec

    def hide(name):
        monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))

    return hide


def test_without_torch_it_says_how_to_install_it(missing, capsys):
    missing("torch")
    assert main(["parity"]) == 2
    out, err = capsys.readouterr()
    assert 'pip install "torch<2.14"' in err and '".[test]"' in err and not out


def test_outside_a_checkout_it_says_where_to_run(missing, capsys):
    pytest.importorskip("torch", reason="parity needs the extra 'test'")
    missing("torch_ref")
    assert main(["parity"]) == 2
    out, err = capsys.readouterr()
    assert "clone the repository" in err and not out


def rows(*errors):
    return lambda: iter([parity.Row("transformer", None, "dots", "float64", *pair, most=(1e-10, 1e-10)) for pair in errors])


@pytest.mark.parametrize(
    ("errors", "code", "verdicts"),
    [
        ([(1e-15, 1e-14), (0.0, 1e-10)], 0, ["pass", "pass"]),
        ([(1e-15, 1e-14), (1e-15, 2e-10)], 1, ["pass", "FAIL"]),
        ([(2e-10, 0.0)], 1, ["FAIL"]),
        ([(float("nan"), 0.0)], 1, ["FAIL"]),
    ],
)
def test_a_row_that_fails_fails_the_command(errors, code, verdicts, monkeypatch, capsys):
    pytest.importorskip("torch", reason="parity needs the extra 'test'")
    monkeypatch.setattr(parity, "compare", rows(*errors))
    assert main(["parity"]) == code
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-1] for line in lines if line and line[0] == "transformer"] == verdicts


def test_it_runs(monkeypatch, capsys):
    pytest.importorskip("torch", reason="parity needs the extra 'test'")
    monkeypatch.setattr(parity, "CASES", {"transformer": (3, ((2, "dots"),))})
    assert main(["parity"]) == 0
    printed = capsys.readouterr().out
    assert "torch " in printed
    lines = [line.split() for line in printed.splitlines() if line.startswith("transformer")]
    assert [line[:4] + line[-1:] for line in lines] == [
        ["transformer", "2", "dots", "float64", "pass"],
        ["transformer", "2", "dots", "bfloat16", "pass"],
    ]
