"""Train deep stacks of identical blocks in a fraction of the memory, in JAX and Flax."""

from jaxckpt import _start as _start  # before JAX
from jaxckpt import policies as policies
from jaxckpt._blocks import checkpoint_blocks as checkpoint_blocks
from jaxckpt._checkpoint import checkpoint as checkpoint
from jaxckpt._params import stack_params as stack_params
from jaxckpt._params import unstack_params as unstack_params
from jaxckpt._plan import Plan as Plan
from jaxckpt._scan import checkpoint_scan as checkpoint_scan
from jaxckpt.memory import targets as targets
from jaxckpt.memory.explain import explain as explain
from jaxckpt.memory.measure import measure as measure
from jaxckpt.planning.batch import largest_batch as largest_batch
from jaxckpt.planning.search import plan as plan

__all__ = [
    "Plan",
    "checkpoint",
    "checkpoint_blocks",
    "checkpoint_scan",
    "explain",
    "largest_batch",
    "measure",
    "plan",
    "policies",
    "stack_params",
    "targets",
    "unstack_params",
]
__version__ = "0.1.0"
