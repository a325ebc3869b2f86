"""Named functions of one kind: tfquant's own, those that a program registers, and those of installed packages.

A program registers with a decorator:

    @tfquant.register_estimator("mine")
    def mine(stats, bits): ...

A package names its functions as entry points, in a group per kind (`GROUPS`); they are imported when they are asked for:

    [project.entry-points."tfquant.estimators"]
    mine = "package.module:mine"
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, TypeVar

from tfquant.errors import ConfigError, shown

T = TypeVar("T", bound=Callable[..., Any])

# Kind to the group of its entry points.
GROUPS = {"estimator": "tfquant.estimators", "strategy": "tfquant.strategies", "metric": "tfquant.metrics"}
# What this program registered, by kind and name; and the names that tfquant's own have, as far as their registry is imported.
_registered: dict[str, dict[str, Any]] = {kind: {} for kind in GROUPS}
_taken: dict[str, frozenset[str]] = dict.fromkeys(GROUPS, frozenset())


class Registry(Generic[T]):
    """The functions of one kind, by name. Iterating gives the names; `in` says whether there is such a name.

    Args:
        kind: a key of `GROUPS`.
        builtin: tfquant's own, which nothing else can take the place of.
        reserved: names that mean something else where one of these functions is named.

    Raises:
        ConfigError: the program has registered another function under such a name.
    """

    def __init__(self, kind: str, builtin: Mapping[str, T], reserved: Collection[str] = ()) -> None:
        self._kind, self._builtin = kind, dict(builtin)
        self._loaded: dict[str, T] = {}
        _taken[kind] |= {*self._builtin, *reserved}
        for name in _registered[kind]:
            _fail_if_taken(kind, name)

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a function under `name` in this process; again, in the place of the earlier one.

        Raises:
            ConfigError: the name is no word, or one that tfquant uses, or what is decorated cannot be called.
        """
        return _decorator(self._kind, name)

    def get(self, name: str) -> T:
        """The function of this name: tfquant's own, else a registered one, else that of an entry point, imported now.

        Raises:
            ConfigError: there is none, or its package cannot be imported, or several packages have one.
        """
        if name in self._builtin:
            return self._builtin[name]
        if name in _registered[self._kind]:
            found: T = _registered[self._kind][name]
            return found
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def names(self) -> tuple[str, ...]:
        """All names: tfquant's own, then others, sorted."""
        others = {*_registered[self._kind], *(entry.name for entry in self._entries())} - _taken[self._kind]
        return (*self._builtin, *sorted(others))

    def __contains__(self, name: object) -> bool:
        return name in self._builtin or name in _registered[self._kind] or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _entries(self) -> importlib.metadata.EntryPoints:
        return importlib.metadata.entry_points(group=GROUPS[self._kind])

    def _load(self, name: str) -> T:
        entries = {entry.value: entry for entry in self._entries() if entry.name == name}
        if not entries:
            raise ConfigError(f"There is no {self._kind} {shown(name)}. Known: {', '.join(self.names())}")
        if len(entries) > 1:
            raise ConfigError(
                f"Several packages have the {self._kind} {name!r}; remove all but one: {', '.join(sorted(entries))}"
            )
        value, entry = next(iter(entries.items()))
        try:
            found: T = entry.load()
        except Exception as error:  # a package may fail in any way while it is imported
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ConfigError(f"The {self._kind} {name!r} cannot be loaded from {value}: {reason}") from error
        _fail_if_not_callable(self._kind, name, found)
        return found


def register_estimator(name: str) -> Callable[[T], T]:
    """Registers an estimator, `estimate(stats: TensorStats, bits: int) -> (low, high)`. See `Registry.register`."""
    return _decorator("estimator", name)


def register_strategy(name: str) -> Callable[[T], T]:
    """Registers a strategy of the tuner. See `Registry.register`."""
    return _decorator("strategy", name)


def register_metric(name: str) -> Callable[[T], T]:
    """Registers a metric of the tuner. See `Registry.register`."""
    return _decorator("metric", name)


def _decorator(kind: str, name: str) -> Callable[[T], T]:
    if not isinstance(name, str) or not name or any(letter.isspace() or letter in ",[]=" for letter in name):
        raise ConfigError(f"The name of a registered {kind} must be a word without spaces and commas. Received: {shown(name)}")
    _fail_if_taken(kind, name)

    def register(function: T) -> T:
        _fail_if_not_callable(kind, name, function)
        _registered[kind][name] = function
        return function

    return register


def _fail_if_taken(kind: str, name: str) -> None:
    if name in _taken[kind]:
        raise ConfigError(f"The {kind} {name!r} is one of tfquant's own: register yours under another name.")


def _fail_if_not_callable(kind: str, name: str, value: object) -> None:
    if not callable(value):
        raise ConfigError(f"The {kind} {name!r} must be a function. Received: {shown(value)}")
