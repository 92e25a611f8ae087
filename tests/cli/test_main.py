import contextlib
import os
import signal

import pytest

from jaxckpt import _start
from jaxckpt.cli import demo, explain, main, parity, plan, policies, report

COMMANDS = [demo, explain, report, plan, parity, policies]
NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def without_reader(arguments):
    """The exit code where the reader of stdout is gone, and where Python flushes it once more, as at exit."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream, contextlib.redirect_stdout(stream):
        return main(arguments)


@pytest.mark.parametrize("size", [1, 100_000])  # seen when it is flushed, and when it is written
@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_a_reader_that_is_gone(monkeypatch, command, size):
    monkeypatch.setattr(command, "run", lambda options: print("x" * size) or 0)
    assert without_reader([command.__name__.rpartition(".")[2]]) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["--version"]], ids=" ".join)
def test_help_for_a_reader_that_is_gone(arguments):
    assert without_reader(arguments) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_interruption(monkeypatch, capsys, command):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert main([command.__name__.rpartition(".")[2]]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.parametrize("name", NAMES)
def test_verbose(monkeypatch, name):
    shown = []
    monkeypatch.setattr(_start, "show_logs", lambda: shown.append(name))
    monkeypatch.setattr(COMMANDS[NAMES.index(name)], "run", lambda options: 0)
    assert main([name]) == 0 and not shown
    assert main([name, "--verbose"]) == 0 and shown == [name]
