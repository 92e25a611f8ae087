"""The layer axis in the metadata of Linen's boxes and of NNX's variables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxckpt import checkpoint_scan, stack_params, unstack_params
from jaxckpt._metadata import add_layer_axis, remove_layer_axis

N, VALUE = 3, np.arange(6.0, dtype=np.float32).reshape(2, 3)


def linen(cls, names, value):
    return {"params": {"w": cls(value, names=names), "plain": value}}


def variable(names, value):
    metadata = {} if names is None else {"out_sharding": names}
    return {"w": nnx.Param(value, eager_sharding=False, **metadata), "plain": value}


def names_of(tree):
    """Of the axes of `w`, boxed or an NNX variable."""
    w = tree.get("params", tree)["w"]
    return w.names if isinstance(w, nn.Partitioned) else w.get_metadata().get("out_sharding")


BOXES = {
    "Partitioned": lambda names, value: linen(nn.Partitioned, names, value),
    "LogicallyPartitioned": lambda names, value: linen(nn.LogicallyPartitioned, names, value),
    "nnx.Param": variable,
}
boxes = pytest.mark.parametrize("make", BOXES.values(), ids=BOXES.keys())


@boxes
@pytest.mark.parametrize("names", [("embed", "mlp"), (None, "mlp"), (None, None)])
def test_the_layer_axis_comes_in_front_and_goes_again(make, names):
    one, stacked = make(names, VALUE), make(names, np.stack([VALUE] * N))
    there = add_layer_axis(stacked)
    assert names_of(there) == ("layers", *names)
    assert names_of(stacked) == names, "the tree that was given is left alone"
    back = remove_layer_axis(jax.tree.map(lambda leaf: leaf[0], there))
    assert names_of(back) == names
    assert jax.tree.structure(back) == jax.tree.structure(remove_layer_axis(add_layer_axis(one)))
    assert names_of(there) == ("layers", *names)


@boxes
def test_arrays_are_not_copied(make):
    leaves = jax.tree.leaves(tree := make((None, "mlp"), jnp.asarray(VALUE)))
    for changed in (add_layer_axis(tree), remove_layer_axis(add_layer_axis(tree))):
        assert all(a is b for a, b in zip(jax.tree.leaves(changed), leaves, strict=True))


def test_values_without_metadata_stay_as_they_are():
    tree = {"array": VALUE, "key": jax.random.key(0), "variable": variable(None, VALUE)["w"], "none": None}
    changed = add_layer_axis(tree)
    assert jax.tree.structure(changed) == jax.tree.structure(tree)
    assert jax.tree.structure(remove_layer_axis(tree)) == jax.tree.structure(tree)


@boxes
def test_stack_params_and_unstack_params_keep_it(make):
    trees = [make((None, "mlp"), VALUE + i) for i in range(N)]
    stacked = stack_params(trees)
    assert names_of(stacked) == ("layers", None, "mlp")
    for tree, back in zip(trees, unstack_params(stacked), strict=True):
        assert names_of(back) == (None, "mlp")
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(back), jax.tree.leaves(tree))


def test_a_partition_spec_has_the_layer_axis():
    specs = nn.get_partition_spec(add_layer_axis(linen(nn.Partitioned, (None, "mlp"), np.stack([VALUE] * N))))
    assert specs["params"]["w"] == jax.P("layers", None, "mlp")


# Another name, or none, on a mesh whose axes the parameters name.


INIT = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
NNX_INIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(4, kernel_init=INIT)(x)


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(4, 4, kernel_init=NNX_INIT, rngs=rngs)

    def __call__(self, x):
        return x + self.linear(x)


@pytest.fixture
def mesh():
    return jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


@boxes
@pytest.mark.parametrize("name", [None, "stage"])
def test_the_layer_axis_may_have_another_name(make, name):
    stacked = stack_params([make((None, "mlp"), VALUE)] * N, partition_name=name)
    assert names_of(stacked) == (name, None, "mlp")
    assert names_of(unstack_params(stacked, partition_name=name)[0]) == (None, "mlp")


@pytest.mark.parametrize("knobs", [{}, {"snapshots": 2}, {"plan": "auto"}], ids=str)
def test_a_linen_stack_is_made_in_its_place_on_a_mesh(knobs, mesh):
    x, stack = jnp.ones((2, 4)), checkpoint_scan(LinenBlock, N, partition_name=None, **knobs)()
    spec = nn.get_partition_spec(jax.eval_shape(stack.init, jax.random.key(0), x))
    assert spec["params"]["Dense_0"]["kernel"] == jax.P(None, None, "model")
    where = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), spec)
    variables = jax.jit(stack.init, out_shardings=where)(jax.random.key(0), x)
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(lambda v: stack.apply(v, x).sum()))(variables)
    assert gradients["params"]["Dense_0"]["kernel"].names == (None, None, "model")


def nnx_class(**knobs):
    return checkpoint_scan(NnxBlock, N, **knobs)(rngs=nnx.Rngs(0))


def nnx_list(**knobs):
    return checkpoint_scan([NnxBlock(rngs=nnx.Rngs(i)) for i in range(N)], **knobs)


@pytest.mark.parametrize("make", [nnx_class, nnx_list])
def test_an_nnx_stack_is_made_in_its_place_on_a_mesh(make, mesh):
    @nnx.jit
    def create():
        stack = make(partition_name=None)
        state = nnx.state(stack)
        nnx.update(stack, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
        return stack

    with jax.set_mesh(mesh):
        stack = create()
        gradients = nnx.jit(nnx.grad(lambda stack: stack(jnp.ones((2, 4))).sum()))(stack)
    assert stack.linear.kernel.get_metadata()["out_sharding"] == (None, None, "model")
    assert gradients["linear"]["kernel"].get_metadata()["out_sharding"] == (None, None, "model")


@boxes
def test_metadata_with_another_name_is_refused(make):
    stacked = stack_params([make((None, "mlp"), VALUE)] * N, partition_name=None)
    with pytest.raises(ValueError, match=r"\['w'\].*\(None, None, 'mlp'\).* named 'layers': write partition_name=None"):
        unstack_params(stacked)


def test_variables_of_a_stack_with_another_name_are_refused():
    x = jnp.ones((2, 4))
    variables = jax.eval_shape(checkpoint_scan(LinenBlock, N)().init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"'layers'.* named None: write partition_name='layers'"):
        jax.eval_shape(checkpoint_scan(LinenBlock, N, partition_name=None)().apply, variables, x)


@pytest.mark.parametrize("call", [stack_params, unstack_params, lambda _, **name: checkpoint_scan(LinenBlock, N, **name)])
def test_what_is_no_name_is_refused(call):
    with pytest.raises(TypeError, match=r"partition_name, .* must be a name, or None .* got 3"):
        call([VALUE], partition_name=3)


def test_a_function_has_no_metadata():
    with pytest.raises(ValueError, match=r"partition_name=None is of the metadata of Flax modules, .* stack_params"):
        checkpoint_scan(lambda w, x: x * w, partition_name=None)
