"""The policies that come with the library: JAX's own, and the recipes MaxText made common, as lists of tags."""

import jax

from jaxckpt.policies.grammar import JaxPolicy, Policy, Term

_jax = jax.checkpoint_policies

# name, JAX's spellings and other names people know it by, rule, what it keeps
_RULES: tuple[tuple[str, tuple[str, ...], JaxPolicy, str], ...] = (
    ("everything", ("everything_saveable", "none"), _jax.everything_saveable, "all that autodiff asks for"),
    ("nothing", ("nothing_saveable", "full"), _jax.nothing_saveable, "only the block's input"),
    (
        "dots",
        ("dots_saveable", "checkpoint_dots"),
        _jax.dots_saveable,
        "the results of matrix products and convolutions",
    ),
    (
        "dots_no_batch",
        ("dots_with_no_batch_dims_saveable", "checkpoint_dots_with_no_batch_dims", "minimal"),
        _jax.dots_with_no_batch_dims_saveable,
        "the results of matrix products without batch dimensions: projections, not attention",
    ),
)

_QKV = ("query_proj", "key_proj", "value_proj", "kv_proj", "qkv_proj")
_MLP = ("mlpwi_0", "mlpwi_1", "mlpwi", "mlpwo")

# MaxText's `remat_policy` names (maxtext/layers/decoders.py, get_remat_policy) and the tags behind each. Its `minimal`
# is the list below without `context`; here `minimal` is `dots_no_batch`, which needs no tags.
_RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "save_qkv_proj": ("save", _QKV),
    "save_out_proj": ("save", ("out_proj",)),
    "save_dot_except_mlp": ("save", (*_QKV, "out_proj")),
    "save_dot_except_mlpwi": ("save", (*_QKV, "out_proj", "mlpwo")),
    "save_dot_with_context_except_mlp": ("save", (*_QKV, "context", "out_proj")),
    "minimal_with_context": ("save", (*_QKV, "context", "out_proj", *_MLP)),
    "minimal_flash": ("save", (*_QKV, "context", "out_proj", *_MLP)),
    "minimal_with_quantization": ("save", (*_QKV, "out_proj", *_MLP, "quantization")),
    "minimal_with_context_and_quantization": ("save", (*_QKV, "context", "out_proj", *_MLP, "quantization")),
    "qkv_proj_offloaded": ("offload", ("query_proj", "key_proj", "value_proj", "kv_proj")),
    "minimal_offloaded": ("offload", (*_QKV, "out_proj", *_MLP)),
}


def builtins() -> dict[str, tuple[Policy, str]]:
    """Every built-in name with its policy and what it keeps."""
    table = {}
    for name, aliases, rule, keeps in _RULES:
        table[name] = (Policy((Term(name, rule=rule),)), keeps)
        for alias in aliases:
            table[alias] = (Policy((Term(alias, rule=rule),)), f"the same as {name}: {keeps}")
    keeps = (
        "the fewest bytes under which no matrix product, convolution, loop, sort, random draw or custom call is run again"
    )
    table["cheap"] = (Policy((Term("cheap", chooses=True),)), keeps)
    for name, (verb, tags) in _RECIPES.items():
        where = "kept" if verb == "save" else "moved to pinned host memory"
        keeps = f"MaxText's recipe: of the tags {', '.join(tags)} those the block has, {where}"
        table[name] = (Policy((Term(name, verb=verb, globs=tags, any_of=True),)), keeps)
    return table
