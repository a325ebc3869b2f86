"""What several scripts have in common: arguments that are refused in one line, rows that a killed run keeps, Markdown tables."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

Row = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def numbers(text: str) -> list[int]:
    """ "1,16" as numbers above 0."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def read_rows(path: Path, *keys: str) -> dict[tuple[Any, ...], Row]:
    """The rows of a file by the values of these keys, the last line of each; what a killed run left unfinished is none."""
    rows: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            key = tuple(row[name] for name in keys)
            rows.pop(key, None)
            rows[key] = row
    return rows


def append_row(path: Path, row: Row) -> None:
    """Adds a line; behind a line that was cut short it begins a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * is_cut + json.dumps(row) + "\n")


def markdown(rows: Sequence[Sequence[str]], align: Iterable[str] = ()) -> list[str]:
    """Lines of a Markdown table: the first row is the heading.

    Args:
        rows: cells without "|".
        align: per column "left" or "right"; by default the first is left and the others right.
    """
    sides = list(align) or ["left", *["right"] * (len(rows[0]) - 1)]
    rule = ["---:" if side == "right" else "---" for side in sides]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
