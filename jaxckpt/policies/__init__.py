"""Remat policies by name: what a block keeps for its backward pass."""

from jaxckpt.policies.grammar import Policy as Policy
from jaxckpt.policies.registry import describe as describe
from jaxckpt.policies.registry import get as get
from jaxckpt.policies.registry import names as names
from jaxckpt.policies.registry import register as register
