"""Strictness for every test: silent rank promotion is an error (and warnings are, see pyproject.toml)."""

import os
from importlib.metadata import version
from pathlib import Path

# Programs here are tiny and run once: compiling them is what takes the time. The first flag halves it, the second, which
# later versions do not have, makes it a third again. The order of operations and what the compiler allocates stay the same.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * version("jax").startswith("0.10."),
)

# Where JAX's CUDA plugin is installed without NVIDIA's libraries it refuses to load, and could not compile for a GPU that is
# only described.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# On a GPU the workers share it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest

from jaxckpt import targets

jax.config.update("jax_numpy_rank_promotion", "raise")


# The knobs, the policies, what a jaxpr says, values and gradients of every front end and engine.
QUICK = """policies analysis engine/test_layout.py engine/test_scan.py engine/test_schedule.py cli/test_main.py
cli/test_policies.py test_blocks.py test_conventions.py test_gradients.py test_metadata.py test_params.py test_progress.py
test_setting.py test_start.py""".split()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    folder = Path(__file__).parent
    for item in items:
        inside = item.path.is_relative_to(folder) and {item.path, *item.path.parents}
        if inside and any(folder / name in inside for name in QUICK) and not item.get_closest_marker("full"):
            item.add_marker("quick")


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
