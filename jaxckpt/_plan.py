"""A plan: the settings of a step's stacks, found by `jaxckpt.plan`, saved, and pinned by `checkpoint_scan(plan=...)`."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxckpt._sizes import size_text
from jaxckpt._table import aligned

_FORMAT = 2


@dataclass(frozen=True)
class Knobs:
    """Arguments of `checkpoint_scan`, and what no argument says.

    Fields:
        kept: the values that each block keeps, if `policy` is "planned".
        first: so many blocks come first, and run under knobs of their own. All are run by the reversal engine then.
    """

    blocks_per_ckpt: int | None = None
    policy: str = "nothing"
    kept: tuple[str, ...] = ()
    snapshots: int | None = None
    stages: str | None = None
    offload_carry: bool = False
    engine: str = "scan"
    tiles: int | str | None = None
    first: "tuple[int, Knobs] | None" = None

    def __post_init__(self) -> None:
        if self.first is None:
            return
        for knobs in (self, self.first[1]):
            if knobs.engine != "reversal" or "offload:" in knobs.policy:
                raise ValueError(
                    f"blocks under knobs of their own are run by the reversal engine, and not under {knobs.policy}"
                )
        if self.first[1].first is not None:
            raise ValueError("of the first blocks none have knobs of their own")

    @property
    def pieces(self) -> str | None:
        """What a block is cut into: "stages", pieces in slices such as "tiles=auto", or None."""
        return f"tiles={self.tiles}" if self.tiles else "stages" if self.stages else None

    def __str__(self) -> str:
        shown = {"blocks_per_ckpt": self.blocks_per_ckpt, "snapshots": self.snapshots, "stages": self.stages}
        shown["tiles"] = self.tiles
        parts = [f"{name}={value}" for name, value in shown.items() if value is not None]
        kept = f"keeps {len(self.kept)} values" if self.policy == "planned" else self.policy
        said = ", ".join([kept, *parts, *["offload_carry"] * self.offload_carry, self.engine])
        return said if self.first is None else f"first {self.first[0]}: {self.first[1]}, then: {said}"


@dataclass(frozen=True)
class StackPlan:
    """The knobs of one stack, and what they were found for.

    Fields:
        block, length: the block's name and how many there are. carry: the types of its positional arguments; of what is no
            stack, of all arrays that it is given.
        program: a hash of what one block computes. mesh: the axes and sizes of the mesh that the carry lies on, as in
            "data=8"; None where that is not known, and in a file of an older version.
    """

    block: str
    length: int
    carry: str
    program: str
    jax_version: str
    knobs: Knobs
    mesh: str | None = None

    def refusal(self, mesh: str | None, **found: Any) -> ValueError | None:
        """Why a stack is not the one that was planned, of `block`, `length`, `carry` and `program`; None where it is."""
        said = {"block": "its block is", "length": "its length is", "carry": "it is given"}
        other = [
            f"{words} {found[name]}, and the plan is for {getattr(self, name)}"
            for name, words in said.items()
            if found[name] != getattr(self, name)
        ]
        if mesh is not None and self.mesh is not None and _sizes(mesh) != _sizes(self.mesh):
            other.append(f"it lies on the mesh {mesh}, and the plan is for {self.mesh}")
        if not other and found["program"] != self.program:
            other = ["it computes something else, though its name and types are the same (other flags, say)"]
        if not other:
            return None
        return ValueError(
            f"{found['block']}: the plan is for something else: {'; '.join(other)}. Without derivatives, as in evaluation, "
            "it runs all the same; but here it is differentiated, and its memory is unknown. Run jaxckpt.plan again, "
            "or leave plan away: the parameters fit"
        )


def _sizes(mesh: str) -> list[str]:
    """Those of a mesh's axes, but for axes of one; whatever their names and order."""
    sizes = [axis.rpartition("=")[2] for axis in mesh.split(",")]
    return sorted(size for size in sizes if size != "1")


