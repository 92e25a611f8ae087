"""The systems that can checkpoint a stack, on the same blocks: each is a way to run `N` blocks with stacked parameters.

Every system gets the pure function of one Flax block, and must reproduce loss and gradients of a plain loop on a small stack
(`gradient_error`) before anything of it is measured.
"""
# pyright: reportMissingImports=false

import contextlib
import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import jaxckpt
from jaxckpt import checkpoint_scan
from jaxckpt.models import EvoformerBlock, PairformerBlock, TransformerBlock, _layers
from jaxckpt.models import transformer as transformer_model

TOLERANCE = 1e-4
QUICKLY = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}
Carry = tuple[Any, ...]
Forward = Callable[[Any, Carry, dict[str, Any]], Carry]


class MLPBlock(nn.Module):
    """Two dense layers with a GELU between them, added to their input."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype, param_dtype=self.dtype or jnp.float32)(x))
        return x + nn.Dense(self.width, dtype=self.dtype, param_dtype=self.dtype or jnp.float32)(hidden)


@dataclasses.dataclass(frozen=True)
class Stack:
    """`length` blocks of one kind: what is compiled.

    Fields:
        block: an unbound Linen module.
        chunk: the number of blocks per chunk for the systems that have chunks; it divides `length`.
        carry, shared: shapes of the positional and of the keyword arguments.
    """

    title: str
    block: nn.Module
    length: int
    chunk: int
    carry: Carry
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def chunks(self) -> int:
        return self.length // self.chunk

    def apply(self, params: Any, *carry: Any, **shared: Any) -> Any:
        """The pure function of one block."""
        return self.block.apply({"params": params}, *carry, **shared)

    def step(self, params: Any, carry: Carry, shared: dict[str, Any]) -> Carry:
        """The same, with a tuple for the carry and a dict for what the blocks share."""
        return as_tuple(self.apply(params, *carry, **shared))

    def arguments(self) -> tuple[Any, Carry, dict[str, Any]]:
        """Shapes of the stacked parameters, the carry and the shared arguments."""
        one = jax.eval_shape(self.block.init, jax.random.key(0), *self.carry, **self.shared)["params"]
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.length, *leaf.shape), leaf.dtype), one)
        return stacked, self.carry, self.shared


def as_tuple(out: Any) -> Carry:
    return out if isinstance(out, tuple) else (out,)


@dataclasses.dataclass(frozen=True)
class FusedStack(Stack):
    """The same blocks with cuDNN's attention in place of ours, which keeps no logits."""

    def apply(self, params: Any, *carry: Any, **shared: Any) -> Any:
        with fused_attention("xla" if self.title == "small" else "cudnn"):
            return super().apply(params, *carry, **shared)


@contextlib.contextmanager
def fused_attention(how: Literal["xla", "cudnn"]) -> Iterator[None]:
    """Our models with `jax.nn.dot_product_attention`: cuDNN's kernel, or "xla", its formula, where values are compared."""

    def attention(query: Any, key: Any, value: Any, *, biases: Any = (), causal: bool = False) -> Any:
        leading, (length, heads, _) = query.shape[:-3], query.shape[-3:]
        flat: Any = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
        bias: Any = None
        if biases:
            total = functools.reduce(jnp.add, biases)
            bias = total.reshape(-1, *total.shape[-3:]).astype(query.dtype)
            bias = jnp.broadcast_to(bias, (bias.shape[0], heads, length, key.shape[-3]))
        out = jax.nn.dot_product_attention(*flat, bias=bias, is_causal=causal, implementation=how)
        return out.reshape(*leading, length, heads, -1)

    with mock.patch.object(_layers, "attention", attention), mock.patch.object(transformer_model, "attention", attention):
        yield


class System(NamedTuple):
    """One way to run a stack. `build` makes `forward(stacked params, carry, shared)` of a `Stack`."""

    name: str
    setting: str
    build: Callable[[Stack], Forward]
    package: str = "jax"
    depends_on_block: bool = False  # how much of a block is run again
    is_slow: bool = False  # to compile


# --- what is compiled ---------------------------------------------------------------------------------------------------


