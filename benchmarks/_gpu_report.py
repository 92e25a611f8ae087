"""The tables of `on_gpu.py`, made of the files in a folder and of nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _gpu_list import CROPS, LONG_STEP, PLAN, REFERENCE, TORCH, Measurement, measurements, next_crop
from _journal import read

Row = dict[str, Any]
GIB = 2**30
INTRODUCTION = """## On a GPU

`on_gpu.py` measures in one call of nine minutes what only a GPU can tell; the next call goes on where one has stopped."""
WAITS = "**This waits for a GPU: no run on one has been made yet.**"
_PEAKS = """#### (a) Predicted and real peaks

Predicted: compiled for this GPU by its name. Real: the allocator's, in a process of its own. Seconds: of its last step."""
_GRADIENTS = """#### (b) Gradients of what offloads

The largest difference from the plain loop's, relative to its largest entry, in float64."""
_RACES = """#### (c) Seconds of a step

In turns; ratio to per-block remat of the same rounds, for torch, which has a process of its own, of the medians. Peak: as
compiled, torch's its own. Model: the time model's seconds of the stack. Loss: what differs from per-block remat's, of it."""
_CROPS = """#### (e) The largest crop that trains

A Pairformer of 48 blocks: one step was made, or failed."""
_RATES = """#### (f) The link to the host, and rates

Measured, beside what is published."""
_BEFOREHAND = """### Compiled for {target} beforehand, with JAX {jax}

Nothing here was run. Seconds of compiling are of two cores; seconds of a step are the time model's. A call of nine minutes
makes the rows of its number, in this order."""
_CALL_SECONDS = 540
_START_SECONDS = 10  # of a process and of making the values, assumed
_STEPS = 10
_RATES_SECONDS = 20  # assumed
_TORCH_SLOWER, _TORCH_COMPILES = 2, 30  # than the time model's per-block step, and seconds for a block; assumed
_PROBES = 4  # crops of a search that begins where the compiled peaks say


def section(out: Path) -> str:
    """All tables of a folder; what there is no row of is left out, or said to wait for a GPU."""
    about, rows = read(out / "on_gpu.jsonl")
    said, compiled = read(out / "on_gpu_beforehand.jsonl")
    parts = [INTRODUCTION]
    if rows:
        parts += [_place(about, rows), *_results(rows)]
    if not rows or about.get("dry_run"):
        parts.insert(1, WAITS)
    if compiled:
        parts += _beforehand(said, compiled)
    return "\n\n".join(parts)


def _place(about: Row, rows: dict[str, Row]) -> str:
    named = [f"{name} {value}" for name, value in about.items() if name not in ("device", "dry_run") and value]
    places = [f"{name} {row[name]}" for row in rows.values() for name in ("driver", "machine", "python") if row.get(name)]
    named = ", ".join(dict.fromkeys([*named, *places]))
    return f"### {about['device']}{' (a dry run: sizes are small)' * about['dry_run']}\n\n{named}"


def _results(rows: dict[str, Row]) -> Iterator[str]:
    tables = {"peak": _peaks, "gradients": _gradients, "race": _races, "crop": _crops, "rates": _rates}
    for kind, make in tables.items():
        if found := {key.partition("/")[2]: row for key, row in rows.items() if key.startswith(f"{kind}/")}:
            torch = {key.partition("/")[2]: row for key, row in rows.items() if key.startswith("torch/")}
            yield from make(found, torch) if kind == "race" else make(found)


def _peaks(rows: dict[str, Row]) -> Iterator[str]:
    yield _PEAKS
    yield _table(
        ("stack", "setting", "predicted GiB", "real GiB", "real / predicted", "seconds"),
        ([workload, setting, *_peak_cells(row)] for (workload, setting), row in _split(rows)),
    )


def _peak_cells(row: Row) -> list[str]:
    if "error" in row:
        return [_cell(row["error"]), "", "", ""]
    real, predicted, seconds = row["real_bytes"], row["predicted_bytes"], f"{row['seconds']:.3g}"
    first = _gib(predicted) if predicted else "not compiled"
    if real is None:
        return [first, "not counted", "", seconds]
    if real <= row["bytes_before_the_step"]:  # XLA took more while it tuned the program
        return [first, f"at most {_gib(real)}", "", seconds]
    return [first, _gib(real), f"{real / predicted:.3f}" if predicted else "", seconds]


