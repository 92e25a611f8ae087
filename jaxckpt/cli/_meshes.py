"""Our models on several devices: `--mesh data=4,tensor=2` and `--fsdp`.

`data` splits the batch, and with `--fsdp` the parameters too, each along the longest axis that is left. `tensor` splits
heads and hidden channels as Megatron-LM does (Shoeybi et al. 2019): the outputs of a product, and the inputs of the one that
projects back.
"""

import argparse
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxckpt.cli._stacks import Call
from jaxckpt.memory.targets import Target

AXES = ("data", "tensor")
_BACK = ("out", "out_proj", "wo")  # the modules of our models that project back


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXES",
        help="split --model over the devices of a target such as h200:8: data=8 splits the batch, which has an example for "
        "each at least, and data=4,tensor=2 heads and hidden channels too",
    )
    parser.add_argument("--fsdp", action="store_true", help="split the parameters over data, too")


def mesh_axes(text: str) -> dict[str, int]:
    """What `--mesh` takes: `data=4,tensor=2` as a dict, in that order."""
    parts = [part.partition("=") for part in text.split(",")]
    names = [name for name, _, _ in parts]
    if any(name not in AXES or not (size.isascii() and size.isdecimal()) or int(size) < 1 for name, _, size in parts) or len(
        {*names}
    ) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mesh such as data=8, tensor=8 or data=4,tensor=2")
    return {name: int(size) for name, _, size in parts}


def check_mesh(options: argparse.Namespace, targets: Iterable[Target]) -> None:
    """Raises ValueError where the mesh is of something else than `--model`, or has not the devices of every target."""
    if options.mesh is None:
        if options.fsdp:
            raise ValueError(
                "--fsdp splits parameters over the axis data of --mesh: write --mesh data=8 --fsdp, for a target of 8"
            )
        return
    if options.stack is not None or getattr(options, "step", None) is not None:
        raise ValueError(
            "--mesh is of --model: arguments of your own stack or step say by their shardings how they are split"
        )
    if options.fsdp and "data" not in options.mesh:
        raise ValueError(f"--fsdp splits parameters over the axis data, and --mesh has {' and '.join(options.mesh)} only")
    size = math.prod(options.mesh.values())
    for target in targets:
        if target.count != size:
            raise ValueError(
                f"--mesh has {size} devices and --target {target.name} has {target.count}; write --target "
                f"{target.name.partition(':')[0]}:{size}"
            )


def on_mesh(call: Call, options: argparse.Namespace, target: Target) -> Call:
    """The stack with its arguments split over a mesh of the target's devices, if the options name one."""
    axes: dict[str, int] | None = options.mesh
    if axes is None:
        return call
    mesh = target.mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    variables, *carry = call.args
    of_batch = PartitionSpec("data" if "data" in axes else None)
    placed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _sharded(leaf, mesh, of_parameter(path, leaf, axes, options.fsdp)), variables
    )
    return call._replace(args=(placed, *(_sharded(leaf, mesh, of_batch) for leaf in carry)))


def of_parameter(path: Any, leaf: Any, axes: dict[str, int], fsdp: bool) -> PartitionSpec:
    """How a parameter of our models is split; axis 0 is the blocks', and stays whole."""
    spec: list[str | None] = [None] * len(leaf.shape)
    module, name = ([None, None] + [getattr(key, "key", None) for key in path])[-2:]
    if "tensor" in axes and name == "kernel" and leaf.ndim == 3:
        axis = 1 if module in _BACK else 2
        spec[axis] = "tensor" if leaf.shape[axis] % axes["tensor"] == 0 else None
    if fsdp:
        free = [i for i in range(1, leaf.ndim) if spec[i] is None and leaf.shape[i] % axes["data"] == 0]
        if free:
            spec[max(free, key=lambda i: leaf.shape[i])] = "data"
    return PartitionSpec(*spec)


def _sharded(leaf: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
