"""`jaxckpt demo`: one small language model, trained under four settings, and what each of them costs.

A byte-level transformer learns the source of Python's standard library. Every setting starts from the same parameters
and sees the same batches, so losses and gradients must agree; only memory and time may differ. With `--devices` parameters
and batch are split over several (FSDP), and one device alone is a setting beside.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxckpt
from jaxckpt import plan
from jaxckpt._progress import Progress
from jaxckpt._table import aligned
from jaxckpt.cli._errors import fail
from jaxckpt.cli._meshes import of_parameter
from jaxckpt.models import TransformerLM

CHUNK = 3
SETTINGS: dict[str, dict[str, Any]] = {
    "no checkpointing": {"policy": "everything"},
    "per block": {"policy": "nothing"},
    f"chunks of {CHUNK}": {"blocks_per_ckpt": CHUNK, "policy": "everything"},
    "dots": {"policy": "dots"},
}
AGREE = 1e-4  # how far the losses of two settings may be apart, in nats per byte
PRECISION = "float32"  # in full on every device: TF32 would round more than the settings may differ
MIB = 2**20


class Size(NamedTuple):
    """The model's width and the batch. The defaults make activations, not parameters, the larger part of the memory."""

    d_model: int = 128
    num_heads: int = 4
    d_ff: int = 384
    batch: int = 4
    length: int = 256


class State(NamedTuple):
    params: Any
    optimizer: Any


class Result(NamedTuple):
    """One setting's costs and losses; bytes and seconds."""

    setting: str
    blocks_per_ckpt: int | None
    policy: str
    temp_bytes: int
    total_bytes: int
    seconds_per_step: float
    losses: list[float]
    gradient_difference: float


