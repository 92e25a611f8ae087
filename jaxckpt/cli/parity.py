"""`jaxckpt parity`: the three models in Flax and in PyTorch, the same numbers in, and how far the two are apart.

A short version of `tests/parity`. The reference, `torch_ref`, is part of a checkout and not of the installed package, and
torch is no dependency: both are looked for when the command runs.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxckpt._progress import Progress

# Torch's chunk size, and the settings of `checkpoint_scan` to compare with it.
CASES: dict[str, tuple[int, tuple[tuple[int | None, str], ...]]] = {
    "transformer": (3, ((None, "nothing"), (2, "save_qkv_proj"), (3, "dots"))),
    "pairformer": (2, ((None, "dots"), (2, "everything"))),
    "evoformer": (4, ((None, "nothing"), (1, "everything"))),
}
ROUNDING = 1.5  # how much larger than torch's an error in bf16 may be
COLUMNS = {"model": 11, "K": 4, "policy": 13, "dtype": 8, "values": 8, "gradients": 9, "at most": 16, "": 4}


class Row(NamedTuple):
    """One comparison: relative errors, and what they may be."""

    model: str
    blocks_per_ckpt: int | None
    policy: str
    dtype: str
    values: float
    gradients: float
    most: tuple[float, float]

    @property
    def passed(self) -> bool:
        return self.values <= self.most[0] and self.gradients <= self.most[1]


def add_parser(commands: Any) -> None:
    about = "compare values and gradients of the Flax models with a PyTorch reference; needs torch and a checkout"
    parser = commands.add_parser("parity", help=about, description=about)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the table; returns 1 where a row fails, 2 where torch or the reference is missing."""
    problem = find_problem()
    if problem:
        print(f"jaxckpt parity: {problem}", file=sys.stderr)
        return 2
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)  # more only wait for one another on tensors this small
    print(f"jax {jax.__version__}, torch {torch.__version__}\n")
    print(_line(COLUMNS))
    failed = 0
    to_come = [f"{model} in float64, {policy}" for model, (_, settings) in CASES.items() for _, policy in settings]
    to_come += [f"{model} in bfloat16" for model in CASES]
    with Progress("parity", len(to_come), "row") as progress:
        progress.doing(f"comparing {to_come.pop(0)}")
        for row in compare():
            *setting, values, gradients, most = row
            numbers = (f"{values:.1e}", f"{gradients:.1e}", " ".join(f"{bound:.1e}" for bound in most))
            progress.print(_line((*setting, *numbers, "pass" if row.passed else "FAIL")))
            progress.advance()
            if to_come:
                progress.doing(f"comparing {to_come.pop(0)}")
            failed += not row.passed
    print(
        "\nK: blocks_per_ckpt of the Flax stack; torch runs its own checkpoint_blocks with another. float64: the largest"
        "\ndifference from torch relative to the largest entry, dropout included. bfloat16: the distance from a float64 run,"
        f"\nin the mean over several problems; at most {ROUNDING} times torch's own."
    )
    return 1 if failed else 0


def find_problem() -> str | None:
    """What keeps the comparison from running, and what to do about it."""
    if importlib.util.find_spec("torch") is None:
        return 'torch is not installed: pip install "torch<2.14", or the extra: pip install -e ".[test]"'
    if importlib.util.find_spec("torch_ref") is None:
        return (
            "the reference, torch_ref, is not in the installed package: clone the repository, and run "
            "'python -m jaxckpt parity' in its folder"
        )
    return None


def compare() -> Iterator[Row]:
    """The rows, each as soon as it is known."""
    parity, problems = (importlib.import_module(f"torch_ref.{name}") for name in ("parity", "problems"))
    exact = parity.TOLERANCE["float64"]
    for model, (per_ckpt, settings) in CASES.items():
        posed = problems.problem(model, np.dtype("float64"), with_dropout=True)
        want = parity.run_torch(problems.torch_stack(model, posed), posed, per_ckpt)
        for knobs in settings:
            got = parity.run_flax(posed, blocks_per_ckpt=knobs[0], policy=knobs[1])
            yield Row(model, *knobs, "float64", *parity.errors(got, want), most=(exact, exact))
    for model, (per_ckpt, settings) in CASES.items():
        per_block, policy = settings[0]
        ours, theirs = problems.bfloat16_errors(model, problems.LENGTH, per_ckpt, blocks_per_ckpt=per_block, policy=policy)
        yield Row(model, per_block, policy, "bfloat16", *ours, most=tuple(ROUNDING * e for e in theirs))


def _line(cells: Any) -> str:
    widths = COLUMNS.values()
    return "  ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
