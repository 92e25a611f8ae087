"""The guard against a compiler bug: offload through `lax.scan` gives wrong gradients on GPU before JAX 0.11.1.

XLA of JAX 0.10.2 and 0.11.0 burns the offsets of host slices into the program and counts them the wrong way round, so a
backward loop that asks for block 47, 46, ... is given block 0, 1, ... (openxla/xla#46231). Nothing fails; the gradients
are wrong. So a stack that offloads is refused when it is lowered for a GPU, present or described, and only then: the
same stack runs on a CPU, and forward passes, which offload nothing, run everywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import Offloadable
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxckpt._setting import FIXED_IN
from jaxckpt.policies.grammar import JaxPolicy, everything, nothing

CARRY = "jaxckpt_carry"  # the tag of what enters a chunk, where that goes to the host

carry_to_host: JaxPolicy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[CARRY], offload_src="device", offload_dst="pinned_host"
)


def to_host(arrays: list[Any]) -> list[Any]:
    """To host memory, in loops that take slices of it; `jax.vmap` would make gathers of those, which read no host memory."""
    return jax.device_put([unbatched_p.bind(array) for array in arrays], jax.memory.Space.Host)


def to_device(arrays: list[Any]) -> list[Any]:
    """Back from host memory."""
    return jax.device_put(arrays, jax.memory.Space.Device)


class _Watch:
    """Whether a policy has offloaded a value; lowering comes after differentiation, so it knows."""

    offloaded = False


class Guarded(NamedTuple):
    """Policies that are watched, and a function to pass the first and the last carry through, which refuses to lower."""

    keep: JaxPolicy
    carry_to_host: JaxPolicy
    mark: Callable[[list[Any]], list[Any]]


def guard_offload(keep: JaxPolicy, may_offload: bool, version: tuple[int, ...] = jax.__version_info__) -> Guarded:
    """Makes a stack that offloads through `lax.scan` refuse to be lowered for a GPU, on the versions that get it wrong."""
    if version >= FIXED_IN or not may_offload:
        return Guarded(keep, carry_to_host, list)
    watch = _Watch()

    def watched(policy: JaxPolicy) -> JaxPolicy:
        if policy in (everything, nothing):  # known by identity elsewhere
            return policy

        def asked(prim, *avals, **params):
            answer = policy(prim, *avals, **params)
            watch.offloaded |= isinstance(answer, Offloadable)
            return answer

        return asked

    # The first carry is what the whole program depends on; the last one catches differentiation outside jit, where the
    # first is already lowered when the policy is asked.
    def mark(leaves: list[Any]) -> list[Any]:
        return [guard_p.bind(leaves[0], watch=watch), *leaves[1:]] if leaves else leaves

    return Guarded(watched(keep), watched(carry_to_host), mark)


def _refuse(ctx, x, *, watch):
    if watch.offloaded:
        raise NotImplementedError(
            f"JAX {jax.__version__} compiles offload through lax.scan to wrong gradients on GPU (openxla/xla#46231). "
            "Use JAX 0.11.1 or later, or a policy that keeps the values on the device ('save:NAMES' instead of "
            "'offload:NAMES'); offload_carry=True is right on every version with engine='reversal'."
        )
    return [x]


def _impl(x, *, watch):
    with jax.disable_jit(False):
        return jax.jit(lambda x: guard_p.bind(x, watch=watch))(x)


guard_p = Primitive("jaxckpt_offload_guard")
guard_p.def_impl(_impl)
guard_p.def_abstract_eval(lambda x, *, watch: x)
ad.deflinear2(guard_p, lambda ct, x, *, watch: [ct])
batching.defvectorized(guard_p)
mlir.register_lowering(guard_p, lambda ctx, x, *, watch: [x])
for _platform in ("cuda", "rocm"):
    mlir.register_lowering(guard_p, _refuse, platform=_platform)


def _refuse_batches(*args, **params):
    raise NotImplementedError(
        "offload_carry=True with engine='reversal' does not work under jax.vmap, only on whole batches: give the carry the "
        "batch axis and write jax.vmap inside of the block, or engine='scan', or leave offload_carry away"
    )


unbatched_p = Primitive("jaxckpt_unbatched")
unbatched_p.def_impl(lambda x: x)
unbatched_p.def_abstract_eval(lambda x: x)
ad.deflinear2(unbatched_p, lambda ct, x: [ct])
batching.primitive_batchers[unbatched_p] = _refuse_batches
mlir.register_lowering(unbatched_p, lambda ctx, x: [x])
