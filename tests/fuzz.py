"""Random stacks for `test_fuzz.py`: a block, what it is called with and its settings are drawn from one seed.

A block is a few operations on the arrays `[ROWS, WIDTH]` of its carry, with whatever else may stand in a carry or among
parameters beside them: scalars, integers, keys, arrays of no size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_scan

ROWS, WIDTH = 2, 3
Rng = np.random.Generator
Step = Callable[[Any, SimpleNamespace], Any]  # of an array of the carry, and of what the block was given, to the next array


@dataclass
class Case:
    """A stack to try. `str(case)` says what was drawn."""

    seed: int
    length: int
    kind: str  # of the block: "function", "linen" or "nnx"
    knobs: dict[str, Any]
    steps: list[tuple[str, int]]  # operations, and the array of the carry that each changes
    block: Callable[..., Any]  # of (params, *carry, **keywords)
    params: dict[str, Any]
    carry: tuple[Any, ...]
    keywords: dict[str, Any]
    fixed: float  # the part of the inputs that is not differentiated

    def __str__(self) -> str:
        given = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", (self.params, self.carry, self.keywords))
        steps = ", ".join(f"{name} of {i}" for name, i in self.steps)
        return f"seed {self.seed}: {self.length} {self.kind} blocks under {self.knobs}\n  {steps}\n  given {given}"


def draw_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 5))
    arrays = int(rng.integers(1, 4))
    names = [str(name) for name in rng.choice(list(OPERATIONS), rng.integers(2, 4))]
    steps = [(name, int(rng.integers(arrays))) for name in names]
    others = {name for name in OTHERS if _chance(rng, 0.25)}
    has_aux, per_block, is_one = _chance(rng, 0.3), _chance(rng, 0.4), _chance(rng, 0.3)
    knobs = _knobs(rng, length, "tag" in names) | ({"has_aux": True} if has_aux else {})
    if per_block:
        knobs["per_block"] = ("rate", "level")
    return Case(
        seed=seed,
        length=length,
        kind=str(rng.choice(["function", "function", "linen", "nnx"])),
        knobs=knobs,
        steps=steps,
        block=_block(rng, steps, others, has_aux, is_one),
        params=_params(rng, length),
        carry=_carry(rng, arrays, others, is_one),
        keywords=_keywords(rng, length, per_block),
        fixed=float(rng.choice([0.0, 0.0, 0.3])),
    )


def _chance(rng: Rng, p: float) -> bool:
    return bool(rng.random() < p)


def _normal(rng: Rng, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape))


# --- what a block is given ----------------------------------------------------------------------------------------------

OTHERS = ("count", "key", "scalar", "empty")


def _params(rng: Rng, length: int) -> dict[str, Any]:
    return {
        "w": _normal(rng, length, WIDTH, WIDTH) / 2,
        "b": _normal(rng, length, WIDTH),
        "scale": _normal(rng, length),
        "q": jnp.asarray(rng.integers(-3, 4, (length, WIDTH, WIDTH)), jnp.int8),
        "at": jnp.asarray(rng.integers(0, WIDTH, length), jnp.int32),
        "seed": jax.random.split(jax.random.key(int(rng.integers(2**16))), length),
        "none": jnp.zeros((length, 0)),
    }


def _carry(rng: Rng, arrays: int, others: set[str], is_one: bool) -> tuple[Any, ...]:
    every = {
        "count": jnp.asarray(rng.integers(0, 5, ROWS), jnp.int32),
        "key": jax.random.key(int(rng.integers(2**16))),
        "scalar": _normal(rng),
        "empty": jnp.zeros((0, WIDTH)),
    }
    rest = {name: every[name] for name in sorted(others)}
    main = [_normal(rng, ROWS, WIDTH) for _ in range(arrays)]
    return ({"main": main, **rest},) if is_one else (*main, rest) if rest else tuple(main)


def _keywords(rng: Rng, length: int, per_block: bool) -> dict[str, Any]:
    given = {"mask": _normal(rng, ROWS, WIDTH), "shift": jnp.asarray(rng.integers(0, WIDTH), jnp.int32)}
    if per_block:
        given |= {"rate": _normal(rng, length), "level": jnp.asarray(rng.integers(0, 3, length), jnp.int32)}
    return given


# --- operations ---------------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Rng], Step]] = {}


def operation(make: Callable[[Rng], Step]) -> Callable[[Rng], Step]:
    OPERATIONS[make.__name__] = make
    return make


@operation
def residual(rng: Rng) -> Step:
    return lambda h, see: h + jnp.tanh(h @ see.w + jnp.broadcast_to(see.b, h.shape))


@operation
def attention(rng: Rng) -> Step:
    return lambda h, see: jax.nn.softmax(h @ h.T) @ (h @ see.w)


@operation
def gate(rng: Rng) -> Step:
    return lambda h, see: h * jax.nn.sigmoid(see.scale * see.mask)


@operation
def tag(rng: Rng) -> Step:
    return lambda h, see: checkpoint_name(jnp.sin(h @ see.w), "h")


@operation
def swap(rng: Rng) -> Step:
    def run(h: Any, see: SimpleNamespace) -> Any:
        see.main[0], see.main[-1] = see.main[-1], see.main[0]
        return see.main[see.here]

    return run


@operation
def mix(rng: Rng) -> Step:
    return lambda h, see: 0.5 * h + jnp.cos(see.main[-1])


@operation
def stopped(rng: Rng) -> Step:
    return lambda h, see: jnp.sin(h) + lax.stop_gradient(h @ see.w)


@operation
def replaced_by_parameters(rng: Rng) -> Step:
    return lambda h, see: jnp.broadcast_to(see.b, h.shape)


@operation
def dtype_round_trip(rng: Rng) -> Step:
    narrow = rng.choice(["float32", "bfloat16"])
    return lambda h, see: jnp.sin(h.astype(narrow)).astype(h.dtype) + h


@operation
def ref(rng: Rng) -> Step:
    def run(h: Any, see: SimpleNamespace) -> Any:
        acc = jax.new_ref(jnp.zeros_like(h))
        acc[...] += jnp.tanh(h @ see.w)
        acc[0] = acc[0] * see.scale
        return acc[...] + h

    return run


@operation
def ref_in_a_loop(rng: Rng) -> Step:
    def run(h: Any, see: SimpleNamespace) -> Any:
        acc = jax.new_ref(h)

        def body(i: Any, _: None) -> None:
            acc[...] = jnp.sin(acc[...] @ see.w) + i

        lax.fori_loop(0, 2, body, None)
        return acc[...]

    return run


@operation
def nested_jit(rng: Rng) -> Step:
    table = _normal(rng, WIDTH, WIDTH)
    return lambda h, see: jax.jit(lambda v: jnp.sin(v @ table) * see.scale)(h)


@operation
def nested_jit_twice(rng: Rng) -> Step:
    table = rng.normal(size=(WIDTH, WIDTH))
    inner = jax.jit(lambda v, w: jax.jit(lambda u: u @ table + u @ w)(jnp.cos(v)))
    return lambda h, see: inner(inner(h, see.w), see.w.T)


@operation
def loop(rng: Rng) -> Step:
    def run(h: Any, see: SimpleNamespace) -> Any:
        return lax.scan(lambda c, row: (jnp.tanh(c @ see.w) + jnp.broadcast_to(row, c.shape), c.sum()), h, see.w)[0]

    return run


@operation
def branch(rng: Rng) -> Step:
    table = _normal(rng, WIDTH, WIDTH)
    return lambda h, see: lax.cond(h.sum() > 0, lambda v: jnp.sin(v @ table), lambda v: v * see.scale, h)


@operation
def switch(rng: Rng) -> Step:
    branches = [jnp.sin, jnp.cos, lambda v: v]
    return lambda h, see: lax.switch(see.at, branches, h @ see.w)


@operation
def own_checkpoint(rng: Rng) -> Step:
    table = _normal(rng, WIDTH, WIDTH)
    return lambda h, see: jax.checkpoint(lambda v: jnp.tanh(jnp.sin(v @ see.w) @ table))(h)


@operation
def custom_vjp(rng: Rng) -> Step:
    table = _normal(rng, WIDTH, WIDTH)

    @jax.custom_vjp
    def rule(v: Any, w: Any) -> Any:
        return jnp.sin(v @ table) @ w

    rule.defvjp(
        lambda v, w: (rule(v, w), (v, w)),
        lambda kept, ct: ((2 * ct @ kept[1].T * jnp.cos(kept[0] @ table)) @ table.T, jnp.sin(kept[0] @ table).T @ ct),
    )
    return lambda h, see: rule(h, see.w)


@operation
def custom_jvp(rng: Rng) -> Step:
    table = _normal(rng, ROWS, WIDTH)

    @jax.custom_jvp
    def rule(v: Any) -> Any:
        return jnp.sin(v * table)

    rule.defjvp(lambda primals, tangents: (rule(*primals), 3 * jnp.cos(primals[0] * table) * tangents[0]))
    return lambda h, see: rule(h)


@operation
def batched(rng: Rng) -> Step:
    return lambda h, see: jax.vmap(lambda row: jnp.tanh(row @ see.w))(h)


@operation
def integers(rng: Rng) -> Step:
    return lambda h, see: h + (h @ see.q.astype(h.dtype)) / 9 + jnp.roll(h, see.shift, axis=1) * h[0, see.at]


@operation
def noise(rng: Rng) -> Step:
    return lambda h, see: h * jax.random.uniform(see.seed, h.shape, h.dtype)


@operation
def sort(rng: Rng) -> Step:
    return lambda h, see: jnp.sort(h, axis=1) + jnp.cumsum(h, axis=0)


@operation
def per_block_values(rng: Rng) -> Step:
    return lambda h, see: h * see.given.get("rate", 0.5) + see.given.get("level", 1)


# --- a block ------------------------------------------------------------------------------------------------------------


def _block(rng: Rng, drawn: list[tuple[str, int]], others: set[str], has_aux: bool, is_one: bool) -> Callable[..., Any]:
    steps = [(i, OPERATIONS[name](rng)) for name, i in drawn]
    moves = {name: _chance(rng, 0.6) for name in OTHERS}

    def block(params: dict[str, Any], *carry: Any, **given: Any) -> Any:
        if is_one:
            rest = {**carry[0]}
            main = list(rest.pop("main"))
        else:
            main, rest = (list(carry[:-1]), {**carry[-1]}) if others else (list(carry), {})
        see = SimpleNamespace(main=main, given=given, mask=given["mask"], shift=given["shift"], **params)
        for see.here, step in steps:
            main[see.here] = step(main[see.here], see)
        rest = {name: _moved(name, value, main[0]) if moves[name] else value for name, value in rest.items()}
        out = {"main": main, **rest} if is_one else (*main, rest) if others else tuple(main)
        out = out[0] if isinstance(out, tuple) and len(out) == 1 else out
        return (out, {"mean": main[-1].mean(), "at": see.at, "b": see.b}) if has_aux else out

    return block


def _moved(name: str, value: Any, h: Any) -> Any:
    """The next value of what a carry holds beside its arrays."""
    if name == "count":
        return value + 1
    if name == "key":
        return jax.random.fold_in(value, 1)
    return 0.9 * value + h.mean() if name == "scalar" else 2 * value


# --- settings -----------------------------------------------------------------------------------------------------------

POLICIES = [None, None, "everything", "nothing", "dots", "dots_no_batch", "cheap", "cheap", "budget:0.4", "budget:1KiB"]
OF_TAGS = ["save:h", "except:h", "dots+save:h", "offload:h", "cheap+save:h"]


def _knobs(rng: Rng, length: int, tagged: bool) -> dict[str, Any]:
    def one_of(values: list[Any]) -> Any:
        return values[rng.integers(len(values))]

    knobs: dict[str, Any] = {
        "engine": one_of([None, "scan", "reversal"]),
        "blocks_per_ckpt": one_of([None, int(rng.integers(1, length + 1))]),
        "policy": one_of(POLICIES + OF_TAGS * tagged),
        "stages": one_of([None, None, "auto", 2, *["tags:h"] * tagged]),
        "unroll": one_of([1, 1, 2, True]),
        "offload_carry": _chance(rng, 0.2),
    }
    if knobs["engine"] != "scan" and _chance(rng, 0.4):
        knobs["snapshots"] = int(rng.integers(1, -(-length // (knobs["blocks_per_ckpt"] or 1)) + 1))
    if knobs["blocks_per_ckpt"] is None and "snapshots" not in knobs and knobs["policy"] not in (None, "nothing"):
        knobs["offload_carry"] = False  # which is refused beside values that are kept for all blocks
    if knobs["engine"] == "reversal" or "snapshots" in knobs or knobs["offload_carry"]:
        knobs["unroll"] = 1
    return {name: value for name, value in knobs.items() if value not in (None, False) and (name, value) != ("unroll", 1)}


# --- to run -------------------------------------------------------------------------------------------------------------


class LinenBlock(nn.Module):
    fn: Callable[..., Any]

    def __call__(self, *carry: Any, **keywords: Any) -> Any:
        return self.fn(self.variables["params"], *carry, **keywords)


class NnxBlock(nnx.Module):
    def __init__(self, fn: Callable[..., Any], params: dict[str, Any]):
        self.fn, self.names = fn, tuple(params)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, *carry: Any, **keywords: Any) -> Any:
        return self.fn({name: getattr(self, name)[...] for name in self.names}, *carry, **keywords)


def slices(tree: Any, length: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(length)]


def stack_of(case: Case) -> Callable[..., Any]:
    """The stack as `(params, *carry, **keywords)`."""
    if case.kind == "linen":
        stack = checkpoint_scan(LinenBlock, case.length, **case.knobs)(case.block)
        return lambda params, *carry, **keywords: stack.apply({"params": params}, *carry, **keywords)
    if case.kind == "nnx":

        def run(params: Any, *carry: Any, **keywords: Any) -> Any:
            blocks = [NnxBlock(case.block, one) for one in slices(params, case.length)]
            return checkpoint_scan(blocks, **case.knobs)(*carry, **keywords)

        return run
    return checkpoint_scan(case.block, **case.knobs)


def loop_of(case: Case) -> Callable[..., Any]:
    """What the stack must equal: a Python loop."""

    def run(params: Any, *carry: Any, **keywords: Any) -> Any:
        names = case.knobs.get("per_block", ())
        shared = {name: value for name, value in keywords.items() if name not in names}
        auxes = []
        for one, own in zip(slices(params, case.length), slices({n: keywords[n] for n in names}, case.length), strict=True):
            out = case.block(one, *carry, **shared, **own)
            if case.knobs.get("has_aux"):
                out, aux = out
                auxes.append(aux)
            carry = out if len(carry) > 1 else (out,)
        out = carry if len(carry) > 1 else carry[0]
        return (out, jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)) if auxes else out

    return run


def outcome(fn: Callable[..., Any], case: Case) -> tuple[Any, Any, Any]:
    """Values, gradients for random cotangents, and what has no gradient, of a function in the place of the stack."""
    leaves, tree = jax.tree.flatten((case.params, case.carry, case.keywords))
    rng = np.random.default_rng(case.seed)
    inexact = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    where = [i for i in inexact if rng.random() >= case.fixed] or inexact

    def of_inexact(values: list[Any], rest: list[Any]) -> tuple[list[Any], list[Any]]:
        given = list(rest)
        for i, value in zip(where, values, strict=True):
            given[i] = value
        params, carry, keywords = jax.tree.unflatten(tree, given)
        out = jax.tree.leaves(fn(params, *carry, **keywords))
        moving = [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        keys = [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        whole = [leaf for leaf in out if jnp.issubdtype(leaf.dtype, jnp.integer)]
        return moving, [*whole, *map(jax.random.key_data, keys)]

    def run(leaves: list[Any]) -> tuple[Any, Any, Any]:
        values, pull, rest = jax.vjp(functools.partial(of_inexact, rest=leaves), [leaves[i] for i in where], has_aux=True)
        draw = np.random.default_rng(case.seed + 1)
        cotangents = [jnp.asarray(draw.normal(size=value.shape), value.dtype) for value in values]
        return values, pull(cotangents)[0], rest

    return run, leaves
