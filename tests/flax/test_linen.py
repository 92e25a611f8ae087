"""Linen stacks beside `nn.scan`, which their variables must match, and beside the plain loop over blocks."""

import functools
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

import flax.core
import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from jaxckpt import checkpoint_scan, stack_params, unstack_params
from tests.support import assert_no_zero_leaf, pull_back, random_like, relative_error

N, D = 5, 4
KEY = jax.random.key(0)
CHUNKS = [None, 1, 2, N]
SETTINGS = [(None, None), (None, "everything"), (1, None), (2, "nothing"), (3, "dots")]
COLLECTIONS = ("params", "batch_stats", "intermediates", "losses", "cache", "perturbations")

settings = pytest.mark.parametrize("blocks_per_ckpt, policy", SETTINGS)
chunks = pytest.mark.parametrize("blocks_per_ckpt", CHUNKS)


class Block(nn.Module):
    """Parameters, metadata, statistics, dropout, a sown value, shared arguments."""

    rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, *, mask=None, train=False, scale=1.0):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "mlp"))
        h = nn.Dense(D, kernel_init=init, param_dtype=self.dtype)(x)
        h = nn.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=self.dtype)(h)
        self.sow("intermediates", "h", h)
        if mask is not None:
            h = h * mask[:, None]
        return x + scale * nn.Dropout(self.rate, deterministic=not train)(jnp.tanh(h))


