"""What the command line needs before JAX is imported; `python -m jaxckpt` imports the whole package before its first line.

In any other process nothing happens: a program that imports `jaxckpt` keeps its signals, its environment and its stderr.
"""

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pkgutil
import re
import select
import signal
import sys
from collections.abc import Iterator

_NVIDIA = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # one of them is there where a GPU is; the last in WSL
_SET_BY_USERS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
# What XLA logs: notes, warnings and errors. Fatal ones ("F0000 ...") and all that is no log line pass.
_LOGGED = re.compile(rb"[IWE]\d{4} [\d:.]+ +\d+ [^ ]+:\d+\]|WARNING: All log messages before absl::InitializeLog")
_direct: int | None = None  # stderr itself, where file descriptor 2 is the filter's


def prepare() -> None:
    """Prepares this process, if it is the command line: `_interrupted`, `_choose_platform`, `_filter_logs`."""
    # An embedded Python may have no arguments, and a process that the command line spawns is not the command line.
    is_spawned = multiprocessing.parent_process() is not None
    if is_spawned or not is_command_line(getattr(sys, "argv", []), sys.orig_argv):
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    _choose_platform()
    if hasattr(os, "fork") and sys.stderr is not None:
        _filter_logs()


def is_command_line(argv: list[str], whole: list[str]) -> bool:
    """Whether a process that was called so is `jaxckpt` or `python -m jaxckpt`.

    Arguments:
        argv, whole: `sys.argv` and `sys.orig_argv` while the package is imported.
    """
    if argv[:1] == ["-m"]:  # as long as Python looks for the module; its name stands before the arguments
        return re.fullmatch(r"(-\w*m)?jaxckpt", whole[-len(argv)]) is not None
    return os.path.splitext(os.path.basename(argv[0] if argv else ""))[0] == "jaxckpt"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, so that a command can say what it has."""
    if signal.getsignal(signal.SIGINT) is not _interrupted:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(*_: object) -> None:
    """Ends the process: while modules are imported there is nothing to clean up, and a traceback tells nobody anything."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _choose_platform() -> None:
    """Without an NVIDIA GPU JAX's CUDA plugin says at length that it fails, and cannot compile for a GPU that is described.

    Unless JAX is told to compute on the CPU. What the user has set stays, and so does JAX where other plugins may find an
    accelerator.
    """
    if any(name in os.environ for name in _SET_BY_USERS) or any(map(os.path.exists, _NVIDIA)):
        return
    spec = importlib.util.find_spec("jax_plugins")
    plugins = {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)} if spec else set()
    plugins |= {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    if plugins and all(name.startswith("xla_cuda") for name in plugins) and importlib.util.find_spec("libtpu") is None:
        os.environ["JAX_PLATFORMS"] = "cpu"


def _filter_logs() -> None:
    """Leaves out what XLA logs, on file descriptor 2: "This indicates an error in the calculation!" and the like.

    The filter is a process of its own, so that it still passes on what this one says when it crashes, and is forked before
    JAX has threads. Python's own `sys.stderr` goes around it.
    """
    global _direct
    _direct = os.dup(2)
    read, write = os.pipe()
    if os.fork() == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
        for descriptor in (0, 1, 2, write):
            os.close(descriptor)
        with contextlib.suppress(BaseException):
            pass_on(read, _direct)
        os._exit(0)
    os.close(read)
    os.dup2(write, 2)
    os.close(write)
    sys.stderr = sys.__stderr__ = os.fdopen(os.dup(_direct), "w", buffering=1, errors="backslashreplace")


def show_logs() -> None:
    """Ends the filter: what XLA logs is shown from now on."""
    if _direct is not None:
        os.dup2(_direct, 2)


def pass_on(read: int, write: int) -> None:
    """Writes what can be read, until there is no more, without the lines that XLA logs."""
    line = b""
    while True:
        if line and not line.startswith((b"I", b"W", b"E")) and not select.select([read], [], [], 0.2)[0]:
            os.write(write, line)  # an unfinished line that is none of XLA's waits for nobody
            line = b""
        if not (new := os.read(read, 1 << 16)):
            break
        *lines, line = (line + new).split(b"\n")
        os.write(write, b"".join(one + b"\n" for one in lines if not _LOGGED.match(one)))
    os.write(write, b"" if _LOGGED.match(line) else line)


prepare()
