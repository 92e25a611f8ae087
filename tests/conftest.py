"""Strictness for every test: silent rank promotion is an error (and warnings are, see pyproject.toml)."""

import os

# Programs here are tiny and run once: compiling them is what takes the time. This halves it, and changes neither the
# order of operations nor what the compiler allocates.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Where JAX's CUDA plugin is installed without NVIDIA's libraries it refuses to load, and could not compile for a GPU that is
# only described.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# On a GPU the workers share it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

from jaxckpt import targets

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def h200():
    """A GPU that is not there; skips where JAX's CUDA plugin is not installed."""
    target = targets.get("h200")
    try:
        target.devices  # noqa: B018
    except RuntimeError as error:
        pytest.skip(str(error))
    return target