def workloads() -> dict[str, Stack]:
    return {
        "pairformer-tiny": pairformer(12, 24, 6),
        "pairformer-small": pairformer(8, 24, 4, jnp.float32),
        "transformer-small": transformer(12, 4, 128, 128, 3, jnp.float32),
        "pairformer-128": pairformer(4, 128, 2, jnp.float32),  # large enough to be sliced
        "transformer-512": transformer(4, 4, 512, 256, 2, jnp.float32),
        **{f"pairformer-{tokens}": pairformer(48, tokens, 6) for tokens in (384, 512, 768)},
        "pairformer-768x192": pairformer(192, 768, 12),
        "pairformer-2048": pairformer(48, 2048, 6),
        "evoformer-128x256": evoformer(48, 128, 256, 6),  # sequences and residues: AlphaFold 2's first training
        "evoformer-512x384": evoformer(48, 512, 384, 6),  # and its fine-tuning
        "transformer-2048": transformer(24, 8, 2048, 1024, 4),
        "mlp-4096": mlp(48, 4096, 1024, 6),  # carries are what fills memory
        "mlp-128": mlp(48, 128, 1024, 6),  # parameters are
    }


def pairformer(blocks: int, tokens: int, chunk: int, dtype: Any = jnp.bfloat16) -> Stack:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return Stack(
        f"Pairformer, {blocks} blocks, {tokens} tokens, {jnp.dtype(dtype).name}",
        PairformerBlock(dtype=dtype),
        blocks,
        chunk,
        (shape((tokens, 384)), shape((tokens, tokens, 128))),
        {"pair_mask": shape((tokens, tokens))},
    )


def evoformer(blocks: int, sequences: int, residues: int, chunk: int, dtype: Any = jnp.bfloat16) -> Stack:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    return Stack(
        f"Evoformer, {blocks} blocks, {sequences} sequences of {residues} residues, {jnp.dtype(dtype).name}",
        EvoformerBlock(dtype=dtype),
        blocks,
        chunk,
        (shape((sequences, residues, 256)), shape((residues, residues, 128))),
        {"msa_mask": shape((sequences, residues)), "pair_mask": shape((residues, residues))},
    )


def transformer(blocks: int, batch: int, tokens: int, width: int, chunk: int, dtype: Any = jnp.bfloat16) -> Stack:
    heads = width // 64
    return Stack(
        f"transformer, {blocks} blocks of {width} channels, {batch} x {tokens} tokens, {jnp.dtype(dtype).name}",
        TransformerBlock(width, num_heads=heads, d_ff=4 * width, dtype=dtype),
        blocks,
        chunk,
        (jax.ShapeDtypeStruct((batch, tokens, width), dtype),),
    )


def mlp(blocks: int, rows: int, width: int, chunk: int, dtype: Any = jnp.bfloat16) -> Stack:
    title = f"MLP, {blocks} blocks of {width} channels, {rows} rows, {jnp.dtype(dtype).name}"
    return Stack(title, MLPBlock(width, dtype), blocks, chunk, (jax.ShapeDtypeStruct((rows, width), dtype),))


