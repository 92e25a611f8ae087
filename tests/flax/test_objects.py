"""NNX modules in `checkpoint_blocks`: their state goes on as in the plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_blocks, checkpoint_scan
from tests.support import relative_error

D = 4
x = jnp.linspace(-1.0, 1.0, 3 * D).reshape(3, D)
settings = pytest.mark.parametrize("blocks_per_ckpt, policy", [(1, "everything"), (3, "cheap"), (2, "save:h")])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.dropout = nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jax.ad_checkpoint.checkpoint_name(jnp.tanh(self.linear(x)), "h"))


class Other(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def forward(self, x, *, scale=1.0):
        return x + scale * jnp.sin(self.norm(x))


def modules() -> nnx.List:
    blocks = [Block(nnx.Rngs(0)), Other(nnx.Rngs(1)), Block(nnx.Rngs(2)), Other(nnx.Rngs(3))]
    return nnx.List([*blocks, blocks[0]])  # one of them twice


def callables(modules):
    a, b, c, d, again = modules
    return [a, b.forward, c, functools.partial(d.forward, scale=0.5), functools.partial(again)]


@settings
def test_values_gradients_and_state_are_those_of_the_loop(x64, blocks_per_ckpt, policy):
    def run(modules, x, blocks_per_ckpt):
        def loss(modules, x):
            (y,) = checkpoint_blocks(callables(modules), x, blocks_per_ckpt, policy=policy)
            return (y**2).sum()

        return nnx.value_and_grad(loss, argnums=(0, 1))(modules, x)

    got, want = modules(), modules()
    for model in (got, want):
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(float), nnx.state(model, (nnx.Param, nnx.BatchStat))))
    step = nnx.jit(run, static_argnums=2)
    for _ in range(2):
        a, b = step(got, x.astype(float), blocks_per_ckpt), step(want, x.astype(float), None)
        assert relative_error(nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b))) < 1e-12
    pure = [nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) for model in (got, want)]
    assert relative_error(*pure) < 1e-12
    counts = [[int(model[i].dropout.rngs.count[...]) for i in (0, 2)] for model in (got, want)]
    assert counts == [[4, 2], [4, 2]]


def test_without_jit_steps_draw_other_masks():
    blocks = callables(modules())
    first, second = (checkpoint_blocks(blocks, x, 2)[0] for _ in range(2))
    assert not np.allclose(first, second)


def test_a_stream_among_the_arguments_advances():
    def block(x, rngs):
        return x + rngs.normal(x.shape), rngs

    def run(blocks_per_ckpt):
        rngs = nnx.Rngs(0)
        y, returned = checkpoint_blocks([block] * 5, (x, rngs), blocks_per_ckpt)
        assert returned is rngs and int(rngs.default.count[...]) == 5
        return y

    np.testing.assert_allclose(run(2), run(None), rtol=1e-6)


def test_a_stream_that_blocks_share_advances_through_them():
    rngs, same = nnx.Rngs(0), nnx.Rngs(0)
    draw = lambda rngs, x: x + rngs.normal(x.shape)  # noqa: E731
    got = checkpoint_blocks([functools.partial(draw, rngs)] * 5, x, 2)[0]
    want = checkpoint_blocks([functools.partial(draw, same)] * 5, x, None)[0]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert int(rngs.default.count[...]) == 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_blocks_sow_is_in_the_modules():
    class Sows(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "h", x)
            return jnp.sin(x)

    blocks = [Sows() for _ in range(3)]
    checkpoint_blocks(blocks, x, 2)
    np.testing.assert_allclose(blocks[2].h.get_value()[0], jnp.sin(jnp.sin(x)), rtol=1e-6)


def test_state_that_a_lambda_hides_is_refused():
    block = Block(nnx.Rngs(0))
    for policy in ("everything", "cheap", "save:h"):
        with pytest.raises(ValueError, match=r"changes an NNX object that it closes over.*functools\.partial"):
            checkpoint_blocks([lambda x: block(x)] * 2, x, 2, policy=policy)


@pytest.mark.parametrize("blocks_per_ckpt, policy", [(1, "everything"), (2, "everything"), (2, "dots")])
def test_attributes_that_are_no_arrays_go_on_as_in_the_loop(blocks_per_ckpt, policy):
    class Counting(nnx.Module):
        def __init__(self):
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            return x * self.calls

    block = Counting()
    for count in (3, 6):
        (got,) = checkpoint_blocks([block] * 3, jnp.ones(()), blocks_per_ckpt, policy=policy)
        assert block.calls == count
        assert got == [6, 4 * 5 * 6][count == 6]


def _of_blocks(cls, x):
    return checkpoint_blocks([cls(), cls()], x, 2)


def _of_stack(cls, x):
    return checkpoint_scan(cls, 2)()(x)


class Makes(nnx.Module):
    """Blocks that do to an attribute what cannot be done to the object itself once the trace has ended."""

    def __init__(self):
        self.inner = nnx.Dict(mode="a", w=nnx.Param(jnp.ones(())))


class Deletes(Makes):
    def __call__(self, x):
        del self.inner.mode
        return x


class SetsAnArray(Makes):
    def __call__(self, x):
        self.last = jnp.sin(x)
        return x


class SetsADictionary(Makes):
    def __call__(self, x):
        self.last = {"x": jnp.sin(x)}
        return x


class MakesALayer(Makes):
    def __call__(self, x):
        self.layer = nnx.Linear(D, D, rngs=nnx.Rngs(0))
        return self.layer(x)


class DropsAVariable(Makes):
    def __call__(self, x):
        self.inner.w = 3.0
        return x


@pytest.mark.parametrize("run", [_of_blocks, _of_stack])
@pytest.mark.parametrize(
    "cls, said",
    [
        (Deletes, r"Deletes\.inner\.mode is deleted"),
        (SetsAnArray, r"SetsAnArray\.last is set to what holds arrays"),
        (SetsADictionary, r"SetsADictionary\.last is set to what holds arrays"),
        (MakesALayer, r"MakesALayer\.layer becomes of type Linear"),
        (DropsAVariable, r"DropsAVariable\.inner\.w becomes of type float"),
    ],
)
def test_changes_of_attributes_that_would_be_lost_are_refused(run, cls, said):
    with pytest.raises(ValueError, match=rf"{said} while a block runs, and that would be lost: .*__init__.*nnx\.Variable"):
        run(cls, x)