class Small(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(nn.Dense(D, param_dtype=self.dtype)(x))


class WithSetup(nn.Module):
    """Parameters and statistics declared in `setup`, a submodule used by a method other than `__call__`."""

    features: int = D

    def setup(self):
        self.scale = self.param("scale", nn.with_partitioning(nn.initializers.ones, ("embed",)), (self.features,))
        self.calls = self.variable("batch_stats", "calls", lambda: jnp.zeros((), jnp.int32))
        self.embed = nn.Embed(3, self.features)
        self.layers = [nn.Dense(self.features), nn.Dense(self.features)]

    def score(self, x):
        return self.embed.attend(x) @ self.embed.embedding

    def __call__(self, x):
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            self.calls.value = self.calls.value + 1
        for layer in self.layers:
            x = x + jnp.tanh(layer(x)) * self.scale.reshape(1, -1)
        return x + self.score(x)


class WithFields(nn.Module):
    """Modules passed by the caller, alone, in a sequence and in a dict."""

    inner: nn.Module
    more: Sequence[Any] = ()
    table: Any = None

    @nn.compact
    def __call__(self, x):
        for layer in (self.inner, *self.more, *(self.table or {}).values()):
            x = x + layer(x)
        return nn.LayerNorm()(x)


class Nested(nn.Module):
    """Submodules of submodules, parameters made in a helper method, logical metadata."""

    @nn.compact
    def __call__(self, x):
        gate = self.param("gate", nn.with_logical_partitioning(nn.initializers.ones, ("embed",)), (D,))
        return self.helper(Small(name="first")(x)) * gate.reshape(1, -1)

    def helper(self, x):
        return x + nn.MultiHeadDotProductAttention(2, name="attention")(x[None])[0]


class Deep(nn.Module):
    """A block that contains a stack."""

    @nn.compact
    def __call__(self, x):
        return Small(name="after")(checkpoint_scan(Small, 3, blocks_per_ckpt=2)(name="inner")(x))


class DeepByScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Small(name="after")(nn_scan(Small, 3)(name="inner")(x)[0])


class WithoutParameters(nn.Module):
    def __call__(self, x):
        return jnp.sin(x)


def fields():
    return {
        "inner": nn.Dense(D),
        "more": (nn.Dense(D, use_bias=False), jnp.tanh, Small()),
        "table": {"a": nn.Dense(D)},
    }


BLOCKS = {
    "compact": (Block, dict),
    "setup": (WithSetup, dict),
    "module fields": (WithFields, fields),
    "nested": (Nested, dict),
    "sequential": (nn.Sequential, lambda: {"layers": [nn.Dense(D), nn.tanh, Small()]}),
    "no parameters": (WithoutParameters, dict),
}
blocks = pytest.mark.parametrize("block, make", BLOCKS.values(), ids=BLOCKS.keys())


def nn_scan(block: type[nn.Module], length: int, **shared: Any) -> type[nn.Module]:
    """The stack as one writes it without this library; its modules return `(x, None)`."""

    def __call__(self, x):
        return block.__call__(self, x, **shared), None

    return nn.scan(
        type(block.__name__, (block,), {"__call__": __call__, "__module__": __name__}),
        variable_axes=dict.fromkeys(COLLECTIONS, 0),
        split_rngs={"params": True, "dropout": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def types(tree: Any) -> Any:
    """`tree`, boxes of metadata included, with `dtype[shape]` for its arrays."""
    return jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)


def init_types(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return types(jax.eval_shape(lambda: module.init({"params": KEY, "dropout": KEY}, *args, **kwargs)))


def variables_of(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Variables as `init` makes them, but drawn in NumPy: nothing is compiled, and no leaf is zero."""
    shapes = jax.eval_shape(lambda: module.init({"params": KEY, "dropout": KEY}, *args, **kwargs))
    return {
        name: random_like(tree) if name == "params" else jax.tree.map(abs, random_like(tree))
        for name, tree in shapes.items()
    }


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)` in one program, compiled fast."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})(*args)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, D)), jnp.float32)


class InDouble:
    """The full block in float64 with variables, inputs and the keys of the dropout."""

    def __init__(self, rate: float = 0.5):
        self.block = Block(rate=rate, dtype=jnp.float64)
        rng = np.random.default_rng(1)
        self.x = jnp.asarray(rng.normal(size=(3, D)))
        self.mask = jnp.asarray(rng.uniform(0.5, 1, size=3))
        stack = checkpoint_scan(self.block, N)
        variables = nn.unbox(jax.eval_shape(stack.init, KEY, self.x))
        self.params = random_like(variables["params"])
        self.stats = jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), random_like(variables["batch_stats"]))
        self.rngs = {"dropout": jax.random.key(7)}

    def run(self, apply: Callable[..., Any]) -> Any:
        """Value, updated collections, and gradients of parameters, carry and mask for random cotangents of all of them."""

        def fn(params, x, mask):
            variables = {"params": params, "batch_stats": self.stats}
            return apply(variables, x, mask=mask, train=True, mutable=["batch_stats", "intermediates"])

        return pull_back(fn, self.params, self.x, self.mask)

    def stacked(self, **knobs: Any) -> Any:
        return self.run(functools.partial(checkpoint_scan(self.block, N, **knobs).apply, rngs=self.rngs))

    def loop(self) -> Any:
        """Block after block by `apply`, with the keys that the documentation promises."""
        stack = checkpoint_scan(self.block, N)
        key = stack.apply({}, "dropout", method=nn.Module.make_rng, rngs=self.rngs)

        def apply(variables, x, **kwargs):
            updates = []
            for i in range(N):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
                x, update = self.block.apply(one, x, rngs={"dropout": jax.random.fold_in(key, i)}, **kwargs)
                updates.append(update)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *updates)

        return self.run(apply)

    def scanned(self) -> Any:
        def apply(variables, x, *, mutable, **shared):
            (y, _), updates = nn_scan(Block, N, **shared)(dtype=jnp.float64).apply(variables, x, mutable=mutable)
            return y, updates

        return self.run(apply)


# The variables are those of nn.scan.


@chunks
@blocks
def test_variables_are_those_of_nn_scan(block, make, blocks_per_ckpt, x):
    stack = checkpoint_scan(block, N, blocks_per_ckpt=blocks_per_ckpt)
    assert init_types(stack(**make()), x) == init_types(nn_scan(block, N)(**make()), x)


def test_a_stack_in_a_block_has_the_variables_of_nested_nn_scan(x):
    assert init_types(checkpoint_scan(Deep, 2)(), x) == init_types(nn_scan(DeepByScan, 2)(), x)


@pytest.mark.parametrize(
    "how", [lambda: checkpoint_scan(Small(), N), lambda: checkpoint_scan(functools.partial(Small, dtype=jnp.float32), N)()]
)
def test_instances_and_partials_give_the_same_stack(how, x):
    assert init_types(how(), x) == init_types(nn_scan(Small, N)(), x)


class InCompact(nn.Module):
    make: Callable[[], Sequence[nn.Module]]

    @nn.compact
    def __call__(self, x):
        for stack in self.make():
            out = stack(nn.Dense(D)(x))
            x = out[0] if isinstance(out, tuple) else out
        return x


class InSetup(InCompact):
    def setup(self):
        self.first, *self.others = self.make()

    def __call__(self, x):
        for stack in (self.first, *self.others):
            out = stack(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


@pytest.mark.parametrize(
    "names, want", [((None, None), "ScanSmall_0 ScanSmall_1"), (("a", "b"), "a b"), (("a", None), "a ScanSmall_0")]
)
def test_names_in_a_parent_are_those_of_nn_scan(names, want, x):
    tree = init_types(InCompact(lambda: [checkpoint_scan(Small, N)(name=name) for name in names]), x)
    assert tree == init_types(InCompact(lambda: [nn_scan(Small, N)(name=name) for name in names]), x)
    assert set(want.split()) < tree["params"].keys()


def test_names_in_setup_are_those_of_nn_scan(x):
    tree = init_types(InSetup(lambda: [checkpoint_scan(Small, N)() for _ in range(3)]), x)
    assert tree == init_types(InSetup(lambda: [nn_scan(Small, N)() for _ in range(3)]), x)
    assert tree["params"].keys() == {"first", "others_0", "others_1"}


@pytest.mark.parametrize(
    "how",
    [
        lambda name: checkpoint_scan(Small, N)(name=name),
        lambda name: checkpoint_scan(Small(parent=None, name=name), N),
        lambda name: checkpoint_scan(functools.partial(Small, name=name), N)(),
    ],
    ids=["constructor", "instance", "partial"],
)
def test_an_explicit_name_is_the_stacks(how, x):
    tree = init_types(InCompact(lambda: [how("trunk")]), x)
    assert tree["params"].keys() == {"Dense_0", "trunk"}


def test_an_instance_made_in_a_parent_leaves_no_variables_of_its_own(x):
    tree = init_types(InCompact(lambda: [checkpoint_scan(Small(), N)]), x)
    assert tree["params"].keys() == {"Dense_0", "ScanSmall_0"}


def test_initial_values_differ_from_block_to_block_and_not_with_the_setting(x):
    trees = [compiled(checkpoint_scan(Small, N, blocks_per_ckpt=k)().init, KEY, x) for k in CHUNKS]
    kernel = trees[0]["params"]["Dense_0"]["kernel"]
    assert len(np.unique(np.asarray(kernel[:, 0, 0]))) == N
    for tree in trees[1:]:
        np.testing.assert_array_equal(tree["params"]["Dense_0"]["kernel"], kernel)


def test_saved_variables_load_under_every_setting_and_under_nn_scan(x):
    saving = checkpoint_scan(Block, N, blocks_per_ckpt=2)()
    variables = nn.unbox(variables_of(saving, x))
    want, data = compiled(saving.apply, variables, x), flax.serialization.to_bytes(variables)

    def load(module):
        empty = jax.tree.map(jnp.zeros_like, nn.unbox(variables_of(module, x)))
        return flax.serialization.from_bytes(empty, data)

    for k in CHUNKS:
        stack = checkpoint_scan(Block, N, blocks_per_ckpt=k)()
        np.testing.assert_allclose(compiled(stack.apply, load(stack), x), want, rtol=1e-5)
    scanned = nn_scan(Block, N)()
    np.testing.assert_allclose(compiled(scanned.apply, load(scanned), x)[0], want, rtol=1e-5)


@pytest.mark.parametrize("scanned", [False, True])
def test_stack_params_and_unstack_params_convert_to_single_blocks(scanned, x):
    stack = checkpoint_scan(Block, N, blocks_per_ckpt=2)()
    variables = variables_of(nn_scan(Block, N)() if scanned else stack, x)
    y = x
    for one in unstack_params(variables):
        assert one["params"]["Dense_0"]["kernel"].names == (None, "mlp")
        y = Block().apply(one, y)
    np.testing.assert_allclose(compiled(stack.apply, variables, x), y, rtol=1e-5)
    assert types(stack_params(unstack_params(variables))) == types(variables)


@pytest.mark.parametrize("convert", [lambda v: v, nn.unbox, flax.core.freeze, lambda v: flax.core.freeze(nn.unbox(v))])
@pytest.mark.parametrize("block", [Block, Nested])
def test_parameters_may_be_boxed_unboxed_or_frozen(convert, block, x):
    stack = checkpoint_scan(block, N, blocks_per_ckpt=2)()
    variables = variables_of(stack, x)
    want, _ = compiled(nn_scan(block, N)().apply, variables, x)
    given = convert(variables)

    def loss(params):
        y = stack.apply({**given, "params": params}, x)
        return y.sum(), y

    gradients, y = compiled(jax.grad(loss, has_aux=True), given["params"])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(given["params"])


def test_metadata_gains_the_layer_axis(x):
    params = variables_of(checkpoint_scan(Nested, N)(), x)["params"]
    assert params["gate"].names == ("layers", "embed") and isinstance(params["gate"], nn.LogicallyPartitioned)
    specs = nn.get_partition_spec(variables_of(checkpoint_scan(Block, N)(), x))
    assert specs["params"]["Dense_0"]["kernel"] == jax.P("layers", None, "mlp")


# Values and gradients.


@functools.cache
def reference(kind: str) -> Any:
    return InDouble().loop() if kind == "loop" else InDouble(rate=0.0).scanned()


@settings
@pytest.mark.parametrize("kind, rate", [("loop", 0.5), ("nn.scan", 0.0)])
def test_values_updates_and_gradients_are_those_of_the_loop_and_of_nn_scan(x64, blocks_per_ckpt, policy, kind, rate):
    value, gradients = InDouble(rate).stacked(blocks_per_ckpt=blocks_per_ckpt, policy=policy)
    want, want_gradients = reference(kind)
    assert relative_error(value, want) < 1e-12
    assert relative_error(gradients, want_gradients) < 1e-12
    assert_no_zero_leaf((value, gradients))


@blocks
def test_every_kind_of_block_computes_what_nn_scan_does(block, make, x):
    stack, scanned = checkpoint_scan(block, N, blocks_per_ckpt=2)(**make()), nn_scan(block, N)(**make())
    variables = variables_of(scanned, x)
    want, _ = compiled(scanned.apply, variables, x)
    np.testing.assert_allclose(compiled(stack.apply, variables, x), want, rtol=1e-4, atol=1e-5)


def test_a_stack_in_a_block_computes_what_nested_nn_scan_does(x):
    variables = variables_of(nn_scan(DeepByScan, 2)(), x)
    got, want = (
        compiled(jax.grad(lambda v, module=module: jax.tree.leaves(module.apply(v, x))[0].sum()), variables)
        for module in (checkpoint_scan(Deep, 2, blocks_per_ckpt=1)(), nn_scan(DeepByScan, 2)())
    )
    assert relative_error(got, want) < 1e-5


# Random numbers.


class Noisy(nn.Module):
    """Draws from two streams and shows what it drew."""

    @nn.compact
    def __call__(self, x):
        mask = nn.Dropout(0.5, deterministic=False)(jnp.ones((64,)))
        self.sow("intermediates", "mask", mask)
        noise = jax.random.normal(self.make_rng("noise"), (64,))
        self.sow("intermediates", "noise", noise)
        return x + mask.sum() + noise.sum()


def drawn(stack: nn.Module, rngs: Any) -> Any:
    _, updates = compiled(lambda: stack.apply({}, jnp.zeros(()), rngs=rngs, mutable=["intermediates"]))
    return updates["intermediates"]


@settings
def test_every_block_draws_its_own_numbers_whatever_the_setting(blocks_per_ckpt, policy):
    rngs = {"dropout": jax.random.key(1), "noise": jax.random.key(2)}
    got = drawn(checkpoint_scan(Noisy, N, blocks_per_ckpt=blocks_per_ckpt, policy=policy)(), rngs)
    want = drawn(checkpoint_scan(Noisy, N)(), rngs)
    for name in ("mask", "noise"):
        np.testing.assert_array_equal(got[name][0], want[name][0])
        assert len(np.unique(np.asarray(got[name][0]), axis=0)) == N


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey, functools.partial(jax.random.key, impl="rbg")])
def test_keys_of_every_kind(make_key, x):
    stack = checkpoint_scan(Block, N, blocks_per_ckpt=2)(rate=0.5)
    assert jax.eval_shape(stack.init, make_key(0), x).keys() == {"params", "batch_stats"}
    variables = variables_of(stack, x)

    @jax.jit
    def run(key):
        return stack.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    ys = [run(make_key(i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(ys[0], ys[1])
    assert not np.allclose(ys[0], ys[2])


def test_a_stack_called_twice_draws_anew():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = checkpoint_scan(Noisy, N)(name="stack")
            return stack(stack(x))

    rngs = {"dropout": jax.random.key(1), "noise": jax.random.key(2)}
    first, second = drawn(Twice(), rngs)["stack"]["mask"]
    assert not np.array_equal(first, second)


def test_init_without_a_dropout_key_draws_from_the_params_stream(x):
    stack = checkpoint_scan(Block, N)(rate=0.5)
    assert jax.eval_shape(lambda: stack.init(KEY, x, train=True)).keys() == {"params", "batch_stats"}


class OtherStream(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + jax.random.normal(self.make_rng("drop-path"), x.shape)


@pytest.mark.parametrize(
    "block, stream", [(functools.partial(Noisy), "dropout"), (functools.partial(OtherStream), "drop-path")]
)
def test_a_missing_stream_is_named(block, stream):
    with pytest.raises(ValueError, match=re.escape(f"rngs={{{stream!r}: key}}")):
        checkpoint_scan(block, N)().apply({}, jnp.zeros(()))


# Mutable collections.


class Sown(nn.Module):
    """Two values sown, one of them summed up; a perturbation."""

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(D)(x)
        self.sow("losses", "sum", (h**2).sum(), init_fn=lambda: jnp.zeros(()), reduce_fn=lambda a, b: a + b)
        self.sow("intermediates", "h", h)
        self.sow("intermediates", "h", x)
        return x + self.perturb("p", jnp.tanh(h))


class CallsTwice(nn.Module):
    stack: nn.Module

    def __call__(self, x):
        for _ in range(2):
            out = self.stack(x)
            x = out[0] if isinstance(out, tuple) else out
        return x


MUTABLE = [True, "losses", ["losses", "intermediates"], ["params"], [], flax.core.DenyList("params")]


@pytest.mark.parametrize("mutable", MUTABLE, ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_updated_collections_are_those_of_nn_scan(mutable, twice, x):
    ours, theirs = checkpoint_scan(Sown, N, blocks_per_ckpt=2)(), nn_scan(Sown, N)()
    if twice:
        ours, theirs = CallsTwice(ours), CallsTwice(theirs)
    variables = variables_of(theirs, x)
    run = compiled if isinstance(mutable, list) and len(mutable) == 2 else jax.eval_shape
    assert init_types(ours, x) == types(variables)
    got, want = (run(lambda v, m=module: m.apply(v, x, mutable=mutable), variables) for module in (ours, theirs))
    assert types(got[1]) == types(want[1])
    if run is compiled:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_without_mutable_only_the_carry_comes_back(x):
    stack = checkpoint_scan(Sown, N)()
    variables = variables_of(stack, x)
    for keywords in ({}, {"mutable": False}):
        assert jax.eval_shape(lambda keywords=keywords: stack.apply(variables, x, **keywords)).shape == x.shape


def test_capture_intermediates(x):
    stack, scanned = checkpoint_scan(Small, N, blocks_per_ckpt=2)(), nn_scan(Small, N)()
    variables = variables_of(stack, x)
    (y, captured), (_, want) = (
        compiled(functools.partial(module.apply, capture_intermediates=True), variables, x) for module in (stack, scanned)
    )
    (dense,), (want,) = (tree["intermediates"]["Dense_0"]["__call__"] for tree in (captured, want))
    np.testing.assert_allclose(dense, want, rtol=1e-5, atol=1e-6)
    outputs, last = captured["intermediates"]["__call__"]
    assert outputs.shape == (N, *x.shape)
    np.testing.assert_array_equal(outputs[-1], last)
    np.testing.assert_array_equal(last, y)


@settings
def test_statistics_are_updated_exactly_once_under_grad(blocks_per_ckpt, policy, x):
    stack = checkpoint_scan(WithSetup, N, blocks_per_ckpt=blocks_per_ckpt, policy=policy)()
    variables = variables_of(stack, x)

    @jax.jit
    def step(params, stats):
        def loss(params):
            y, updates = stack.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return y.sum(), updates["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    stats = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    for count in (1, 2):
        (_, stats), _ = step(variables["params"], stats)
        np.testing.assert_array_equal(stats["calls"], np.full(N, count))


def test_writing_an_immutable_collection_is_flaxs_error(x):
    class Writes(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("cache", "x", lambda: x).value = x
            return x

    stack = checkpoint_scan(Writes, N)()
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="cache"):
        stack.apply(variables_of(stack, x), x)


@pytest.mark.parametrize("blocks_per_ckpt", [None, 2])
def test_batch_statistics_over_a_named_axis(blocks_per_ckpt):
    class Synced(nn.Module):
        axis: str | None = "batch"

        @nn.compact
        def __call__(self, x):
            return x + nn.BatchNorm(use_running_average=False, axis_name=self.axis)(x)

    stack = checkpoint_scan(Synced, N, blocks_per_ckpt=blocks_per_ckpt)()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(4, 2, D)), jnp.float32)
    variables = variables_of(checkpoint_scan(Synced, N)(axis=None), x[0])
    got = compiled(jax.vmap(lambda x: stack.apply(variables, x, mutable=["batch_stats"]), axis_name="batch"), x)
    y, updates = compiled(lambda x: checkpoint_scan(Synced, N)(axis=None).apply(variables, x, mutable=["batch_stats"]), x)
    np.testing.assert_allclose(got[0], y, rtol=1e-4, atol=1e-5)
    assert relative_error(jax.tree.map(lambda leaf: leaf[0], got[1]), updates) < 1e-5


# What is passed to the blocks.


@settings
def test_per_block_arguments_and_aux(x64, blocks_per_ckpt, policy):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, z, *, rate, bias):
            h = jnp.tanh(nn.Dense(D, param_dtype=jnp.float64)(x)) * rate + bias
            return (x + h, z + h.sum()), {"norm": (h**2).sum(), "rate": rate}

    knobs = {"blocks_per_ckpt": blocks_per_ckpt, "policy": policy}
    stack = checkpoint_scan(Scaled, N, has_aux=True, per_block=("rate",), **knobs)()
    rng = np.random.default_rng(2)
    x, z, bias = jnp.asarray(rng.normal(size=(3, D))), jnp.asarray(0.5), jnp.asarray(rng.normal(size=(3, D)))
    rate = jnp.linspace(0.1, 1.0, N)
    params = variables_of(stack, x, z, rate=rate, bias=bias)["params"]

    def stacked(params, x, z, rate, bias):
        return stack.apply({"params": params}, x, z, rate=rate, bias=bias)

    def loop(params, x, z, rate, bias):
        auxes = []
        for i, one in enumerate(unstack_params(params)):
            (x, z), aux = Scaled().apply({"params": one}, x, z, rate=rate[i], bias=bias)
            auxes.append(aux)
        return (x, z), jax.tree.map(lambda *leaves: jnp.stack(leaves), *auxes)

    args = (params, x, z, rate, bias)
    got, want = pull_back(stacked, *args), pull_back(loop, *args)
    assert relative_error(got, want) < 1e-12
    assert_no_zero_leaf(got)


class Config:
    """Neither hashable nor a pytree."""

    __hash__ = None

    def __init__(self, factor):
        self.factor = factor


class Configured(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, *, mode="plain", config=None, flags=(), tables=None):
        x = nn.Dense(D)(x)
        x = x if mask is None else jnp.where(mask, x, 0)
        x = x * config.factor if config is not None else x
        x = x + tables["bias"] if tables is not None else x
        return jnp.tanh(x) if mode == "tanh" and "off" not in flags else x


@pytest.mark.parametrize(
    "shared",
    [
        {},
        {"mask": None, "mode": "tanh"},
        {"mask": np.array([[True] * D, [False] * D, [True] * D]), "config": Config(0.5)},
        {"mode": "tanh", "flags": ("off", 1, None)},
        {"tables": {"bias": jnp.full((3, D), 0.5), "note": "not an array", "none": None}},
        {"config": Config(jnp.float32(2.0))},
    ],
    ids=lambda shared: ",".join(shared) or "nothing",
)
def test_shared_arguments(shared, x):
    stack = checkpoint_scan(Configured, N, blocks_per_ckpt=2)()
    variables = variables_of(stack, x, **shared)
    y = x
    for one in unstack_params(variables):
        y = Configured().apply(one, y, **shared)
    np.testing.assert_allclose(compiled(lambda v: stack.apply(v, x, **shared), variables), y, rtol=1e-4, atol=1e-5)


def test_a_block_without_parameters_needs_only_a_length(x):
    stack = checkpoint_scan(WithoutParameters, N, blocks_per_ckpt=2)()
    assert stack.init(KEY, x) == {}
    np.testing.assert_allclose(stack.apply({}, x), functools.reduce(lambda y, _: jnp.sin(y), range(N), x), rtol=1e-6)


# Under Linen's and JAX's transformations.


@pytest.mark.parametrize("lift", [lambda cls: cls, nn.jit, nn.remat], ids=["plain", "nn.jit", "nn.remat"])
@pytest.mark.parametrize("call", [lambda fn, *args: fn(*args), compiled], ids=["eager", "jax.jit"])
def test_init_and_apply_when_lifted(lift, call, x):
    stack = lift(checkpoint_scan(Small, N, blocks_per_ckpt=2))()
    variables = call(stack.init, KEY, x)
    assert types(variables) == init_types(nn_scan(Small, N)(), x)
    got = call(jax.value_and_grad(lambda v: stack.apply(v, x).sum()), variables)
    want = compiled(jax.value_and_grad(lambda v: nn_scan(Small, N)().apply(v, x)[0].sum()), variables)
    assert relative_error(got, want) < 1e-5


def test_nn_vmap_over_a_stack(x):
    lift = functools.partial(nn.vmap, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=2)
    many = lift(checkpoint_scan(Small, N, blocks_per_ckpt=2))()
    xs = jnp.stack([x, 2 * x])
    variables = variables_of(many, xs)
    assert variables["params"]["Dense_0"]["kernel"].shape == (2, N, D, D)
    want = compiled(jax.vmap(checkpoint_scan(Small, N)().apply), variables, xs)
    np.testing.assert_allclose(compiled(many.apply, variables, xs), want, rtol=1e-4, atol=1e-5)


def test_a_stack_of_stacks(x):
    stack = checkpoint_scan(checkpoint_scan(Small, 3, blocks_per_ckpt=2), 2)()
    variables = variables_of(stack, x)
    assert variables["params"]["Dense_0"]["kernel"].shape == (2, 3, D, D)
    flat = jax.tree.map(lambda leaf: leaf.reshape(6, *leaf.shape[2:]), variables)
    want = compiled(checkpoint_scan(Small, 6)().apply, flat, x)
    np.testing.assert_allclose(compiled(stack.apply, variables, x), want, rtol=1e-4, atol=1e-5)


def over_time(**knobs):
    """A stack in the cell of an `nn.scan` over time, with one set of parameters for all steps."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, step):
            y = checkpoint_scan(Small, N, **knobs)(name="deep")(carry + step)
            return y, y.sum()

    return nn.scan(Cell, variable_broadcast="params", split_rngs={"params": False})()


OVER_TIME = [
    {"blocks_per_ckpt": 2, "stages": 2},
    {"policy": "cheap"},
    {"policy": "budget:0.5", "engine": "reversal"},
    {"engine": "reversal", "policy": "everything"},
    {"snapshots": 2},
    {"offload_carry": True},
    {"plan": "auto"},
]


@pytest.mark.parametrize("knobs", OVER_TIME, ids=str)
def test_a_stack_in_a_scan_over_time_is_initialised_under_every_knob(knobs, x):
    steps = jnp.linspace(0.0, 1.0, 3)
    assert init_types(over_time(**knobs), x, steps) == init_types(over_time(), x, steps)


def test_a_stack_in_a_scan_over_time_has_the_same_values_and_gradients(x):
    steps, ours = jnp.linspace(0.0, 1.0, 3), over_time(snapshots=2)
    variables = variables_of(ours, x, steps)

    def both(model):
        return lambda v: jax.vjp(lambda v, x: model.apply(v, x, steps)[0], v, x)[1](random_like(x))

    assert relative_error(compiled(both(ours), variables), compiled(both(over_time()), variables)) < 1e-5


@pytest.mark.parametrize("knobs", [{"policy": "save:missing"}, {"stages": "tags:missing"}], ids=str)
def test_init_finds_out_that_knobs_name_no_tag(knobs, x):
    with pytest.raises(ValueError, match="'missing'"):
        init_types(checkpoint_scan(Small, N, **knobs)(), x)


def test_init_makes_no_choice(x, monkeypatch):
    monkeypatch.setattr("jaxckpt.engine.run.with_choice", None)
    init_types(checkpoint_scan(Small, N, policy="cheap")(), x)


def test_init_variants_give_one_tree(x):
    stack = checkpoint_scan(Small, N, blocks_per_ckpt=3)()
    y, variables = compiled(stack.init_with_output, KEY, x)
    lazy = stack.lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert types(variables) == types(lazy) == init_types(stack, x)
    np.testing.assert_allclose(y, compiled(stack.apply, variables, x), rtol=1e-5)
    np.testing.assert_allclose(stack.bind(variables)(x), y, rtol=1e-5)


def test_a_stack_called_twice_shares_its_parameters(x):
    module = CallsTwice(checkpoint_scan(Small, N, blocks_per_ckpt=2)())
    variables = variables_of(module, x)
    assert types(variables["params"]) == {"stack": init_types(nn_scan(Small, N)(), x)["params"]}
    stack, inner = checkpoint_scan(Small, N)(), {"params": variables["params"]["stack"]}
    want = compiled(lambda: stack.apply(inner, stack.apply(inner, x)))
    np.testing.assert_allclose(compiled(module.apply, variables, x), want, rtol=1e-4, atol=1e-5)


def test_share_scope_merges_the_stack_into_its_parent(x):
    class Merged(nn.Module):
        def setup(self):
            self.stack = checkpoint_scan(Small, N)()
            nn.share_scope(self, self.stack)

        def __call__(self, x):
            return self.stack(x)

    assert init_types(Merged(), x) == init_types(nn_scan(Small, N)(), x)


@pytest.mark.parametrize("flops", [False, True])
def test_tabulate(flops, x):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(checkpoint_scan(Small, N, blocks_per_ckpt=2)(name="trunk")(nn.Dense(D)(x)))

    options = {"compute_flops": flops, "compute_vjp_flops": flops, "console_kwargs": {"width": 200, "no_color": True}}
    table = Model().tabulate(KEY, x, **options)
    total = N * (D * D + D) + (D * D + D) + (D * 2 + 2)
    assert "ScanSmall" in table and f"Total Parameters: {total}" in table
    assert f"[{N},{D},{D}]" in nn.tabulate(checkpoint_scan(Small, N)(), KEY, **options)(x)


def test_modules_in_a_block_know_their_path(x):
    paths = []

    class Where(nn.Module):
        @nn.compact
        def __call__(self, x):
            paths.append(self.path)
            return nn.Dense(D)(x)

    init_types(InCompact(lambda: [checkpoint_scan(Where, N)(name="trunk")]), x)
    assert set(paths) == {("trunk",)}


# Stacks are modules like others, and hide no state.


def test_stacks_compare_hash_print_and_copy_like_modules(x):
    stack = checkpoint_scan(WithFields, N)
    a, b, other = stack(nn.Dense(D)), stack(nn.Dense(D)), stack(nn.Dense(2 * D))
    assert a == b and hash(a) == hash(b) and a != other
    assert repr(a).startswith("ScanWithFields(") and "features = 4" in repr(a)
    assert a.copy(inner=nn.Dense(2 * D)) == other == a.clone(inner=nn.Dense(2 * D))
    assert "48" not in stack.__doc__ and f"{N} `WithFields`s" in stack.__doc__
    assert issubclass(stack, WithFields) and stack.__name__ == "ScanWithFields"
    assert init_types(a, x) == init_types(b, x)


def test_a_bound_stack_shows_its_fields(x):
    stack = checkpoint_scan(WithFields, N)(nn.Dense(D))
    bound = stack.bind(variables_of(stack, x))
    assert bound.inner.features == D


class PassesItsOwn(nn.Module):
    """Gives a submodule of its own to the blocks of a stack."""

    use: Callable[[nn.Module, jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        return self.use(nn.Dense(D), x)


@pytest.mark.parametrize(
    "use",
    [
        lambda dense, x: checkpoint_scan(WithFields, N)(dense)(x),
        lambda dense, x: checkpoint_scan(WithFields, N)(dense)(dense(x)),
        lambda dense, x: checkpoint_scan(WithFields, N)(nn.Dense(D, parent=None), more=(dense,))(x),
        lambda dense, x: checkpoint_scan(WithFields, N)(nn.Dense(D, parent=None), table={"d": dense})(x),
        lambda dense, x: checkpoint_scan(WithFields(dense), N)(x),
    ],
    ids=["field", "used before", "in a tuple", "in a dict", "of an instance"],
)
def test_fields_bound_in_a_parent_are_refused(use, x):
    with pytest.raises(ValueError, match=r"WithFields.*Dense.*bound to another module.*parent=None"):
        PassesItsOwn(use).init(KEY, x)


class TakesModule(nn.Module):
    @nn.compact
    def __call__(self, x, *, layer):
        return x + layer(x)


@pytest.mark.parametrize(
    "make", [lambda: nn.Dense(D), lambda: nn.Dropout(0.5, deterministic=False), lambda: nn.BatchNorm(False)]
)
def test_bound_modules_among_shared_arguments_are_refused(make, x):
    """They would leak tracers into the parent's variables, and give every block one dropout mask."""

    class Shares(nn.Module):
        @nn.compact
        def __call__(self, x):
            return checkpoint_scan(TakesModule, N)()(x, layer=make())

    with pytest.raises(ValueError, match="layer"):
        Shares().init({"params": KEY, "dropout": KEY}, x)


def test_one_module_in_two_fields_stays_one(x):
    dense = nn.Dense(D)

    def make():
        return {"inner": dense, "more": (dense,)}

    assert init_types(checkpoint_scan(WithFields, N)(**make()), x) == init_types(nn_scan(WithFields, N)(**make()), x)


def test_the_constructor_arguments_reach_every_block(x):
    class Counts(nn.Module):
        power: int
        scale: float | None = None

        def __post_init__(self):
            self.scale = 2.0 if self.scale is None else self.scale
            super().__post_init__()

        @nn.compact
        def __call__(self, x):
            return self.scale * x**self.power

    np.testing.assert_allclose(checkpoint_scan(Counts, 3)(1).apply({}, x), 8 * x, rtol=1e-6)
    np.testing.assert_allclose(checkpoint_scan(Counts(power=1, scale=3.0), 2).apply({}, x), 9 * x, rtol=1e-6)


@pytest.mark.parametrize("args", [(True,), (None,)])
def test_a_flag_by_position_is_told_to_be_a_keyword(args, x):
    class Flagged(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(D)(x)

    with pytest.raises(TypeError, match=r"keyword"):
        checkpoint_scan(Flagged, N)().init(KEY, x, *args)


# Programs in the style of Flax's documentation.


class LanguageModel(nn.Module):
    """Embedding, a stack with dropout and a sown auxiliary loss, a tied output layer."""

    blocks_per_ckpt: int | None = None

    @nn.compact
    def __call__(self, tokens, *, train):
        class TransformerBlock(nn.Module):
            @nn.compact
            def __call__(self, x, *, mask, train):
                h = nn.LayerNorm()(x)
                x = x + nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=not train)(h, mask=mask)
                h = nn.Dense(2 * D)(nn.LayerNorm()(x))
                self.sow("losses", "activity", 1e-3 * (h**2).mean())
                return x + nn.Dropout(0.1, deterministic=not train)(nn.Dense(D)(nn.gelu(h)))

        embed = nn.Embed(11, D)
        stack = checkpoint_scan(TransformerBlock, 4, blocks_per_ckpt=self.blocks_per_ckpt)(name="layers")
        return embed.attend(nn.LayerNorm()(stack(embed(tokens), mask=nn.make_causal_mask(tokens), train=train)))


@pytest.mark.parametrize("blocks_per_ckpt", [None, 3])
def test_training_a_language_model(blocks_per_ckpt):
    model = LanguageModel(blocks_per_ckpt)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, size=(2, 6)))
    params = compiled(lambda: model.init(KEY, tokens, train=False))["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(3e-2))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(state, key):
        def loss(params):
            logits, updates = state.apply_fn(
                {"params": params}, tokens[:, :-1], train=True, rngs={"dropout": key}, mutable=["losses"]
            )
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
            return nll + sum(leaf.sum() for leaf in jax.tree.leaves(updates))

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for i in range(30):
        state, loss = step(state, jax.random.fold_in(KEY, i))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_decoding_with_a_cache_is_the_full_forward_pass():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x, *, decode):
            mask = None if decode else nn.make_causal_mask(x[..., 0])
            return x + nn.MultiHeadDotProductAttention(2, decode=decode)(x, mask=mask)

    stack = checkpoint_scan(Decoder, 3)()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, D)), jnp.float32)
    variables = variables_of(stack, x, decode=True)
    params, cache = variables["params"], jax.tree.map(jnp.zeros_like, variables["cache"])
    want = compiled(lambda x: stack.apply({"params": params}, x, decode=False), x)

    @jax.jit
    def step(cache, x):
        return stack.apply({"params": params, "cache": cache}, x, decode=True, mutable=["cache"])

    steps = []
    for t in range(x.shape[1]):
        y, updates = step(cache, x[:, t : t + 1])
        cache = updates["cache"]
        steps.append(y)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), want, rtol=1e-4, atol=1e-5)
    index = flax.traverse_util.flatten_dict(cache, sep="/")["MultiHeadDotProductAttention_0/cache_index"]
    np.testing.assert_array_equal(index, [5, 5, 5])


