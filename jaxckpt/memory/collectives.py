"""The collectives of a compiled program, read off its text: how many are run in one call, and what each device sends.

What stands in the body of a loop counts as often as XLA says that the loop is run, and once where it cannot say; of branches
the one counts in which most is sent. Bytes are those of a ring over the `n` devices of a group: `(n - 1) / n` of the whole
value for what gathers, scatters or exchanges it, and twice as much for an all-reduce, which is one of each (Patarasuk and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_ARRAY = r"[a-z]\w*\[[\d,]*\]"


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one call of a program.

    Fields:
        kind: one of `KINDS`. number: of those that are run. sent_bytes: by each device, all together.
    """

    kind: str
    number: int
    sent_bytes: int


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """Those of one call of a program on so many devices, whose compiled text this is; what sends most first."""
    program = _Program(text, devices)
    number, sent = program.of(program.entry)
    kinds = sorted(number, key=lambda kind: (-sent[kind], kind))
    return tuple(Collective(kind, int(number[kind]), round(sent[kind])) for kind in kinds)


_Counts = tuple[Counter[str], Counter[str]]  # number, and bytes, by kind


class _Program:
    """The instructions of each computation of a compiled program, by the computation's name."""

    def __init__(self, text: str, devices: int):
        self.devices, self.entry, self.lines = devices, "", {}
        current: list[str] = []
        for line in text.splitlines():
            if begin := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
                current = self.lines.setdefault(begin[2], [])
                self.entry = begin[2] if begin[1] else self.entry
            elif " = " in line:
                current.append(line)
        self.of = functools.cache(self._of)

    def _of(self, name: str) -> _Counts:
        return _sum(map(self._of_line, self.lines.get(name, [])))

    def _of_line(self, line: str) -> _Counts:
        if found := re.search(r" = (.*?) (" + "|".join(KINDS) + r")(-start)?\(", line):
            result, kind, is_start = found.groups()
            return Counter({kind: 1}), Counter({kind: _sent(kind, _whole(kind, result, bool(is_start)), self._group(line))})
        if re.search(r" async-(?:done|update)\(", line):  # what was started, and counted there
            return Counter(), Counter()
        if body := re.search(r"\bbody=%?([\w.-]+)", line):
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            return _times(int(trips[1]) if trips else 1, self.of(body[1]))
        branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
        if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
            branches += re.findall(r"%?([\w.-]+)", listed[1])
        if branches:
            return max(map(self.of, branches), key=lambda counts: (counts[1].total(), counts[0].total()))
        return _sum(self.of(name) for name in re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", line))

    def _group(self, line: str) -> int:
        """The number of devices that a collective joins."""
        if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
            return len(listed[1].split(","))
        if regular := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
            return int(regular[2])
        return self.devices


def _whole(kind: str, result: str, is_start: bool) -> tuple[int, bool]:
    """The bytes of the whole value, and whether they are of all that a group has and not of one device's part.

    What is started returns what it was given beside what comes of it, but for an older all-reduce.
    """
    parts = _parts(result) if is_start else [result]
    if kind == "all-reduce" and not parts[0].startswith("("):
        parts = [result]
    return max(map(_size, parts)), is_start or kind != "reduce-scatter"


def _sent(kind: str, whole: tuple[int, bool], group: int) -> float:
    size, is_of_all = whole
    if kind.startswith("collective"):
        return size
    return (group - 1) / group * size * (1 if is_of_all else group) * (2 if kind == "all-reduce" else 1)


def _parts(result: str) -> list[str]:
    """What a tuple holds, `(a, (b, c))` as `a` and `(b, c)`."""
    parts, depth = [""], 0
    for letter in re.sub(r"\{[^}]*\}", "", result[1:-1] if result.startswith("(") else result):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _size(result: str) -> int:
    """Bytes of `bf16[8,128]`, or of all arrays in a tuple."""
    total = 0
    for array in re.findall(_ARRAY, result):
        dtype, shape = array.rstrip("]").split("[")
        bits = int(found[0]) if (found := re.findall(r"\d+", dtype)) else 8
        total += -(-math.prod(map(int, filter(None, shape.split(",")))) * bits // 8)
    return total


def _sum(counts: Iterable[_Counts]) -> _Counts:
    number, sent = Counter[str](), Counter[str]()
    for more, bytes_more in counts:
        number.update(more)
        sent.update(bytes_more)
    return number, sent


def _times(trips: int, counts: _Counts) -> _Counts:
    return Counter({k: trips * n for k, n in counts[0].items()}), Counter({k: trips * n for k, n in counts[1].items()})
