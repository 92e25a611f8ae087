"""Rows that are safe as soon as they are made: a file of JSON lines, the first of which says where the others come from."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Appends rows to a file, one by one, each on the disk before the next begins.

    Attributes:
        rows: by key, as they stand in the file; a later row of the same key replaces an earlier one.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        """Opens a journal, or begins it.

        Arguments:
            about: what must be the same for all rows: device, versions.

        Raises:
            ValueError: the file was begun on another device, or with other versions.
        """
        self.path, self.rows = path, {}
        found, self.rows = read(path)
        self.about = found or about
        if differs := [name for name in about if self.about.get(name) != about[name]]:
            said = "; ".join(f"{name}: {self.about.get(name)} there, {about[name]} here" for name in differs)
            raise ValueError(f"{path} is from elsewhere ({said}): name another folder with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Anew, since a line that was being written when the process was killed is no row.
        whole = path.with_suffix(".new")
        whole.write_text("".join(map(_line, [{"about": self.about}, *self.rows.values()])))
        whole.replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Writes a row; `row["key"]` names it."""
        self.rows[row["key"]] = row
        with self.path.open("a") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a journal is about, and its rows by key; both empty where there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    about: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue  # cut off
        if "about" in found:
            about = found["about"]
        else:
            rows[found["key"]] = found
    return about, rows


def _line(item: dict[str, Any]) -> str:
    return json.dumps(item) + "\n"
