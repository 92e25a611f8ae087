"""The command line, `jaxckpt` or `python -m jaxckpt`. One file per subcommand, each with `add_parser` and `run`."""

import argparse
import sys
from collections.abc import Sequence

import jaxckpt
from jaxckpt.cli import demo, explain, parity, plan, policies, report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Arguments:
        argv: the arguments after the program's name; by default those of the process.
    Returns:
        The exit code: 0; 1 where the command found something wrong, 2 where it needs what is not installed, 130 where it
        was interrupted.
    Raises:
        SystemExit: with code 2 for a usage error, with code 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(prog="jaxckpt", description=jaxckpt.__doc__)
    parser.add_argument("--version", action="version", version=f"jaxckpt {jaxckpt.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, explain, report, plan, parity, policies):
        command.add_parser(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
