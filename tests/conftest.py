"""Strictness for every test: silent rank promotion is an error (and warnings are, see pyproject.toml)."""

import os

# Programs here are tiny and run once: compiling them is what takes the time. This halves it, and changes neither the
# order of operations nor what the compiler allocates.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
