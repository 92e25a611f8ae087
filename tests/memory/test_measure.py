"""Sizes of compiled programs, on the CPU and for GPUs that are not there."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt import checkpoint_scan, measure, targets
from jaxckpt.memory.measure import Measurement

W, X = jnp.ones((6, 32, 32)) / 32, jnp.ones((16, 32))
stack = checkpoint_scan(lambda w, x: x + jnp.tanh(x @ w))


def step(w, x):
    value, gradient = jax.value_and_grad(lambda w: stack(w, x).sum())(w)
    return w - 0.1 * gradient, value


SIZES = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "alias_size_in_bytes")


def sizes(found):
    return found.argument_bytes, found.output_bytes, found.temp_bytes, found.aliased_bytes


@pytest.mark.parametrize("donate", [(), (0,)])
@pytest.mark.parametrize("name", ["cpu", "h200", "a100-40gb"])
def test_equals_memory_analysis(name, donate, request):
    if name != "cpu":
        request.getfixturevalue("h200")
    jitted = jax.jit(step, donate_argnums=donate)
    compiled = jitted.lower(*targets.get(name).place((W, X))).compile().memory_analysis()
    found = measure(jitted, W, X, target=name)
    assert sizes(found) == tuple(getattr(compiled, size) for size in SIZES)
    assert found.peak_bytes == sum(sizes(found)[:3]) - found.aliased_bytes
    assert (found.aliased_bytes > 0) == bool(donate)
    assert found.hlo_instructions > 20 and found.compile_seconds > 0
    assert found.target == name and found.jax_version == jax.__version__


def test_where_the_arguments_are():
    default = measure(step, W, X)
    assert sizes(default) == sizes(measure(step, W, X, target="attached"))
    assert default.seconds is None and default.runtime_peak_bytes is None


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_shapes_do_for_arrays(name, request):
    if name == "h200":
        request.getfixturevalue("h200")
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (W, X)]
    assert sizes(measure(step, *shapes, target=name)) == sizes(measure(step, W, X, target=name))
    assert sizes(measure(step, np.asarray(W), np.asarray(X), target=name)) == sizes(measure(step, W, X, target=name))


def test_nothing_is_allocated_for_a_target(h200):
    """A step over a pebibyte of parameters: no array of it can be anywhere."""
    huge = jax.ShapeDtypeStruct((2**20, 2**14, 2**14), jnp.float32)
    before = {id(array) for array in jax.live_arrays()}
    found = measure(lambda w, x: stack(w, x), huge, jax.ShapeDtypeStruct((1, 2**14), jnp.float32), target="h200")
    assert [a for a in jax.live_arrays() if id(a) not in before and a.size > 100] == []
    assert found.argument_bytes > 2**50
    assert found.excess_bytes == found.peak_bytes - h200.memory_bytes > 0
    assert "does not fit:" in str(found)


def test_constants_and_static_arguments(h200):
    jitted = jax.jit(lambda x, kind: jnp.tanh(x) + X if kind == "tanh" else x, static_argnums=1)
    assert measure(jitted, X, "tanh", target="h200").output_bytes == X.nbytes
    assert measure(jitted, X, "tanh", time=True).seconds > 0


def test_bytes_of_one_device_of_several(h200):
    four = targets.get("h200:4")
    sharded = NamedSharding(four.mesh((4,), ("data",)), PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharded)
    found = measure(step, W, x, target=four)
    assert found.argument_bytes == W.nbytes + x.size * 4 // 4


@pytest.mark.parametrize("donate", [(), (0,)])
def test_seconds(donate):
    w = jnp.array(W)
    found = measure(jax.jit(step, donate_argnums=donate), w, X, target="cpu", time=True)
    assert found.seconds > 0
    assert not w.is_deleted()


def test_prints_and_dumps():
    found = measure(step, W, X, target="cpu")
    assert str(found).startswith("peak 0.1 MiB on cpu (cpu), JAX ")
    assert json.loads(json.dumps(found.to_json()))["peak_bytes"] == found.peak_bytes


def test_a_time_needs_arrays_and_a_device(h200):
    with pytest.raises(ValueError, match=r"'h200' is only described; take target='attached'"):
        measure(step, W, X, target="h200", time=True)
    for target in (None, "cpu"):
        with pytest.raises(ValueError, match="time=True runs the program and needs arrays"):
            measure(step, jax.ShapeDtypeStruct(W.shape, W.dtype), X, target=target, time=True)


def test_a_program_that_does_not_fit_is_reported_and_not_run(monkeypatch):
    monkeypatch.setattr(targets.Target, "memory_bytes", 1000)
    monkeypatch.setattr("jaxckpt.memory.measure._run", lambda *_: pytest.fail("was run"))
    found = measure(step, W, X, target="cpu", time=True)
    assert found.excess_bytes == found.peak_bytes - 1000 and found.seconds is None


def test_without_a_target_it_is_measured_where_the_arguments_are(h200):
    there = SingleDeviceSharding(h200.devices[0])
    w, x = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there) for a in (W, X))
    found = measure(step, w, x)
    assert (found.target, found.device, found.memory_bytes) == ("h200", "NVIDIA H200", h200.memory_bytes)
    assert found.temp_bytes == measure(step, W, X, target="h200").temp_bytes
    with pytest.raises(ValueError, match=r"the arguments lie on different devices: args\[0\] on .*H200.*; args\[1\] on"):
        measure(step, w, jax.device_put(X, jax.devices("cpu")[0]))


def test_a_mesh_that_the_function_names(h200):
    mesh = targets.get("h200:2").mesh((2,), ("data",))
    on_mesh = jax.jit(step, in_shardings=(NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))))
    found = measure(on_mesh, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (W, X)))
    assert (found.target, found.device, found.memory_bytes) == ("h200:2", "NVIDIA H200", h200.memory_bytes)


def test_the_state_of_a_module_is_an_argument():
    found = measure(nnx.Linear(32, 32, rngs=nnx.Rngs(0)), jax.ShapeDtypeStruct((16, 32), "float32"), target="cpu")
    assert found.argument_bytes == 4 * (32 * 32 + 32 + 16 * 32)


def test_what_does_not_trace_says_what_it_was_given():
    def bad(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        measure(bad, X)
    assert "jaxckpt.measure traced bad with shapes in place of values: (float32[16,32],)" in "".join(raised.value.__notes__)


def test_unknown_targets_are_refused_before_anything_is_traced():
    with pytest.raises(ValueError, match="did you mean 'h200'"):
        measure(lambda: 1 / 0, target="h2000")


TWO_DEVICES = """
import jax, jax.numpy as jnp
from jaxckpt import measure
args = [jax.device_put(jnp.ones(3), device) for device in jax.devices()]
try:
    measure(jnp.add, *args)
except ValueError as error:
    print(error)
assert measure(jnp.add, *args, target="cpu", time=True).seconds > 0
"""


def test_arguments_on_different_devices():
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lie on different devices: args[0] on ['cpu:0']; args[1] on ['cpu:1']. Put them on the same" in done.stdout


@pytest.mark.parametrize("peak, unit", [(40 * 2**30, "GiB"), (2**30, "MiB")])
def test_one_unit_in_a_sum(peak, unit):
    sizes = dict(temp_bytes=peak - 3 * 2**20, argument_bytes=2**21, output_bytes=2**21, aliased_bytes=2**20)
    rest = dict(host_bytes=0, compile_seconds=1.0, hlo_instructions=1)
    found = Measurement("h200", "H200", **sizes, **rest, memory_bytes=30 * 2**30)
    for line in str(found).splitlines()[: 3 if found.excess_bytes else 2]:
        assert set(re.findall(r"[KMG]iB", line)) <= {unit}, line
    said = [float(number.replace(",", "")) for number in re.findall(r"([\d.,]+) [MG]iB", str(found))]
    assert said[0] == pytest.approx(said[1] + said[2] + said[3] - said[4], abs=0.02)