def _gradients(rows: dict[str, Row]) -> Iterator[str]:
    yield _GRADIENTS
    yield _table(
        ("setting", "loss", "gradients"),
        (
            [
                setting,
                *(
                    [_cell(row["error"]), ""]
                    if "error" in row
                    else [f"{row['error_of_loss']:.1e}", f"{row['error_of_gradients']:.1e}"]
                ),
            ]
            for (_, setting), row in _split(rows)
        ),
    )


def _races(rows: dict[str, Row], torch: dict[str, Row]) -> Iterator[str]:
    yield _RACES
    by_workload: dict[str, dict[str, Row]] = {}
    for (workload, setting), row in _split(rows):
        by_workload.setdefault(workload, {})[setting] = row
    for workload, raced in by_workload.items():
        others = {f"torch, {setting}": row for (name, setting), row in _split(torch) if name == workload}
        reference = raced.get(REFERENCE, {})
        title = next((row["title"] for row in raced.values() if "title" in row), workload)
        yield f"{title}:"
        yield _table(
            ("setting", "seconds", "ratio", "peak GiB", "model s", "loss"),
            ([name, *_race_cells(row, reference)] for name, row in sorted({**raced, **others}.items(), key=_by_seconds)),
        )
        yield _of_time_model(raced)


def _race_cells(row: Row, reference: Row) -> list[str]:
    if "error" in row:
        return [_cell(row["error"]), "", "", "", ""]
    ratio = row.get("ratio") or ("seconds" in reference and row["seconds"] / reference["seconds"])
    size = row.get("compiled_peak_bytes") or row.get("real_bytes")
    cells = [f"{row['seconds']:.4g}", f"{ratio:.2f}" if ratio else "", _gib(size) if size else ""]
    model = row.get("model_seconds")
    loss = f"{row['loss'] / reference['loss'] - 1:+.1e}" if "loss" in reference else ""
    return [*cells, f"{model:.3g}" if model else "", loss]


def _by_seconds(item: tuple[str, Row]) -> float:
    return item[1].get("seconds", float("inf"))


def _of_time_model(raced: dict[str, Row]) -> str:
    """(d): how the time model orders the settings, and what its choice costs."""
    from scipy.stats import spearmanr  # slow to import

    timed = {name: row for name, row in raced.items() if "seconds" in row and row.get("model_seconds")}
    if len(timed) < 3:
        return "(d) The time model: fewer than three settings to order."
    order, _ = spearmanr([row["model_seconds"] for row in timed.values()], [row["seconds"] for row in timed.values()])
    lines = [f"(d) The time model against these seconds: rank correlation {order:.2f} over {len(timed)} settings"]
    if PLAN in timed:
        plan = timed[PLAN]
        within = {name: r["seconds"] for name, r in timed.items() if r["compiled_peak_bytes"] <= plan["budget_bytes"]}
        if best := min(within, key=within.__getitem__, default=None):
            budget, cost = _gib(plan["budget_bytes"]), plan["seconds"] / within[best]
            lines.append(
                f"; the plan for {budget} GiB ({plan['plan_text']}) takes {cost:.2f} of the fastest within it, {best}"
            )
    return "".join(lines) + "."


def _crops(rows: dict[str, Row]) -> Iterator[str]:
    yield _CROPS
    lines = []
    for name in CROPS:
        of_search = [
            (int(setting.partition("/")[2]), row) for (_, setting), row in _split(rows) if setting.startswith(f"{name}/")
        ]
        tried = {tokens: row for tokens, row in of_search if "trains" in row}
        failed = [f"{tokens}: {_cell(row['error'])}" for tokens, row in of_search if "error" in row]
        trains = {tokens: row["trains"] for tokens, row in tried.items()}
        most = max((tokens for tokens in tried if trains[tokens]), default=None)
        said = "none yet" if most is None else f"{'at least ' * (next_crop(trains, most) is not None)}{most}"
        seconds = f"{tried[most]['seconds']:.3g}" if most else ""
        beyond = ", ".join(str(tokens) for tokens in sorted(tried) if not trains[tokens])
        lines.append([name, CROPS[name], said, seconds, "; ".join([beyond, *failed])])
    yield _table(("", "setting", "tokens", "seconds of its step", "did not train"), lines)


def _rates(rows: dict[str, Row]) -> Iterator[str]:
    yield _RATES
    lines = []
    for (_, setting), row in _split(rows):
        if "error" in row:
            lines.append([setting, _cell(row["error"]), ""])
        elif "to_host" in row:
            published = row["published_bandwidth"]
            lines += [
                [f"{way.replace('_', ' ')}, GB/s", _billions(row[way]), _billions(published)]
                for way in ("to_host", "from_host")
            ]
        else:
            lines += list(_calibrated(row["found"], row["published"] or {}))
    yield _table(("", "measured", "published"), lines)


