"""One process of `on_gpu.py`: reads what it is asked for, and prints each row as soon as it is made.

A process of its own for each measurement, since a runtime's peak is for life, and since what fails or fills the memory must
leave nothing behind. It ends when its parent does.
"""

import json
import os
import sys
import threading
import traceback
import warnings

import _gpu_measure
import _gpu_race
from _gpu_job import Job, Row, line_of
from _race import NOT_INSTALLED, in_a_line

KINDS = {
    "about": _gpu_measure.about,
    "compile": _gpu_measure.compile_for_target,
    "peak": _gpu_measure.peak,
    "gradients": _gpu_measure.gradients,
    "rates": _gpu_measure.rates,
    "race": _gpu_race.race,
    "torch": _gpu_race.torch_race,
    "crop": _gpu_measure.crop,
}


def main() -> None:
    fields = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore")
    job = Job(**{**fields, "settings": tuple(fields["settings"])})
    owed = dict.fromkeys(job.settings)

    def say(setting: str, row: Row) -> None:
        owed.pop(setting, None)
        print(line_of(setting, row), flush=True)

    try:
        for setting, row in KINDS[job.kind](job):
            say(setting, row)
    except Exception as error:
        traceback.print_exc()
        for setting in tuple(owed):
            is_missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
            say(setting, {"error": NOT_INSTALLED if is_missing else in_a_line(error)})


def _end_with_parent() -> None:
    sys.stdin.read()  # the parent holds the other end, and writes nothing more
    os._exit(1)  # at once: an orphan would measure beside the next call


if __name__ == "__main__":
    main()
