"""What `on_gpu.py` has compiled, packed into a few files beside its results: a call on another machine has it too."""

import gzip
import shutil
import tarfile
import tempfile
from pathlib import Path

_LIVE = Path("cache") / "live"
_PARTS = 3  # what a machine that is lent takes and gives back is bounded
_PART_BYTES = 15 * 2**20
_OF_ENTRY = 1024  # what an archive says of a file, compressed, and more


def variables(out: Path) -> dict[str, str]:
    """Where JAX, torch, Triton and jaxckpt keep what they compile and measure: the environment of a process."""
    live = (out / _LIVE).absolute()
    return {
        "JAX_COMPILATION_CACHE_DIR": str(live / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(live / "torch"),
        "TRITON_CACHE_DIR": str(live / "triton"),
        "XDG_CACHE_HOME": str(live / "rates"),
    }


def unpack(out: Path) -> None:
    """Brings the packed cache to where it is used, unless one is there."""
    if (out / _LIVE).exists():
        return
    for part in sorted(out.glob("cache-*.tar.gz")):
        with tempfile.TemporaryDirectory(dir=out) as new:
            try:
                with tarfile.open(part) as archive:
                    archive.extractall(new, filter="data")
            except (OSError, EOFError, tarfile.TarError):
                continue  # cut off; what it holds is compiled again
            shutil.copytree(new, out / _LIVE, dirs_exist_ok=True)


def pack(out: Path) -> int:
    """Packs the cache into at most three files of 15 MiB, small files first; the number of files that had no room."""
    live = out / _LIVE
    files = sorted((f for f in live.rglob("*") if f.is_file()), key=lambda f: (f.stat().st_size, str(f)))
    parts: list[list[Path]] = [[] for _ in range(_PARTS)]
    sizes = [0] * _PARTS
    left = 0
    for file in files:
        size = len(gzip.compress(file.read_bytes(), 1)) + _OF_ENTRY
        room = next((i for i in range(_PARTS) if sizes[i] + size <= _PART_BYTES), None)
        if room is None:
            left += 1
            continue
        parts[room].append(file)
        sizes[room] += size
    for i, part in enumerate(filter(None, parts)):
        new = out / "cache.new"
        with tarfile.open(new, "w:gz", compresslevel=1) as archive:
            for file in part:
                archive.add(file, file.relative_to(live))
        new.replace(out / f"cache-{i}.tar.gz")
    for i in range(sum(map(bool, parts)), _PARTS):
        (out / f"cache-{i}.tar.gz").unlink(missing_ok=True)
    return left
