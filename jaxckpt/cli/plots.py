"""Pictures of what a command found; matplotlib, the extra `plot`, is imported when one is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
FORMATS = (".svg", ".png", ".pdf")


class Point(NamedTuple):
    """A setting: what it costs and what it is called."""

    forward_runs: float
    peak_bytes: int
    label: str


class OfBatch(NamedTuple):
    """A size of the batch: what it costs, and examples per second by the time model."""

    size: int
    throughput: float
    peak_bytes: int
    forward_runs: float


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in memory without running more, from the fewest forward runs to the most."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (round(p.forward_runs, 6), p.peak_bytes)):
        if not front or point.peak_bytes < front[-1].peak_bytes:
            front.append(point)
    return front


def check_plot(path: Path) -> None:
    """Raises before the work, not after it: ValueError for a format that is not drawn, RuntimeError without matplotlib."""
    if path.suffix not in FORMATS:
        raise ValueError(f"--plot writes {', '.join(FORMATS)}; got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise RuntimeError('--plot needs matplotlib: pip install "jaxckpt[plot]", or pip install matplotlib') from None


def draw_memory_against_runs(
    path: Path,
    title: str,
    points: Mapping[str, Sequence[Point]],
    memory: Mapping[str, int],
    what: str = "all its memory",
) -> None:
    """Draws peak memory against forward runs, a colour for each target, with its Pareto front and its memory.

    Arguments:
        path: an `.svg`, `.png` or `.pdf` file.
        points: by the target's name, the settings measured there.
        memory: by the target's name, the bytes at which a line is drawn, 0 for none. what: they are.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes: Any = figure.subplots()
    for i, (name, settings) in enumerate(points.items()):
        colour = f"C{i}"
        front = pareto(settings)
        axes.plot(*_steps(front), color=colour, linewidth=1.5, label=f"{name}, Pareto front")
        others = [p for p in settings if p not in front]
        for group, filled in ((front, True), (others, False)):
            axes.scatter(
                [p.forward_runs for p in group],
                [p.peak_bytes / GIB for p in group],
                facecolor=colour if filled else "none",
                edgecolor=colour,
                zorder=3,
            )
        if whole := memory[name]:
            axes.axhline(whole / GIB, color=colour, linestyle=":", label=f"{name}: {what}, {whole / GIB:.3g} GiB")
        for k, p in enumerate(sorted(settings) if i == 0 else []):  # neighbours' names above and below in turn
            place = (5, -11 if k % 2 else 4)
            axes.annotate(p.label, (p.forward_runs, p.peak_bytes / GIB), place, textcoords="offset points", fontsize=8)
    axes.set(
        title=title,
        xlabel="forward runs of a block per training step (1: nothing is run again)",
        ylabel="peak memory of one device, GiB",
        yscale="log",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _steps(front: Sequence[Point]) -> tuple[list[float], list[float]]:
    """The corners of the staircase through the front: until the next point is paid for, the one before is the best."""
    xs, ys = [], []
    for i, p in enumerate(front):
        if i:
            xs.append(p.forward_runs)
            ys.append(front[i - 1].peak_bytes / GIB)
        xs.append(p.forward_runs)
        ys.append(p.peak_bytes / GIB)
    return xs, ys


def draw_batches(path: Path, title: str, points: Sequence[OfBatch], budget: int | None) -> None:
    """Draws the throughput that the time model expects, and the peak, against the size of the batch; and the budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    throughput: Any = figure.subplots()
    memory = throughput.twinx()
    sizes = [p.size for p in points]
    throughput.plot(sizes, [p.throughput for p in points], "o-", color="C0", label="examples per second, by the time model")
    memory.plot(sizes, [p.peak_bytes / GIB for p in points], "s--", color="C1", label="peak")
    if budget is not None:
        memory.axhline(budget / GIB, color="C1", linewidth=1, label="budget")
    for p in points:
        runs, place = f"{p.forward_runs:.2f} runs", (p.size, p.throughput)
        throughput.annotate(runs, place, textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    throughput.set(xlabel="batch", ylabel="examples per second (the stacks alone)", title=title)
    throughput.set_ylim(0, 1.15 * max(p.throughput for p in points) or 1)
    memory.set_ylabel("GiB")
    memory.set_ylim(0, 1.15 * max(budget or 0, *(p.peak_bytes for p in points)) / GIB)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)
