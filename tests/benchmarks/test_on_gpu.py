"""`benchmarks/on_gpu.py`: the dry run of everything, killed and started again, and the parts it is made of."""

import argparse
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


@pytest.mark.full  # two to three minutes on both cores
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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--beforehand", "h20O"), "h20O"),
        (("--minutes", "nan"), "no number of minutes"),
        (("--minutes", "-1"), "no number of minutes"),
    ],
)
def test_bad_options(tmp_path, args, said):
    code, _, err = run("--out", str(tmp_path), *args)
    assert code == 2 and said in err and "Traceback" not in err


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run("--out", str(tmp_path / "file"), "--dry-run")
    assert code == 2 and "is a file: name a folder" in err


class Call:
    """`OnDevice` without a machine: a process says what `says` says of the settings that it is asked for."""

    def __init__(self, monkeypatch, tmp_path, says):
        on_gpu = module("on_gpu")
        versions = {name: "1" for name in on_gpu._SAME_VERSIONS} | {"python": "3"}
        found = {"device": "cpu", "platform": "cpu", "target": None, "machine": "m", "limit": None, "versions": versions}
        self.asked = []

        def run_process(job, out, end):
            self.asked.append(job.settings)
            yield from says(job)

        def make():
            call = on_gpu.OnDevice(argparse.Namespace(out=tmp_path, dry_run=True, minutes=1))
            self.asked.clear()
            return call

        monkeypatch.setattr(on_gpu, "_about", lambda *_: found)
        monkeypatch.setattr(on_gpu, "run_process", run_process)
        monkeypatch.setattr(on_gpu, "measurements", lambda dry: [self.measurement])
        self.measurement = module("_gpu_list").Measurement("gradients", "small", ("a", "b", "c"))
        self.make = make


def test_a_process_that_dies_takes_one_row_with_it_which_the_next_call_tries_once_more(tmp_path, monkeypatch):
    def says(job):
        for setting in job.settings:
            yield [setting]
            if setting == "b":
                return  # died
            yield {"setting": setting}

    fake = Call(monkeypatch, tmp_path, says)
    call = fake.make()
    call.run()
    assert fake.asked == [("a", "b", "c"), ("c",)]
    assert "without a result" in call.journal.rows["gradients/small/b"]["error"]
    assert keys_in(tmp_path / "on_gpu.jsonl") == [f"gradients/small/{s}" for s in "abc"]
    fake.make().run()
    assert fake.asked == [("b",)]
    fake.make().run()
    assert fake.asked == []


def test_what_no_time_is_left_for_is_the_next_calls(tmp_path, monkeypatch):
    def says(job):
        yield from (
            {"setting": setting, **({"left": "for the next call"} if setting == "c" else {})} for setting in job.settings
        )

    fake = Call(monkeypatch, tmp_path, says)
    fake.make().run()
    assert fake.asked == [("a", "b", "c")]
    assert set(keys_in(tmp_path / "on_gpu.jsonl")) == {"gradients/small/a", "gradients/small/b"}
    fake.make().run()
    assert fake.asked == [("c",)]


def test_a_crop_that_fails_for_another_reason_says_nothing_of_memory(tmp_path, monkeypatch):
    fake = Call(monkeypatch, tmp_path, lambda job: [{"setting": job.settings[0], "error": "XlaRuntimeError: INTERNAL"}])
    fake.measurement = module("_gpu_list").Measurement("crop", "pairformer", ("ours",))
    fake.make().run()
    assert fake.asked == [("ours/512",)]
    assert "512: XlaRuntimeError" in module("_gpu_report").section(tmp_path)


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
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')\n")
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
    temporaries = {n: 3 * n**2 + 5 * n**3 for n in (384, 768, 1024)}
    rows = {
        f"compile/pairformer-{n}/stages": {"predicted_bytes": temporaries[n] + 10**9, "temp_bytes": temporaries[n]}
        for n in (384, 768)
    }
    assert programs.crop_guess("stages", rows, temporaries[1024] + 10**9 + 1) == 1024
    assert programs.crop_guess("stages", rows, temporaries[1024]) < 1024
    assert programs.crop_guess("stages", rows, 5) == programs.CROP_STEP
    assert programs.crop_guess("stages", {}, 1e9) == programs.crop_guess("stages", rows, None) == 512


def test_packed_cache_is_unpacked_elsewhere(tmp_path):
    cache = module("_gpu_cache")
    here, there = tmp_path / "here", tmp_path / "there"
    live = Path(cache.variables(here)["JAX_COMPILATION_CACHE_DIR"])
    live.mkdir(parents=True)
    for i in range(5):
        (live / f"program-{i}").write_bytes(os.urandom(4 * 2**20))
    (live / "too-large").write_bytes(os.urandom(17 * 2**20))
    assert cache.pack(here) == cache.pack(here) == 1
    parts = list(here.glob("cache-*.tar.gz"))
    assert len(parts) == 2 and all(part.stat().st_size < 16 * 2**20 for part in parts)
    there.mkdir()
    (there / "cache-9.tar.gz").write_bytes(parts[0].read_bytes()[:1000])  # cut off: what it holds is compiled again
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
    found = report.schedule(rows, memory_bytes=2**31)
    calls = [call for *_, call in found]
    assert calls == sorted(calls)
    for call in set(calls):
        assert sum(seconds for *_, seconds, c in found if c == call) <= 540
    of_race = [seconds for m, _, seconds, _ in found if (m.kind, m.workload) == ("race", "pairformer-384")]
    # Each makes ten steps, and six of twelve programs were compiled for their peaks.
    assert sum(of_race) - 12 * 10 - 6 * 30 in (10, 20)  # a process begins in one call or in two
    too_large = report.schedule(rows, memory_bytes=2**29)
    assert sum(seconds for m, _, seconds, _ in too_large if (m.kind, m.workload) == ("race", "pairformer-384")) == 10
