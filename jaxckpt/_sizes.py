"""Sizes in bytes as people write them."""

import re

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
