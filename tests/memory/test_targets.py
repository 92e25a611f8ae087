"""Targets by name and by file, and the shapes that are placed on them."""

import os
import subprocess
import sys
from importlib import resources, util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt import targets

GPUS = [name for name in targets.names() if name not in ("attached", "cpu")]
H200 = (resources.files("jaxckpt.memory") / "gpus" / "h200.toml").read_text()


@pytest.mark.parametrize(
    "name", ["a100-40gb", "a100-80gb", "h100-pcie", "h100-sxm", "h200", "b200", "gb200", "rtx-a6000", "l40s"]
)
def test_the_gpus_people_rent_have_names(name):
    assert name in GPUS


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_compiles(name, h200):
    target = targets.get(name)
    assert target.devices[0].device_kind == target.gpu.description
    assert not target.is_present and target.memory_bytes == target.gpu.memory_bytes
    compiled = jax.jit(lambda x: jnp.tanh(x) @ x).lower(target.place(jnp.ones((64, 64)))).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == 64 * 64 * 4


@pytest.mark.parametrize("name", GPUS)
def test_facts_are_plausible(name):
    """Typing errors in the data: rates follow from cores, clocks and dtypes within bounds that hold for all GPUs."""
    gpu = targets._known(name)
    assert 2**35 < gpu.memory_bytes < 2**39
    assert 5e11 < gpu.memory_bandwidth < 1e13 and 1e10 < gpu.host_bandwidth < gpu.memory_bandwidth
    assert (
        gpu.matmul_rate["bfloat16"] == gpu.matmul_rate["float16"] > gpu.matmul_rate["float32"] > gpu.matmul_rate["float64"]
    )
    assert gpu.host_bandwidth <= gpu.link_bandwidth < gpu.memory_bandwidth and gpu.network_bandwidth > 2e10
    assert gpu.network_bandwidth <= gpu.link_bandwidth
    of_cores = 2 * gpu.cores * gpu.fpus_per_core * gpu.clock_ghz * 1e9
    assert of_cores == pytest.approx(gpu.vector_rate["float32"], rel=0.1)


def test_a_file_need_not_say_how_gpus_are_joined(tmp_path):
    path = tmp_path / "mine.toml"
    lines = (targets._DATA / "h200.toml").read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(("link", "network"))))
    gpu = targets.get(path).gpu
    assert gpu.link_bandwidth == gpu.network_bandwidth == gpu.host_bandwidth == 6.4e10


def test_present_devices():
    assert targets.get("cpu").devices == (jax.devices("cpu")[0],)
    attached = targets.get("attached")
    assert attached.is_present and attached.devices == (jax.devices()[0],)
    assert targets.get(attached) is attached


def test_several_devices(h200):
    assert len(targets.get("h200:8").devices) == 8
    assert len(targets.get("h200:16").devices) == 16
    assert targets.get("h200:8").devices == targets.get("h200:8").devices


