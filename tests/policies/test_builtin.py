"""The built-in policies: JAX's own under several names, and MaxText's recipes."""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint_scan, policies

QKV = {"query_proj", "key_proj", "value_proj", "kv_proj", "qkv_proj"}
MLP = {"mlpwi_0", "mlpwi_1", "mlpwi", "mlpwo"}
OUT = {"out_proj"}

# MaxText's `get_remat_policy` (layers/decoders.py), restated.
SAVED = {
    "save_qkv_proj": QKV,
    "save_out_proj": OUT,
    "save_dot_except_mlp": QKV | OUT,
    "save_dot_except_mlpwi": QKV | OUT | {"mlpwo"},
    "save_dot_with_context_except_mlp": QKV | OUT | {"context"},
    "minimal_with_context": QKV | OUT | MLP | {"context"},
    "minimal_flash": QKV | OUT | MLP | {"context"},
    "minimal_with_quantization": QKV | OUT | MLP | {"quantization"},
    "minimal_with_context_and_quantization": QKV | OUT | MLP | {"context", "quantization"},
}
OFFLOADED = {
    "qkv_proj_offloaded": QKV - {"qkv_proj"},
    "minimal_offloaded": QKV | OUT | MLP,
}
ALL_TAGS = sorted(QKV | MLP | OUT | {"context", "quantization", "another"})


def kept(policy: str, tags: list[str]) -> tuple[set[str], set[str]]:
    """The tags that a block with `tags` keeps on the device, and those on the host; each has a width of its own."""
    width = {3 + ALL_TAGS.index(tag): tag for tag in tags}

    def block(x):
        for w, tag in width.items():
            x = x + jnp.sin(checkpoint_name(jnp.sin(jnp.broadcast_to(x, (w,))), tag)).sum()
        return x

    keep = policies.get(policy).for_tags(tags)
    pullback = jax.make_jaxpr(lambda x: jax.tree.leaves(jax.vjp(jax.checkpoint(block, policy=keep), x)[1]))
    device, host = set(), set()
    for aval in pullback(jnp.ones(())).out_avals:
        if aval.shape and aval.shape[0] in width:
            (host if "host" in str(aval.memory_space).lower() else device).add(width[aval.shape[0]])
    return device, host


@pytest.mark.parametrize("name", SAVED)
def test_recipes_save_what_maxtext_says(name):
    assert kept(name, ALL_TAGS) == (SAVED[name], set())


@pytest.mark.parametrize("name", OFFLOADED)
def test_recipes_offload_what_maxtext_says(name):
    assert kept(name, ALL_TAGS) == (set(), OFFLOADED[name])


@pytest.mark.parametrize("name", [*SAVED, *OFFLOADED])
def test_a_recipe_takes_those_of_its_tags_that_the_block_has(name):
    listed = {**SAVED, **OFFLOADED}[name]
    one = min(listed)
    device, host = kept(name, [one, "another"])
    assert device | host == {one}
    assert bool(host) == (name in OFFLOADED)


@pytest.mark.parametrize("name", [*SAVED, *OFFLOADED])
@pytest.mark.parametrize("tags", [(), ("another",)])
def test_a_recipe_that_tags_nothing_is_refused(name, tags):
    with pytest.raises(ValueError, match=f"policy '{name}': .* nothing in the block"):
        policies.get(name).for_tags(tags)


def test_a_recipe_joins_other_terms():
    device, host = kept("save_out_proj+offload:mlp*", ALL_TAGS)
    assert (device, host) == (OUT, MLP)


@pytest.mark.parametrize(
    ("own", "names"),
    [
        ("everything_saveable", ("everything", "everything_saveable", "none")),
        ("nothing_saveable", ("nothing", "nothing_saveable", "full")),
        ("dots_saveable", ("dots", "dots_saveable", "checkpoint_dots")),
        (
            "dots_with_no_batch_dims_saveable",
            ("dots_no_batch", "dots_with_no_batch_dims_saveable", "checkpoint_dots_with_no_batch_dims", "minimal"),
        ),
    ],
)
def test_jaxs_policies_under_all_their_names(own, names):
    for name in names:
        assert policies.get(name).for_tags(()) is getattr(jax.checkpoint_policies, own)


def test_every_name_is_tested_here():
    tested = {*SAVED, *OFFLOADED, "everything", "everything_saveable", "none", "nothing", "nothing_saveable", "full"}
    tested |= {"dots", "dots_saveable", "checkpoint_dots", "dots_no_batch", "dots_with_no_batch_dims_saveable"}
    tested |= {"checkpoint_dots_with_no_batch_dims", "minimal"}
    tested |= {"cheap"}  # in tests/engine/test_choice.py
    assert set(policies.names()) == tested


def test_dots_no_batch_keeps_projections_and_not_attention():
    def block(w, x):
        q = x @ w["q"]  # [B, T, 7]
        return jnp.sin(jnp.einsum("btd,bsd->bts", q, q)).sum((1, 2))[:, None, None] + x

    w, x = {"q": jnp.ones((1, 5, 7))}, jnp.ones((2, 3, 5))
    shapes = {}
    for policy in ("dots", "dots_no_batch"):
        stack = checkpoint_scan(block, policy=policy)
        residuals = jax.eval_shape(lambda *args, stack=stack: jax.tree.leaves(jax.vjp(stack, *args)[1]), w, x)
        shapes[policy] = {leaf.shape[1:] for leaf in residuals}
    assert {(2, 3, 7), (2, 3, 3)} <= shapes["dots"]
    assert (2, 3, 7) in shapes["dots_no_batch"] and (2, 3, 3) not in shapes["dots_no_batch"]
