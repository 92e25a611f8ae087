"""What computing a piece in slices takes longer than computing it whole.

A piece in slices runs each of its kernels once per slice. A kernel takes no less than it takes to start the next, and each
slice reads again what all share: so slices cost nothing as long as they are large, and much where they are many.
"""

from typing import Any

from jaxckpt.analysis import jaxpr as jx
from jaxckpt.analysis.cost import cost, is_dear
from jaxckpt.analysis.tiles import Tiles

START = 4e-6  # seconds between kernels of a loop on a GPU, as published for H100: 2 to 6


def slicing_seconds(jaxpr: Any, tiles: Tiles, rates: Any) -> float:
    """Of one run; rates as in `jaxckpt.analysis.cost`."""
    tiling, count = tiles
    shared = {place.of(jaxpr) for place in tiling.shared}

    def longer(eqns: list[Any]) -> float:
        """Of what is one kernel."""
        whole = sum(cost(eqn, rates).seconds for eqn in eqns)
        read = {var for eqn in eqns for var in jx.variables(eqn.invars) if var in shared}
        again = sum(jx.nbytes(var.aval) for var in read) / rates.memory_bandwidth
        return count * max(START, whole / count, again) - whole

    inside = [jaxpr.eqns[i] for i in tiling.inside]
    fused = [eqn for eqn in inside if not is_dear(eqn)]  # into one of the others, or few kernels
    kernels = [fused, *([eqn] for eqn in inside if is_dear(eqn))]
    return sum(longer(eqns) for eqns in kernels if any(cost(eqn, rates).seconds for eqn in eqns))
