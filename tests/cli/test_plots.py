import pytest

from jaxckpt.cli.plots import OfBatch, Point, draw_batches, draw_memory_against_runs, pareto

GIB = 2**30
FRONT = [Point(1.0, 90 * GIB, "everything"), Point(1.5, 20 * GIB, "dots"), Point(2.0, 9 * GIB, "nothing")]
BEATEN = [
    Point(1.5, 21 * GIB, "same runs, more memory"),
    Point(1.7, 20 * GIB, "more runs, same memory"),
    Point(3.0, 10 * GIB, "x"),
]


def test_pareto():
    assert pareto(BEATEN + FRONT[::-1]) == FRONT
    assert pareto([]) == []


@pytest.mark.parametrize("suffix, begins", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_picture(tmp_path, suffix, begins):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"front.{suffix}"
    draw_memory_against_runs(path, "48 blocks", {"h200": FRONT + BEATEN, "cpu": FRONT}, {"h200": 141 * GIB, "cpu": 0})
    assert path.read_bytes().startswith(begins)


def test_the_picture_names_axes_units_settings_and_the_memory(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    path = tmp_path / "front.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        draw_memory_against_runs(path, "48 blocks", {"h200": FRONT + BEATEN}, {"h200": 141 * GIB})
    said = path.read_text()
    for text in ("48 blocks", "GiB", "forward runs of a block", "dots", "h200, Pareto front", "141 GiB"):
        assert text in said


def test_batches(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    points = [OfBatch(8, 900.0, 20 * GIB, 1.0), OfBatch(16, 1000.0, 40 * GIB, 1.5)]
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        draw_batches(tmp_path / "batches.svg", "48 blocks", points, 48 * GIB)
        draw_batches(tmp_path / "one.svg", "48 blocks", [OfBatch(8, 0.0, 20 * GIB, 1.0)], None)  # of no throughput
    said = (tmp_path / "batches.svg").read_text()
    for text in ("48 blocks", "GiB", "1.50 runs", "examples per second", "peak", "budget"):
        assert text in said
    assert "budget" not in (tmp_path / "one.svg").read_text()
