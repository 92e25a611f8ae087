"""NNX stacks beside the plain loop over their modules."""

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, explain, stack_params
from jaxckpt.analysis.jaxpr import equations
from tests.support import assert_no_zero_leaf, random_like, relative_error

N, D = 5, 4
SETTINGS = [(None, None), (None, "everything"), (1, None), (2, "nothing"), (3, "dots")]
settings = pytest.mark.parametrize("blocks_per_ckpt, policy", SETTINGS)


class Block(nnx.Module):
    """Parameters, statistics, dropout, an irrelevant static attribute, shared arguments."""

    def __init__(self, rngs, *, layer_idx=0, rate=0.5, dtype=jnp.float32):
        self.linear = nnx.Linear(D, D, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(D, momentum=0.9, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.layer_idx = layer_idx
        nnx.update(self, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(self, nnx.BatchStat)))

    def __call__(self, x, *, mask=None, scale=1.0):
        h = self.norm(self.linear(x))
        h = h if mask is None else h * mask[:, None]
        return x + scale * self.dropout(jnp.tanh(h))


class Small(nnx.Module):
    """Nothing but parameters."""

    def __init__(self, *, rngs, features=D, layer_idx=0):
        self.linear, self.layer_idx = nnx.Linear(features, features, rngs=rngs), layer_idx

    def __call__(self, x):
        return x + jnp.tanh(self.linear(x))


class Nested(nnx.Module):
    """Submodules in lists and dicts, and one variable under two names."""

    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs), Small(rngs=rngs)])
        self.table = nnx.Dict(a=nnx.Linear(D, D, use_bias=False, rngs=rngs))
        self.gain = nnx.Param(rngs.params.normal((1, D)))
        self.tied = self.gain

    def __call__(self, x):
        for layer in (*self.layers, self.table["a"]):
            x = x + jnp.sin(layer(x))
        return x * self.gain + self.tied


class Sown(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.linear(x))
        self.sow(nnx.Intermediate, "h", h)
        return x + h


def modules(cls: type[nnx.Module], count: int = N, **options: Any) -> list[Any]:
    return [cls(rngs=nnx.Rngs(i), **options) for i in range(count)]


def shapes(module: nnx.Module) -> dict[Any, Any]:
    return {path: jax.tree.map(jnp.shape, leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(module))}


def run_loop(blocks: list[Any], x: Any, **shared: Any) -> Any:
    for block in blocks:
        x = block(x, **shared)
    return x


def stacked_state(blocks: list[Any], *filters: Any) -> Any:
    return nnx.to_pure_dict(stack_params([nnx.state(block, *filters) for block in blocks]))


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, D)), jnp.float32)


# What a stack holds.


@pytest.mark.parametrize("cls", [Block, Small, Nested])
def test_a_class_and_a_list_hold_the_blocks_paths_with_a_layer_axis(cls):
    one = shapes(cls(rngs=nnx.Rngs(0)))
    for stack in (checkpoint_scan(cls, N)(rngs=nnx.Rngs(0)), checkpoint_scan(modules(cls))):
        assert shapes(stack) == {path: (N, *shape) for path, shape in one.items()}
        assert isinstance(stack, cls) and type(stack).__name__ == f"Scan{cls.__name__}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: checkpoint_scan(Block, N)(nnx.Rngs(0), dtype=jnp.float16),
        lambda: checkpoint_scan(Block, N)(rngs=nnx.Rngs(params=0, dropout=1), dtype=jnp.float16),
        lambda: checkpoint_scan(functools.partial(Block, dtype=jnp.float16), N)(nnx.Rngs(0)),
        lambda: nnx.jit(lambda: checkpoint_scan(Block, N)(nnx.Rngs(0), dtype=jnp.float16))(),
        lambda: nnx.eval_shape(lambda: checkpoint_scan(Block, N)(nnx.Rngs(0), dtype=jnp.float16)),
    ],
    ids=["positional", "keyword", "partial", "nnx.jit", "nnx.eval_shape"],
)
def test_constructor_arguments_reach_every_block(make):
    stack = make()
    assert stack.linear.kernel.shape == (N, D, D) and stack.linear.kernel.dtype == jnp.float16
    assert stack.dropout.rngs.count.shape == (N,)


