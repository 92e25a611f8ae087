"""Sizes in bytes as people write them."""

import re
from collections.abc import Sequence

_UNITS = {"B": 1} | {
    f"{letter}{i}B": base ** (k + 1) for i, base in (("i", 1024), ("", 1000)) for k, letter in enumerate("KMGT")
}
_FORM = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def size_of(text: str) -> int:
    """The bytes of a size such as "300MiB", "1.5 GB" or "4096B".

    Raises:
        ValueError: it is no number with a unit.

    >>> size_of("1.5KiB"), size_of("2 MB")
    (1536, 2000000)
    """
    found = _FORM.fullmatch(text)
    unit = next((unit for unit in _UNITS if found and unit.lower() == found[2].lower()), None)
    if found is None or unit is None:
        raise ValueError(f"a size is a number and a unit, as in '300MiB' or '1.5GB'; got {text!r}")
    return int(float(found[1]) * _UNITS[unit])


def size_text(size: float) -> str:
    """`size` bytes for people.

    >>> size_text(1536), size_text(12)
    ('1.5 KiB', '12 B')
    """
    for unit in ("GiB", "MiB", "KiB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:,.1f} {unit}"
    return f"{size:.0f} B"


def one_unit(sizes: Sequence[float]) -> list[str]:
    """`sizes` in bytes for people, all in one unit, so that they can be added up: GiB where one has ten, or else MiB.

    >>> one_unit([12 * 2**30, 3 * 2**28]), one_unit([2**30, 3 * 2**18])
    (['12.00 GiB', '0.75 GiB'], ['1,024.0 MiB', '0.8 MiB'])
    """
    if max(map(abs, sizes), default=0) >= 10 * _UNITS["GiB"]:
        return [f"{size / _UNITS['GiB']:,.2f} GiB" for size in sizes]
    return [f"{size / _UNITS['MiB']:,.1f} MiB" for size in sizes]
