"""A stack of a pure function `f(params, *carry, **shared)`."""

import functools
from collections.abc import Callable
from typing import Any

from jaxckpt._leaves import STACK_THEM, stacked_length
from jaxckpt._metadata import LAYERS
from jaxckpt._setting import Setting
from jaxckpt.engine import check
from jaxckpt.engine.stack import per_block_of
from jaxckpt.flax.arguments import run_and_write_back


def function_stack(block: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    """`stack(params, *carry, **shared)` for `block(params, *carry, **shared)`; leaves of `params` are `[N, ...]`."""
    if setting.partition_name != LAYERS:
        raise ValueError(
            f"partition_name={setting.partition_name!r} is of the metadata of Flax modules, and a function's parameters are "
            "passed on as they are: leave it away, or write it to stack_params and unstack_params"
        )
    inner = block.func if isinstance(block, functools.partial) else block
    name = getattr(inner, "__name__", None) or type(inner).__name__
    names = check.names_of(block, name, skip=1)

    @functools.wraps(block, updated=())
    def stack(params: Any, /, *carry: Any, **keywords: Any) -> Any:
        check.call_fits(block, (params,), carry, keywords, names)
        length = stacked_length(params, setting.length, f"{name}: the stacked parameters", STACK_THEM)
        per_block, shared = per_block_of(setting, length, keywords, names)

        def call(x, carry, shared):
            params, per_block = x
            return block(params, *carry, **shared, **per_block), ()

        both = slice(0, 2)
        out = run_and_write_back(call, setting, length, (params, per_block), carry, shared, names, watched=both)
        return (out.carry, out.aux) if setting.has_aux else out.carry

    return stack
