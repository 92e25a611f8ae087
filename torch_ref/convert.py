"""Parameters between a Flax variable tree and a torch `state_dict`, bit for bit.

Both sides name their submodules alike, so that a parameter's path is its name: `["query"]["kernel"]` is `query.weight`.
What differs is the last part, and the layout of a matrix, `[in, out]` in Flax and `[out, in]` in torch. A stack has its
parameters under `blocks.0`, `blocks.1` ... in torch, and in Flax either with a leading axis `N` or as a list of `N`
trees.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def to_state_dict(variables: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a Flax module as the `state_dict` of its torch counterpart.

    Arguments:
        variables: `{"params": ...}`; for a `Stack` with a leading axis `N` on every leaf, or a list of `N` of them.
        like: the counterpart's own `state_dict()`: the names, shapes and dtypes it has a place for.

    Raises:
        ValueError: a parameter that `like` has no place for or that is missing, named; another shape or dtype, since
            `load_state_dict` would round silently; a collection other than "params".
    """
    if isinstance(variables, list | tuple):
        found = {f"blocks.{i}.{name}": leaf for i, tree in enumerate(variables) for name, leaf in _named(tree)}
    elif _is_stack(like):
        found = {f"blocks.{i}.{name}": part for name, leaf in _named(variables) for i, part in enumerate(leaf)}
    else:
        found = dict(_named(variables))
    _check_names("the Flax variables", found, "the torch module", like)
    state_dict = {name: to_torch(_layout(name, np.asarray(leaf))) for name, leaf in found.items()}
    for name, value in state_dict.items():
        _check_type(name, value, like[name])
    return state_dict


def from_state_dict(state_dict: Mapping[str, Tensor], like: Any) -> Any:
    """The inverse of `to_state_dict`; gradients go the same way, as a mapping of parameter names to gradients.

    Arguments:
        like: the Flax variables in the form that is wanted (leading axis, list, or one block), arrays or
            `jax.ShapeDtypeStruct`s.

    Returns:
        A tree like `like`, partitioning metadata included, with NumPy leaves.

    Raises:
        ValueError: a name that only one side has; another shape or dtype.
    """
    taken = set()

    def fetch(name: str) -> np.ndarray:
        taken.add(name)
        if name not in state_dict:
            raise ValueError(f"the torch state_dict lacks {name}, which the Flax variables have a place for")
        return _layout(name, to_numpy(state_dict[name]))

    def fill(tree: Any, value_of: Callable[[str], np.ndarray]) -> Any:
        values = []
        for name, leaf in _named(tree):
            values.append(value_of(name))
            _check_type(name, values[-1], leaf)
        return jax.tree.unflatten(jax.tree.structure(tree), values)

    if isinstance(like, list | tuple):
        out = [fill(tree, lambda name, i=i: fetch(f"blocks.{i}.{name}")) for i, tree in enumerate(like)]
    elif _is_stack(state_dict):
        count = 1 + max(int(name.split(".")[1]) for name in state_dict)
        out = fill(like, lambda name: np.stack([fetch(f"blocks.{i}.{name}") for i in range(count)]))
    else:
        out = fill(like, fetch)
    _check_names("the torch state_dict", state_dict, "the Flax variables", taken)
    return out


def to_torch(array: Any) -> Tensor:
    """A torch tensor with the bits of a NumPy or JAX array, bf16 included; the memory is its own."""
    array = np.array(array, order="C")
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The inverse of `to_torch`."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().copy().view(jnp.bfloat16)
    return tensor.numpy().copy()


def _named(variables: Any) -> list[tuple[str, Any]]:
    """`(torch name, leaf)` for each parameter, in the order of `jax.tree.leaves`."""
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(f"torch has no place for the Flax collections {', '.join(others)}: pass {{'params': ...}} alone")
    named = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        # Boxes of partitioning metadata add parts to the path that are not keys.
        *modules, last = [entry.key for entry in path[1:] if isinstance(entry, jax.tree_util.DictKey)]
        if last not in _LEAVES:
            raise ValueError(
                f"torch has no name for the Flax parameter {jax.tree_util.keystr(path)}; known are the kernel and bias of "
                "Dense, and the scale and bias of norms"
            )
        named.append((".".join([*modules, _LEAVES[last]]), leaf))
    return named


def _layout(name: str, array: np.ndarray) -> np.ndarray:
    """A matrix from one framework's layout to the other's; a vector is the same in both."""
    if array.ndim not in (1, 2) or (array.ndim == 2 and not name.endswith("weight")):
        raise ValueError(f"{name} has shape {array.shape} in one block; known are matrices of Dense, and vectors")
    return array.T


def _is_stack(state_dict: Mapping[str, Any]) -> bool:
    return bool(state_dict) and all(name.startswith("blocks.") for name in state_dict)


def _check_names(source: str, given: Iterable[str], target: str, wanted: Iterable[str]) -> None:
    extra, missing = sorted(set(given) - set(wanted)), sorted(set(wanted) - set(given))
    problems = [f"{target} has no place for {', '.join(extra)}"] * bool(extra)
    problems += [f"{source} lacks {', '.join(missing)}"] * bool(missing)
    if problems:
        raise ValueError("; ".join(problems))


def _check_type(name: str, given: Any, wanted: Any) -> None:
    given, wanted = (f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in (given, wanted))
    if given != wanted:
        raise ValueError(f"{name} is {given}, and its place is {wanted}")
