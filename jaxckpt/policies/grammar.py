"""The policy grammar: terms joined by `+`, the union of what each keeps.

A `Policy` is parsed without tracing anything. Terms that speak of tags (`save:`, `except:`, `offload:`) hold globs;
`Policy.for_tags` turns them into the names one block really has, and the whole policy into a `jax.checkpoint` policy.
Tags are values marked with `jax.ad_checkpoint.checkpoint_name`.
"""

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import Offloadable, Recompute, Saveable
from jax.extend.core.primitives import name_p

from jaxckpt._sizes import size_of

JaxPolicy = Callable[..., Any]

everything: JaxPolicy = jax.checkpoint_policies.everything_saveable
nothing: JaxPolicy = jax.checkpoint_policies.nothing_saveable


@dataclass(frozen=True)
class Term:
    """One term. Exactly one of `rule` (a `jax.checkpoint` policy), `globs` and `chooses` is set.

    `verb` says what happens to the tags that the globs match: `"save"`, `"except"` (all the others are saved) or
    `"offload"` (moved to pinned host memory). With `any_of`, the globs are alternatives of which one match is enough,
    as in a recipe written for several models; otherwise each of them must match. A term that `chooses` has the values
    found for the block at hand: within `budget`, a fraction (a float) or bytes (an int), or without one as `cheap` says; or
    they are `values`, which a plan has found before.
    """

    text: str
    rule: JaxPolicy | None = None
    verb: str = ""
    globs: tuple[str, ...] = ()
    any_of: bool = False
    chooses: bool = False
    budget: float | int | None = None
    values: tuple[str, ...] | None = None


VERBS = {
    "save": "the values tagged by checkpoint_name that match",
    "except": "every tagged value but those that match",
    "offload": "the values tagged by checkpoint_name that match, moved to pinned host memory",
}

BUDGETS = {
    "budget:F": "what is run again in the least time, within a fraction (0 to 1) of the bytes that everything would keep",
    "budget:SIZE": "the same within bytes per block, as in budget:300MiB, beside the block's input",
}


@dataclass(frozen=True)
class Policy:
    """What each block keeps for the backward pass: the union of its terms. Made by `jaxckpt.policies.get`."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return "+".join(term.text for term in self.terms)

    @property
    def reads_tags(self) -> bool:
        """Whether the policy depends on the tags of the block."""
        return any(term.verb for term in self.terms)

    @property
    def chooses(self) -> Term | None:
        """The term that chooses what a block keeps, if there is one."""
        return next((term for term in self.terms if term.chooses), None)

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is run again."""
        return any(term.rule is everything for term in self.terms) and not self.may_offload

    @property
    def keeps_nothing(self) -> bool:
        """Whether nothing but the block's input is kept."""
        return all(term.rule is nothing for term in self.terms)

    @property
    def may_offload(self) -> bool:
        """Whether a value may go to host memory; of a policy function that is not JAX's own, nobody knows."""
        return any(term.verb == "offload" or (term.rule is not None and not _is_jaxs_own(term.rule)) for term in self.terms)

    def for_tags(self, tags: Iterable[str], chosen: Iterable[str] = ()) -> JaxPolicy:
        """The `jax.checkpoint` policy that this policy is for a block with these tags; `chosen` are those of `chooses`.

        Raises:
            ValueError: a glob matches none of `tags`, or a tag is both saved and offloaded.
        """
        tags = frozenset(tags)
        named, rest, offloaded, rules = set(chosen), set(), set(), []
        for term in self.terms:
            if term.chooses:
                continue
            if term.rule is not None:
                rules.append(term.rule)
                continue
            matched = self._matches(term, tags)
            if term.verb == "save":
                named |= matched
            elif term.verb == "except":
                # Not `save_anything_except_these_names`, which saves everything upstream.
                rest |= tags - matched
            else:
                offloaded |= matched
        if named & offloaded:
            raise ValueError(
                f"policy {str(self)!r} both saves and offloads {_listed(named & offloaded)}; "
                "a value is kept in one place, so name it in one term"
            )
        return _union(rules, (named | rest) - offloaded, offloaded)

    def _matches(self, term: Term, tags: frozenset[str]) -> set[str]:
        found = {glob: fnmatch.filter(tags, glob) for glob in term.globs}
        missed = [glob for glob, hits in found.items() if not hits]
        if missed and not (term.any_of and len(missed) < len(found)):
            raise ValueError(_tags_nothing(str(self), missed, tags))
        return {tag for hits in found.values() for tag in hits}


