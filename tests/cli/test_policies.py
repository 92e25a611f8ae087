import subprocess
import sys

import pytest

import jaxckpt
from jaxckpt import policies
from jaxckpt.cli import main


def test_every_name_is_listed_with_what_it_keeps(capsys):
    assert main(["policies"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert set(listed) == {*policies.names(), "save:NAMES", "except:NAMES", "offload:NAMES", "budget:F", "budget:SIZE"}
    assert listed["nothing"] == "only the block's input"


def test_one_policy(capsys):
    assert main(["policies", "dots+save:q"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["dots", "save:q"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["policies", "dotz"], "unknown policy 'dotz'; did you mean 'dots'?"),
        (["policies", "dots+save:"], "a name is missing in 'save:'"),
        (["policies", "dots", "nothing"], "unrecognized arguments: nothing"),
        (["polices"], "invalid choice: 'polices'"),
        ([], "required: COMMAND"),
    ],
)
def test_usage_errors(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert message in err and not out


def test_interruption(monkeypatch, capsys):
    def interrupt(policy):
        raise KeyboardInterrupt

    monkeypatch.setattr(policies, "describe", interrupt)
    assert main(["policies"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.strip() == f"jaxckpt {jaxckpt.__version__}"


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "jaxckpt", "policies", "dots"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "dots"), done.stderr


def test_the_package_does_not_import_its_command_line():
    code = "import sys, jaxckpt; print([m for m in sys.modules if m.startswith(('jaxckpt.cli', 'jaxckpt.models'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
