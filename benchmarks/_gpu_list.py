"""What `on_gpu.py` measures, in order of worth: settings by name, measurements, and the search for the largest crop.

Nothing here needs JAX: the process that leads the others starts at once and leaves the GPU to them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

BY_HAND, PLAN = "per block by hand", "plan"
CHUNK = "chunk"  # stands for the workload's own number of blocks per chunk
SETTINGS: dict[str, dict[str, Any]] = {
    "no checkpointing": {"policy": "everything"},
    BY_HAND: {},
    "per block": {},
    "chunks": {"blocks_per_ckpt": CHUNK},
    "dots_no_batch": {"policy": "dots_no_batch"},
    "stages": {"stages": "auto"},
    "tiles": {"tiles": "auto"},
    "snapshots 5": {"snapshots": 5, "stages": "auto"},
    "snapshots 5, tiles": {"snapshots": 5, "tiles": "auto"},
    "snapshots 9": {"snapshots": 9, "stages": "auto"},
    "offload": {"offload_carry": True, "stages": "auto", "engine": "reversal"},
    "cheap": {"policy": "cheap"},
}
REFERENCE = "per block"
RACE = (
    *(REFERENCE, BY_HAND, "chunks", "stages", "tiles", "snapshots 5", "offload", "no checkpointing", "cheap", PLAN),
    *("snapshots 5, tiles", "snapshots 9"),
)
PEAKS = (REFERENCE, "chunks", "stages", "snapshots 5", "offload", "snapshots 5, tiles")
TORCH = {  # blocks per checkpoint, and whether through torch.compile
    "eager, K=1": (1, False),
    "eager, K=chunk": (CHUNK, False),
    "compiled, K=1": (1, True),
    "compiled, K=chunk": (CHUNK, True),
}
CROPS = {"ours": "snapshots 5", "per block": REFERENCE}
RATES = ("link to the host", "calibrated")
OFFLOADS: dict[str, dict[str, Any]] = {
    "carries": {"offload_carry": True},
    "carries in chunks": {"offload_carry": True, "blocks_per_ckpt": 3},
    "carries and snapshots": {"offload_carry": True, "snapshots": 3},
    "carries in stages": {"offload_carry": True, "stages": "tags:context"},
    "values": {"policy": "offload:query_proj,mlpwo"},
    "values in chunks": {"policy": "offload:query_proj,mlpwo", "blocks_per_ckpt": 3},
    "values beside kept ones": {"policy": "dots_no_batch+offload:context"},
    "MaxText's qkv_proj_offloaded": {"policy": "qkv_proj_offloaded"},
}
_MOST_TOKENS = 4096
LONG_STEP = 20  # seconds: of a step that takes longer, one is made for its peak and not three
CROP_STEP = 64  # tokens: what the search for the largest crop tells apart
_ENGINES = ("reversal", "scan")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process measures: rows `kind/workload/setting`, one for each of `settings`.

    Fields:
        kind: of `_gpu_measure.KINDS`. settings: of a crop the searches, whose rows are found as they go.
    """

    kind: str
    workload: str
    settings: tuple[str, ...]

    def key(self, setting: str) -> str:
        return f"{self.kind}/{self.workload}/{setting}"


def measurements(dry: bool) -> list[Measurement]:
    """In order of their worth; a call makes as many as its time allows, and the next goes on."""
    both = [(name, engine) for name in OFFLOADS for engine in _ENGINES]
    # Snapshots are the reversal engine's alone.
    gradients = tuple(
        f"{name}, {engine}" for name, engine in both if engine == "reversal" or "snapshots" not in OFFLOADS[name]
    )
    found = [
        Measurement("peak", "transformer", (REFERENCE,)),
        Measurement("peak", "transformer", ("dots_no_batch",)),
        Measurement("gradients", "small", gradients),
        Measurement("rates", "device", RATES),
        Measurement("race", "transformer", RACE),
        *(Measurement("peak", "pairformer-384", (name,)) for name in PEAKS),
        Measurement("peak", "pairformer-384 x 16", ("no checkpointing",)),
        Measurement("race", "pairformer-384", RACE),
        Measurement("torch", "pairformer-384", tuple(TORCH)),
        Measurement("race", "pairformer-768", RACE),
        Measurement("peak", "pairformer-2048", ("snapshots 5, tiles",)),
        *(Measurement("crop", "pairformer", (name,)) for name in CROPS),
        Measurement("torch", "transformer", tuple(TORCH)),
        Measurement("torch", "pairformer-768", tuple(TORCH)),
    ]
    return [fewer for m in found if (fewer := _fewer(m)) is not None] if dry else found