def parse(text: str, known: dict[str, "Policy"]) -> Policy:
    """`text` as a policy; `known` are the names that may stand alone as a term."""
    terms: list[Term] = []
    for part in text.split("+"):
        terms += _parse_term(part.strip(), text, known)
    if any(term.rule is everything for term in terms) and any(term.verb == "offload" for term in terms):
        raise ValueError(f"policy {text!r} keeps everything on the device, so that nothing is left to offload; name less")
    if len(terms) > 1 and any(term.budget is not None for term in terms):
        raise ValueError(f"policy {text!r}: a budget is all that a block keeps, and stands alone, as in 'budget:0.25'")
    return Policy(tuple(terms))


def _parse_term(part: str, text: str, known: dict[str, Policy]) -> tuple[Term, ...]:
    if part in known:
        return known[part].terms
    verb, colon, rest = part.partition(":")
    if colon and verb in VERBS:
        globs = tuple(glob.strip() for glob in rest.split(","))
        if not all(globs):
            raise ValueError(f"policy {text!r}: a name is missing in {part!r}; write '{verb}:NAME' or '{verb}:NAME,mlp_*'")
        return (Term(part, verb=verb, globs=globs),)
    if colon and verb == "budget":
        return (Term(part, chooses=True, budget=_budget(rest.strip(), text)),)
    raise ValueError(_unknown(part, text, known))


def _budget(amount: str, text: str) -> float | int:
    """A fraction as a float, bytes as an int."""
    with contextlib.suppress(ValueError):
        if 0 <= (fraction := float(amount)) <= 1:
            return fraction
    with contextlib.suppress(ValueError):
        return size_of(amount)
    raise ValueError(
        f"policy {text!r}: a budget is a fraction from 0 to 1, as in 'budget:0.25', or bytes per block with their unit, "
        f"as in 'budget:300MiB'; got {amount!r}"
    )


def _unknown(part: str, text: str, known: dict[str, Policy]) -> str:
    where = "" if part == text else f" in {text!r}"
    choices = [*known, *(f"{verb}:" for verb in (*VERBS, "budget"))]
    wanted = part.partition(":")[0] + ":" if ":" in part else part
    near = difflib.get_close_matches(wanted, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    forms = ", ".join([*(f"{verb}:NAMES" for verb in VERBS), *BUDGETS])
    return (
        f"unknown policy {part!r}{where}{hint} Known: {', '.join(known)}; {forms}; "
        "terms are joined by '+', as in 'dots+save:attn'."
    )


def _tags_nothing(policy: str, missed: list[str], tags: frozenset[str]) -> str:
    if not tags:
        have = "it has no tags at all: mark values in it with jax.ad_checkpoint.checkpoint_name(value, name)"
    else:
        have = f"its tags are {_listed(tags)}"
        near = difflib.get_close_matches(missed[0], tags, n=1)
        have += f"; did you mean {near[0]!r}?" if near else ""
    return f"policy {policy!r}: {_listed(missed)} {'tags' if len(missed) == 1 else 'tag'} nothing in the block; {have}"


def _is_jaxs_own(rule: JaxPolicy) -> bool:
    """Whether `rule` is one of JAX's policies that offload nothing; what its factories return may be a plain closure."""
    return rule in vars(jax.checkpoint_policies).values() or type(rule).__module__.startswith("jax.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def _union(rules: list[JaxPolicy], saved: set[str], offloaded: set[str]) -> JaxPolicy:
    """One `jax.checkpoint` policy; JAX's own wherever there is one, because `jax_remat3` knows those by type."""
    policies = jax.checkpoint_policies
    if offloaded and not any(rule is not nothing for rule in rules):
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(saved),
            names_which_can_be_offloaded=sorted(offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    if everything in rules:
        return everything
    rules = [rule for rule in rules if rule is not nothing]
    if saved:
        rules.append(policies.save_only_these_names(*sorted(saved)))
    if len(rules) == 1 and not offloaded:
        return rules[0]
    return Union(tuple(rules), frozenset(offloaded)) if rules else nothing


@dataclass(frozen=True)
class Union:
    """Keeps what any of `rules` keeps, with the tags in `offloaded` on the host whatever the rules say."""

    rules: tuple[JaxPolicy, ...]
    offloaded: frozenset[str]

    def __call__(self, prim, *avals, **params):
        if prim is name_p and params["name"] in self.offloaded:
            return Offloadable(src="device", dst="pinned_host")
        answers = [rule(prim, *avals, **params) for rule in self.rules]
        if any(answer is True or answer is Saveable for answer in answers):
            return Saveable
        return next((answer for answer in answers if isinstance(answer, Offloadable)), Recompute)
