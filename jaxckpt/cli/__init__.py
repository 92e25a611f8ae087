"""The command line, `jaxckpt` or `python -m jaxckpt`. One file per subcommand, each with `add_parser` and `run`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import jaxckpt
from jaxckpt import _start
from jaxckpt.cli import demo, explain, parity, plan, policies, report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Arguments:
        argv: the arguments after the program's name; by default those of the process.
    Returns:
        The exit code: 0; 1 where the command found something wrong, 2 where it needs what is not installed, 130 where it
        was interrupted, 141 where nobody reads its output any more.
    Raises:
        SystemExit: with code 2 for a usage error, with code 0 after `--help` and `--version`.
    """
    try:
        with _start.interruptible():
            code = _run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on, as in `jaxckpt explain | head`
        _drop_output()
        return 128 + signal.SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="jaxckpt", description=jaxckpt.__doc__)
    parser.add_argument("--version", action="version", version=f"jaxckpt {jaxckpt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, explain, report, plan, parity, policies):
        command.add_parser(commands)
    for subparser in commands.choices.values():
        subparser.add_argument("--verbose", action="store_true", help="also show what XLA logs while it compiles")
    try:
        options = parser.parse_args(argv)
    except SystemExit:
        sys.stdout.flush()  # of --help, for a reader that is gone
        raise
    if options.verbose:
        _start.show_logs()
    return options.run(options)


def _drop_output() -> None:
    """Points stdout and stderr nowhere where their readers are gone, or Python would complain at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