def test_blocks_of_a_class_start_from_different_values():
    stack = checkpoint_scan(Block, N)(rngs=nnx.Rngs(0))
    assert len(np.unique(np.asarray(stack.linear.kernel[:, 0, 0]))) == N
    assert len(np.unique(jax.random.key_data(stack.dropout.rngs.key[...]), axis=0)) == N


def test_a_stack_advances_the_rngs_it_is_made_from():
    rngs = nnx.Rngs(0)
    a, b = (checkpoint_scan(Small, N)(rngs=rngs) for _ in range(2))
    assert not np.array_equal(a.linear.kernel, b.linear.kernel)


@pytest.mark.parametrize("container", [list, tuple, nnx.List])
def test_a_list_gives_its_values_block_by_block(container):
    blocks = modules(Small)
    stack = checkpoint_scan(container(blocks))
    for i, block in enumerate(blocks):
        np.testing.assert_array_equal(stack.linear.kernel[i], block.linear.kernel[...])


def test_tied_variables_of_a_block_stay_tied():
    for stack in (checkpoint_scan(Nested, N)(rngs=nnx.Rngs(0)), checkpoint_scan(modules(Nested))):
        assert stack.gain is stack.tied
        assert (copy := nnx.clone(stack)).gain is copy.tied


def test_split_merge_clone_and_state_round_trips(x):
    stack = checkpoint_scan(Nested, N, blocks_per_ckpt=2)(rngs=nnx.Rngs(0))
    want = stack(x)
    other = checkpoint_scan(Nested, N, blocks_per_ckpt=2)(rngs=nnx.Rngs(1))
    nnx.update(other, nnx.state(stack))
    for copy in (nnx.merge(*nnx.split(stack)), nnx.clone(stack), other):
        np.testing.assert_allclose(copy(x), want, rtol=1e-6)
        assert isinstance(copy, Nested) and shapes(copy) == shapes(stack)
    assert nnx.graphdef(nnx.clone(stack)) == nnx.graphdef(stack)
    assert repr(stack).startswith("ScanNested(")


def test_a_stack_in_a_module_and_in_a_stack(x):
    class Trunk(nnx.Module):
        def __init__(self, *, rngs):
            self.first = nnx.Linear(D, D, rngs=rngs)
            self.stack = checkpoint_scan(Block, 3, blocks_per_ckpt=2)(rngs)

        def __call__(self, x):
            return self.stack(self.first(x))

    trunk = Trunk(rngs=nnx.Rngs(0))
    assert shapes(trunk)[("stack", "linear", "kernel")] == (3, D, D)
    deep = checkpoint_scan(Trunk, 2)(rngs=nnx.Rngs(0))
    assert shapes(deep)[("stack", "linear", "kernel")] == (2, 3, D, D)
    assert shapes(deep)[("first", "kernel")] == (2, D, D)
    assert nnx.jit(lambda m, x: m(x))(deep, x).shape == x.shape
    np.testing.assert_array_equal(deep.stack.dropout.rngs.count, np.ones((2, 3)))


# Values and gradients.


