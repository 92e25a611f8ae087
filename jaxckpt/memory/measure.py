"""What a function needs: bytes, as the compiler says, on a device that need not be there; seconds, on one that is."""

import contextlib
import dataclasses
import os
import re
import statistics
import time as clock
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from jaxckpt._leaves import is_array
from jaxckpt._sizes import one_unit
from jaxckpt.engine.check import shape_of
from jaxckpt.flax.steps import jitted, map_leaves, objects_are_arguments, with_objects
from jaxckpt.memory import targets
from jaxckpt.memory.collectives import Collective, collectives
from jaxckpt.memory.meshes import lowered_on
from jaxckpt.memory.targets import Target


@dataclass(frozen=True)
class Measurement:
    """Sizes of one compiled program, in bytes on each device, as `compiled.memory_analysis()` gives them.

    Fields:
        target: the name of the target, and `device` what the device calls itself.
        temp_bytes: what the program allocates for itself while it runs.
        argument_bytes, output_bytes: what it is given and what it returns.
        aliased_bytes: outputs that lie in the memory of donated arguments.
        host_bytes: pinned host memory: arguments, outputs and temporaries, aliased ones once.
        compile_seconds: of XLA; without tracing, and without autotuning for what is only described. Next to nothing for what
            this process, or JAX's cache, has compiled before.
        hlo_instructions: the size of the compiled program.
        memory_bytes: of one device of the target, where it is known.
        seconds: the median time of a call; None if it was not asked for.
        runtime_peak_bytes: the most memory of the device that the process had in use up to the end of those calls; with
            donation that is more than the program's own peak by the arguments, since copies of them are given away. None
            where the device does not count (CPUs).
        jax_version: peaks move with the compiler.
        collectives: what devices send to each other in one call, by kind; loops multiplied by how often they run.
    """

    target: str
    device: str
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    aliased_bytes: int
    host_bytes: int
    compile_seconds: float
    hlo_instructions: int
    memory_bytes: int | None = None
    seconds: float | None = None
    runtime_peak_bytes: int | None = None
    jax_version: str = jax.__version__
    collectives: tuple[Collective, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """All that is on the device at once: temporaries, arguments and outputs, donated memory counted once."""
        return self.temp_bytes + self.argument_bytes + self.output_bytes - self.aliased_bytes

    @property
    def excess_bytes(self) -> int:
        """By how much the peak is larger than the device's memory; 0 if it fits, or if the memory is unknown."""
        return max(0, self.peak_bytes - self.memory_bytes) if self.memory_bytes else 0

    @property
    def sent_bytes(self) -> int:
        """What each device sends to others in one call, in all collectives."""
        return sum(found.sent_bytes for found in self.collectives)

    def to_json(self) -> dict[str, Any]:
        """The fields and the peak, as JSON has them."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "excess_bytes": self.excess_bytes}

    def __str__(self) -> str:
        sizes = [self.temp_bytes, self.argument_bytes, self.output_bytes, self.aliased_bytes]
        peak, temp, arguments, outputs, donated = one_unit([self.peak_bytes, *sizes])
        lines = [f"peak {peak} on {self.target} ({self.device}), JAX {self.jax_version}"]
        lines.append(f"  = {temp} temporaries + {arguments} arguments + {outputs} outputs")
        if self.aliased_bytes:
            lines[-1] += f" - {donated} donated"
        if self.excess_bytes and self.memory_bytes:
            more, memory = one_unit([self.excess_bytes, self.memory_bytes])
            lines.append(f"  does not fit: {more} more than the {memory} of the device")
        if self.host_bytes:
            lines.append(f"  pinned host memory {one_unit([self.host_bytes])[0]}")
        if self.collectives:
            total = one_unit([self.sent_bytes])[0]
            kinds = ", ".join(f"{c.number} {c.kind} ({one_unit([c.sent_bytes])[0]})" for c in self.collectives)
            lines.append(f"  each device sends {total}: {kinds}")
        lines.append(f"  compiled in {self.compile_seconds:.1f} s to {self.hlo_instructions} instructions")
        if self.seconds is not None:
            lines.append(f"  {self.seconds:.4g} s per call (median)")
        if self.runtime_peak_bytes is not None:
            lines.append(f"  the runtime's own peak {one_unit([self.runtime_peak_bytes])[0]}")
        return "\n".join(lines)


def measure(
    fn: Callable[..., Any], *args: Any, target: str | os.PathLike[str] | Target | None = None, time: bool = False
) -> Measurement:
    """Compiles `fn(*args)` for a target and reads the sizes of its buffers; nothing is allocated on the target.

    Arguments:
        fn: a function, jitted or not: a training step, say; or an NNX module, whose state is an argument then. What it was
            jitted to donate counts once (a function around a jitted one donates nothing). Arrays that it closes over are
            constants of the program, and no arguments: pass what belongs to the model. With NNX objects among its arguments
            (or as what a `functools.partial` or a method is bound to), a function that is not jitted is compiled as
            `nnx.jit` would: what it changes in them is a result.
        args: arrays or `jax.ShapeDtypeStruct`s, sharded or not; only their shapes are used unless `time` is true. Anything
            else is passed on as it is, and is static where `fn` was jitted so.
        target: see `jaxckpt.targets.get`; by default where the arguments are, which is as a rule JAX's default device.
        time: also runs the program, on a device that is present and large enough, until five calls and a second have
            passed.

    Returns:
        The sizes. A program larger than the target is reported (`excess_bytes`), not raised, and not run.

    Raises:
        ValueError: the arguments lie on several devices that are no one target, or `time` for a GPU that is not there.
        RuntimeError: the target is a GPU for which JAX's CUDA plugin is missing.
        Exception: whatever tracing `fn` raises, with a note that says what it was traced with.

    >>> import jax.numpy as jnp
    >>> found = measure(lambda x: jnp.tanh(x) @ x, jnp.ones((256, 256)))
    >>> found.argument_bytes, found.output_bytes
    (262144, 262144)
    """
    if not callable(fn):
        raise TypeError(f"measure takes a function, such as a training step, and then its arguments; got {fn!r:.200}")
    if isinstance(fn, nnx.Module):
        graph, state = nnx.split(fn)
        return measure(lambda state, *args: nnx.merge(graph, state)(*args), state, *args, target=target, time=time)
    fn, args = with_objects(fn, args)
    where = place_of(args) if target is None else targets.get(target)
    if time and not where.is_present:
        raise ValueError(f"time=True runs the program, and {where.name!r} is only described; take target='attached'")
    if time and (missing := [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.ShapeDtypeStruct)]):
        raise ValueError(f"time=True runs the program and needs arrays; among the arguments is {missing[0]}")
    program, name = jitted(fn, args), getattr(fn, "__name__", repr(fn))
    try:
        with objects_are_arguments(fn, "measure"):
            if target is None:
                lowered, placed = program.lower(*args), args
            else:
                lowered, placed = lowered_on(where, program, name, args)
    except Exception as error:
        error.add_note(f"jaxckpt.measure traced {name} with shapes in place of values: {shape_of(args)}")
        raise
    start = clock.perf_counter()
    compiled = where.compile(lowered)
    compile_seconds = clock.perf_counter() - start
    if target is None:
        where = _place_of_compiled(compiled, where)
    sizes, text = compiled.memory_analysis(), compiled.as_text() or ""
    if sizes is None:
        raise ValueError(f"the compiler for {where.devices[0].device_kind} does not say what memory its programs need")
    found = Measurement(
        target=where.name,
        device=where.devices[0].device_kind,
        temp_bytes=sizes.temp_size_in_bytes,
        argument_bytes=sizes.argument_size_in_bytes,
        output_bytes=sizes.output_size_in_bytes,
        aliased_bytes=sizes.alias_size_in_bytes,
        host_bytes=sizes.host_temp_size_in_bytes
        + sizes.host_argument_size_in_bytes
        + sizes.host_output_size_in_bytes
        - sizes.host_alias_size_in_bytes,
        compile_seconds=compile_seconds,
        hlo_instructions=len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", text, re.MULTILINE)),
        memory_bytes=where.memory_bytes,
        collectives=collectives(text, where.count) if where.count > 1 else (),
    )
    if not time or found.excess_bytes or not where.is_present:
        return found
    seconds, runtime_peak = _run(program, _put(args, placed), _donates(lowered), where)
    return dataclasses.replace(found, seconds=seconds, runtime_peak_bytes=runtime_peak)


def place_of(args: Any) -> Target:
    """Where the arguments were put, or JAX's default device where nobody put them anywhere.

    Refuses what was put on different devices; arrays that nobody put anywhere go where the others are.
    """
    found: dict[frozenset[Any], str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        is_put = leaf.committed if isinstance(leaf, jax.Array) else isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding
        if is_put and not isinstance(getattr(leaf.sharding, "mesh", None), AbstractMesh):
            found.setdefault(frozenset(leaf.sharding.device_set), jax.tree_util.keystr(path))
    if len(found) == 1:
        return targets.of_devices(next(iter(found)))
    if len(found) > 1:
        places = "; ".join(f"args{path} on {sorted(map(str, devices))}" for devices, path in found.items())
        raise ValueError(
            f"the arguments lie on different devices: {places}. Put them on the same with jax.device_put, or name a target"
        )
    return targets.get("attached")


def _place_of_compiled(compiled: Any, where: Target) -> Target:
    """The devices that a program was compiled for: `fn` itself may have named them, by a mesh."""
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    devices = frozenset().union(*(sharding.device_set for sharding in shardings))
    return where if not devices or devices == frozenset(where.devices) else targets.of_devices(devices)


def _put(args: Any, placed: Any) -> Any:
    """The arguments where `Target.place` says that they lie."""
    return map_leaves(lambda x, to: jax.device_put(x, to.sharding) if to is not x else x, args, placed)


def _copied(args: Any) -> Any:
    return map_leaves(lambda x: jnp.copy(x) if is_array(x) else x, args)


def _donates(lowered: Any) -> bool:
    """Whether a lowered program is given the memory of any argument."""
    infos = jax.tree.leaves(lowered.args_info, is_leaf=lambda leaf: hasattr(leaf, "donated"))
    return any(info.donated for info in infos)


def _run(program: Any, args: Any, donated: bool, target: Target) -> tuple[float, int | None]:
    """The median time of a call, and the runtime's peak; with donation all arguments are copied before each call."""

    def fresh() -> Any:
        return jax.block_until_ready(_copied(args)) if donated else args

    times: list[float] = []
    jax.block_until_ready(program(*fresh()))
    while len(times) < 5 or sum(times) < 1:
        given = fresh()
        start = clock.perf_counter()
        jax.block_until_ready(program(*given))
        times.append(clock.perf_counter() - start)
    return statistics.median(times), target.memory_stats.get("peak_bytes_in_use")


def seconds_in_turns(
    step: Callable[..., Any],
    contexts: Sequence[Callable[[], contextlib.AbstractContextManager[Any]]],
    args: Any,
    target: Target,
) -> list[float]:
    """The median time of a call under each context, in turns, so that whatever else the machine does slows all alike.

    Arguments:
        step: jitted or not; is traced anew under each context.
    """
    program = jitted(step, args)
    args = _put(args, target.place(args))
    donated = _donates(program.lower(*args))
    times: list[list[float]] = [[] for _ in contexts]
    for turn in range(13):
        for context, its in zip(contexts, times, strict=True):
            given = _copied(args) if donated else args
            jax.block_until_ready(given)
            with context():
                start = clock.perf_counter()
                jax.block_until_ready(program(*given))
                its += [clock.perf_counter() - start] * (turn > 1)  # compiled at first, and warm at second
    return [statistics.median(its) for its in times]
