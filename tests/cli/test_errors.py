import pytest

from jaxckpt._setting import check_blocks_per_ckpt
from jaxckpt.cli import main
from jaxckpt.cli._errors import spoken


def test_a_knob_in_the_words_of_the_command_line():
    with pytest.raises(ValueError) as caught:
        check_blocks_per_ckpt(7, 6)
    assert spoken(str(caught.value)) == (
        "--blocks-per-ckpt must be between 1 and len(blocks) = 6, and an integer; got 7. Write 'none' for no chunks."
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--blocks", "2", "--tokens", "8", "--blocks-per-ckpt", "7"],
        ["report", "--blocks", "2", "--tokens", "8", "--blocks-per-ckpt", "7", "--target", "cpu"],
        ["plan", "--blocks", "2", "--tokens", "8", "--time", "--target", "h200"],
        ["plan", "--blocks", "2", "--tokens", "8", "--target", "cpu"],
        ["plan", "--blocks", "2", "--tokens", "8", "--target", "cpu", "--budget", "much"],
        ["plan", "--blocks", "2", "--tokens", "8", "--target", "h200", "--calibrate"],
        ["demo", "--budget", "much"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_nothing_of_python_in_what_is_said(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"jaxckpt {arguments[0]}: ")
    for python in ("blocks_per_ckpt ", "None", "=True", "target=", "budget=", " of type int", "Error"):
        assert python not in said, said