@functools.cache
def small(kind: str) -> Stack:
    """Two chunks of two tiny blocks of the same kind in float32, to compare values on."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    if kind == "PairformerBlock":
        block = PairformerBlock(16, 8, c_hidden_mul=8, num_heads_pair=2, head_dim_pair=4, num_heads_single=2)
        return Stack("small", block, 4, 2, (shape((6, 16)), shape((6, 6, 8))), {"pair_mask": shape((6, 6))})
    if kind == "EvoformerBlock":
        heads: dict[str, Any] = dict(num_heads_msa=2, head_dim_msa=4, num_heads_pair=2, head_dim_pair=4)
        block = EvoformerBlock(16, 8, c_hidden_opm=4, c_hidden_mul=8, **heads)
        masks = {"msa_mask": shape((4, 6)), "pair_mask": shape((6, 6))}
        return Stack("small", block, 4, 2, (shape((4, 6, 16)), shape((6, 6, 8))), masks)
    if kind == "MLPBlock":
        return Stack("small", MLPBlock(16), 4, 2, (shape((8, 16)),))
    return Stack("small", TransformerBlock(16, num_heads=2, d_ff=32), 4, 2, (shape((2, 6, 16)),))


def loss_and_gradients(forward: Forward, params: Any, carry: Carry, shared: dict[str, Any]) -> Any:
    def loss(params: Any) -> Any:
        return sum(
            jnp.sum(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) ** 2) for leaf in forward(params, carry, shared)
        )

    return jax.value_and_grad(loss)(params)


# --- the systems --------------------------------------------------------------------------------------------------------


def systems(stack: Stack) -> list[System]:
    k, m, n = stack.chunk, stack.chunks, stack.length
    haiku_remat = {"": {}, "prevent_cse=False": {"prevent_cse": False}, "dots": {"policy": POLICIES["dots"]}}
    simple = [(None, "everything"), (None, "dots"), (None, "dots_no_batch"), (None, "nothing")]
    simple += [(None, "cheap"), (2, "everything"), (k, "everything"), (k, "dots"), (k, "nothing")]
    ours = {f"blocks_per_ckpt={count}, {name}": {"blocks_per_ckpt": count, "policy": name} for count, name in simple}
    in_chunks = {"blocks_per_ckpt": k, "policy": "nothing"}
    ours |= {f'{setting}, engine="reversal"': {**knobs, "engine": "reversal"} for setting, knobs in ours.items()}
    ours |= {
        'stages="auto", nothing': {"stages": "auto"},
        'stages="auto", nothing, engine="reversal"': {"stages": "auto", "engine": "reversal"},
        f'blocks_per_ckpt={k}, stages="auto", nothing': {**in_chunks, "stages": "auto"},
        f'blocks_per_ckpt={k}, stages="auto", nothing, engine="reversal"': {
            **in_chunks,
            "stages": "auto",
            "engine": "reversal",
        },
        "snapshots=9": {"snapshots": 9},
        "snapshots=5": {"snapshots": 5},
        'offload_carry, engine="reversal"': {"offload_carry": True, "engine": "reversal"},
        'snapshots=9, stages="auto"': {"snapshots": 9, "stages": "auto"},
        'snapshots=5, stages="auto"': {"snapshots": 5, "stages": "auto"},
        'offload_carry, stages="auto", engine="reversal"': {"offload_carry": True, "stages": "auto", "engine": "reversal"},
        'tiles="auto", nothing': {"tiles": "auto"},
        'tiles="auto", everything': {"tiles": "auto", "policy": "everything"},
        'tiles="auto", nothing, engine="reversal"': {"tiles": "auto", "engine": "reversal"},
        'snapshots=5, tiles="auto"': {"snapshots": 5, "tiles": "auto"},
        'offload_carry, tiles="auto", engine="reversal"': {"offload_carry": True, "tiles": "auto", "engine": "reversal"},
    }
    return [
        System("no checkpointing", "lax.scan", plain_scan),
        *(System("jaxckpt, cuDNN attention", name, with_fused(knobs), "jaxckpt") for name, knobs in FUSED.items()),
        *(
            System(
                "jaxckpt",
                setting,
                our_stack(**knobs),
                "jaxckpt",
                any(w in setting for w in ("dots", "cheap", "stages", "tiles")),
            )
            for setting, knobs in ours.items()
        ),
        System("Python loop", "jax.checkpoint of each block", checkpointed_loop, is_slow=True),
        *(
            System("flax nn.scan(nn.remat)", name, functools.partial(flax_scan, policy), "flax", "dots" in name)
            for name, policy in POLICIES.items()
        ),
        System("flax nn.remat_scan", f"lengths=({n}, 1)", lambda s: flax_remat_scan(s, (s.length, 1)), "flax"),
        System("flax nn.remat_scan", f"lengths=({m}, {k})", lambda s: flax_remat_scan(s, (s.chunks, s.chunk)), "flax"),
        System("flax nn.remat_scan", f"lengths=({m}, {k}, 1)", lambda s: flax_remat_scan(s, (s.chunks, s.chunk, 1)), "flax"),
        *(
            System("haiku layer_stack + hk.remat", name, functools.partial(haiku_stack, **remat), "dm-haiku", name == "dots")
            for name, remat in haiku_remat.items()
        ),
        System("equinox checkpointed scan", "checkpoints=None", equinox_scan, "equinox"),
        System("equinox checkpointed scan", f"checkpoints={k}", lambda s: equinox_scan(s, s.chunk), "equinox"),
        System("equinox checkpointed scan", 'checkpoints="all"', lambda s: equinox_scan(s, "all"), "equinox"),
        System("haliax Stacked", "True", lambda s: haliax_stacked(s, True), "haliax"),
        System("haliax Stacked", '"recompute"', lambda s: haliax_stacked(s, "recompute"), "haliax"),
        System("haliax Stacked", '"nested"', lambda s: haliax_stacked(s, "nested"), "haliax"),
        System("haliax Stacked", f"simple, nested={m}", haliax_nested, "haliax"),
    ]


def our_stack(
    blocks_per_ckpt: int | None = None, snapshots: int | None = None, tiles: int | str | None = None, **knobs: Any
) -> Callable[[Stack], Forward]:
    def build(stack: Stack) -> Forward:
        per_chunk = blocks_per_ckpt and min(blocks_per_ckpt, stack.chunk)  # a small stack, to compare values on
        stored = snapshots and min(snapshots, stack.length // (per_chunk or 1))
        sliced = 3 if tiles == "auto" and stack.title == "small" else tiles  # which "auto" would not slice
        run = checkpoint_scan(stack.apply, blocks_per_ckpt=per_chunk, snapshots=stored, tiles=sliced, **knobs)
        return lambda params, carry, shared: as_tuple(run(params, *carry, **shared))

    return build


FUSED: dict[str, dict[str, Any]] = {
    "per block, nothing": {},
    'stages="auto"': {"stages": "auto"},
    'snapshots=5, stages="auto"': {"snapshots": 5, "stages": "auto"},
    'snapshots=5, tiles="auto"': {"snapshots": 5, "tiles": "auto"},
}


def with_fused(knobs: dict[str, Any]) -> Callable[[Stack], Forward]:
    """Without masks of pairs: this kernel takes one bias for all rows of an attention, or one as large as its logits."""

    def build(stack: Stack) -> Forward:
        run = our_stack(**knobs)(FusedStack(**{f.name: getattr(stack, f.name) for f in dataclasses.fields(stack)}))
        is_checked = stack.title == "small"
        return lambda params, carry, shared: run(params, carry, shared if is_checked else dict.fromkeys(shared))

    return build


def plain_scan(stack: Stack) -> Forward:
    return lambda params, carry, shared: lax.scan(lambda c, p: (stack.step(p, c, shared), None), carry, params)[0]


def checkpointed_loop(stack: Stack) -> Forward:
    return functools.partial(loop, jax.checkpoint(stack.step), stack.length)


def loop(step: Forward, length: int, params: Any, carry: Carry, shared: dict[str, Any]) -> Carry:
    for i in range(length):
        carry = step(jax.tree.map(lambda leaf, i=i: leaf[i], params), carry, shared)
    return carry


class FlaxBody(nn.Module):
    """What `nn.scan` wants: a module that returns `(carry, output)`."""

    block: nn.Module

    def __call__(self, carry, shared):
        return as_tuple(self.block(*carry, **shared)), None


def flax_scan(policy: Any, stack: Stack) -> Forward:
    body = nn.scan(
        nn.remat(FlaxBody, policy=policy, prevent_cse=False),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=stack.length,
    )(stack.block)
    return lambda params, carry, shared: body.apply({"params": {"block": params}}, carry, shared)[0]


class FlaxCarryBody(nn.Module):
    """What `nn.remat_scan` wants: a module of the carry alone."""

    block: nn.Module
    shared: dict[str, Any]

    def __call__(self, carry):
        return as_tuple(self.block(*carry, **self.shared))


def flax_remat_scan(stack: Stack, lengths: tuple[int, ...]) -> Forward:
    def forward(params, carry, shared):
        body = nn.remat_scan(FlaxCarryBody, lengths=lengths)(stack.block, shared)
        nested = jax.tree.map(lambda leaf: leaf.reshape(*lengths, *leaf.shape[1:]), params)
        return body.apply({"params": {"block": nested}}, carry)

    return forward


def haiku_stack(stack: Stack, **remat: Any) -> Forward:
    import haiku as hk

    shapes, tree = jax.tree.flatten(stack.arguments()[0])

    def run(carry, shared):
        def block(carry):
            leaves = [
                hk.get_parameter(f"p{i}", leaf.shape[1:], leaf.dtype, hk.initializers.Constant(0))
                for i, leaf in enumerate(shapes)
            ]
            return stack.step(tree.unflatten(leaves), carry, shared)

        return hk.layer_stack(stack.length)(hk.remat(block, **remat))(carry)

    transformed = hk.transform(run)

    def forward(params, carry, shared):
        names = jax.eval_shape(transformed.init, jax.random.key(0), carry, shared)
        leaves = jax.tree.leaves(params)
        own = {module: {name: leaves[int(name[1:])] for name in inside} for module, inside in names.items()}
        return transformed.apply(own, None, carry, shared)

    return forward


def equinox_scan(stack: Stack, checkpoints: Any = None) -> Forward:
    from equinox import internal as eqxi

    def forward(params, carry, shared):
        def body(carry, block):
            return stack.step(block.params, carry, shared), None

        xs = equinox_block()(params)
        return eqxi.scan(body, carry, xs, stack.length, kind="checkpointed", checkpoints=checkpoints)[0]

    return forward


def haliax_stacked(stack: Stack, policy: Any) -> Forward:
    import haliax

    def forward(params, carry, shared):
        stacked = haliax.nn.Stacked(equinox_block()(params), haliax.Axis("layers", stack.length), checkpoint_policy(policy))
        return stacked.fold_via(lambda block, carry: stack.step(block.params, carry, shared))(carry)

    return forward


def haliax_nested(stack: Stack) -> Forward:
    from haliax import ScanCheckpointPolicy

    return haliax_stacked(stack, ScanCheckpointPolicy(simple=True, nested=stack.chunks))


def checkpoint_policy(policy: Any) -> Any:
    from haliax import ScanCheckpointPolicy

    return ScanCheckpointPolicy.from_bool_or_str(policy) if isinstance(policy, (bool, str)) else policy


@functools.cache
def equinox_block() -> Any:
    import equinox

    class Block(equinox.Module):
        params: Any

    return Block


# --- the check ------------------------------------------------------------------------------------------------------------


def version(package: str) -> str:
    return jaxckpt.__version__ if package == "jaxckpt" else importlib.metadata.version(package)


def gradient_error(system: System, stack: Stack) -> float:
    """The largest difference from the plain loop, of loss and gradients of a small stack, to the largest entry."""
    kind = type(stack.block).__name__
    tiny, want = small(kind), plain_loop(kind)
    got = run_quickly(functools.partial(loss_and_gradients, system.build(tiny)), tiny)
    return checked_error(got, want)


def checked_error(got: Any, want: Any) -> float:
    """The larger of the errors of two pairs of loss and gradients.

    Raises:
        ValueError: it is larger than `TOLERANCE`.
    """
    errors = [largest(jax.tree.map(jnp.subtract, a, b)) / largest(b) for a, b in zip(got, want, strict=True)]
    if not all(error <= TOLERANCE for error in errors):
        raise ValueError(f"loss and gradients differ from the plain loop's by {errors}")
    return max(errors)


def run_quickly(fn: Callable[..., Any], stack: Stack) -> Any:
    """`fn` on the CPU, where float32 is no TF32, compiled in little time."""
    with jax.default_device(jax.devices("cpu")[0]):
        arguments = values(stack)
        return jax.device_get(jax.jit(fn).lower(*arguments).compile(QUICKLY)(*arguments))


def largest(tree: Any) -> float:
    return float(jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)])))


@functools.cache
def plain_loop(kind: str) -> Any:
    stack = small(kind)
    forward = functools.partial(loop, stack.step, stack.length)
    loss, gradients = run_quickly(functools.partial(loss_and_gradients, forward), stack)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradients)), "a gradient is zero, and proves nothing"
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradients)))
    return loss, gradients


def values(stack: Stack) -> Any:
    """Random values of the stack's arguments, of a size with which deep stacks stay finite."""
    shapes, tree = jax.tree.flatten(stack.arguments())
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = len(jax.tree.leaves(stack.arguments()[0]))
    fan_in = [s.shape[1] if i < weights and s.ndim > 2 else 1 for i, s in enumerate(shapes)]
    drawn = zip(keys, shapes, fan_in, strict=True)
    return tree.unflatten(0.5 * jax.random.normal(k, s.shape, s.dtype) / n**0.5 for k, s, n in drawn)
