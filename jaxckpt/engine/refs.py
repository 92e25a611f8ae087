"""`jax.Ref`s that reach a block from outside are refused by name, under every setting.

What a block writes there would be written again by every re-run, and what it reads may have changed by then. A Ref that is
born and dies in the block is pure, and becomes a value when the block is traced (`jaxckpt.analysis.jaxpr.trace`).
"""

from collections.abc import Iterable
from typing import Any

import jax

from jaxckpt.analysis import jaxpr as jx

_WHY = (
    "which a checkpointed block cannot be given: it is run again in the backward pass, and would read and write it a second "
    "time. "
)


def check_given(block: str, trees: Iterable[tuple[str, Any]]) -> None:
    """Refuses Refs in trees that have names."""
    for name, tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, jax.Ref):
                what = f"{name}{jax.tree_util.keystr(path)}"
                raise TypeError(
                    f"{block}: {what} is a jax.Ref, {jax.typeof(leaf)}, {_WHY}Pass its value, ref[...], and write into the "
                    "Ref what is returned. A Ref that the block makes itself, jax.new_ref, is fine."
                )


def check_closed_over(block: str, closed: Any) -> None:
    """Refuses a block that closes over a Ref; `closed` is its jaxpr."""
    if jx.closes_over_ref(closed):
        raise TypeError(
            f"{block} closes over a jax.Ref, {_WHY}Return what it would write (a stack's block with has_aux=True), and pass "
            "what it reads, ref[...], as an argument. A Ref that the block makes itself, jax.new_ref, is fine."
        )
