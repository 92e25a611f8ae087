"""A static check of compiled GPU programs: do slices of host memory lie where the program asked for them?

XLA may burn the offsets of a slice into the program, as a linear function of the iterations of the loop around it. The check
interprets the scalar arithmetic that computes each slice's index, iteration by iteration, and compares.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

HOST = "S(5)"
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "s32": 4, "u32": 4, "pred": 1}
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "clamp": lambda low, x, high: max(low, min(x, high)),
    "negate": lambda a: -a,
    "select": lambda which, a, b: a if which else b,
    **dict.fromkeys(["bitcast", "copy", "reshape", "convert"], lambda a: a),
}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str

    @property
    def called(self) -> list[str]:
        found = CALLED.findall(self.text)
        return [name.strip(" %") for one, many in found for name in (one or many).split(",")]

    @property
    def is_root(self) -> bool:
        return self.text.lstrip().startswith("ROOT ")


Computation = dict[str, Instruction]


class Unknown(Exception):
    """The value is not a function of constants and iterations alone."""


@dataclass
class Frame:
    """A computation as it is called in one place; `iterations` are those of the loops around it, the innermost last."""

    program: dict[str, Computation]
    name: str
    arguments: Sequence[Callable[[], Any]] = ()
    iterations: tuple[int, ...] = ()
    known: dict[str, Any] = field(default_factory=dict)

    def thunks(self, names: Sequence[str]) -> list[Callable[[], Any]]:
        return [lambda name=name: self.value(name) for name in names]

    def value(self, name: str) -> Any:
        """A number, or for a tuple a list of functions that return one."""
        if name not in self.known:
            self.known[name] = self._value(self.program[self.name][name])
        return self.known[name]

    def root(self) -> Any:
        return self.value(next(name for name, instruction in self.program[self.name].items() if instruction.is_root))

    def _value(self, instruction: Instruction) -> Any:
        opcode, operands, text = instruction.opcode, instruction.operands, instruction.text
        if opcode == "parameter":
            number = int(re.search(r"parameter\((\d+)\)", text)[1])
            return self.arguments[number]()
        if opcode == "tuple":
            return self.thunks(operands)
        if opcode == "get-tuple-element":
            return self.value(operands[0])[int(re.search(r"index=(\d+)", text)[1])]()
        if opcode == "constant" and (literal := re.search(r"constant\((-?\d+|true|false)\)", text)):
            return {"true": True, "false": False}.get(literal[1]) if literal[1].isalpha() else int(literal[1])
        if opcode == "compare":
            return COMPARISONS[re.search(r"direction=(\w+)", text)[1]](*map(self.value, operands))
        if opcode in ("fusion", "call"):
            return Frame(self.program, instruction.called[0], self.thunks(operands)).root()
        if opcode in ARITHMETIC:
            return ARITHMETIC[opcode](*map(self.value, operands))
        raise Unknown(f"{instruction.name} = {opcode}")


class Slice(NamedTuple):
    name: str
    iteration: int
    asked: int | None  # bytes from the beginning; None where that is not known
    burnt_in: int


def parse(text: str) -> dict[str, Computation]:
    program: dict[str, Computation] = {}
    for line in text.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = program["ENTRY" if header[1] else header[2]] = {}
        elif match := INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.\-#]+)", match["rest"].split(")")[0])
            current[match["name"]] = Instruction(match["name"], match["shape"], match["opcode"], operands, line)
    for computation in program.values():  # `%a#1` is an element of what `%a` returns
        for name in {name for instruction in computation.values() for name in instruction.operands if "#" in name}:
            source, index = name.split("#")
            computation[name] = Instruction(name, "", "get-tuple-element", [source], f"index={index}")
    return program


def frames(program: dict[str, Computation], name: str) -> Iterator[Frame]:
    """Each call of a computation, in each iteration of the loops around it."""
    if name == "ENTRY":
        yield Frame(program, name)
    for caller, computation in program.items():
        for instruction in [i for i in computation.values() if name in i.called]:
            for around in frames(program, caller):
                given = around.thunks(instruction.operands)
                if instruction.opcode == "while":
                    count = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
                    for i in range(int(count[1]) if count else 1):
                        frame = Frame(program, name, given, (*around.iterations, i))
                        yield frame
                        given = [frame.root]
                else:
                    branch = instruction.called.index(name)
                    given = given[branch + 1 :][:1] if instruction.opcode == "conditional" else given
                    yield Frame(program, name, given, around.iterations)


def host_slices(text: str) -> list[Slice]:
    """Slices of host memory whose offsets are burnt in, once for each iteration."""
    program = parse(text)
    found = []
    for name, computation in program.items():
        for instruction in computation.values():
            is_read = instruction.opcode == "dynamic-slice"
            if not is_read and instruction.opcode != "dynamic-update-slice":
                continue
            whole = computation[instruction.operands[0]].shape
            config = re.search(r'dynamic_slice_config":\{(.*)', instruction.text)
            if HOST not in whole + instruction.shape or not config:
                continue
            numbers = config[1].partition('"linear":')[2] or config[1]
            offset, stride = (int(re.search(rf'"{key}":"(-?\d+)"', numbers)[1]) for key in ("byte_offset", "byte_stride"))
            kind, dims = re.match(r"(\w+)\[([\d,]*)\]", whole).groups()
            row = BYTES[kind] * math.prod(map(int, dims.split(",")[1:]))
            for frame in frames(program, name):
                try:
                    asked = row * frame.value(instruction.operands[1 if is_read else 2])
                except Unknown:
                    asked = None
                i = frame.iterations[-1] if frame.iterations else 0
                found.append(Slice(instruction.name, i, asked, offset + stride * i))
    return found
