"""What an array's type says of the devices it lies on, and zeros of a type."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxckpt.analysis.jaxpr import varying


def is_explicit(aval: Any) -> bool:
    """Whether the sharding is part of the type."""
    return any(axis.name == "Explicit" for axis in aval.sharding.mesh.axis_types)


def zeros(aval: Any, count: int | None = None) -> jax.Array:
    """Zeros of a type; with `count`, with an axis of that length in front."""
    front = () if count is None else (count,)
    made = jnp.zeros((*front, *aval.shape), aval.dtype)
    if is_explicit(aval):  # `reshard`, because outside of `jax.set_mesh` `zeros` of JAX 0.12 forgets what it is told
        spec = PartitionSpec(*([None] * len(front)), *aval.sharding.spec)
        made = jax.sharding.reshard(made, NamedSharding(aval.sharding.mesh, spec))
    return lax.pcast(made, tuple(axes), to="varying") if (axes := varying(aval)) else made
