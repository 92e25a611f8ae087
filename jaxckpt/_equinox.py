"""Equinox modules: how they are told from functions and from Flax's, and what to write for them.

An Equinox module is a tree: its arrays are parameters, and beside them stand activation functions, names and numbers.
Equinox itself is not imported.
"""

from typing import Any

import jax

RUN_THEM = "checkpoint_scan(lambda arrays, x: eqx.combine(arrays, static)(x))"
OF_STACKED = f"arrays, static = eqx.partition(stacked, eqx.is_array), and {RUN_THEM}(arrays, x)"
OF_LIST = (
    "static = eqx.partition(blocks[0], eqx.is_array)[1], and "
    f"{RUN_THEM}(stack_params([eqx.filter(block, eqx.is_array) for block in blocks]), x)"
)


def is_equinox(value: Any) -> bool:
    """Whether `value` is an Equinox module, or a class of them."""
    cls = value if isinstance(value, type) else type(value)
    return any(base.__name__ == "Module" and base.__module__.partition(".")[0] == "equinox" for base in cls.__mro__)


def holds_equinox(tree: Any) -> bool:
    """Whether there are Equinox modules in `tree`."""
    return any(map(is_equinox, jax.tree.leaves(tree, is_leaf=is_equinox)))


def check_no_module(block: Any, cls: Any) -> None:
    """Refuses an Equinox module, or a class of them, as a block; functions that Equinox has wrapped are functions.

    Arguments:
        cls: the class behind `block`, if it is one, with arguments or without.
    """
    if isinstance(cls, type) and is_equinox(cls):
        name, made = cls.__name__, f"stacked = eqx.filter_vmap(lambda key: {cls.__name__}(..., key=key))(keys), then "
    elif is_equinox(block) and not hasattr(block, "__wrapped__"):
        name, made = type(block).__name__, ""
    else:
        return
    raise TypeError(
        f"{name} is an Equinox module, and a block is a function of parameters: give it the arrays of all modules, "
        f"stacked, and put one module together inside. Write {made}{OF_STACKED}"
    )
