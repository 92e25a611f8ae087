"""Where something comes of: the user's lines, wherever his code lies."""

import contextlib
import functools
import importlib.util
import os

import flax
import jax
import jax.numpy as jnp
import pytest

import jaxckpt
from jaxckpt import checkpoint_scan, explain
from jaxckpt.analysis import sources
from jaxckpt.models import transformer


@pytest.mark.parametrize("package", [jax, flax, jaxckpt])
def test_the_packages_own_files_are_libraries(package):
    assert sources.is_in_library(os.path.join(os.path.dirname(package.__file__), "inner", "file.py"))


def test_files_of_python_that_stand_between_are_libraries():
    assert all(map(sources.is_in_library, (contextlib.__file__, functools.__file__, "<frozen runpy>", "<string>")))


def test_models_are_user_code():
    assert not sources.is_in_library(transformer.__file__)


FOLDERS = ["jax", "flax", "jaxlib", "jaxckpt"]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("path", ["/home/me/{}/model.py", "/home/me/{}/tests/model.py", "/home/me/{}-project/model.py"])
def test_folders_of_the_same_name_are_user_code(folder, path):
    assert not sources.is_in_library(path.format(folder))


BLOCK = """
import jax, jax.numpy as jnp

@jax.jit
def helper(x):
    return jnp.where(x > 0, jnp.sin(x), x)

def block(w, x):
    return x + helper(x @ w)
"""


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_of_a_block_in_such_a_folder(tmp_path, folder):
    file = tmp_path / folder / "mine.py"
    file.parent.mkdir()
    file.write_text(BLOCK)
    spec = importlib.util.spec_from_file_location(f"mine_in_{folder}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = explain(checkpoint_scan(module.block, policy="everything"), jnp.ones((2, 3, 3)), jnp.ones((2, 3)))
    computed = [value.source for value in found.values if value.op != "input"]
    assert computed and all(source.startswith("mine.py:") for source in computed)


def test_a_warning_points_to_code_in_such_a_folder(tmp_path):
    file = tmp_path / "jax" / "warned.py"
    file.parent.mkdir()
    file.write_text(BLOCK + "\ndef run(stack, w, x):\n    return stack(w, x)\n")
    spec = importlib.util.spec_from_file_location("warned", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stack = checkpoint_scan(lambda w, x: x * w, stages="auto")
    with pytest.warns(UserWarning, match="nothing to cut") as caught:
        module.run(stack, jnp.ones((2, 3)), jnp.ones(3))
    assert caught[0].filename == str(file)