def add_parser(commands: Any) -> None:
    about = "train a small language model under four settings and compare memory, time and losses"
    parser = commands.add_parser("demo", help=about, description=f"{about}; on a GPU where JAX finds one")
    parser.add_argument("--steps", type=_at_least(2, "the loss has to fall"), default=10, help="steps per setting (10)")
    parser.add_argument(
        "--blocks",
        type=_at_least(CHUNK, f"one of the settings is chunks of {CHUNK}"),
        default=12,
        help="blocks of the transformer (12)",
    )
    parser.add_argument("--budget", help="also plan for a peak of so much memory, such as 120MiB, and train under the plan")
    parser.add_argument(
        "--devices",
        type=_at_least(2, "the demo trains on one without"),
        help="split parameters and batch over so many (FSDP), simulated ones where there is no GPU",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, size: Size | None = None) -> int:
    """Trains, prints the table, and returns 1 where losses do not fall or do not agree.

    As JSON: what `about_run` tells, `settings`, a list of `Result`s, and `problems`, a list of sentences, empty if all is
    well. Progress and problems go to stderr.
    """
    size = size or Size()
    try:
        text = read_text(Path(sysconfig.get_paths()["stdlib"]))
    except FileNotFoundError as error:
        print(f"jaxckpt demo: {error}", file=sys.stderr)
        return 1
    try:
        mesh = None if options.devices is None else mesh_of(options.devices)
        if mesh is not None:
            size = size._replace(batch=-(-size.batch // mesh.size) * mesh.size)
        results = train_all(draw_batches(text, options.steps, size), options.blocks, size, options.budget, mesh)
    except ValueError as error:  # a budget that is none, or too small; devices that are not there
        return fail("demo", error)
    problems = find_problems(results)
    about = about_run(options, size, len(text))
    if options.json:
        print(json.dumps({**about, "settings": [r._asdict() for r in results], "problems": problems}, indent=2))
    else:
        print(report(about, results))
    for problem in problems:
        print(f"jaxckpt demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read_text(folder: Path) -> np.ndarray:
    """The bytes of the Python files in `folder`, one file after the other in alphabetical order."""
    files = sorted(folder.glob("*.py"))
    if not files:
        raise FileNotFoundError(
            f"the demo trains on the source of Python's standard library, and there is none in {folder} (a Python "
            "that is zipped or frozen into one file comes without it); run it with another Python"
        )
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)


def draw_batches(text: np.ndarray, steps: int, size: Size) -> np.ndarray:
    """Windows at random places, `int32[steps, batch, length + 1]`: each byte but the last has the next as its target."""
    rng = np.random.default_rng(0)
    starts = rng.integers(len(text) - size.length, size=(steps, size.batch, 1))
    return text[starts + np.arange(size.length + 1)].astype(np.int32)


def mesh_of(count: int) -> Mesh:
    """A mesh of so many devices: GPUs, or a CPU's, which are asked for before JAX starts.

    Raises:
        ValueError: there are not so many, and JAX has started.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it has
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices() if jax.device_count() >= count else jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--devices {count}: there are {len(devices)}. For simulated ones on a CPU set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Mesh(np.array(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def train_all(
    batches: np.ndarray, blocks: int, size: Size, budget: str | None = None, mesh: Mesh | None = None
) -> list[Result]:
    """Every setting on the same batches from the same start; with a budget, the one that is planned for it too.

    Over a mesh if one is given, and then on one of its devices too.

    The settings take turns, step by step, so that whatever else the machine does meanwhile slows all of them alike.
    """
    optimizer = optax.adamw(1e-3)
    width = {"d_model": size.d_model, "num_heads": size.num_heads, "d_ff": size.d_ff}
    settings = dict(SETTINGS)
    # The parameters do not depend on the setting: any model can make them for all.
    make = functools.partial(TransformerLM, num_blocks=blocks, **width)
    params = jax.jit(make().init)(jax.random.key(0), batches[0, :1, :-1])["params"]
    start = State(params, optimizer.init(params))
    if budget is not None:
        state, tokens = placed(start, batches[0], mesh)
        with jax.default_matmul_precision(PRECISION):
            found = plan(make_step(make(plan="auto"), optimizer, state), state, tokens, budget=budget)
        print(found, file=sys.stderr)
        settings[f"plan for {budget}"] = {"plan": found[""]}
    meshes: list[Mesh | None] = [mesh] * len(settings)
    if mesh is not None:
        settings, meshes = {"one device": {"policy": "everything"}, **settings}, [None, *meshes]
    models = [make(**knobs) for knobs in settings.values()]
    states = [placed(jax.tree.map(jnp.copy, start), batches[0], on)[0] for on in meshes]

    programs, gradients = [], []
    losses, seconds = np.zeros((2, len(models), len(batches)))
    with Progress("demo", losses.size, "step") as progress:
        for name, model, on in zip(settings, models, meshes, strict=True):
            progress.doing(f"compiling {name}")
            programs.append(compile_step(model, optimizer, *placed(start, batches[0], on)))
        for j, batch in enumerate(batches):
            for i, program in enumerate(programs):
                _, tokens = placed(None, batch, meshes[i])
                began = time.perf_counter()
                states[i], loss = jax.block_until_ready(program(states[i], tokens))
                seconds[i, j], losses[i, j] = time.perf_counter() - began, loss
                progress.advance()
            progress.news(f"step {j + 1} of {len(batches)}, loss {losses[0, j]:.3f}")
            gradients = gradients or [first_gradient(state) for state in states]
    return [
        Result(
            setting=name,
            blocks_per_ckpt=knobs.get("blocks_per_ckpt"),
            policy=knobs.get("policy", "planned"),
            **memory_of(programs[i]),
            seconds_per_step=float(np.median(seconds[i, 1:])),
            losses=losses[i].tolist(),
            gradient_difference=relative_difference(gradients[i], gradients[0]),
        )
        for i, (name, knobs) in enumerate(settings.items())
    ]


def placed(state: Any, tokens: np.ndarray, mesh: Mesh | None) -> tuple[Any, Any]:
    """A state and a batch, split over a mesh, parameters and their moments too; as they are without one."""
    if mesh is None:
        return state, tokens

    def of_state(path: Any, leaf: Any) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, of_parameter(path, leaf, dict(mesh.shape), fsdp=True)))

    return jax.tree_util.tree_map_with_path(of_state, state), jax.device_put(
        tokens, NamedSharding(mesh, PartitionSpec("data"))
    )


def make_step(model: TransformerLM, optimizer: optax.GradientTransformation, given: State | None = None) -> Any:
    """One training step `(state, tokens) -> (state, loss)`; the old state's memory is given to the new one.

    Arguments:
        given: a state that lies where the step's are to lie.
    """

    def loss_of(params, tokens):
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state, tokens):
        loss, gradient = jax.value_and_grad(loss_of)(state.params, tokens)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state), loss

    where = None if given is None else jax.tree.map(lambda leaf: leaf.sharding, given)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))


def compile_step(model: TransformerLM, optimizer: optax.GradientTransformation, state: State, tokens: Any) -> Any:
    """The training step, compiled."""
    with jax.default_matmul_precision(PRECISION):
        return make_step(model, optimizer, state).lower(state, tokens).compile()


def memory_of(program: Any) -> dict[str, int]:
    """The bytes of a compiled program, by XLA's own account; memory of donated arguments is counted once."""
    memory = program.memory_analysis()
    temp = memory.temp_size_in_bytes
    rest = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {"temp_bytes": temp, "total_bytes": temp + rest}


def first_gradient(state: State) -> Any:
    """The gradient of the first step, up to a factor: after one step Adam's first moment is (1 - b1) times it."""
    return jax.device_get(optax.tree_utils.tree_get(state.optimizer, "mu"))


def relative_difference(tree: Any, reference: Any) -> float:
    """The largest difference between two trees, relative to the largest entry of `reference`."""
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True))
    return float(max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs))


