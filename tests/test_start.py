import contextlib
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxckpt import _start

ROOT = Path(__file__).parents[1]
NOTE = "I0000 00:00:1795934887.832600    6034 cudart_stub.cc:31] Could not find cuda drivers on your machine"
ALARM = "E1129 07:01:02.832600    6034 gpu_hlo_schedule.cc:31] ... This indicates an error in the calculation!"
FATAL = "F1129 07:01:02.832600    6034 pjrt.cc:31] Check failed: it is over"
BEFORE = "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR"


@contextlib.contextmanager
def interrupts(handler):
    """Inside, SIGINT is left to `handler`; a process that is started there ignores it only where this one does."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def started(tmp_path, jax, *arguments, **environment):
    """`python -m jaxckpt` with the lines `jax` in place of JAX, the first that it imports."""
    (tmp_path / "jax.py").write_text(f"import os, signal, sys, time\n{jax}\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    env = {name: value for name, value in os.environ.items() if name not in _start._SET_BY_USERS}
    return subprocess.run(
        [sys.executable, "-m", "jaxckpt", *(arguments or ["policies"])],
        env={**env, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "argv, whole, expected",
    [
        (["-m", "demo"], ["python", "-m", "jaxckpt", "demo"], True),
        (["-m"], ["python", "-X", "dev", "-mjaxckpt"], True),
        (["-m", "x"], ["python", "-Im", "jaxckpt", "x"], True),
        (["/env/bin/jaxckpt", "plan"], ["/env/bin/python", "/env/bin/jaxckpt", "plan"], True),
        (["-m", "jaxckpt"], ["python", "-m", "mine", "jaxckpt"], False),
        (["-m"], ["python", "-m", "my.jaxckpt"], False),
        (["train.py", "jaxckpt"], ["python", "train.py", "jaxckpt"], False),
        (["-c"], ["python", "-c", "import jaxckpt"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_only_the_command_line_is_prepared(argv, whole, expected):
    assert _start.is_command_line(argv, whole) == expected


def test_an_interrupt_while_modules_are_imported(tmp_path):
    with interrupts(signal.default_int_handler):  # a shell's jobs in the background ignore them
        done = started(tmp_path, "os.kill(os.getpid(), signal.SIGINT); time.sleep(30)")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_a_shell_that_ignores_interrupts_is_obeyed(tmp_path):
    with interrupts(signal.SIG_IGN):
        done = started(tmp_path, "os.kill(os.getpid(), signal.SIGINT); print('still here'); os._exit(0)")
    assert done.stderr == "" and done.returncode == 0


def test_an_interrupt_inside_of_a_command():
    with interrupts(_start._interrupted):
        with pytest.raises(KeyboardInterrupt), _start.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is _start._interrupted


LOGS = "\n".join(f"os.write(2, b{line + chr(10)!r})" for line in [BEFORE, NOTE, ALARM])


def test_what_xla_logs_is_left_out_and_nothing_else(tmp_path):
    other = "os.write(2, b'Error: mine\\n'); os.write(2, b'unfinished'); time.sleep(0.5); print('python', file=sys.stderr)"
    done = started(tmp_path, f"{LOGS}\n{other}\nraise ValueError('in the import')")
    for said in ("Error: mine\n", "unfinished", "python\n", "Traceback", "ValueError: in the import"):
        assert said in done.stderr
    assert not any(line in done.stderr for line in (BEFORE, NOTE, ALARM))


def test_the_last_words_of_a_crash(tmp_path):
    done = started(tmp_path, f"{LOGS}\nos.write(2, b{FATAL + chr(10)!r}); os.abort()", PYTHONFAULTHANDLER="1")
    assert done.returncode == -signal.SIGABRT
    assert FATAL in done.stderr and "Fatal Python error: Aborted" in done.stderr and ALARM not in done.stderr


def test_what_other_programs_write_to_stderr_passes(tmp_path):
    done = started(tmp_path, "import subprocess; subprocess.run(['sh', '-c', 'echo from a child >&2']); os._exit(3)")
    assert (done.returncode, done.stderr) == (3, "from a child\n")


def test_verbose_ends_the_filter(tmp_path):
    verbose = "import jaxckpt._start as start; start.show_logs()"
    done = started(tmp_path, f"{verbose}\n{LOGS}\nos._exit(0)")
    assert done.stderr.splitlines() == [BEFORE, NOTE, ALARM]


def test_unfinished_lines_wait_only_where_they_may_be_logs():
    (read, write), (back, out) = os.pipe(), os.pipe()
    os.write(write, f"{NOTE}\nWhat is it\n{ALARM}".encode())
    os.close(write)
    _start.pass_on(read, out)
    os.close(out)
    assert os.read(back, 1 << 16) == b"What is it\n"
    os.close(read)
    os.close(back)


SAYS = "print(os.environ.get('JAX_PLATFORMS')); sys.stdout.flush(); os._exit(0)"


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine with JAX's CUDA plugin and without a GPU, where the user has set nothing."""
    for name in _start._SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_start, "_NVIDIA", ("/dev/there/is/none",))
    plugins = [SimpleNamespace(name="xla_cuda12")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    yield plugins
    os.environ.pop("JAX_PLATFORMS", None)


def test_jax_is_told_to_compute_on_the_cpu(no_gpu):
    _start._choose_platform()
    assert os.environ["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize("name", _start._SET_BY_USERS)
def test_what_the_user_has_set_stays(no_gpu, monkeypatch, name):
    monkeypatch.setenv(name, "mine")
    _start._choose_platform()
    assert os.environ.get("JAX_PLATFORMS") == ("mine" if name == "JAX_PLATFORMS" else None)


def test_a_gpu_that_is_there_is_used(no_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(_start, "_NVIDIA", (str(tmp_path),))
    _start._choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


def test_other_accelerators_are_left_to_jax(no_gpu, monkeypatch):
    no_gpu.append(SimpleNamespace(name="xla_rocm7"))
    _start._choose_platform()
    assert "JAX_PLATFORMS" not in os.environ
    no_gpu.clear()
    _start._choose_platform()
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.skipif(any(map(os.path.exists, _start._NVIDIA)), reason="there is a GPU")
def test_before_jax_is_imported(tmp_path):
    has_plugin = any(entry.name.startswith("xla_cuda") for entry in importlib.metadata.entry_points(group="jax_plugins"))
    assert started(tmp_path, SAYS).stdout.strip() == ("cpu" if has_plugin else "None")
    assert started(tmp_path, SAYS, JAX_PLATFORMS="").stdout.strip() == ""


def test_a_program_that_imports_the_package_is_left_alone(tmp_path):
    (tmp_path / "jax.py").write_text(f"import os, sys\n{LOGS}\n{SAYS}")
    env = {name: value for name, value in os.environ.items() if name not in _start._SET_BY_USERS}
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import jaxckpt"], env={**env, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "None" and ALARM in done.stderr


def test_a_process_without_arguments():
    code = "import sys; del sys.argv; import jaxckpt._start"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
