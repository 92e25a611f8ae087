import contextlib
import io
import threading
import time

import pytest

from jaxckpt import _progress
from jaxckpt._progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def terminal():
    """What is written to a terminal."""
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


@pytest.fixture
def quick(monkeypatch):
    """A hundredth of a second in place of seconds."""
    monkeypatch.setattr(_progress, "_TICK", 0.01)
    monkeypatch.setattr(_progress, "_QUIET", 0.05)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "jaxckpt progress"]


def test_a_line_for_each_thing_that_is_done(capsys):
    with Progress("plan", unit="compilation") as progress:
        for what in ("compiling dots", "compiling nothing"):
            progress.doing(what)
            progress.advance()
    out, err = capsys.readouterr()
    assert (out, err.splitlines()) == ("", ["plan: compiling dots", "plan: compiling nothing"])


def test_few_lines_of_news(capsys):
    with Progress("demo", total=100) as progress:
        for step in range(1, 101):
            progress.advance()
            progress.news(f"step {step} of 100")
    assert capsys.readouterr().err.splitlines() == ["demo: step 1 of 100", "demo: step 100 of 100"]


def test_a_line_for_what_takes_long_and_then_fewer_and_fewer(quick, capsys):
    with Progress("plan") as progress:
        progress.doing("compiling dots")
        time.sleep(0.5)
    first, *more = capsys.readouterr().err.splitlines()
    assert first == "plan: compiling dots"
    assert 2 <= len(more) <= 4 and all(line.startswith("plan: compiling dots, for ") for line in more)


def test_a_bar_in_a_terminal(quick, capsys):
    with terminal() as stream, Progress("report", total=2, unit="setting") as progress:
        progress.doing("compiling dots for h200")
        time.sleep(0.05)
        progress.advance()
        progress.print("a row")
    said = stream.getvalue()
    assert "report: compiling dots for h200, 0 s" in said and "\r" in said and "1/2" in said
    assert not any(line.startswith("report: compiling dots for h200\n") for line in said.splitlines(keepends=True))
    assert capsys.readouterr().out == "a row\n"


def test_news_in_a_bar_are_all_seen():
    with terminal() as stream, Progress("demo", total=3) as progress:
        for step in range(3):
            progress.advance()
            progress.news(f"step {step}")
    assert all(f"demo: step {step}" in stream.getvalue() for step in range(3))


def test_nothing_where_nothing_is_wanted():
    with terminal() as stream, Progress("plan", shown=False) as progress:
        assert not threads()
        progress.doing("compiling dots")
        progress.news("step 1")
        progress.advance()
    assert stream.getvalue() == ""


def test_it_ends_with_what_it_is_of():
    with pytest.raises(KeyboardInterrupt), Progress("plan") as progress:
        progress.doing("compiling dots")
        assert threads()
        raise KeyboardInterrupt
    assert not threads()


def test_stderr_that_is_not_there():
    with contextlib.redirect_stderr(None), Progress("plan") as progress:  # as under pythonw
        progress.doing("compiling dots")
        progress.advance()