@settings
def test_values_gradients_statistics_and_counters_are_those_of_the_loop(x64, blocks_per_ckpt, policy):
    """Dropout on: the keys of each block lie in its state, so the loop draws the same masks."""
    blocks = modules(Block, dtype=jnp.float64)
    stack = checkpoint_scan(blocks, blocks_per_ckpt=blocks_per_ckpt, policy=policy)
    rng = np.random.default_rng(0)
    x, mask = jnp.asarray(rng.normal(size=(3, D))), jnp.asarray(rng.uniform(0.5, 1, size=3))

    def run(model, x, mask):
        def loss(model, x, mask):
            y = run_loop(model, x, mask=mask) if isinstance(model, nnx.List) else model(x, mask=mask)
            return (y * random_like(y)).sum(), y

        gradients, y = nnx.grad(loss, argnums=(0, 1, 2), has_aux=True)(model, x, mask)
        return y, gradients

    y, (of_stack, *of_inputs) = nnx.jit(run)(stack, x, mask)
    loop = nnx.List(blocks)
    want, (of_loop, *of_loop_inputs) = nnx.jit(run)(loop, x, mask)
    per_block = nnx.to_pure_dict(of_loop)
    of_loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(per_block[i] for i in range(N)))
    got = (y, nnx.to_pure_dict(of_stack), of_inputs)
    assert relative_error(got, (want, of_loop, of_loop_inputs)) < 1e-12
    assert_no_zero_leaf(got)
    updated = nnx.to_pure_dict(nnx.state(stack, nnx.BatchStat))
    assert relative_error(updated, stacked_state(list(loop), nnx.BatchStat)) < 1e-12
    np.testing.assert_array_equal(stack.dropout.rngs.count, np.ones(N))


@pytest.mark.parametrize("cls", [Small, Nested])
@pytest.mark.parametrize("blocks_per_ckpt", [None, 2])
def test_every_kind_of_block_computes_what_the_loop_does(cls, blocks_per_ckpt, x):
    blocks = modules(cls)
    stack = checkpoint_scan(blocks, blocks_per_ckpt=blocks_per_ckpt)
    np.testing.assert_allclose(stack(x), run_loop(blocks, x), rtol=1e-4, atol=1e-5)


def test_the_loop_returns_no_parameters(x):
    """They would come back as copies `[N, ...]`: gigabytes."""
    stack = checkpoint_scan(modules(Block))
    stack.dropout.deterministic = True
    graphdef, params, rest = nnx.split(stack, nnx.Param, ...)

    def forward(params, rest, x):
        return nnx.merge(graphdef, params, rest)(x)

    closed = jax.make_jaxpr(forward)(params, rest, x)
    scans = [eqn for eqn in equations(closed.jaxpr) if eqn.primitive.name == "scan"]
    assert scans
    stacked = [v.aval.shape for eqn in scans for v in eqn.outvars]
    assert sorted(stacked) == sorted([x.shape, (N, D), (N, D)]), "the carry, and mean and variance of the statistics"


def test_a_stack_without_state_to_update_changes_no_variable(x):
    stack = checkpoint_scan(Small, N, blocks_per_ckpt=2)(rngs=nnx.Rngs(0))
    before = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(stack))}
    jax.jit(lambda x: stack(x))(x)
    for path, v in nnx.to_flat_state(nnx.state(stack)):
        assert v.get_value() is before[path]


def test_per_block_shared_and_aux(x):
    class Scaled(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x, z, *, rate, bias=None, mode="plain", config=None):
            h = self.linear(x) * rate + (0 if bias is None else bias)
            h = jnp.tanh(h) if mode == "tanh" else h * config["factor"]
            return (x + h, z + h.sum()), (h**2).sum()

    blocks = modules(Scaled)
    stack = checkpoint_scan(blocks, blocks_per_ckpt=2, has_aux=True, per_block=("rate",))
    rates, z = jnp.linspace(0.1, 1.0, N), jnp.zeros(())
    for shared in ({"mode": "tanh", "bias": jnp.ones((3, D))}, {"config": {"factor": 0.5, "name": "a"}}):
        (got, total), aux = stack(x, z, rate=rates, **shared)
        want, want_total, want_aux = x, z, []
        for block, rate in zip(blocks, rates, strict=True):
            (want, want_total), one = block(want, want_total, rate=rate, **shared)
            want_aux.append(one)
        assert relative_error([got, total, aux], [want, want_total, jnp.stack(want_aux)]) < 1e-5


