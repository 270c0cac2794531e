"""A results file: one JSON object a line, the first says what was run. It grows by whole lines, so a killed run goes on."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InvalidInput

_KIND = "unisparse-np results"


class ResultsFile:
    """Opened for one run; holds what an earlier part of the same run left.

    Attributes:
        records: every line after the first, in the order of the file.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        """Open or create `path` for the run that `run` describes (plain JSON values).

        Raises:
            InvalidInput: the file is not a results file, belongs to another run, or cannot be written. It stays as it is.
        """
        self.path = path
        run = json.loads(json.dumps(run))
        self.records: list[dict[str, Any]] = []
        try:
            self._file = path.open("a+b")
            try:
                self._take_over(run)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise InvalidInput(f"--results {path} cannot be written ({error.strerror}): name another file") from None

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; when this returns, it survives a kill."""
        self._write(record)
        self.records.append(record)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()

    def _take_over(self, run: dict[str, Any]) -> None:
        """Lock the file, check it, read its records, and cut off what a kill left half written; a new file gets its first line."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"--results {self.path} is in use by another run: let that end, or name another file") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if whole:
            self._check_same(_json_lines(self.path, whole), run)
        elif content:
            raise _not_results(self.path)
        self._file.truncate(len(whole))
        if not whole:
            self._write(run | {"kind": _KIND})

    def _check_same(self, lines: list[dict[str, Any]], run: dict[str, Any]) -> None:
        before = {name: value for name, value in lines[0].items() if name != "kind"}
        if before != run:
            name, *values = _first_difference(before, run)
            was, now = (json.dumps(value)[:80] for value in values)
            raise InvalidInput(
                f"results file {self.path} belongs to another run ({name} was {was}, now {now}): "
                "name another file with --results, or delete that one"
            )
        self.records = lines[1:]

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _first_difference(before: Any, now: Any, path: str = "") -> tuple[str, Any, Any]:
    """(dotted name, value before, value now) of the first entry in which two objects differ, however deep it lies."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return path, before, now
    name = next(name for name in sorted({*before, *now}) if name not in before or name not in now or before[name] != now[name])
    return _first_difference(before.get(name), now.get(name), f"{path}.{name}" if path else name)


def _json_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    except ValueError:
        raise _not_results(path) from None
    if not all(isinstance(line, dict) for line in lines) or lines[0].get("kind") != _KIND:
        raise _not_results(path)
    return lines


def _not_results(path: Path) -> InvalidInput:
    return InvalidInput(f"{path} exists and is not a results file of this program: name another file with --results")
