"""Rates of the attached device: measured once, kept, and taken by plans."""

import json

import pytest

from jaxckpt.analysis.cost import CPU
from jaxckpt.memory import targets
from jaxckpt.memory.calibrate import _key, cache_file, calibrate, rates_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_measured_once_and_kept():
    where = targets.get("cpu")
    assert rates_of(where) == CPU
    found = calibrate(where)
    assert found.memory_bandwidth > 1e8 and found.matmul_rate["float32"] > 1e8 and found.vector_rate["float32"] > 1e6
    assert rates_of(where) == found == calibrate(where)
    kept = json.loads(cache_file().read_text())
    ((key, _),) = kept.items()
    kept[key]["memory_bandwidth"] = 3.0
    cache_file().write_text(json.dumps(kept))
    assert calibrate(where).memory_bandwidth == 3.0
    assert calibrate(where, again=True).memory_bandwidth > 3.0


def test_a_file_that_is_none():
    where = targets.get("cpu")
    whole = CPU._asdict()
    wrong = [{}, {"memory_bandwidth": 1.0}, {**whole, "vector_rate": {}}, {**whole, "memory_bandwidth": "much"}, 3]
    cache_file().parent.mkdir(parents=True)
    for text in ["{", "[]", "null", *(json.dumps({_key(where): fields}) for fields in wrong)]:
        cache_file().write_text(text)
        assert rates_of(where) == CPU


def test_an_older_file():
    """Which does not have all that is published: that is not read off it anyway."""
    older = CPU._replace(memory_bandwidth=3.0)._asdict()
    for name in ("link_bandwidth", "network_bandwidth"):
        del older[name]
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(json.dumps({_key(targets.get("cpu")): {**older, "host_bandwidth": 5.0}}))
    assert rates_of(targets.get("cpu")) == CPU._replace(memory_bandwidth=3.0)


def test_described_targets():
    where = targets.get("h200")
    assert rates_of(where) == where.gpu
    with pytest.raises(ValueError, match="'h200' is only described"):
        calibrate(where)
