"""A journal of finished files, one JSON line each: what a stopped run need not do again."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """Append-only; a line that was cut off by a crash is ignored.

    Args:
        path: the journal's file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    self.entries[entry["key"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue

    def __enter__(self) -> "Journal":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._path, "a", encoding="utf-8")
        self._file.write("\n")  # ends a line that a crash cut off
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, key: str, **facts: Any) -> dict[str, Any]:
        """Note that `key` is done, with what is known of it; returns the entry."""
        entry = {"key": key, **facts}
        self.entries[key] = entry
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        return entry