def test_a_file_of_the_users_own(tmp_path, h200):
    path = tmp_path / "half.toml"
    path.write_text(H200.replace("NVIDIA H200", "Half an H200").replace("151_397_597_184", "75_000_000_000"))
    for given in (path, str(path), f"{path}:2"):
        target = targets.get(given)
        assert target.memory_bytes == 75_000_000_000
        assert {device.device_kind for device in target.devices} == {"Half an H200"}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda text: text.replace("cores = 132\n", ""), "does not say cores; see .*h200.toml"),
        (lambda text: "coars = 132\n" + text, "says coars, which"),
        (lambda text: text.replace("cores = 132", "cores = 0"), "cores = 0 is not a positive integer"),
        (lambda text: text.replace("cores = 132", "cores = true"), "cores = True is not a positive integer"),
        (lambda text: text.replace("cores = 132", "cores = 1.5"), "cores = 1.5 is not a positive integer"),
        (lambda text: text.replace("4.8e12", "'fast'"), "memory_bandwidth = 'fast' is not a positive number"),
        (lambda text: text.replace("4.94e14", "-1"), "matmul_rate = .* is not a table of rates by dtype"),
        (lambda text: text.replace('"9.0"', '"sm_90"'), "compute_capability = 'sm_90' is not of the form '9.0'"),
        (lambda text: text + "]", "is not TOML"),
        (lambda text: text.replace("4.8e12", "inf"), "memory_bandwidth = inf is not a positive number"),
        (
            lambda text: text.replace("float32 = 6.69e13", ""),
            "vector_rate has no rate for float32",
        ),
        (lambda text: text.replace('"NVIDIA H200"', "'a \"GPU\"'"), "is not a GPU's name"),
    ],
)
def test_wrong_files(tmp_path, change, said):
    path = tmp_path / "gpu.toml"
    path.write_text(change(H200))
    with pytest.raises(ValueError, match=said) as raised:
        targets.get(path)
    assert str(path) in str(raised.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(
        IsADirectoryError, match=r"names a file that cannot be read: Is a directory\. The GPUs known by name are"
    ):
        targets.get(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="names a file that cannot be read: No such file"):
        targets.get(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="is not a text file"):
        targets.get(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "name, said",
    [
        ("h20", "unknown target 'h20'; did you mean 'h200'.* There are attached, cpu, a100-40gb"),
        ("H100", "did you mean .*'h100-sxm'"),
        ("tpu", "unknown target 'tpu'.* There are"),
        ("", "unknown target ''"),
        ("h200:0", "after the colon stands the number of devices, as in 'h200:8'"),
        ("h200:", "after the colon"),
        ("h200:all", "after the colon"),
        ("cpu:99", "asks for 99 devices, and [0-9]+ are present"),
        ("h200:12", "12 GPUs are not whole hosts of 8"),
    ],
)
def test_wrong_names(name, said):
    with pytest.raises(ValueError, match=said):
        targets.get(name)


def test_what_is_no_name():
    with pytest.raises(TypeError, match="a target is a name, such as 'h200', or a file; got 8"):
        targets.get(8)


def test_placing_makes_shapes(h200):
    array = jnp.ones((4, 2), jnp.bfloat16)
    given = {
        "a": array,
        "n": np.ones(3, np.float32),
        "s": jax.ShapeDtypeStruct((2,), "int32"),
        "k": jax.random.key(0),
        "x": "no",
        "i": 3,
    }
    placed = h200.place(given)
    for name in ("a", "n", "s", "k"):
        assert isinstance(placed[name], jax.ShapeDtypeStruct)
        assert (placed[name].shape, placed[name].dtype) == (given[name].shape, given[name].dtype)
        assert placed[name].sharding == SingleDeviceSharding(h200.devices[0])
    assert placed["x"] == "no" and placed["i"] == 3
    assert h200.place(jnp.asarray(1.0)).weak_type == jnp.asarray(1.0).aval.weak_type


def test_pinned_host_memory(h200):
    host = SingleDeviceSharding(jax.devices("cpu")[0], memory_kind="pinned_host")
    given = jax.ShapeDtypeStruct((2,), "float32", sharding=host)
    assert targets.get("cpu").place(given).sharding.memory_kind == "pinned_host"
    with pytest.raises(ValueError, match=r"the argument \['m'\] lies in pinned host memory"):
        h200.place({"m": given})


def test_shardings_move_to_the_targets_devices(h200):
    eight = targets.get("h200:8")
    sharded = NamedSharding(targets.get("h200:4").mesh((2, 2), ("data", "model")), PartitionSpec("model"))
    given = jax.ShapeDtypeStruct((8, 2), "float32", sharding=sharded)
    placed = targets.get("a100-80gb:4").place(given)
    assert placed.sharding.spec == PartitionSpec("model") and dict(placed.sharding.mesh.shape) == {"data": 2, "model": 2}
    assert {d.device_kind for d in placed.sharding.device_set} == {"NVIDIA A100-SXM4-80GB"}
    with pytest.raises(
        ValueError, match=r"the argument \['w'\] lies on 4 devices, and target 'h200:8' has 8: use the target 'h200:4'"
    ):
        eight.place({"w": given})
    assert eight.place(jnp.ones(3)).sharding.is_fully_replicated
    with pytest.raises(ValueError, match="has 6 devices, target 'h200:8' has 8"):
        eight.mesh((2, 3), ("a", "b"))


def test_shardings_over_a_mesh_that_is_only_its_shape(h200):
    sharded = NamedSharding(AbstractMesh((4,), ("data",)), PartitionSpec("data"))
    placed = targets.get("h200:4").place(jax.ShapeDtypeStruct((8, 2), "float32", sharding=sharded))
    assert placed.sharding.shard_shape((8, 2)) == (2, 2)
    assert {d.device_kind for d in placed.sharding.device_set} == {"NVIDIA H200"}


def test_a_description_that_xla_does_not_take(tmp_path, h200):
    path = tmp_path / "gpu.toml"
    path.write_text(H200.replace("cores = 132", "cores = 99999999999"))
    with pytest.raises(ValueError, match="XLA does not take the description of 'NVIDIA H200'"):
        _ = targets.get(path).devices


class Untuned:
    """A program of which XLA knows no kernel without autotuning."""

    def __init__(self):
        self.asked = []

    def compile(self, compiler_options=None):
        self.asked.append(compiler_options)
        if compiler_options:
            raise jax.errors.JaxRuntimeError("INTERNAL: No supported config found for HLO: ...")
        return "compiled"


def test_what_cannot_be_compiled_without_autotuning_is_compiled_with_it(h200):
    described, present = Untuned(), Untuned()
    assert h200.compile(described) == "compiled" and len(described.asked) == 2
    assert targets.get("cpu").compile(present) == "compiled" and present.asked == [None]


def test_without_autotuning_sizes_are_the_same(h200):
    def loss(w, x):
        return jnp.sum(jax.nn.softmax(jnp.tanh(x @ w) @ w.T) ** 2)

    shapes = h200.place([jax.ShapeDtypeStruct((256, 512), jnp.bfloat16), jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)])
    lowered = jax.jit(jax.grad(loss)).lower(*shapes)
    quick, usual = (compiled.memory_analysis() for compiled in (h200.compile(lowered), lowered.compile()))
    assert quick.temp_size_in_bytes == usual.temp_size_in_bytes > 0


def test_the_target_of_devices(h200):
    assert targets.of_devices(h200.devices).name == "h200" and not targets.of_devices(h200.devices).is_present
    assert targets.of_devices(targets.get("h200:4").devices).name == "h200:4"
    assert targets.of_devices(jax.devices()).present == tuple(jax.devices())


RUN = """
import os
import jaxckpt
before = dict(os.environ)
try:
    print(jaxckpt.targets.get("h200").devices[0].device_kind)
except RuntimeError as error:
    print(error)
assert dict(os.environ) == before
"""


def run(**environment):
    wanted = {"JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"}
    clean = {key: value for key, value in os.environ.items() if key not in wanted}
    done = subprocess.run([sys.executable, "-c", RUN], env=clean | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(bool(list(Path("/dev").glob("nvidia[0-9]"))), reason="a GPU is present, so the plugin loads")
def test_what_mends_a_missing_or_refused_plugin():
    """And nothing in jaxckpt changes the environment."""
    if any(util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        assert "Set the environment variable JAX_PLATFORMS=cpu" in run()
        assert run(JAX_PLATFORMS="cpu") == run(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1") == "NVIDIA H200"
    else:
        assert 'pip install "jaxckpt[aot]"' in run()
