"""The collectives of a compiled program, read off its text: how many are run in one call, and the bytes that they move.

What stands in a loop's body counts as often as XLA says the loop is run; of branches that one counts which moves most.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "c128": 128}


class Collectives(NamedTuple):
    """By kind.

    Fields:
        number: of those that are run. bytes: of the larger of what one device gives and gets, in all of them.
    """

    number: Counter[str]
    bytes: Counter[str]

    def __add__(self, other: "Collectives") -> "Collectives":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Collectives(self.number + other.number, self.bytes + other.bytes)

    def times(self, trips: int) -> "Collectives":
        return Collectives(*(Counter({kind: trips * n for kind, n in part.items()}) for part in self))


NONE = Collectives(Counter(), Counter())


def collectives(text: str) -> Collectives:
    """Those of one call of the program whose compiled text this is."""
    computations: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if begin := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            current = begin[2]
            computations[current] = []
            entry = current if begin[1] else entry
        elif " = " in line:
            computations[current].append(line)
    found: dict[str, Collectives] = {}

    def of(name: str) -> Collectives:
        if name not in found:
            found[name] = sum(map(of_line, computations[name]), NONE)
        return found[name]

    def of_line(line: str) -> Collectives:
        own = _of_instruction(line)
        if body := re.search(r"\bbody=%?([\w.-]+)", line):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            return own + of(body[1]).times(int(trips[1]) if trips else 1)
        branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
        if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
            branches += re.findall(r"%?([\w.-]+)", listed[1])
        if branches:
            return own + max(map(of, branches), key=lambda c: c.bytes.total())
        return sum((of(name) for name in re.findall(r"\bcalls=%?([\w.-]+)", line)), own)

    return of(entry)


def _of_instruction(line: str) -> Collectives:
    found = re.search(r" = (.*?) (" + "|".join(KINDS) + r")(?:-start)?\(", line)
    if found is None:
        return NONE
    return Collectives(Counter({found[2]: 1}), Counter({found[2]: max(map(_size, re.findall(r"\w+\[[\d,]*\]", line)))}))


def _size(array: str) -> int:
    """Bytes of `bf16[8,128]`."""
    dtype, shape = array.rstrip("]").split("[")
    bits = _BITS.get(dtype) or int(re.findall(r"\d+", dtype)[0] if re.search(r"\d", dtype) else 8)
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8