def _fewer(m: Measurement) -> Measurement | None:
    """What a dry run makes of a measurement: some of each kind, so that it ends within three minutes."""
    fewer = {
        ("peak", "transformer"): (REFERENCE,),
        ("peak", "pairformer-384"): ("offload",),
        ("peak", "pairformer-384 x 16"): (),
        ("peak", "pairformer-2048"): (),
        ("gradients", "small"): ("carries, reversal", "carries, scan", "values, reversal", "values, scan"),
        ("race", "transformer"): (REFERENCE, BY_HAND, "offload", "snapshots 5, tiles", "no checkpointing", PLAN),
        ("race", "pairformer-384"): (),
        ("race", "pairformer-768"): (),
        ("torch", "transformer"): ("eager, K=1", "compiled, K=1"),
        ("torch", "pairformer-384"): (),
        ("torch", "pairformer-768"): (),
        ("crop", "pairformer"): ("ours",),
    }.get((m.kind, m.workload), m.settings)
    settings = tuple(setting for setting in m.settings if setting in fewer)
    return dataclasses.replace(m, settings=settings) if settings else None


def programs() -> list[tuple[str, str]]:
    """Workload and setting of every program that can be compiled beforehand, in the order in which they are wanted."""
    kinds = ("peak", "gradients", "race")
    return list(
        dict.fromkeys((m.workload, setting) for m in measurements(False) if m.kind in kinds for setting in m.settings)
    )


def next_crop(tried: Mapping[int, bool], guess: int) -> int | None:
    """The number of tokens to try next: from a guess in growing steps to both sides of the edge, then by bisection.

    Arguments:
        tried: by tokens, whether it trains.

    >>> next_crop({}, 512), next_crop({512: True}, 512), next_crop({512: True, 576: True}, 512)
    (512, 576, 704)
    >>> next_crop({512: True, 768: False}, 512), next_crop({512: True, 576: False}, 512)
    (640, None)
    """
    if not tried:
        return guess
    most = max((tokens for tokens, trains in tried.items() if trains), default=0)
    least = min((tokens for tokens, trains in tried.items() if not trains), default=None)
    stride = CROP_STEP * 2 ** (len(tried) - 1)
    if least is None:
        return most + stride
    if most == 0:
        return max(least - stride, CROP_STEP) if least > CROP_STEP else None
    return None if least - most <= CROP_STEP else (most + least) // 2 // CROP_STEP * CROP_STEP


def crop_guess(setting: str, beforehand: Mapping[str, Any], memory_bytes: float | None) -> int:
    """Where temporaries as compiled for 384 and 768 tokens, `a n^2 + b n^3`, reach the memory; 512 where none were."""
    rows = [beforehand.get(f"compile/pairformer-{n}/{setting}", {}) for n in (384, 768)]
    if memory_bytes is None or not all("temp_bytes" in row for row in rows):
        return 8 * CROP_STEP
    a, b = np.linalg.solve([[n**2, n**3] for n in (384, 768)], [row["temp_bytes"] for row in rows])
    left = memory_bytes - (rows[0]["predicted_bytes"] - rows[0]["temp_bytes"])  # beside parameters and their gradients
    fits = [n for n in range(CROP_STEP, _MOST_TOKENS, CROP_STEP) if a * n**2 + b * n**3 <= left]
    return max(fits, default=CROP_STEP)
