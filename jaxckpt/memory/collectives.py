"""The collectives of a compiled program, read off its text: how many are run in one call, and what each device sends.

What stands in the body of a loop counts as often as XLA says that the loop is run, and once where it cannot say; of branches
the one counts in which most is sent. Bytes are those of a ring over the `n` devices of a group: `(n - 1) / n` of the whole
value for what gathers, scatters or exchanges it, and twice as much for an all-reduce, which is one of each (Patarasuk and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Rings between hosts are as many as a
group has devices in each, so that each device's link to the network carries its part.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxckpt.memory.targets import PER_HOST

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


class Call(NamedTuple):
    """A collective of a program.

    Fields:
        number: of times that it is run in one call of the program. sent_bytes: by each device, all together.
        group: the devices that one of them joins, as the program numbers them.
        scope: where it comes from, as JAX names it. inputs: those of the program that it depends on, as JAX names them;
            none are told where it stands in a loop or a branch.
    """

    kind: str
    number: int
    sent_bytes: float
    group: tuple[int, ...]
    scope: str
    inputs: frozenset[str]

    def seconds(self, rates: Any) -> float:
        """What sending takes, by the links of `rates`, see `jaxckpt.analysis.cost`."""
        hosts = Counter(device // PER_HOST for device in self.group)
        bandwidth = rates.link_bandwidth
        if len(hosts) > 1:
            bandwidth = min(bandwidth, rates.network_bandwidth * min(hosts.values()))
        return self.sent_bytes / bandwidth


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """Those of one call of a program on so many devices, whose compiled text this is; what sends most first."""
    number, sent = Counter[str](), Counter[str]()
    for call in calls(text, devices):
        number[call.kind] += call.number
        sent[call.kind] += call.sent_bytes  # pyright: ignore[reportArgumentType]
    kinds = sorted(number, key=lambda kind: (-sent[kind], kind))
    return tuple(Collective(kind, number[kind], round(sent[kind])) for kind in kinds)


def calls(text: str, devices: int) -> list[Call]:
    """The same, each where it stands in the program."""
    program = _Program(text, devices)
    return program.of(program.entry)


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

    def _of(self, name: str) -> list[Call]:
        inputs = _inputs(self.lines.get(name, [])) if name == self.entry else {}
        return [call for line in self.lines.get(name, []) for call in self._of_line(line, inputs)]

    def _of_line(self, line: str, inputs: Mapping[str, frozenset[str]]) -> list[Call]:
        if found := re.search(r" = (.*?) (" + "|".join(KINDS) + r")(-start)?\(", line):
            result, kind, is_start = found.groups()
            group = _group(line, self.devices)
            sent = _sent(kind, _whole(kind, result, bool(is_start)), len(group))
            return [Call(kind, 1, sent, group, _scope(line), inputs.get(_name(line), frozenset()))]
        if re.search(r" async-(?:done|update)\(", line):  # what was started, and counted there
            return []
        if body := re.search(r"\bbody=%?([\w.-]+)", line):
            found = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            trips = int(found[1]) if found else 1
            return [c._replace(number=trips * c.number, sent_bytes=trips * c.sent_bytes) for c in self.of(body[1])]
        branches = re.findall(r"(?:true|false)_computation=%?([\w.-]+)", line)
        if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
            branches += re.findall(r"%?([\w.-]+)", listed[1])
        if branches:
            return max(map(self.of, branches), key=lambda calls: (sum(c.sent_bytes for c in calls), len(calls)))
        called = [call for name in re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", line) for call in self.of(name)]
        of_line = inputs.get(_name(line), frozenset()) if called else frozenset()
        return [call._replace(inputs=of_line) for call in called]


def _inputs(lines: Iterable[str]) -> dict[str, frozenset[str]]:
    """Of each instruction, the inputs of the program that it depends on."""
    found: dict[str, frozenset[str]] = {}
    for line in lines:  # which XLA prints in an order in which they can be run
        if begin := re.search(r" = .*? ([a-z][\w-]*)\(([^)]*)\)", line):
            op, operands = begin.groups()
            of_operands = (found.get(operand, frozenset()) for operand in re.findall(r"%([\w.-]+)", operands))
            found[_name(line)] = frozenset([_scope(line)]) if op == "parameter" else frozenset().union(*of_operands)
    return found


def _name(line: str) -> str:
    found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = ", line)
    return found[1] if found else ""


def _scope(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _group(line: str, devices: int) -> tuple[int, ...]:
    """The devices that a collective joins: of several such groups one that lies on the most hosts."""
    return max(_groups(line, devices), key=lambda group: len({device // PER_HOST for device in group}))


def _groups(line: str, devices: int) -> list[tuple[int, ...]]:
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", line):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    numbers = np.arange(devices)
    if regular := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        numbers = numbers.reshape([int(n) for n in regular[3].split(",")])
        if regular[4]:
            numbers = numbers.transpose([int(n) for n in regular[4].split(",")])
        return list(map(tuple, numbers.reshape(int(regular[1]), int(regular[2])).tolist()))
    if on_mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes, joined = [], []  # of axes of the mesh, and of the parts of those of which only a part is joined
        taken = {name: part for name, *part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", on_mesh[2])}
        for name, size in re.findall(r"'([^']*)'=(\d+)", on_mesh[1]):
            # 'x':(2)4 are 4 behind 2 of the axis.
            before, own = map(int, taken[name]) if taken.get(name, [""])[0] else (1, int(size))
            joined += [len(sizes) + 1] if name in taken else []
            sizes += [before, own, int(size) // (before * own)]
        others = [i for i in range(len(sizes)) if i not in joined]
        count = math.prod(sizes[i] for i in joined)
        return list(map(tuple, numbers.reshape(sizes).transpose([*others, *joined]).reshape(-1, count).tolist()))
    return [tuple(range(devices))]


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