def test_equal_stacks_are_equal_modules():
    assert checkpoint_scan(nn.Dense, 3, policy="dots")(4) == checkpoint_scan(nn.Dense, 3, policy="dots")(4)
    assert checkpoint_scan(nn.Dense, 3)(4) != checkpoint_scan(nn.Dense, 3, blocks_per_ckpt=2)(4)


def test_generic_blocks():
    T = typing.TypeVar("T")

    class Block(nn.Module, typing.Generic[T]):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(x.shape[-1])(x)

    x = jnp.ones((2, 4))
    assert checkpoint_scan(Block[int], 3)().init_with_output(jax.random.key(0), x)[0].shape == x.shape


def test_a_subclass_of_a_stack_cannot_override_what_the_blocks_do(x):
    class Scaled(nn.Module):
        scale: float = 1.0

        def setup(self):
            self.dense = nn.Dense(D)

        def half(self, x):
            return 0.5 * self.scale * x

        def __call__(self, x):
            return self.half(self.dense(x))

    stack = checkpoint_scan(Scaled, 3)
    with pytest.raises(TypeError, match=r"Doubles overrides half of Scaled.*are of class Scaled.*stack the subclass"):

        class Doubles(stack):
            def half(self, x):
                return 2.0 * x

    with pytest.raises(TypeError, match=r"Deeper overrides setup of Scaled.*stack the subclass"):

        class Deeper(stack):
            def setup(self):
                self.other = nn.Dense(D)

    class Larger(stack):
        """Fields go over to the blocks, and around the stack all is free."""

        scale: float = 2.0
        factor: float = 3.0

        def __call__(self, x):
            return self.factor * super().__call__(x)

    variables = Larger().init(KEY, x)
    np.testing.assert_allclose(Larger().apply(variables, x), 3.0 * stack(scale=2.0).apply(variables, x), rtol=1e-6)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, stack().init(KEY, x))
    nn.jit(nn.remat(stack))().init(KEY, x)