def test_blocks_without_parameters(x):
    class Sine(nnx.Module):
        def __call__(self, x):
            return jnp.sin(x)

    want = functools.reduce(lambda y, _: jnp.sin(y), range(N), x)
    for stack in (checkpoint_scan(Sine, N)(), checkpoint_scan([Sine() for _ in range(N)])):
        np.testing.assert_allclose(stack(x), want, rtol=1e-6)


# State that changes.


def test_dropout_masks_differ_between_blocks_and_calls():
    class Masks(nnx.Module):
        def __init__(self, *, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return x, self.dropout(jnp.ones((64,)))

    for stack in (
        checkpoint_scan(Masks, N, has_aux=True, blocks_per_ckpt=2)(rngs=nnx.Rngs(0)),
        checkpoint_scan(modules(Masks), has_aux=True, blocks_per_ckpt=2),
    ):
        masks = np.concatenate([stack(jnp.zeros(()))[1] for _ in range(2)])
        assert len(np.unique(masks, axis=0)) == 2 * N
        np.testing.assert_array_equal(stack.dropout.rngs.count, np.full(N, 2))


def test_train_and_eval(x):
    stack = checkpoint_scan(Block, N)(nnx.Rngs(0))
    run = nnx.jit(lambda model, x: model(x))
    stack.eval()
    assert stack.dropout.deterministic and stack.norm.use_running_average
    np.testing.assert_array_equal(run(stack, x), run(stack, x))
    np.testing.assert_array_equal(stack.dropout.rngs.count, np.zeros(N))
    np.testing.assert_array_equal(stack.norm.mean, np.zeros((N, D)))
    stack.train()
    assert not np.allclose(run(stack, x), run(stack, x))
    np.testing.assert_array_equal(stack.dropout.rngs.count, np.full(N, 2))
    assert np.all(stack.norm.mean[...] != 0)


def test_jit_over_a_stack_that_changes_nothing(x):
    stack = checkpoint_scan(Block, N)(nnx.Rngs(0))
    stack.eval()
    closed = jax.jit(lambda x: stack(x))
    np.testing.assert_allclose(closed(x), stack(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(stack)(x[None])[0], stack(x), rtol=1e-5)
    assert jax.grad(lambda x: closed(x).sum())(x).shape == x.shape


@pytest.mark.parametrize(
    "make", [lambda: checkpoint_scan(Sown, N)(rngs=nnx.Rngs(0)), lambda: checkpoint_scan(modules(Sown))]
)
def test_sow_without_capture(make, x):
    stack = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        y = x
        for i in range(N):
            one = Sown(rngs=nnx.Rngs(0))
            nnx.update(one, jax.tree.map(lambda leaf, i=i: leaf[i], nnx.state(stack, nnx.Param)))
            y = one(y)
        for calls in (1, 2):
            np.testing.assert_allclose(stack(x), y, rtol=1e-5)
            sown = stack.h.get_value()
            assert len(sown) == calls and all(value.shape == (N, *x.shape) for value in sown)
    assert nnx.pop(stack, nnx.Intermediate)["h"].get_value()[0].shape == (N, *x.shape)
    assert not hasattr(stack, "h")


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="nnx.capture is new")
@pytest.mark.parametrize("blocks_per_ckpt", [None, 2])
def test_capture(blocks_per_ckpt, x):
    blocks = modules(Sown)
    stack = checkpoint_scan(blocks, blocks_per_ckpt=blocks_per_ckpt)
    y, captured = nnx.capture(stack, nnx.Intermediate)(x)
    want, z = [], x
    for block in blocks:
        z, one = nnx.capture(block, nnx.Intermediate)(z)
        want.append(one["h"].get_value()[0])
    (h,) = captured["h"].get_value()
    np.testing.assert_allclose(h, jnp.stack(want), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, z, rtol=1e-5)

    def loss(model):
        return nnx.capture(model, nnx.Intermediate)(x)[1]["h"].get_value()[0].sum()

    assert_no_zero_leaf(nnx.to_pure_dict(nnx.grad(loss)(stack)))


@settings
def test_training_reduces_the_loss_under_every_setting(blocks_per_ckpt, policy):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.inp = nnx.Linear(2, D, rngs=rngs)
            stack = checkpoint_scan(Block, 3, blocks_per_ckpt=blocks_per_ckpt, policy=policy)
            self.blocks = stack(rngs, rate=0.1)
            self.out = nnx.Linear(D, 1, rngs=rngs)

        def __call__(self, x):
            return self.out(self.blocks(self.inp(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    y = jnp.sin(x[:, :1]) * x[:, 1:]

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: ((model(x) - y) ** 2).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    np.testing.assert_array_equal(model.blocks.dropout.rngs.count, np.full(3, 40))


def test_sharding_metadata_gains_the_layer_axis(x):
    class Sharded(nnx.Module):
        def __init__(self, *, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.linear = nnx.Linear(D, D, kernel_init=init, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        blocks = modules(Sharded)
        for stack in (checkpoint_scan(Sharded, N)(rngs=nnx.Rngs(0)), checkpoint_scan(blocks, blocks_per_ckpt=2)):
            assert stack.linear.kernel.get_metadata()["out_sharding"] == ("layers", None, "model")
            gradients = nnx.jit(nnx.grad(lambda model: model(x).sum()))(stack)
            assert gradients["linear"]["kernel"].get_metadata()["out_sharding"] == ("layers", None, "model")


class NoHash:
    """A configuration that is compared and has no hash."""

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return self.scale == other.scale

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class ChangesAttributes(nnx.Module):
    """What is static changes from call to call, as in a plain loop: a counter, a mode, a configuration, a list."""

    def __init__(self, *, rngs, layer_idx=0):
        self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.calls, self.config, self.layer_idx = 0, NoHash(1.0), layer_idx
        self.kept = nnx.List([])

    def __call__(self, x):
        x = x + self.config.scale * jnp.tanh(self.calls + self.dropout(self.linear(x)))
        self.calls += 1
        self.config = NoHash(0.5 * self.config.scale)
        self.eval()
        self.kept.append(nnx.Intermediate(x))
        return x


@pytest.mark.parametrize("setting", [{}, {"blocks_per_ckpt": 2, "policy": "cheap"}, {"engine": "reversal"}], ids=str)
@pytest.mark.parametrize("other", [0, 1], ids=["equal", "unlike"])
def test_static_attributes_change_as_in_the_loop(x, setting, other):
    blocks = [ChangesAttributes(rngs=nnx.Rngs(i), layer_idx=i * other) for i in range(N)]
    stack = checkpoint_scan(blocks, **setting)
    first, *rest = (nnx.jit(lambda stack, x: stack(x))(stack, x) for _ in range(3))
    np.testing.assert_allclose(first, run_loop(blocks, x), rtol=1e-5)
    for got in rest:
        np.testing.assert_allclose(got, run_loop(blocks, x), rtol=1e-5)
    assert (stack.calls, stack.config.scale, stack.dropout.deterministic, len(stack.kept)) == (3, 0.125, True, 3)
    np.testing.assert_allclose(stack.kept[2][-1], rest[-1], rtol=1e-6)


def test_explain_changes_no_static_attribute(x):
    stack = checkpoint_scan(ChangesAttributes, N)(rngs=nnx.Rngs(0))
    explain(stack, x)
    assert stack.calls == 0 and not stack.dropout.deterministic


# Lists that are not one function.


def test_modules_that_change_to_unlike_attributes_are_refused(x):
    class Named(Small):
        def __call__(self, x):
            self.name = f"layer {self.layer_idx}"
            return super().__call__(x)

    with pytest.raises(ValueError, match=r"blocks 0 and 1 .* different functions"):
        checkpoint_scan([Named(rngs=nnx.Rngs(i), layer_idx=i) for i in range(N)])(x)
    stack = checkpoint_scan([Named(rngs=nnx.Rngs(i), layer_idx=7) for i in range(N)])
    stack(x)
    assert stack.name == "layer 7"


def test_modules_may_differ_in_what_does_not_matter(x):
    blocks = [Small(rngs=nnx.Rngs(i), layer_idx=i) for i in range(N)]
    stack = checkpoint_scan(blocks, blocks_per_ckpt=2)
    np.testing.assert_allclose(stack(x), run_loop(blocks, x), rtol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(stack, x), stack(x), rtol=1e-5)


class LocalOrGlobal(nnx.Module):
    """GPT-Neo's pattern: equal parameters, every other layer looks at its neighbours only."""

    def __init__(self, *, rngs, layer_idx):
        self.linear, self.local = nnx.Linear(D, D, rngs=rngs), layer_idx % 2 == 1

    def __call__(self, x, *, ignore=False):
        scores = self.linear(x) @ x.T
        if self.local and not ignore:
            scores = jnp.where(jnp.tri(len(x), k=0) - jnp.tri(len(x), k=-2) > 0, scores, -1e9)
        return x + jax.nn.softmax(scores) @ x


def test_different_functions_are_refused_at_the_first_call_that_shows_it(x):
    stack = checkpoint_scan([LocalOrGlobal(rngs=nnx.Rngs(i), layer_idx=i) for i in range(4)])
    assert stack(x, ignore=True).shape == x.shape
    for _ in range(2):
        with pytest.raises(ValueError, match=r"blocks 0 and 1 .* different functions.*checkpoint_blocks"):
            stack(x)


class OnlyInTraining(nnx.Module):
    """Blocks differ by their rate while training, and not otherwise: drop-path with a rate that grows."""

    def __init__(self, *, rngs, rate):
        self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.linear(x))


@pytest.mark.parametrize("made_in_training", [True, False])
def test_whether_blocks_are_one_function_is_asked_for_the_mode_of_the_call(made_in_training, x):
    blocks = [OnlyInTraining(rngs=nnx.Rngs(i), rate=0.1 + 0.2 * i) for i in range(4)]
    for block in blocks:
        block.train() if made_in_training else block.eval()
    stack = checkpoint_scan(blocks)
    stack.eval()
    for block in blocks:
        block.eval()
    np.testing.assert_allclose(stack(x), run_loop(blocks, x), rtol=1e-5)
    stack.train()
    with pytest.raises(ValueError, match="different functions"):
        stack(x)


def test_different_classes_are_refused_at_once():
    blocks = [Small(rngs=nnx.Rngs(0)), Nested(rngs=nnx.Rngs(0))]
    with pytest.raises(TypeError, match=r"block 0 is Small, block 1 is Nested"):
        checkpoint_scan(blocks)


def test_different_shapes_are_refused_at_once_and_the_leaf_is_named():
    blocks = [Small(rngs=nnx.Rngs(0)), Small(rngs=nnx.Rngs(1), features=D + 1)]
    with pytest.raises(ValueError, match=r"linear.*bias.*float32\[5\].*float32\[4\]"):
        checkpoint_scan(blocks)


def shared_bias():
    a, b = modules(Small, 2)
    b.linear.bias = a.linear.bias
    return [a, b]


@pytest.mark.parametrize(
    "make, name", [(shared_bias, "linear.bias"), (lambda: modules(Small, 1) * 2, "linear.bias")], ids=["variable", "module"]
)
def test_variables_shared_between_blocks_are_refused(make, name):
    with pytest.raises(ValueError, match=f"blocks 0 and 1 share the variable {re.escape(name)}"):
        checkpoint_scan(make())


def test_one_rngs_for_all_modules_of_a_list_is_not_shared_state(x):
    rngs = nnx.Rngs(0)
    stack = checkpoint_scan([Block(rngs) for _ in range(N)])
    assert len(np.unique(jax.random.key_data(stack.dropout.rngs.key[...]), axis=0)) == N


# Modules among the arguments would lose their updates.


class TakesRngs(nnx.Module):
    def __init__(self, *, rngs):
        self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x, *, rngs):
        return self.dropout(self.linear(x), rngs=rngs)


class TakesModule(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x, *, layer):
        return x + self.linear(layer(x))


@pytest.mark.parametrize(
    "cls, shared",
    [
        (TakesRngs, lambda: {"rngs": nnx.Rngs(0)}),
        (TakesModule, lambda: {"layer": nnx.BatchNorm(D, rngs=nnx.Rngs(0))}),
        (TakesModule, lambda: {"layer": nnx.Dropout(0.5, rngs=nnx.Rngs(0))}),
    ],
    ids=["rngs", "statistics", "dropout"],
)
def test_a_shared_argument_that_the_block_changes_is_refused(cls, shared, x):
    """Every block would draw the same mask, and the update would be lost."""
    with pytest.raises(ValueError, match=rf"changes the state of .*{next(iter(shared()))}"):
        checkpoint_scan(cls, N)(rngs=nnx.Rngs(0))(x, **shared())


def test_a_shared_module_that_is_only_read_is_differentiated(x):
    stack, layer = checkpoint_scan(TakesModule, N, blocks_per_ckpt=2)(rngs=nnx.Rngs(0)), nnx.Linear(D, D, rngs=nnx.Rngs(1))
    gradients = nnx.grad(lambda layer: stack(x, layer=layer).sum())(layer)
    assert_no_zero_leaf(nnx.to_pure_dict(gradients))


def test_replacing_a_layer_of_a_stack(x):
    stack = checkpoint_scan(Small, N)(rngs=nnx.Rngs(0))
    stack.linear.kernel = nnx.Param(jnp.zeros((N, D, D)))
    np.testing.assert_allclose(stack(x), x, rtol=1e-6)
    stack.linear = nnx.Linear(D, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"linear.*has shape \(4,\).*5"):
        stack(x)


def test_a_module_among_constructor_arguments_is_refused():
    """It would become one module per block; `blocks share the variable` is the same refusal for lists."""

    class Holds(nnx.Module):
        def __init__(self, embed, *, rngs):
            self.embed, self.linear = embed, nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    with pytest.raises(ValueError, match="given a Embed, and each of the 3 blocks would make its own copy"):
        checkpoint_scan(Holds, 3)(nnx.Embed(4, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))


def test_a_stream_of_random_numbers_that_blocks_share_is_refused():
    class Draws(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

        def __call__(self, x):
            return x + jax.random.normal(self.rngs.noise(), x.shape)

    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"rngs\.fork\(\) gives each block a stream of its own"):
        checkpoint_scan([Draws(rngs) for _ in range(3)])


def test_equal_stacks_are_of_one_class():
    class Block(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    assert checkpoint_scan(Block, 3, blocks_per_ckpt=2) is checkpoint_scan(Block, 3, blocks_per_ckpt=2)
    assert checkpoint_scan(Block, 3) is not checkpoint_scan(Block, 4)
    stacks = [checkpoint_scan(Block, 2)(rngs=nnx.Rngs(i)) for i in range(3)]
    assert checkpoint_scan(stacks).linear.kernel.shape == (3, 2, 2, 2)


def test_a_subclass_of_a_stack_cannot_override_what_the_blocks_do():
    class Halves(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def half(self, x):
            return 0.5 * x

        def __call__(self, x):
            return self.half(self.linear(x))

    stack = checkpoint_scan(Halves, 3)
    with pytest.raises(TypeError, match=r"Doubles overrides half of Halves.*are of class Halves.*stack the subclass"):

        class Doubles(stack):
            def half(self, x):
                return 2.0 * x

    class Named(stack):
        def name(self):
            return "trunk"

    assert Named(rngs=nnx.Rngs(0)).name() == "trunk"
    assert Named(rngs=nnx.Rngs(0))(jnp.ones((2, 4))).shape == (2, 4)
