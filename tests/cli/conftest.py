import sys

import pytest

MAKE = """
import jax.numpy as jnp
from jaxckpt import checkpoint_scan

def make(**knobs):
    return checkpoint_scan(lambda w, x: jnp.tanh(x @ w), **knobs), (jnp.ones((3, 4, 4)), jnp.ones((2, 4)))

def with_keywords(**knobs):
    def block(w, x, *, mask, scale):
        return jnp.tanh(x @ w) * mask * {"double": 2.0}[scale]

    x = jnp.ones((2, 4))
    return checkpoint_scan(block, **knobs), (jnp.ones((3, 4, 4)), x), {"mask": x, "scale": "double"}

def nnx_stack(**knobs):
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, *, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    return checkpoint_scan(Block, 3, **knobs)(rngs=nnx.Rngs(0)), (jnp.ones((2, 4)),)

def wrong(**knobs):
    return 3

def raises(**knobs):
    return {}["no such key"]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with stacks of a user's, that can be imported from the working folder."""
    (tmp_path / "some_stack_of_mine.py").write_text(MAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "some_stack_of_mine"
    sys.modules.pop("some_stack_of_mine", None)
