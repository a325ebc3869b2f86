"""What a tuning found out, a line of JSON each, on the disk before the next step: who was killed takes it up from there."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

from tfquant.errors import ConfigError, OutputError

_START = '{"job": '


class Journal:
    """Facts about sets of ops, kept in memory, and in a file where there is one.

    The file may hold several jobs: lines of others are left alone. It is made with the first fact.

    Args:
        path: of the file, or None.
        job: what tells this job from others.

    Raises:
        ConfigError: the file is something else.
    """

    def __init__(self, path: str | os.PathLike[str] | None, job: str) -> None:
        self._path = None if path is None else pathlib.Path(path)
        self._job = job
        self._facts: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
        if self._path is not None:
            check_journal(self._path)
            for line in _lines(self._path):
                self._read(line)

    def _read(self, line: str) -> None:
        try:
            fact = json.loads(line)
            if fact["job"] == self._job:
                self._facts[fact["kind"], tuple(fact["ops"])] = fact["facts"]
        except (ValueError, KeyError, TypeError):
            pass  # a process was killed while it wrote this line

    def recall(self, kind: str, ops: Collection[str]) -> dict[str, Any] | None:
        """What was noted about a set of ops, or None."""
        return self._facts.get((kind, tuple(sorted(ops))))

    def note(self, kind: str, ops: Collection[str], **facts: Any) -> dict[str, Any]:
        """Notes facts (what JSON can hold) about a set of ops; returns them.

        Raises:
            OutputError: the file cannot be written.
        """
        names = tuple(sorted(ops))
        self._facts[kind, names] = facts
        if self._path is not None:
            line = json.dumps({"job": self._job, "kind": kind, "ops": names, "facts": facts}) + "\n"
            try:
                self._append(self._path, line)
            except OSError as error:
                raise OutputError(f"The journal {self._path} cannot be written: {error}") from error
        return facts

    @staticmethod
    def _append(path: pathlib.Path, line: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the line of a process that was killed
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())


def check_journal(path: pathlib.Path) -> None:
    """Raises `ConfigError` where there is something that is no journal."""
    if path.is_dir():
        raise ConfigError(f"A journal is a file. Received: {path}, a folder")
    lines = _lines(path)
    if lines and not (_START.startswith(lines[0][: len(_START)]) or lines[0].startswith(_START)):
        raise ConfigError(f"{path} holds something else than a journal of tuning: name another file.")


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"The journal {path} cannot be read: {error}") from error
