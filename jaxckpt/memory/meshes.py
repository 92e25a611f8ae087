"""Programs that name devices of their own, compiled for a target that has others.

Arguments are put on the target's devices (`Target.place`). A step may name devices too: by the mesh of `jax.set_mesh`, which
is exchanged here for one of the target's devices, or inside of it, where nothing can be exchanged and we say what to write.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt._leaves import is_shaped
from jaxckpt.engine.devices import described
from jaxckpt.flax.steps import map_leaves
from jaxckpt.memory.targets import Target

_OTHER_DEVICES = ("incompatible devices", "Memory kinds passed", "should match the aval mesh")
_OTHER_SHARDING = "does not match the sharding on the respective arg"


@contextlib.contextmanager
def mesh_on(where: Target) -> Iterator[None]:
    """For tracing for a target: exchanges the mesh of `jax.set_mesh`, if there is one, for the same of the target's devices.

    Raises:
        ValueError: it has another number of devices.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or set(mesh.devices.flat) <= set(where.devices):
        exchanged = contextlib.nullcontext()
    elif mesh.size == where.count:
        exchanged = jax.set_mesh(where.mesh(mesh.axis_sizes, mesh.axis_names, mesh.axis_types))
    else:
        raise ValueError(
            f"jax.set_mesh has a mesh of {mesh.size} devices, and target {where.name!r} has {where.count}: use the target "
            f"'{where.name.partition(':')[0]}:{mesh.size}'"
        )
    with exchanged, described(where.count):
        yield


def on_set_mesh(leaf: Any) -> Any:
    """A shape that lies whole on every device of the mesh of `jax.set_mesh`, of an array that nobody sharded over one."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty or isinstance(getattr(leaf, "sharding", None), NamedSharding):
        return leaf
    aval = jax.typeof(leaf)
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding, weak_type=aval.weak_type)


def lowered_on(where: Target, program: Any, name: str, args: Any) -> tuple[Any, Any]:
    """`program.lower(*args)`, its arguments on the target, and these.

    Raises:
        ValueError: the program names other devices than the target's.
    """
    with mesh_on(where):
        placed = where.place(args)
        try:
            return program.lower(*placed), placed
        except ValueError as error:
            if any(said in str(error) for said in _OTHER_DEVICES):
                raise ValueError(_remedy(where, name)) from error
            if _OTHER_SHARDING not in str(error):
                raise
        free = map_leaves(_free, args, placed)  # as the program was jitted to have them
        return program.lower(*free), free


def _free(leaf: Any, placed: Any) -> Any:
    """A shape that lies nowhere, of an array that nobody sharded."""
    if not is_shaped(leaf) or isinstance(getattr(leaf, "sharding", None), NamedSharding):
        return placed
    return jax.ShapeDtypeStruct(placed.shape, placed.dtype, weak_type=placed.weak_type)


def _remedy(where: Target, name: str) -> str:
    return (
        f"{name} names devices that are not those of target {where.name!r}, by a mesh in with_sharding_constraint, "
        "shard_map, device_put or the shardings of jax.jit. Make that mesh of the target's devices, "
        f"jaxckpt.targets.get({where.name!r}).mesh(({where.count},), ('data',)); or name only its axes, "
        "jax.sharding.PartitionSpec('data'), under jax.set_mesh(mesh), whose devices are exchanged for the target's"
    )
