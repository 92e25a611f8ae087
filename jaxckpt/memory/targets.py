"""Devices to compile for, by name; a GPU among them need not be in the machine.

JAX's CUDA plugin compiles for a GPU that is only described to it (`jax.experimental.topologies`), and the compiled program
tells the sizes of its buffers. The plugin alone is enough: `pip install "jax[cuda12-local]"`, without NVIDIA's libraries.
"""

import difflib
import functools
import importlib.util
import math
import os
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxckpt._leaves import is_shaped
from jaxckpt.flax.steps import holds_objects, split_objects

_DATA = resources.files("jaxckpt.memory") / "gpus"
PER_HOST = 8  # more GPUs than these are spread over hosts


@dataclass(frozen=True)
class Gpu:
    """Published facts about a GPU: one file of `jaxckpt/memory/gpus`, or a user's own of the same form.

    Sizes in bytes, bandwidths in bytes per second, rates in operations per second (a multiplication and an addition are
    two). A file need not say how GPUs are joined: then by the link to the host.
    """

    description: str  # as the device names itself: jax.devices()[0].device_kind
    compute_capability: str
    memory_bytes: int
    memory_bandwidth: float
    host_bandwidth: float  # to the host's memory, one direction
    l2_cache_bytes: int
    clock_ghz: float
    cores: int
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    matmul_rate: Mapping[str, float] = field(hash=False)  # by dtype
    vector_rate: Mapping[str, float] = field(hash=False)  # by dtype, outside the matrix units
    link_bandwidth: float = 0.0  # from one GPU to the others of a host, one direction
    network_bandwidth: float = 0.0  # from one GPU to other hosts, one direction

    def __post_init__(self) -> None:
        for name in ("link_bandwidth", "network_bandwidth"):
            object.__setattr__(self, name, getattr(self, name) or self.host_bandwidth)

    def _text(self) -> str:
        """The description that XLA reads (a `GpuTargetConfigProto`)."""
        major, minor = self.compute_capability.split(".")
        return f"""gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {self.threads_per_core}
  shared_memory_per_block: 49152  shared_memory_per_core: {self.shared_memory_per_core}
  shared_memory_per_block_optin: {self.shared_memory_per_block}
  core_count: {self.cores}  fpus_per_core: {self.fpus_per_core}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.memory_bandwidth)}  l2_cache_size: {self.l2_cache_bytes}  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.description}"
"""


