"""Policies by name: look up, list, describe, and add one's own."""

import inspect
from typing import Any

import jax

from jaxckpt.policies.builtin import builtins
from jaxckpt.policies.grammar import BUDGETS, VERBS, JaxPolicy, Policy, Term, parse

_REGISTRY: dict[str, tuple[Policy, str]] = builtins()

_FACTORIES = {
    name: getattr(jax.checkpoint_policies, name)
    for name in (
        "save_only_these_names",
        "save_any_names_but_these",
        "save_anything_except_these_names",
        "save_and_offload_only_these_names",
        "save_from_both_policies",
        "offload_dot_with_no_batch_dims",
    )
}


def get(policy: "str | JaxPolicy | Policy") -> Policy:
    """The policy of a name, an expression such as `"dots+save:attn_*"`, or a `jax.checkpoint` policy function.

    Raises:
        ValueError: an unknown name (the nearest known one is suggested), or a JAX policy that is broken upstream.
        TypeError: not a string or policy function, or one of JAX's policy factories that was not called.

    >>> str(get("dots+save:attn_probs"))
    'dots+save:attn_probs'
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, str):
        return parse(policy, {name: value for name, (value, _) in _REGISTRY.items()})
    if not callable(policy):
        raise TypeError(
            f"policy must be a name, an expression such as 'dots+save:attn', or a jax.checkpoint policy function; "
            f"got {policy!r} of type {type(policy).__name__}"
        )
    if getattr(policy, "__hash__", None) is None:
        raise TypeError(f"a policy function must be hashable, since stacks are compared by it; got {policy!r}")
    return Policy((Term(_function_name(policy), rule=_checked(policy)),))


def names() -> tuple[str, ...]:
    """Every name that can stand alone as a term, built-in and registered.

    >>> "dots_no_batch" in names()
    True
    """
    return tuple(_REGISTRY)


def describe(policy: str | None = None) -> str:
    """What a policy keeps, one line a term; without an argument, one line for every name and form.

    >>> print(describe("dots+save:attn_*"))
    dots         the results of matrix products and convolutions
    save:attn_*  the values tagged by checkpoint_name that match
    """
    if policy is None:
        rows = [(name, keeps) for name, (_, keeps) in _REGISTRY.items()]
        rows += [*((f"{verb}:NAMES", keeps) for verb, keeps in VERBS.items()), *BUDGETS.items()]
    elif not isinstance(policy, str):
        raise TypeError(f"describe takes a name or an expression such as 'dots+save:attn'; got {policy!r}")
    else:
        get(policy)
        rows = [(part, _keeps(part)) for part in map(str.strip, policy.split("+"))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {keeps}" for name, keeps in rows)


def _keeps(part: str) -> str:
    """What a term keeps."""
    if part in _REGISTRY:
        return _REGISTRY[part][1]
    verb = part.partition(":")[0]
    if verb in VERBS:
        return VERBS[verb]
    return BUDGETS["budget:F" if isinstance(get(part).terms[0].budget, float) else "budget:SIZE"]


def register(name: str, policy: "str | JaxPolicy | Policy", *, keeps: str | None = None) -> None:
    """Adds a policy under a name that can then be used wherever a policy is named.

    Arguments:
        name: letters, digits, `_` and `-`; not taken yet.
        policy: an expression, or a `jax.checkpoint` policy function.
        keeps: what it keeps, for `describe`; by default the expression or the function's docstring.
    """
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"a policy's name is made of letters, digits, '_' and '-'; got {name!r}")
    if name in _REGISTRY:
        raise ValueError(f"policy {name!r} exists already: {_REGISTRY[name][1]}; register under another name")
    value = get(policy)
    if keeps is None:
        keeps = policy.__doc__ if inspect.isfunction(policy) else None
    lines = (keeps or "").strip().splitlines()
    _REGISTRY[name] = (value, lines[0] if lines else str(value))


def _checked(policy: JaxPolicy) -> JaxPolicy:
    for name, factory in _FACTORIES.items():
        if policy is factory:
            raise TypeError(f"jax.checkpoint_policies.{name} makes policies and is not one: {_REMEDIES[name]}")
    if getattr(policy, "__qualname__", "").startswith("save_anything_except_these_names"):
        raise ValueError(
            "jax.checkpoint_policies.save_anything_except_these_names saves every value, the named ones included "
            "(a bug in JAX); write policy='except:NAMES' to keep every tagged value but those"
        )
    return policy


_REMEDIES: dict[str, str] = {
    "save_only_these_names": "call it, save_only_these_names('q', 'k'), or write policy='save:q,k'",
    "save_any_names_but_these": "call it, save_any_names_but_these('q', 'k'), or write policy='except:q,k'",
    "save_anything_except_these_names": "write policy='except:q,k' (JAX's own saves everything)",
    "save_and_offload_only_these_names": "write policy='save:q+offload:k'",
    "save_from_both_policies": "call it, save_from_both_policies(a, b), or write policy='dots+save:q'",
    "offload_dot_with_no_batch_dims": "call it, offload_dot_with_no_batch_dims('device', 'pinned_host')",
}


def _function_name(policy: Any) -> str:
    return getattr(policy, "__name__", None) or type(policy).__name__
