"""Progress bars on long work, none when nobody watches."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from tfquant.supervise import tell_stage

Item = TypeVar("Item")


def progress(items: Iterable[Item], title: str, total: int | None) -> Iterator[Item]:
    """The items, with a bar on stderr when that is a terminal."""
    tell_stage(title)
    yield from tqdm(items, desc=title, total=total, disable=not sys.stderr.isatty(), leave=False)


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """Shows that one long step is under way."""
    tell_stage(title)
    with tqdm(total=1, desc=title, bar_format="{desc} ... {elapsed}", disable=not sys.stderr.isatty(), leave=False):
        yield
