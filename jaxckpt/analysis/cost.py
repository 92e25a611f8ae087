"""What running an equation again costs: a roofline, the larger of operations over rate and bytes over bandwidth.

| family | operations | bytes |
|---|---|---|
| `dot_general`, `conv_general_dilated` | 2 per product, at the matrix units' rate for the dtype | inputs and outputs |
| views (`reshape`, `broadcast_in_dim`, `name`, ...) | none | none |
| fusible (elementwise, reductions, `select_n`, `iota`, ...) | none that bound it | a quarter: XLA fuses them |
| others known (`sort`, `gather`, `cumsum`, random bits, ...) | none that bound it | inputs and outputs |
| calls (`jit`, `custom_jvp_call`, `custom_vjp_call`, `remat`) | those of what is called | those of what is called |
| `scan` | length times its body | length times its body |
| `cond` | its most expensive branch | the same |
| `while` | its body once, marked as a guess | the same |
| collectives (`psum`, `all_gather`, ...) | none | what a ring of many devices sends, over the link to other devices |
| everything else (custom calls, kernels) | none | inputs and outputs, marked as a guess |

Rates and bandwidths are those of the target (`jaxckpt.targets`), or `REFERENCE`. Collectives are seen here where the block
names them, inside of `shard_map`; those that the compiler puts in are told by `jaxckpt.memory.split`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxckpt.analysis.jaxpr import inner_jaxprs, nbytes, variables

_VIEWS = frozenset(
    """
    broadcast_in_dim copy_p expand_dims name opt_barrier optimization_barrier pvary reshape sharding_constraint squeeze
    stop_gradient
    """.split()
)
_FUSIBLE = frozenset(
    """
    abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh bitcast_convert_type cbrt ceil clamp
    concatenate convert_element_type copy cos cosh device_put div dynamic_slice dynamic_update_slice eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt imag integer_pow iota is_finite le lgamma log log1p logistic lt max min mul ne neg
    nextafter not one_minus_square or pad population_count pow real reduce_and reduce_max reduce_min reduce_or
    reduce_precision reduce_prod reduce_sum rem rev round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh slice split sqrt square sub tan tanh transpose xor
    """.split()
)
_OTHERS = frozenset(
    """
    approx_top_k clz cumlogsumexp cummax cummin cumprod cumsum digamma fft gather random_bits random_fold_in random_gamma
    random_seed random_split random_unwrap random_wrap reduce_window_max reduce_window_min reduce_window_sum scatter
    scatter_add scatter-add sort threefry2x32 top_k
    """.split()
)
_CALLS = frozenset(
    """
    jit pjit closed_call core_call remat2 checkpoint custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr
    call_hi_primitive shard_map
    """.split()
)
_SUMS = frozenset("psum psum_invariant pmax pmin".split())
_GATHERS = frozenset("all_gather all_gather_invariant all_gather_reduced reduce_scatter".split())
_PERMUTES = frozenset("ppermute pbroadcast".split())
_COLLECTIVES = _SUMS | _GATHERS | _PERMUTES | {"all_to_all", "ragged_all_to_all"}
FUSED = 0.25  # how much of a fusible equation's traffic remains
_DEAR = frozenset("dot_general conv_general_dilated scan while sort top_k approx_top_k fft".split())


class Rates(NamedTuple):
    """What the time model knows of a device: bytes per second, and operations per second by dtype.

    `host_bandwidth` is that of the link to the host's memory, one direction; `link_bandwidth` that to other devices of the
    host, `network_bandwidth` that to other hosts; `fresh_bandwidth` that of memory which is touched for the first time,
    where that costs more, as on CPUs (page faults).
    """

    memory_bandwidth: float
    matmul_rate: Mapping[str, float]
    vector_rate: Mapping[str, float]
    host_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    fresh_bandwidth: float = float("inf")


# Those of an H200, for choices that must not depend on where they are made.
REFERENCE = Rates(
    memory_bandwidth=4.8e12,
    matmul_rate={"bfloat16": 9.89e14, "float16": 9.89e14, "float32": 4.94e14, "float64": 6.69e13},
    vector_rate={"float32": 6.69e13, "float64": 3.35e13},
    host_bandwidth=6.4e10,
    link_bandwidth=4.5e11,
    network_bandwidth=5e10,
)
# Of a few CPU cores: a guess, for a machine that was not calibrated (`jaxckpt.memory.calibrate`).
CPU = Rates(
    memory_bandwidth=1e10,
    matmul_rate={"bfloat16": 2e10, "float16": 2e10, "float32": 1e11, "float64": 5e10},
    vector_rate={"float32": 2e10, "float64": 1e10},
    host_bandwidth=1e10,
    link_bandwidth=1e10,
    network_bandwidth=1e10,
    fresh_bandwidth=2e9,
)


_OF_BACKWARD = 2.0  # forward passes that differentiating a block takes


def step_seconds(
    blocks: int, forward_seconds: float, forward_runs: float, rates: Any, host_bytes: float = 0, fresh_bytes: float = 0
) -> float:
    """What a training step of a stack takes: its blocks are run, differentiated, and what is stored is moved.

    Arguments:
        forward_seconds: of one run of one block. forward_runs: of each block, in the step.
        rates: as in `cost`.
        host_bytes: that go to the host and come back.
        fresh_bytes: that are stored in memory which is touched for the first time.
    """
    moved = fresh_bytes / getattr(rates, "fresh_bandwidth", float("inf")) + 2 * host_bytes / rates.host_bandwidth
    return blocks * forward_seconds * (forward_runs + _OF_BACKWARD) + moved


class Cost(NamedTuple):
    """Seconds, and whether a primitive that the table does not know is in them."""

    seconds: float
    is_guess: bool = False


def cost(eqn: Any, gpu: Any) -> Cost:
    """What running `eqn` once costs.

    Arguments:
        gpu: `Rates`, or a `jaxckpt.memory.targets.Gpu`, which has the same fields.
    """
    name = eqn.primitive.name
    moved = sum(nbytes(var.aval) for var in variables([*eqn.invars, *eqn.outvars])) / gpu.memory_bandwidth
    if name in _VIEWS:
        return Cost(0.0)
    if name in _FUSIBLE:
        return Cost(FUSED * moved)
    if name in _OTHERS:
        return Cost(moved)
    if name in ("dot_general", "conv_general_dilated"):
        dtype = eqn.invars[0].aval.dtype
        is_known = dtype.name in {*gpu.matmul_rate, *gpu.vector_rate}
        return Cost(max(matmul_operations(eqn) / rate(gpu, dtype), moved), is_guess=not is_known)
    if name in _COLLECTIVES:
        return Cost(sent_bytes(eqn) / gpu.link_bandwidth)
    inner = [_total(jaxpr, gpu) for jaxpr in inner_jaxprs(eqn)]
    if name == "scan":
        return Cost(eqn.params["length"] * inner[0].seconds, inner[0].is_guess)
    if name == "cond":
        return max(inner)
    if name == "while":
        return Cost(inner[-1].seconds, is_guess=True)
    if name in _CALLS and inner:
        return inner[0]
    return Cost(moved, is_guess=True)


def is_dear(eqn: Any) -> bool:
    """Whether an equation is none that `cheap` runs again.

    Dear are matrix products, convolutions, loops, sorts, Fourier transforms, random draws, what the table above does not
    know, such as custom calls, and calls and branches with any of these in them.
    """
    name = eqn.primitive.name
    if name in _DEAR or name in ("random_bits", "random_gamma", "threefry2x32"):
        return True
    if name in _VIEWS | _FUSIBLE | _OTHERS:
        return False
    inner = inner_jaxprs(eqn)
    return not inner or any(is_dear(e) for jaxpr in inner for e in jaxpr.eqns)


def _total(jaxpr: Any, gpu: Any) -> Cost:
    costs = [cost(eqn, gpu) for eqn in jaxpr.eqns]
    return Cost(sum(c.seconds for c in costs), any(c.is_guess for c in costs))


def sent_bytes(eqn: Any, sizes: Mapping[Any, int] | None = None) -> int:
    """What each device sends for the collectives that an equation is, or that are in its loop, its call or its branches.

    Arguments:
        sizes: of the axes that have names; along an axis of which it is not known there are many devices.
    """
    name, sizes = eqn.primitive.name, dict(sizes or {})
    if name not in _COLLECTIVES:
        sizes |= dict(eqn.params["mesh"].shape) if name == "shard_map" else {}
        inner = [sum(sent_bytes(e, sizes) for e in jaxpr.eqns) for jaxpr in inner_jaxprs(eqn)]
        return max(inner, default=0) if name == "cond" else eqn.params.get("length", 1) * sum(inner)
    given, made = (sum(nbytes(var.aval) for var in variables(vars)) for vars in (eqn.invars, eqn.outvars))
    if name in _GATHERS:
        return abs(made - given)
    axes = eqn.params.get("axes", eqn.params.get("axis_name"))
    if groups := eqn.params.get("axis_index_groups"):
        devices = len(groups[0])
    else:
        devices = math.prod(sizes.get(axis, math.inf) for axis in (axes if isinstance(axes, (tuple, list)) else [axes]))
    of_ring = 1.0 if name in _PERMUTES and devices > 1 else 1 - 1 / devices
    return round((2 if name in _SUMS else 1) * of_ring * given)


def matmul_operations(eqn: Any) -> int:
    """Multiplications and additions of a `dot_general` or a convolution."""
    left, right = (v.aval for v in eqn.invars[:2])
    outputs = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0][0]
        return 2 * outputs * math.prod(left.shape[i] for i in contracted)
    of_kernel = eqn.params["dimension_numbers"].rhs_spec  # (out, in, *spatial): `in` is already per group
    return 2 * outputs * math.prod(right.shape[i] for i in of_kernel[1:])


def rate(gpu: Any, dtype: Any) -> float:
    """Operations per second of a matmul in `dtype`, on the vector units where the matrix units do not have it."""
    return gpu.matmul_rate.get(dtype.name) or gpu.vector_rate.get(dtype.name) or gpu.vector_rate["float32"]
