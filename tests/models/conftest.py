"""What the tests of the models share: cheap parameters, and looking into a block's jaxpr."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def quick_jit():
    """`jax.jit` without LLVM's optimizations, and results in NumPy.

    Compiling is most of the time of these tests: one Pairformer block takes 0.6 s so, 1 s with a
    plain `jit`, and 4 s op by op (two CPU cores).
    """

    def jit(function):
        compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
        return lambda *args, **kwargs: jax.device_get(compiled(*args, **kwargs))

    return jit


@pytest.fixture(scope="session")
def run(quick_jit):
    """Compile a function and call it once."""
    return lambda function, *args, **kwargs: quick_jit(function)(*args, **kwargs)


@pytest.fixture(scope="session")
def random_variables():
    """Variables of a Linen module without compiling its `init`, biases and scales random too."""

    def make(module, *args, seed=0, **kwargs):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            noise = rng.normal(size=leaf.shape)
            if path[-1].key == "kernel":
                noise = noise / np.sqrt(leaf.shape[0])
            if path[-1].key == "scale":
                noise = 1 + 0.3 * noise
            return jnp.asarray(noise, leaf.dtype)

        shapes = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)
        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


@pytest.fixture(scope="session")
def equations():
    """All equations of a traced function, those of inner jaxprs included."""
    return lambda function, *args, **kwargs: list(_equations(jax.make_jaxpr(lambda *a: function(*a, **kwargs))(*args).jaxpr))


@pytest.fixture(scope="session")
def tags():
    """The `checkpoint_name` tags of a function, in order of appearance, each once."""

    def find(function, *args, **kwargs):
        text = str(jax.make_jaxpr(lambda *a: function(*a, **kwargs))(*args))
        # `name[name=x]`, or under `jax_remat3` `CheckpointName[{'name': 'x'}]`, `CheckpointName[name=x]`.
        found = re.findall(r"\b(?:name|CheckpointName)\[(?:name=|\{'name': ')(\w+)", text)
        return list(dict.fromkeys(found))

    return find


@pytest.fixture(scope="session")
def assert_mixed_precision(equations):
    """In a bf16 block on a float32 stream: matmuls in bf16, softmaxes and statistics in float32."""

    def check(function, *args, **kwargs):
        seen = set()
        for equation in equations(function, *args, **kwargs):
            operands = {v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")}
            if equation.primitive.name == "dot_general":
                assert operands == {jnp.dtype(jnp.bfloat16)}, equation
            if equation.primitive.name in ("exp", "rsqrt"):
                assert operands == {jnp.dtype(jnp.float32)}, equation
            seen.add(equation.primitive.name)
        assert {"dot_general", "exp", "rsqrt"} <= seen

    return check


@pytest.fixture(scope="session")
def float_dtypes(equations):
    """The floating-point dtypes of all values that a function computes."""

    def find(function, *args, **kwargs):
        avals = [v.aval for e in equations(function, *args, **kwargs) for v in e.outvars]
        return {a.dtype for a in avals if jnp.issubdtype(a.dtype, jnp.floating)}

    return find


@pytest.fixture(scope="session")
def assert_gradients_nonzero(run):
    """No leaf of a gradient is zero for a random cotangent; returns the gradients."""

    def check(function, *args):
        rng = np.random.default_rng(7)

        def loss(*args):
            return sum(jnp.vdot(w, y) for w, y in zip(weights, jax.tree.leaves(function(*args)), strict=True))

        weights = [rng.normal(size=y.shape) for y in jax.tree.leaves(jax.eval_shape(function, *args))]
        gradients = run(jax.grad(loss, argnums=tuple(range(len(args)))), *args)
        leaves = jax.tree_util.tree_leaves_with_path(gradients)
        sizes = {jax.tree_util.keystr(path): np.abs(leaf).max() for path, leaf in leaves}
        assert all(np.isfinite(size) for size in sizes.values()), sizes
        assert not [name for name, size in sizes.items() if size < 1e-6 * max(sizes.values())], sizes
        return gradients

    return check