@dataclass(frozen=True)
class Target:
    """Devices to compile for: `jaxckpt.targets.get(name)` makes one.

    Fields:
        name: what it was got by, such as "h200:8".
        count: the number of devices.
        gpu: facts about each of the devices; None for a CPU, and for a present GPU that has no file.
        present: the devices, if they are in the machine; none where they are only described.
    """

    name: str
    count: int
    gpu: Gpu | None = None
    present: tuple[Any, ...] = ()

    @property
    def is_present(self) -> bool:
        """Whether the devices are in the machine, so that they can be computed on."""
        return bool(self.present)

    @property
    def devices(self) -> tuple[Any, ...]:
        """JAX's devices.

        Raises:
            RuntimeError: the target is only described, and JAX's CUDA plugin is missing or was refused at start; the error
                says what mends it.
        """
        if self.present:
            return self.present
        assert self.gpu is not None
        return _described(self.gpu, self.count)

    @property
    def memory_bytes(self) -> int | None:
        """Bytes of memory of one device, as far as known: a present device tells what the process may use of it."""
        return self.memory_stats.get("bytes_limit") or (self.gpu.memory_bytes if self.gpu else None)

    @property
    def memory_stats(self) -> dict[str, Any]:
        """What a present device of this process tells of its memory; empty where it tells nothing."""
        own = (device for device in self.present if device.process_index == jax.process_index())
        return getattr(next(own, None), "memory_stats", dict)() or {}

    def mesh(self, shape: Sequence[int], axes: Sequence[str], axis_types: Any = None) -> Mesh:
        """A mesh of the target's devices, for the shardings of what is compiled for it.

        >>> get("cpu").mesh((1,), ("data",)).shape["data"]
        1
        """
        if math.prod(shape) != self.count:
            number = math.prod(shape)
            raise ValueError(f"a mesh of shape {tuple(shape)} has {number} devices, target {self.name!r} has {self.count}")
        return Mesh(np.array(self.devices).reshape(shape), axes, axis_types=axis_types)

    def place(self, tree: Any) -> Any:
        """`tree` with shapes in place of its arrays, lying on the target; nothing is copied or allocated there.

        Arrays sharded over a mesh of as many devices keep their mesh, with the target's devices in it; all others are
        whole on every device, of that mesh if there is one. What lies in pinned host memory stays there. Leaves that are not
        arrays are left alone.

        Raises:
            ValueError: an array is sharded over another number of devices, or lies in pinned host memory where the target
                is only described (JAX would count it as the device's).
        """

        if holds_objects(tree):
            parts, whole = split_objects(tree)
            return whole(self.place(parts))
        meshes = (getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in jax.tree.leaves(tree))
        mesh = next((mesh for mesh in meshes if mesh is not None and mesh.size == self.count > 1), None)

        def shape_of(path: Any, leaf: Any) -> Any:
            if not is_shaped(leaf):
                return leaf
            aval = jax.typeof(leaf)
            sharding = self._sharding(getattr(leaf, "sharding", None), jax.tree_util.keystr(path), mesh)
            return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)

        return jax.tree_util.tree_map_with_path(shape_of, tree)

    def compile(self, lowered: Any, options: Mapping[str, Any] | None = None) -> Any:
        """Compiles what was lowered for the target, for the sizes of its buffers where the target is only described.

        There nothing can be timed, and XLA takes the first kernel of each product, after it has compiled all of them:
        without autotuning it takes the same one, in two thirds of the time. But it has no first one for some: a program with
        such is compiled again, as usual.

        Arguments:
            options: XLA's, beside.
        """
        options = dict(options or {})
        if not self.is_present:
            try:
                return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0, **options})
            except jax.errors.JaxRuntimeError as error:
                if "config" not in str(error):  # "No supported config found for HLO: ..."
                    raise
        return lowered.compile(compiler_options=options or None)

    def _sharding(self, given: Any, path: str, of_others: Any) -> Any:
        kind = given.memory_kind if given is not None and given.memory_kind == "pinned_host" else None
        if kind and not self.is_present:
            raise ValueError(
                f"the argument {path} lies in pinned host memory, which JAX cannot describe for a GPU that is not there: "
                "its bytes would be counted as the device's. Leave it out of what is measured, or measure on an attached GPU"
            )
        mesh = getattr(given, "mesh", None)
        number = 1 if given is None else mesh.size if mesh is not None else len(given.device_set)
        if number == 1 and not (self.count == 1 and isinstance(given, NamedSharding)):
            around = jax.sharding.get_mesh()  # of jax.set_mesh
            if not around.empty and set(around.devices.flat) == set(self.devices):
                return NamedSharding(around, PartitionSpec(), memory_kind=kind)
            if of_others is not None:
                mesh = self.mesh(of_others.axis_sizes, of_others.axis_names, of_others.axis_types)
                return NamedSharding(mesh, PartitionSpec(), memory_kind=kind)
            if self.count == 1:
                return SingleDeviceSharding(self.devices[0], memory_kind=kind)
            return NamedSharding(self.mesh((self.count,), ("devices",)), PartitionSpec(), memory_kind=kind)
        if number != self.count:
            raise ValueError(
                f"the argument {path} lies on {number} devices, and target {self.name!r} has {self.count}: use the "
                f"target '{self.name.partition(':')[0]}:{number}', or pass the shapes of what one device holds"
            )
        if not isinstance(given, NamedSharding):
            raise ValueError(f"the argument {path} is sharded by a {type(given).__name__}; a target takes NamedSharding")
        mesh = self.mesh(given.mesh.axis_sizes, given.mesh.axis_names, given.mesh.axis_types)
        return NamedSharding(mesh, given.spec, memory_kind=kind)


def names() -> list[str]:
    """The targets that `get` knows: "attached", "cpu" and the GPUs by name.

    >>> "h200" in names()
    True
    """
    return ["attached", "cpu", *gpu_names()]


def gpu_names() -> list[str]:
    """The GPUs that `get` knows by name, present or not."""
    return sorted(Path(entry.name).stem for entry in _DATA.iterdir() if entry.name.endswith(".toml"))


def get(target: "str | os.PathLike[str] | Target") -> Target:
    """The target of a name, or of a file.

    Arguments:
        target: a GPU's name ("h200"), with the number of devices ("h200:8"); a file with a GPU's description, `.toml`
            like those of `jaxckpt/memory/gpus`; "attached", JAX's default device; "cpu"; or a `Target`.

    Raises:
        ValueError: an unknown name, a number that is not one, a file that does not describe a GPU.
        FileNotFoundError: no such file.

    >>> get("cpu").is_present
    True
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, (str, os.PathLike)):
        raise TypeError(f"a target is a name, such as 'h200', or a file; got {target!r}")
    text = os.fspath(target)
    name, colon, number = re.fullmatch(r"(.*?)(?:(:)([^/\\]*))?", text, re.DOTALL).groups()  # pyright: ignore
    if colon and not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(f"target {text!r}: after the colon stands the number of devices, as in '{name}:8'")
    count = int(number or 1)
    if name in ("attached", "cpu"):
        return _present(text, jax.devices("cpu") if name == "cpu" else jax.devices(), count)
    gpu = _read(Path(name)) if name.endswith(".toml") or os.sep in name else _known(name)
    if count > PER_HOST and count % PER_HOST:
        raise ValueError(f"target {text!r}: {count} GPUs are not whole hosts of {PER_HOST}; use a multiple of {PER_HOST}")
    return Target(text, count, gpu)


def of_devices(devices: Collection[Any]) -> Target:
    """The target that these devices of JAX's are, in the machine or only described."""
    ordered = tuple(sorted(devices, key=lambda device: device.id))
    kind = ordered[0].device_kind
    if type(ordered[0].client).__name__ != "CompileOnlyPyClient":  # of a described device
        return _present("attached" if ordered[0] in jax.devices() else kind, ordered, len(ordered))
    name = name_of(kind)
    if name is None:
        raise ValueError(f"the arguments lie on {kind}, of which nothing is known here; name a target")
    return get(name if len(ordered) == 1 else f"{name}:{len(ordered)}")


