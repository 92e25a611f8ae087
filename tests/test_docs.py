"""The documentation is true: its Python blocks run, and its tables are complete."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from jaxckpt import policies
from jaxckpt.policies import registry
from jaxckpt.policies.builtin import builtins
from tests.conftest import QUICK

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def python_blocks():
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: block.start()].count("\n") + 1
            # Blank lines in front, so that a traceback tells the line of the page.
            found.append(pytest.param(page, "\n" * line + block[1], id=f"{page.relative_to(ROOT)}:{line}"))
    return found


@pytest.mark.parametrize("page, code", python_blocks())
def test_block_runs(page, code, monkeypatch, request):
    if 'targets.get("h200' in code:
        request.getfixturevalue("h200")
    if re.search(r"jax\.make_mesh\(\((8,|4, 2)\),", code):
        return run_on_eight_devices(page, code)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def run_on_eight_devices(page, code):
    """Simulated ones, which have to be asked for before JAX starts."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{page.name}: {done.stderr}"


def test_the_first_example_is_short_and_ends_early():
    start = README.index("```python")
    assert README[: README.index("```\n", start)].count("\n") < 35


@pytest.mark.parametrize(
    "command", ["pip install -e . && python -m jaxckpt demo", 'pip install -e ".[test]" && python -m pytest']
)
def test_the_two_commands_are_told(command):
    assert command in README.splitlines()


def test_every_policy_is_documented():
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`([^`]*)`", page))
    missing = {*builtins(), "save:NAMES", "except:NAMES", "offload:NAMES"} - told
    assert not missing
    assert set(builtins()) <= set(policies.names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_extra_is_told():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = set(re.findall(r"`(\w+)`", README.partition("## Extras")[2]))
    assert set(project["optional-dependencies"]) <= told


def test_benchmarks_that_readers_run_leave_what_is_committed_alone():
    for path in PAGES:
        for line in path.read_text().splitlines():
            if command := re.search(r"python benchmarks/\w+\.py[^`]*", line):
                assert " --out mine/results" in command[0], f"{path.name}: {command[0]}"


def test_the_quick_subset_is_told_and_there():
    assert "`python -m pytest -m quick`" in README
    assert [name for name in QUICK if not (ROOT / "tests" / name).exists()] == []
