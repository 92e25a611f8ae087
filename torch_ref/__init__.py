"""The reference in PyTorch: `checkpoint_blocks`, the models of `jaxckpt.models`, and the means to compare the two.

Only the parity tests and `python -m jaxckpt parity` use it; it is not part of the package that is installed.
"""

from torch_ref.checkpointing import checkpoint_blocks as checkpoint_blocks
from torch_ref.convert import from_state_dict as from_state_dict
from torch_ref.convert import to_state_dict as to_state_dict
from torch_ref.models import Stack as Stack

__all__ = ["Stack", "checkpoint_blocks", "from_state_dict", "to_state_dict"]
