"""Whether a program may be split over several devices, which the compiler does and a jaxpr need not say."""

import jax

# How many devices a target has for which a program is traced; None where it is for those that are here.
described = jax.make_user_context(None)


def may_be_several() -> bool:
    """Whether there are several: in the mesh that is set, on the target that is described, or here."""
    return jax.sharding.get_abstract_mesh().size > 1 or (described.value or jax.device_count()) > 1
