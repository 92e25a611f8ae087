"""The package never imports torch, and the reference only when a command asks for it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxckpt

PACKAGE = Path(jaxckpt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_import_of_torch_in_the_source(file):
    roots = {name.partition(".")[0] for name in imported(ast.parse(file.read_text(encoding="utf-8")))}
    assert not roots & {"torch", "torch_ref"}


def test_importing_everything_does_not_import_torch():
    modules = [".".join(("jaxckpt", *file.relative_to(PACKAGE).with_suffix("").parts)) for file in FILES]
    names = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    load = f"import sys, importlib; [importlib.import_module(name) for name in {names}]"
    code = f"{load}; assert not {{'torch', 'torch_ref'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
