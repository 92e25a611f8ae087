"""Policies that choose by themselves what a block keeps: `cheap` and `budget:`."""

from collections.abc import Sequence
from typing import Any

from jaxckpt.analysis import inlining, tagging
from jaxckpt.analysis.cost import REFERENCE
from jaxckpt.analysis.tradeoff import Choice, Tradeoff, tradeoff_of
from jaxckpt.policies.grammar import Term


def choice_of(closed: Any, term: Term, parameters: Sequence[int] = ()) -> tuple[Tradeoff, Choice]:
    """What a block can keep, and what a term chooses of it; the same wherever and whenever it is asked.

    Arguments:
        closed: the block's inlined jaxpr.
        parameters: which of its inputs are.
    """
    trade = tradeoff_of(closed, REFERENCE, parameters)
    if term.budget is None:
        return trade, trade.cheap
    budget = term.budget if isinstance(term.budget, int) else int(term.budget * trade.wanted_bytes)
    return trade, trade.within(budget)


def with_choice(
    closed: Any, term: Term, parameters: Sequence[int] = ()
) -> tuple[Any, tuple[str, ...], tuple[Tradeoff, Choice] | None]:
    """The block's jaxpr with what the term chooses tagged, the tags, and the choice, if it was not made before."""
    flat = inlining.merged(inlining.inlined(closed, checkpoints=True))
    if term.values is not None:
        return tagging.with_tags(flat, frozenset(term.values)), term.values, None
    trade, choice = choice_of(flat, term, parameters)
    return tagging.with_tags(flat, frozenset(choice.names)), choice.names, (trade, choice)