def find_problems(results: Sequence[Result]) -> list[str]:
    """What a sound run does not show, in sentences. A loss that is not a number fails both checks."""
    problems = []
    for result in results:
        first, last = result.losses[0], result.losses[-1]
        if not last < first:
            problems.append(f"{result.setting}: the loss did not fall, from {first:.4f} to {last:.4f}")
        apart = float(np.max(np.abs(np.subtract(result.losses, results[0].losses))))
        if not apart <= AGREE:
            problems.append(
                f"{result.setting}: the losses are {apart:.1e} away from those of {results[0].setting}; "
                f"{AGREE:.0e} is the most that rounding explains"
            )
    return problems


def about_run(options: argparse.Namespace, size: Size, text_bytes: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    kind = f"{device.device_kind} ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
    return {
        "device": kind,
        "devices": options.devices or 1,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": version("flax"),
        "jaxckpt": jaxckpt.__version__,
        "text_bytes": text_bytes,
        "blocks": options.blocks,
        "steps": options.steps,
        **size._asdict(),
    }


def report(about: dict[str, Any], results: Sequence[Result]) -> str:
    """The table, with what was run above it and what its columns mean below."""
    title = ("setting", "temp MiB", "total MiB", "s/step", "first loss", "last loss", "gradient difference")
    rows = [
        (
            r.setting,
            f"{r.temp_bytes / MIB:.1f}",
            f"{r.total_bytes / MIB:.1f}",
            f"{r.seconds_per_step:.3f}",
            f"{r.losses[0]:.4f}",
            f"{r.losses[-1]:.4f}",
            f"{r.gradient_difference:.0e}" if r.gradient_difference else "0",
        )
        for r in results
    ]
    return "\n".join(
        [
            "{blocks} blocks of {d_model} channels, batches of {batch} x {length} bytes, {steps} steps, float32".format(
                **about
            ),
            f"{about['devices']} x " * (about["devices"] > 1)
            + "{device}; jaxckpt {jaxckpt}, jax {jax}, flax {flax}, Python {python}".format(**about),
            "",
            *aligned([title, *rows], right=range(1, len(title))),
            "",
            "temp: what the compiled step allocates while it runs, activations above all, by XLA's own account.",
            "total: temp plus parameters, optimizer state and batch. s/step: the median without the first step.",
            *["Bytes are those of each device; parameters and batch are split over all (FSDP)."] * (about["devices"] > 1),
            "gradient difference: at the first step, from the first setting, relative to the largest entry.",
        ]
    )


def _at_least(minimum: int, reason: str) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"an integer of at least {minimum} is needed; got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"at least {minimum} is needed, since {reason}; got {value}")
        return value

    return integer
