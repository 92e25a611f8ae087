"""Errors of the library in the words of the command line."""

import re
import sys

EXPECTED = (ValueError, TypeError, OSError, RuntimeError)  # what the library raises where what it was given is wrong

_SPOKEN = (
    (r"Write None to keep values for the whole stack instead of chunk by chunk", "Write 'none' for no chunks"),
    (r"^blocks_per_ckpt must", "--blocks-per-ckpt must"),
    (r"(got -?\d+) of type int\b", r"\1"),
    (r"\btime=True\b", "--time"),
    (r"\bcalibrate=True\b", "--calibrate"),
    (r"\bobjective='(\w+)'", r"--objective \1"),
    (r"\btarget='([^']*)'", r"--target \1"),
    (r"^budget=([\d.,]+ [KMGT]?i?B)", r"--budget \1"),
    (r"\bbudget='([^']*)'", r"--budget \1"),
    (r"^budget( is|:)", r"--budget\1"),
    (r"^policy=", "--policy "),
)


def fail(command: str, error: BaseException) -> int:
    """Says what is wrong, on stderr; the exit code for it."""
    print(f"jaxckpt {command}: {spoken(str(error))}", file=sys.stderr)
    return 2


def spoken(said: str) -> str:
    """
    >>> spoken("time=True runs the step, and 'h200' is only described; take target='attached'")
    "--time runs the step, and 'h200' is only described; take --target attached"
    """
    for python, command_line in _SPOKEN:
        said = re.sub(python, command_line, said)
    return said
