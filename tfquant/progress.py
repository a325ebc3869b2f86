"""Progress bars on long work, none when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, total: int | None) -> Iterator[Item]:
    """The items, with a bar on stderr when that is a terminal."""
    yield from tqdm(items, desc=title, total=total, disable=not sys.stderr.isatty(), leave=False)
