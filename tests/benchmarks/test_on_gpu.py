"""`benchmarks/on_gpu.py`: the dry run of everything, killed and started again, and the parts it is made of."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = {"peak", "gradients", "rates", "race", "crop", "torch"}


def module(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


def start(*args, **variables):
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), *args]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*args, **variables):
    process = start(*args, **variables)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def keys_in(path):
    """Of all lines, so that what is made twice counts twice."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [found["key"] for line in lines if "key" in (found := json.loads(line))]


def test_dry_run_goes_on_after_a_kill_and_does_nothing_twice(tmp_path):
    first = start("--out", str(tmp_path), "--dry-run")
    results = tmp_path / "on_gpu.jsonl"
    while len(keys_in(results)) < 3:
        assert first.poll() is None, first.communicate()
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    before = results.read_text()
    with results.open("a") as file:
        file.write('{"key": "cut o')  # as when the disk was reached by half a line

    code, out, err = run("--out", str(tmp_path), "--dry-run")

    assert code == 0, err
    assert results.read_text().startswith(before)
    keys = keys_in(results)
    assert {count for count in Counter(keys).values()} == {1}
    assert {key.split("/")[0] for key in keys} == KINDS
    rows = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    assert not [row for row in rows if "error" in row and row["key"].split("/")[0] != "torch"]
    gradients = [row for row in rows if row["key"].startswith("gradients/")]
    assert all(row["error_of_gradients"] < 1e-12 for row in gradients)
    for row in rows:
        if row["key"].startswith("race/"):
            assert len(row["all_seconds"]) >= 5 and row["model_seconds"] > 0
    assert {row["trains"] for row in rows if row["key"].startswith("crop/")} == {True, False}
    assert out.strip().endswith((tmp_path / "on_gpu.md").read_text().strip())
    for part in "abcdef":
        assert f"({part})" in out
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size < 16 * 2**20 for path in files)

    code, table, _ = run("--out", str(tmp_path), "--table")
    assert code == 0
    assert table.strip() == (tmp_path / "on_gpu.md").read_text().strip()
    assert out.strip().endswith(table.strip())


def test_without_a_gpu_says_so(tmp_path):
    code, _, err = run("--out", str(tmp_path), JAX_PLATFORMS="cpu")
    assert code == 2
    assert "no GPU: JAX finds 'cpu' only" in err and "--dry-run" in err and "--beforehand" in err


def test_a_folder_from_elsewhere_is_refused(tmp_path):
    about = {"device": "NVIDIA H200", "dry_run": False}
    (tmp_path / "on_gpu.jsonl").write_text(json.dumps({"about": about}) + "\n")
    code, _, err = run("--out", str(tmp_path), "--dry-run")
    assert code == 2
    assert "device: NVIDIA H200 there, cpu here" in err and "--out" in err


def test_two_calls_do_not_share_a_folder(tmp_path):
    import fcntl

    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        code, _, err = run("--out", str(tmp_path), "--dry-run")
    finally:
        os.close(folder)
    assert code == 2 and "another call works in" in err


def test_without_results_the_section_waits(tmp_path):
    assert "waits for a GPU" in module("_gpu_report").section(tmp_path)


def test_a_package_that_is_missing_is_a_row(tmp_path, monkeypatch):
    on_gpu, job = module("on_gpu"), module("_gpu_job")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = job.Job("torch", "transformer", ("eager, K=1",), True, "cpu", time.time() + 60, str(tmp_path), {})
    assert list(on_gpu.run_process(asked, tmp_path, time.time() + 60)) == [
        {"setting": "eager, K=1", "error": "not installed"}
    ]


@pytest.mark.parametrize("edge", [64, 100, 512, 640, 1000, 4000])
@pytest.mark.parametrize("guess", [64, 512, 1024])
def test_search_for_the_largest_crop(edge, guess):
    programs = module("_gpu_list")
    tried = {}
    while (tokens := programs.next_crop(tried, guess)) is not None:
        assert tokens not in tried and tokens % programs.CROP_STEP == 0
        tried[tokens] = tokens <= edge
    assert max(tokens for tokens, trains in tried.items() if trains) == edge // 64 * 64
    assert len(tried) <= 16


def test_no_crop_trains():
    programs = module("_gpu_list")
    tried = {}
    while (tokens := programs.next_crop(tried, 512)) is not None:
        tried[tokens] = False
    assert min(tried) == programs.CROP_STEP


def test_guess_of_a_crop_follows_the_compiled_peaks():
    programs = module("_gpu_list")
    rows = {f"compile/pairformer-{n}/stages": {"predicted_bytes": 3 * n**2 + 5 * n**3} for n in (384, 768)}
    assert programs.crop_guess("stages", rows, 3 * 1024**2 + 5 * 1024**3) in (960, 1024)
    assert programs.crop_guess("stages", {}, 1e9) == programs.crop_guess("stages", rows, None) == 512


def test_packed_cache_is_unpacked_elsewhere(tmp_path):
    cache = module("_gpu_cache")
    here, there = tmp_path / "here", tmp_path / "there"
    live = Path(cache.variables(here)["JAX_COMPILATION_CACHE_DIR"])
    live.mkdir(parents=True)
    for i in range(5):
        (live / f"program-{i}").write_bytes(os.urandom(4 * 2**20))
    (live / "too-large").write_bytes(os.urandom(17 * 2**20))
    assert cache.pack(here) == 1
    parts = list(here.glob("cache-*.tar.gz"))
    assert len(parts) == 2 and all(part.stat().st_size < 16 * 2**20 for part in parts)
    there.mkdir()
    for part in parts:
        part.rename(there / part.name)
    cache.unpack(there)
    unpacked = Path(cache.variables(there)["JAX_COMPILATION_CACHE_DIR"])
    assert {f.name for f in unpacked.iterdir()} == {f"program-{i}" for i in range(5)}
    assert (unpacked / "program-3").read_bytes() == (live / "program-3").read_bytes()


def test_schedule_counts_a_program_once():
    report = module("_gpu_report")
    rows = {
        f"compile/{workload}/{setting}": {"compile_seconds": 30.0, "model_seconds": 1.0, "predicted_bytes": 2**30}
        for workload, setting in module("_gpu_list").programs()
    }
    found = report.schedule(rows)
    assert [call for *_, call in found] == sorted(call for *_, call in found)
    of_race = next(seconds for m, seconds, _ in found if (m.kind, m.workload) == ("race", "pairformer-384"))
    # Five of its nine programs were compiled for their peaks.
    assert of_race == pytest.approx(6 + 9 * 10 + 5 * 30)