def gpu_named(description: str) -> Gpu | None:
    """Facts about a GPU by what it calls itself (`device.device_kind`), if there is a file about it."""
    name = name_of(description)
    return None if name is None else _known(name)


def name_of(description: str) -> str | None:
    """The name of the GPU that calls itself so (`device.device_kind`), if there is a file about it."""
    return next((name for name in gpu_names() if _known(name).description == description), None)


def _present(text: str, devices: Sequence[Any], count: int) -> Target:
    if count > len(devices):
        raise ValueError(f"target {text!r} asks for {count} devices, and {len(devices)} are present: {devices}")
    gpu = gpu_named(devices[0].device_kind) if devices[0].platform == "gpu" else None
    return Target(text, count, gpu, present=tuple(devices[:count]))


@functools.cache
def _known(name: str) -> Gpu:
    if name not in gpu_names():
        near = difflib.get_close_matches(name.lower(), names(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise ValueError(
            f"unknown target {name!r}{hint} There are {', '.join(names())}, each with a number of devices ('h200:8') if "
            "wanted, and files with a description ('my-gpu.toml')"
        )
    return _parse((_DATA / f"{name}.toml").read_text(), name)


def _read(path: Path) -> Gpu:
    try:
        return _parse(path.read_text(), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file; a target's description is TOML") from None
    except OSError as error:
        raise type(error)(
            f"target {str(path)!r} names a file that cannot be read: {error.strerror}. The GPUs known by name are "
            f"{', '.join(gpu_names())}"
        ) from None


def _parse(text: str, where: str) -> Gpu:
    example = "see jaxckpt/memory/gpus/h200.toml for one that is complete"
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where} is not TOML: {error}; {example}") from None
    wanted = {f.name: f.type for f in fields(Gpu)}
    if missing := sorted(wanted.keys() - found.keys() - {"link_bandwidth", "network_bandwidth"}):
        unknown = f", and {', '.join(extra)} is not known" if (extra := sorted(found.keys() - wanted.keys())) else ""
        raise ValueError(f"{where} does not say {', '.join(missing)}{unknown}; {example}")
    if unknown := sorted(found.keys() - wanted.keys()):
        raise ValueError(f"{where} says {', '.join(unknown)}, which no GPU has here; {example}")
    for key, kind in ((key, kind) for key, kind in wanted.items() if key in found):
        allowed = {int: (int,), float: (int, float), str: (str,)}.get(kind, (dict,))  # pyright: ignore[reportArgumentType]
        values = found[key].values() if isinstance(found[key], dict) else [found[key]]
        positive = all(isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 2**62 for v in values)
        if not isinstance(found[key], allowed) or (kind is not str and not positive):
            raise ValueError(f"{where}: {key} = {found[key]!r} is not {_WANTED.get(kind, 'a table of rates by dtype')}")
        if isinstance(found[key], dict) and "float32" not in found[key]:
            raise ValueError(f"{where}: {key} has no rate for float32, which stands for dtypes that it does not name")
    if re.search(r'["\\\n]', found["description"]):
        raise ValueError(f"{where}: description = {found['description']!r} is not a GPU's name")
    if not re.fullmatch(r"\d+\.\d+", found["compute_capability"]):
        raise ValueError(f"{where}: compute_capability = {found['compute_capability']!r} is not of the form '9.0'")
    return Gpu(**found)


_WANTED: dict[Any, str] = {int: "a positive integer", float: "a positive number", str: "a string"}


@functools.cache
def _described(gpu: Gpu, count: int) -> tuple[Any, ...]:
    per_host = min(count, PER_HOST)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=gpu.description,
            topology=f"1x{count // per_host}x{per_host}",
            target_config=gpu._text(),
        )
    except NotImplementedError:
        raise RuntimeError(_no_plugin()) from None
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"XLA does not take the description of {gpu.description!r}: {error}") from None
    return tuple(topology.devices)


def _no_plugin() -> str:
    said = "compiling for a GPU that is not in the machine needs JAX's CUDA plugin, "
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return said + (
            "which is installed, but JAX did not load it because it found no NVIDIA GPU or no CUDA libraries. Set the "
            "environment variable JAX_PLATFORMS=cpu (or JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, to use a GPU beside it) before "
            "the process first asks JAX for a device"
        )
    return said + 'which is not installed: pip install "jaxckpt[aot]", or pip install "jax[cuda12-local]" (Linux)'
