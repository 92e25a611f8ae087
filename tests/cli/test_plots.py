import pytest

from jaxckpt.cli.plots import Point, draw_memory_against_runs, pareto

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
