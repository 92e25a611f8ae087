"""Pins the layouts of carries and slots: in the reversal engine, where chunks share slots or carries go to the host; and in
both engines where blocks are computed in slices, but in the scan engine where a policy keeps copies.

In the layouts that XLA for GPUs picks for each loop, all slots and snapshots would be transposed between two loops: 31.2
instead of 30.2 GiB for the Pairformer of 768 tokens in chunks of 6 that keep nothing, 93.5 instead of 87.9 where they keep
products, compiled for H200 with JAX 0.10.2. Where a program is partitioned, XLA gathers a pinned array from all devices, and
an exported program may not hold a pin.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jaxckpt._setting import Setting
from jaxckpt.engine.one_gpu import identity_but_on_one_gpu


def copies_carries(setting: Setting) -> bool:
    """Whether XLA may lay out stacked carries otherwise for the backward loop, which has loops in it, and copy them then.

    48 Pairformer blocks of 768 tokens, compiled for H200: 13.8 and not 10.5 GiB under `tiles="auto"` with JAX 0.10.2, 13.8
    and not 11.8 under `tiles=4` with JAX 0.12.0.1.
    """
    return setting.tiles is not None


def row_major(x: Any) -> Any:
    """`x` in row-major layout where it has several, if the program is for one GPU."""
    return row_major_p.bind(x) if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.inexact) else x


row_major_p = identity_but_on_one_gpu("jaxckpt_row_major", lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))))
