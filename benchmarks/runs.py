"""What a study has measured so far: one row a run, kept in a file of JSON lines, so that a study of an hour may be cut off.

A row is found again by its key, every choice that the run depends on, and not by the code that made it: a file that was
written before a change of the code belongs in the bin.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edge_sdk.errors import StorageError


class Runs:
    """Rows by key. `path`: where they are kept, None for nowhere. Raises `StorageError` for a file that is not of a study."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._load(path)

    def row(self, key: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """`key` and what `run` measured for it; measured only if no earlier study did."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._rows:
            self._rows[name] = {**key, **run()}
            self._keep(name)
            print(f"run {len(self._rows)}: {', '.join(map(str, key.values()))}", file=sys.stderr, flush=True)
        return self._rows[name]

    def _load(self, path: Path) -> None:
        content = path.read_text()
        whole, _, torn = content.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                held = json.loads(line)
                self._rows[json.dumps(held["key"], sort_keys=True)] = held["row"]
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(
                    f"{path}, line {number}: not a run of a study ({error}): name another file"
                ) from error
        if torn:  # the study was killed while it wrote
            path.write_text(whole + "\n" if whole else "")

    def _keep(self, name: str) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": json.loads(name), "row": self._rows[name]}) + "\n")
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written ({error.strerror})") from error
