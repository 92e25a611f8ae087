"""The worked example of `docs/parity.md`, as a doctest."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="parity needs the extra 'test'")

import torch_ref.checkpointing

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


def test_the_page_runs():
    found = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert found.attempted > 10 and not found.failed


def test_the_references_own_example_runs():
    found = doctest.testmod(torch_ref.checkpointing)
    assert found.attempted and not found.failed
