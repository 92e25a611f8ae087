"""The guard against a compiler bug: offload through `lax.scan` gives wrong gradients on GPU before JAX 0.11.1.

XLA of JAX 0.10.2 and 0.11.0 burns the offsets of host slices into the program and counts them the wrong way round, so a
backward loop that asks for block 47, 46, ... is given block 0, 1, ... (openxla/xla#46231). Nothing fails; the gradients
are wrong. So a stack that offloads is refused when it is lowered for a GPU, present or described, and only then: the
same stack runs on a CPU, and forward passes, which offload nothing, run everywhere.

In a loop of the block's own no version compiles an offload for a GPU (XLA's INTERNAL error "Expected instruction to have
shape equal to", up to JAX 0.12.0.1): refused in the same way.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import Offloadable
from jax.extend.core import Primitive
from jax.extend.core.primitives import name_p
from jax.interpreters import ad, batching, mlir

from jaxckpt._setting import FIXED_IN
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import sources, tagging
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
    """Whether a policy has offloaded a value; lowering comes after differentiation, so it knows.

    Attributes:
        loop: that in the block where it does, if there is one.
    """

    offloaded = False

    def __init__(self, loop: str | None):
        self.loop = loop


class Guarded(NamedTuple):
    """Policies that are watched, and a function to pass the first and the last carry through, which refuses to lower."""

    keep: JaxPolicy
    carry_to_host: JaxPolicy
    mark: Callable[[list[Any]], list[Any]]


def loop_that_offloads(jaxpr: Any, keep: JaxPolicy) -> str | None:
    """The loop inside a block, by its source, in which `keep` offloads a value: XLA compiles no such loop for a GPU."""
    for eqn in jaxpr.eqns:
        inner = jx.inner_jaxprs(eqn)
        if eqn.primitive.name in ("scan", "while") and any(
            is_offloaded(e, keep) for part in inner for e in jx.equations(part)
        ):
            source = sources.source_of(eqn)
            return f"{eqn.primitive.name} at {source[0]}:{source[1]}" if source else eqn.primitive.name
        found = next(filter(None, (loop_that_offloads(part, keep) for part in inner)), None)
        if found is not None:
            return found
    return None


def is_offloaded(eqn: Any, keep: JaxPolicy) -> bool:
    """Whether `keep` offloads what an equation computes."""
    tag = tagging.tag_of(eqn)
    prim, params = (eqn.primitive, eqn.params) if tag is None else (name_p, {"name": tag})
    return isinstance(keep(prim, *(var.aval for var in eqn.invars), **params), Offloadable)


def guard_offload(
    keep: JaxPolicy, may_offload: bool, version: tuple[int, ...] = jax.__version_info__, loop: str | None = None
) -> Guarded:
    """Makes a stack that offloads refuse to be lowered for a GPU, where that is compiled wrongly or not at all.

    Arguments:
        version: of JAX; before `FIXED_IN` every offload through `lax.scan` is wrong.
        loop: the loop inside the block in which a value is offloaded, if one is.
    """
    if not may_offload or (version >= FIXED_IN and loop is None):
        return Guarded(keep, carry_to_host, list)
    watch = _Watch(loop)

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
    if watch.offloaded and watch.loop is not None:
        raise NotImplementedError(
            f"the policy offloads a value inside a loop of the block ({watch.loop}), and XLA compiles no offload in a loop "
            "inside the stack's loop for a GPU. Keep the value on the device ('save:NAMES' instead of 'offload:NAMES'), "
            "tag the loop's result instead, behind the loop, or leave it to offload_carry=True with engine='reversal'."
        )
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
