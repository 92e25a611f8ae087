"""`jaxckpt policies`: every policy by name with what it keeps, or the terms of one."""

import argparse
from typing import Any

from jaxckpt import policies


def add_parser(commands: Any) -> None:
    about = "list the policies by name with what each keeps for the backward pass, or describe one"
    parser = commands.add_parser("policies", help=about, description=about)
    parser.add_argument("policy", nargs="?", type=_known, help="a name or an expression, such as 'dots+save:q'")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print(policies.describe(options.policy))
    return 0


def _known(text: str) -> str:
    try:
        policies.get(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
