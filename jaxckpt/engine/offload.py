"""The guard against a compiler bug: offload through `lax.scan` gives wrong gradients on GPU before JAX 0.11.1.

XLA of JAX 0.10.2 and 0.11.0 burns the offsets of host slices into the program and counts them the wrong way round, so a
backward loop that asks for block 47, 46, ... is given block 0, 1, ... (openxla/xla#46231). Nothing fails; the gradients
are wrong. So a stack that offloads is refused when it is lowered for a GPU, present or described, and only then: the
same stack runs on a CPU, and forward passes, which offload nothing, run everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import Offloadable
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxckpt.policies import Policy
from jaxckpt.policies.grammar import JaxPolicy

FIXED_IN = (0, 11, 1)


class _Watch:
    """Whether a policy has offloaded a value; lowering comes after differentiation, so it knows."""

    offloaded = False


def guard_offload(
    keep: JaxPolicy, policy: Policy, version: tuple[int, ...] = jax.__version_info__
) -> tuple[JaxPolicy, Callable[[list[Any]], list[Any]]]:
    """`keep`, watched, and a function to pass the first and the last carry through, which refuses to lower for a GPU."""
    if version >= FIXED_IN or not policy.may_offload:
        return keep, lambda leaves: leaves
    watch = _Watch()

    def watched(prim, *avals, **params):
        answer = keep(prim, *avals, **params)
        watch.offloaded |= isinstance(answer, Offloadable)
        return answer

    # The first carry is what the whole program depends on; the last one catches differentiation outside jit, where the
    # first is already lowered when the policy is asked.
    return watched, lambda leaves: [guard_p.bind(leaves[0], watch=watch), *leaves[1:]] if leaves else leaves


def _refuse(ctx, x, *, watch):
    if watch.offloaded:
        raise NotImplementedError(
            f"JAX {jax.__version__} compiles offload through lax.scan to wrong gradients on GPU (openxla/xla#46231). "
            "Use JAX 0.11.1 or later, or a policy that keeps the values on the device ('save:NAMES' instead of "
            "'offload:NAMES')."
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