@dataclass(frozen=True)
class Candidate:
    """A setting that was looked at.

    Fields:
        setting: of each stack. predicted_bytes: what the model says of the step's peak, as it was calibrated at that time.
        peak_bytes: what the compiler says; None where it was not asked.
        seconds: the time model's, of the stacks. measured_seconds: of the step, where it was run.
    """

    setting: str
    predicted_bytes: int
    seconds: float
    forward_runs: float
    peak_bytes: int | None = None
    measured_seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """What `jaxckpt.plan` found.

    Fields:
        stacks: by name, "" for `plan="auto"`. target, jax_version: that it was compiled for, and with.
        budget_bytes: None for `objective="memory"` without one.
        chosen: the candidate that was taken, and candidates: all that were compiled, the fastest first.
        least_bytes, most_bytes: the predicted peaks of the setting of the least memory and of no checkpointing at all.
        compilations: how many the search was allowed; None in a file of an older version.
        untried: what should be faster and should fit by the model, and was not compiled, the fastest first: by 0.1%, or
            by 1% where the budget is nearly used up. Empty where the model did not choose (`time=True`,
            `objective="memory"`).
    """

    stacks: Mapping[str, StackPlan]
    target: str
    objective: str
    budget_bytes: int | None
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    least_bytes: int
    most_bytes: int
    jax_version: str = jax.__version__
    compilations: int | None = None
    untried: tuple[Candidate, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The compiled peak of the step under the plan."""
        assert self.chosen.peak_bytes is not None
        return self.chosen.peak_bytes

    def __getitem__(self, name: str) -> StackPlan:
        """The plan of the stack that was built with `plan="auto:NAME"`."""
        if name not in self.stacks:
            raise KeyError(f"the plan has no stack {name!r}; it has {', '.join(map(repr, self.stacks))}")
        return self.stacks[name]

    def __str__(self) -> str:
        budget = "" if self.budget_bytes is None else f" of {size_text(self.budget_bytes)}"
        lines = [f"{size_text(self.peak_bytes)}{budget} on {self.target}, JAX {self.jax_version}"]
        for name, stack in self.stacks.items():
            blocks = "1 block" if stack.length == 1 else f"{stack.length} blocks"
            lines.append(f"  {name or stack.block} ({blocks}): {stack.knobs}")
        rows = [("", "setting", "predicted", "compiled", "forward runs", "model s", "measured s")]
        for c in self.candidates:
            compiled = "" if c.peak_bytes is None else size_text(c.peak_bytes)
            measured = "" if c.measured_seconds is None else f"{c.measured_seconds:.4g}"
            mark = "*" if c == self.chosen else ""
            runs, seconds = f"{c.forward_runs:.2f}", f"{c.seconds:.4g}"
            rows.append((mark, c.setting, size_text(c.predicted_bytes), compiled, runs, seconds, measured))
        return "\n".join([*lines, *aligned(rows, right=range(2, 7)), *self._left()])

    def _left(self) -> list[str]:
        """A line about what was left untried."""
        if self.compilations is None or self.objective != "time" or self.chosen.measured_seconds is not None:
            return []
        if not self.untried:
            return ["  left untried: nothing that should be much faster and should fit"]
        first, number = self.untried[0], len(self.untried)
        said = f"{first.setting} ({first.forward_runs:.2f} forward runs, {size_text(first.predicted_bytes)} predicted)"
        settings = (
            "a setting that should be faster and fit" if number == 1 else f"{number} that should be faster and fit, first"
        )
        made = f"compiled were {len(self.candidates)} of the step, of at most compilations={self.compilations}"
        return [f"  left untried: {settings}: {said}; {made}"]

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON has them; `first` of knobs where blocks have some of their own."""
        fields = {"format": _FORMAT, **dataclasses.asdict(self)}
        for stack in fields["stacks"].values():
            if stack["knobs"]["first"] is None:
                del stack["knobs"]["first"]
        return fields

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, for `checkpoint_scan(..., plan=path)`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """The plan that `save` wrote, for `around`; `checkpoint_scan(..., plan=path)` reads the file itself.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no plan, or one of another version of this format.
        """
        return load(path)

    def around(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`step` under the plan: what `plan="auto"` stacks in it are run with.

        What is differentiated must be what was planned; without derivatives, other stacks are run under default knobs.

        Raises:
            ValueError: the plan was made with another version of JAX.
        """
        if not callable(step):
            raise TypeError(f"around takes the step that was planned, a function; got {step!r:.200}")
        _check_version(self.jax_version)

        @functools.wraps(step)
        def planned(*args: Any, **keywords: Any) -> Any:
            with under(self.stacks):
                return step(*args, **keywords)

        return planned


def load(path: str | os.PathLike[str]) -> Plan:
    """The plan that `Plan.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plan, or one of another version of this format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"plan={os.fspath(path)!r} is no file: write 'auto', 'auto:NAME', or the path of a plan that was saved"
        )
    try:
        found = json.loads(Path(path).read_text())
        if found.pop("format") != _FORMAT:
            raise ValueError("it is of another version of jaxckpt")
        if not found["stacks"]:
            raise ValueError("it has no stacks")
        stacks = {name: _stack(fields) for name, fields in found.pop("stacks").items()}
        candidates = tuple(Candidate(**fields) for fields in found.pop("candidates"))
        untried = tuple(Candidate(**fields) for fields in found.pop("untried", ()))
        chosen = Candidate(**found.pop("chosen"))
        return Plan(stacks=stacks, candidates=candidates, chosen=chosen, untried=untried, **found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)} is no plan that jaxckpt.plan saved: {error!r}. Run jaxckpt.plan again"
        ) from None


def _stack(fields: dict[str, Any]) -> StackPlan:
    found = StackPlan(knobs=_knobs(fields.pop("knobs")), **fields)
    if found.knobs.first is None:
        _check_chunks(found.knobs, found.length)
        return found
    count, knobs = found.knobs.first
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < found.length:
        raise ValueError(f"its first {count!r} blocks are no part of {found.length}")
    _check_chunks(knobs, count)
    _check_chunks(found.knobs, found.length - count)
    return found


def _check_chunks(knobs: Knobs, count: int) -> None:
    """Refuses chunks and snapshots that a stack, or a part of one, is too short for."""
    chunks = -(-count // (knobs.blocks_per_ckpt or 1))
    if (knobs.blocks_per_ckpt or 1) > count or (knobs.snapshots or 1) > chunks:
        raise ValueError(f"{knobs} is not for {count} blocks")


def _knobs(fields: dict[str, Any]) -> Knobs:
    first = fields.get("first")
    if first is not None:
        count, knobs = first
        first = count, _knobs(knobs)
    return Knobs(**{**fields, "kept": tuple(fields["kept"]), "first": first})


def stack_of(plan: "Plan | StackPlan | str | os.PathLike[str]") -> StackPlan:
    """The one stack of a plan, a `Plan`, a file, or a file and the stack's name, "plan.json:NAME".

    Raises:
        ValueError: the plan has several stacks and none is named, or it was made with another version of JAX.
        FileNotFoundError: there is no such file.
    """
    if isinstance(plan, StackPlan):
        stack = plan
    else:
        name, where = None, "the plan"
        if not isinstance(plan, Plan):
            where = os.fspath(plan)
            path, colon, named = where.rpartition(":")
            name = named if colon and not Path(where).exists() else None
            plan = load(where if name is None else path)
        if name is None and len(plan.stacks) > 1:
            listed = ", ".join(map(repr, plan.stacks))
            raise ValueError(f"{where} has several stacks, {listed}: write plan='FILE:NAME', or plan=found['NAME']")
        stack = next(iter(plan.stacks.values())) if name is None else plan[name]
    _check_version(stack.jax_version)
    return stack


def _check_version(made_with: str) -> None:
    if made_with != jax.__version__:
        raise ValueError(
            f"the plan was made with JAX {made_with}, and this is JAX {jax.__version__}, whose compiler needs other memory. "
            "Run jaxckpt.plan again"
        )


_active: ContextVar[Mapping[str, StackPlan | Knobs] | None] = ContextVar("active", default=None)
_traced_under = jax.make_user_context(None)  # what is jitted inside is traced anew under other knobs


@contextlib.contextmanager
def under(plans: Mapping[str, StackPlan | Knobs]) -> Iterator[None]:
    """Runs stacks that were built with `plan="auto:NAME"` as the plan of that name says, which is checked, or its knobs."""
    token = _active.set(plans)
    try:
        with _traced_under(tuple(sorted(plans.items(), key=lambda item: item[0]))):
            yield
    finally:
        _active.reset(token)


def active(name: str) -> StackPlan | Knobs | None:
    """What `under` says of a stack."""
    plans = _active.get()
    return None if plans is None else plans.get(name)
