"""What one of several devices has of a block: of its values, of its work, and of what is sent."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxckpt._recent import Recent
from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis import tagging
from jaxckpt.analysis.cost import cost
from jaxckpt.analysis.tradeoff import Tradeoff, tradeoff_of


@dataclass(frozen=True)
class Shares:
    """Which part of each value of a block one device holds.

    Fields:
        inputs: of what the block is given: slices of `xs`, the carry, shared arrays.
        outputs: of each equation, of each of its outputs.
        sent_bytes: by one device, for each equation. sending: seconds that this takes whenever the equation is run.
        gathering: seconds that one run of the block gathers parameters for, and what depends on them alone, which are not
            in `sending`: a block that is run again to be differentiated at once has to gather them for that anyway.
    """

    inputs: tuple[float, ...]
    outputs: tuple[tuple[float, ...], ...]
    sent_bytes: tuple[int, ...]
    sending: tuple[float, ...]
    gathering: float

    def of_work(self, jaxpr: Any, parameters: Sequence[int]) -> tuple[float, ...]:
        """Which part of each equation's work one device does.

        A product is split as its result is, or along what is summed, as what it is given is. (Parameters are stored in
        parts, but gathered before they are computed with.)
        """
        held: dict[Any, float] = dict(zip(jaxpr.invars, self.inputs, strict=True))
        held |= dict.fromkeys((jaxpr.invars[i] for i in parameters), 1.0)
        found = []
        for eqn, made in zip(jaxpr.eqns, self.outputs, strict=True):
            given = [held.get(var, 1.0) for var in jx.variables(eqn.invars)]
            held |= zip(eqn.outvars, made, strict=True)
            # Inside of `shard_map` shapes are those of one device.
            found.append(1.0 if eqn.primitive.name == "shard_map" else min([*made, *given], default=1.0))
        return tuple(found)

    def seconds(self, jaxpr: Any, parameters: Sequence[int], rates: Any) -> list[float]:
        """What running each equation takes one device, see `jaxckpt.analysis.cost`."""
        work = self.of_work(jaxpr, parameters)
        whole = (cost(eqn, rates).seconds for eqn in jaxpr.eqns)
        return [seconds * share + sent for seconds, share, sent in zip(whole, work, self.sending, strict=True)]


_recent: Recent[Tradeoff] = Recent()


def tradeoff_of_one(closed: Any, rates: Any, parameters: Sequence[int], shares: Shares) -> Tradeoff:
    """The trade of a block in the bytes and the seconds of one device; see `tradeoff_of`."""
    question = jx.text(closed), str(rates), tuple(parameters), shares
    return _recent.of(question, lambda: _of_one(tradeoff_of(closed, rates, parameters), closed, rates, parameters, shares))


def _of_one(trade: Tradeoff, closed: Any, rates: Any, parameters: Sequence[int], shares: Shares) -> Tradeoff:
    graph, work = trade.graph, shares.of_work(closed.jaxpr, parameters)
    held: dict[int, float] = {}  # of each value that the block computes, and of each that is tagged
    of_block: dict[int, int] = {}  # which of the block an equation of the graph is
    for v, name in enumerate(trade.names):
        if name and (output := tagging.output_of(name)) is not None:
            i, k = output
            before = graph.needs[graph.made_by[v]]
            held |= dict.fromkeys([v, *before], shares.outputs[i][k])
            of_block |= {graph.made_by[u]: i for u in before}
    costs = [cost(eqn, rates).seconds for eqn in closed.jaxpr.eqns]
    computing = sum(seconds * share for seconds, share in zip(costs, work, strict=True))
    # What derivatives compute beside, and what is inside of equations, is split as the others are in the mean.
    sized = [(size, held[v]) for v, size in enumerate(graph.sizes) if size and v in held]
    in_mean = sum(size * share for size, share in sized) / (sum(size for size, _ in sized) or 1)
    of_work = computing / (sum(costs) or 1.0)

    def of_one(e: int, seconds: float) -> float:
        i = of_block.get(e)
        return seconds * of_work if i is None else seconds * work[i] + shares.sending[i]

    local = graph._replace(
        sizes=[None if size is None else round(size * held.get(v, in_mean)) for v, size in enumerate(graph.sizes)],
        seconds=[of_one(e, seconds) for e, seconds in enumerate(graph.seconds)],
    )
    wanted = {v: round(size * held.get(v, in_mean)) for v, size in trade.wanted.items()}
    forward_seconds = computing + sum(shares.sending) + shares.gathering
    return replace(trade, graph=local, wanted=wanted, forward_seconds=forward_seconds)