def _calibrated(found: Row, published: Row) -> Iterator[list[str]]:
    yield ["memory, GB/s", _billions(found["memory_bandwidth"]), _billions(published.get("memory_bandwidth"))]
    for what in ("matmul_rate", "vector_rate"):
        for dtype, rate in found[what].items():
            yield [
                f"{what.partition('_')[0]} {dtype}, TFLOP/s",
                *(_billions(r and r / 1e3) for r in (rate, published.get(what, {}).get(dtype))),
            ]


# --- beforehand -----------------------------------------------------------------------------------------------------------


def _beforehand(about: Row, rows: dict[str, Row]) -> Iterator[str]:
    yield _BEFOREHAND.format(**about)
    lines = []
    planned = schedule(rows, about["memory_bytes"])
    for m, setting, seconds, call in planned:
        row = rows.get(f"compile/{m.workload}/{setting}", {})
        cells = [_cell(row.get("error", "")), ""]
        if size := row.get("predicted_bytes"):
            cells = [_gib(size) + ", too large" * (size > about["memory_bytes"]), f"{row['compile_seconds']:.0f}"]
        model = row.get("model_seconds")
        lines.append([str(call), m.kind, m.workload, setting, *cells, f"{model:.3g}" if model else "", f"{seconds:.0f}"])
    yield _table(("call", "kind", "workload", "setting", "peak GiB", "compile s", "step s", "estimated s"), lines)
    yield _calls(planned)


def schedule(rows: dict[str, Row], memory_bytes: int) -> list[tuple[Measurement, str, float, int]]:
    """Each row in order with its estimated seconds, and the number of the call of nine minutes that makes it.

    An estimate: what is not compiled yet is compiled, and each program makes ten steps, unless it is too large for the GPU.
    """
    fitting = {key: row for key, row in rows.items() if row.get("predicted_bytes", 0) <= memory_bytes}
    found: list[tuple[Measurement, str, float, int]] = []
    compiled: set[tuple[str, str]] = set()
    call, used, begun = 1, 0.0, None
    wanted = [(measurement, setting) for measurement in measurements(False) for setting in measurement.settings]
    for m, setting in wanted:
        seconds = _seconds_of(m, setting, fitting, compiled)
        start = 0.0 if begun == (m, call) else _START_SECONDS
        if used and used + start + seconds > _CALL_SECONDS:
            call, used, start = call + 1, 0.0, _START_SECONDS
        begun = m, call
        used += start + seconds
        found.append((m, setting, start + seconds, call))
    return found


def _seconds_of(m: Measurement, setting: str, rows: dict[str, Row], compiled: set[tuple[str, str]]) -> float:
    if m.kind == "rates":
        return _RATES_SECONDS / len(m.settings)
    if m.kind == "torch":
        step = rows.get(f"compile/{m.workload}/{REFERENCE}", {}).get("model_seconds") or 0.0
        return _STEPS * _TORCH_SLOWER * step + _TORCH_COMPILES * TORCH[setting][1]
    if m.kind == "crop":
        row = rows.get(f"compile/pairformer-768/{CROPS[setting]}", {})
        return _PROBES * (_START_SECONDS + row.get("compile_seconds", 0.0) + _STEPS * (row.get("model_seconds") or 0.0))
    row = rows.get(f"compile/{m.workload}/{setting}", {})
    compiling = 0.0 if (m.workload, setting) in compiled else row.get("compile_seconds", 0.0)
    compiled.add((m.workload, setting))
    step = row.get("model_seconds") or 0.0
    return compiling + (1 if m.kind == "peak" and step > LONG_STEP else _STEPS) * step


def _calls(found: Sequence[tuple[Measurement, str, float, int]]) -> str:
    lines = []
    for call in sorted({call for *_, call in found}):
        of_call = [(m, seconds) for m, _, seconds, c in found if c == call]
        names = ", ".join(dict.fromkeys(f"{m.kind} {m.workload}" for m, _ in of_call))
        lines.append(f"- call {call}, {sum(seconds for _, seconds in of_call):.0f} s: {names}")
    return "\n".join(lines)


# --- cells ----------------------------------------------------------------------------------------------------------------


def _split(rows: dict[str, Row]) -> Iterator[tuple[tuple[str, str], Row]]:
    for key, row in rows.items():
        workload, _, setting = key.partition("/")
        yield (workload, setting), row


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _billions(rate: float | None) -> str:
    return f"{rate / 1e9:,.3g}" if rate else ""


def _cell(text: str) -> str:
    return text.replace("|", "/")
