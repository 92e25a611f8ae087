"""Where benchmarks write their tables."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The module, and as its own folder of results `benchmarks/results` below a folder that has a README, too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("_results")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Mine\n")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.chdir(tmp_path)
    return module


@pytest.mark.parametrize("out", ["mine", "mine/results", "."])
def test_another_folder_gets_a_file_of_its_own(results, out):
    for text in ("first", "second"):
        results.write_section("race", text, Path(out))
    assert Path(out, "race.md").read_text() == "second\n"
    assert [str(path) for path in Path().rglob("README.md")] == ["README.md"] and Path("README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("out", ["benchmarks/results", "benchmarks/../benchmarks/results"])
def test_the_folder_of_results_has_its_sections_in_the_readme_above(results, out):
    readme = Path("benchmarks/README.md")
    readme.write_text("# Benchmarks\n\n<!-- race -->\n\nold\n\n<!-- end of race -->\n\nlast\n")
    results.write_section("race", "new", Path(out))
    assert readme.read_text() == "# Benchmarks\n\n<!-- race -->\n\nnew\n\n<!-- end of race -->\n\nlast\n"
    results.write_section("other", "more", Path(out))
    assert readme.read_text().endswith("last\n\n<!-- other -->\n\nmore\n\n<!-- end of other -->\n")
    assert not any(Path(out).iterdir()) and Path("README.md").read_text() == "# Mine\n"
