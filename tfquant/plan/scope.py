"""The ignored scope: which layers a user keeps in float, by path, by pattern or by op type."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tfquant.errors import ConfigError, shown

if TYPE_CHECKING:  # options are checked before TensorFlow starts
    from tfquant.graph.ir import Node

_PATTERN, _TYPE = "re:", "type:"
# (name, op type) of a node to the entry that names it, or None.
Resolved = Callable[[str, str], str | None]


@dataclasses.dataclass(frozen=True)
class IgnoredScope:
    """What must stay float.

    A path covers the node of that name and all that lies below it: "block1" covers "block1/conv/Conv2D". A pattern must fit
    a node's name, or a path that the node lies below, as a whole. Both may leave out the leading name of the model.

    Attributes:
        names: paths of layers or names of nodes.
        patterns: regular expressions.
        types: TensorFlow's op types.

    Raises:
        ConfigError: an entry is empty or no string, or a pattern is no regular expression.
    """

    names: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            entries = getattr(self, field.name)
            if isinstance(entries, str) or not isinstance(entries, Iterable):
                raise ConfigError(f"ignored_scope takes a list of {field.name}. Received: {shown(entries)}")
            entries = tuple(entries)
            for entry in entries:
                if not isinstance(entry, str) or not entry.strip("/ "):
                    raise ConfigError(f"ignored_scope takes strings that are not empty. Received: {shown(entry)}")
            object.__setattr__(self, field.name, entries)
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                at = "" if error.pos is None else f" at position {error.pos}"
                raise ConfigError(
                    f"ignored_scope holds a pattern that is no regular expression: {error.msg}{at}. Received: {shown(pattern)}"
                ) from error
            except (RecursionError, OverflowError) as error:
                raise ConfigError(f"ignored_scope holds a pattern that is too large. Received: {shown(pattern)}") from error

    @classmethod
    def parse(cls, entries: Iterable[str]) -> IgnoredScope:
        """The scope of a list of entries: "path", "re:PATTERN" or "type:OP".

        Raises:
            ConfigError: as the class, or `entries` is not a list.
        """
        if isinstance(entries, (str, bytes)) or not isinstance(entries, Iterable):
            raise ConfigError(f"ignored_scope must be a list of strings. Received: {shown(entries)}")
        names, patterns, types = [], [], []
        for entry in entries:
            if isinstance(entry, str) and entry.startswith(_PATTERN):
                patterns.append(entry.removeprefix(_PATTERN))
            elif isinstance(entry, str) and entry.startswith(_TYPE):
                types.append(entry.removeprefix(_TYPE).strip())
            else:
                names.append(entry)
        return cls(tuple(names), tuple(patterns), tuple(types))

    def __bool__(self) -> bool:
        return bool(self.names or self.patterns or self.types)


def resolve(scope: IgnoredScope | Iterable[str], nodes: Sequence[tuple[str, str]]) -> Resolved:
    """The scope, read for one model.

    Args:
        scope: the scope, or its entries.
        nodes: (name, op type) of all nodes of the model.

    Returns:
        A function of (name, op type) of a node: the entry that names it, as it is written in a list, or None.

    Raises:
        ConfigError: an entry names no node; the nearest names are given.
    """
    scope = scope if isinstance(scope, IgnoredScope) else IgnoredScope.parse(scope)
    model = _model_name([name for name, _ in nodes])
    names = {name.strip("/ "): name for name in reversed(scope.names)}
    patterns = [(re.compile(pattern), f"{_PATTERN}{pattern}") for pattern in scope.patterns]
    types = {op: f"{_TYPE}{op}" for op in scope.types}

    def find(name: str, op: str) -> Iterator[str]:
        paths = list(_paths(name, model))
        yield from (names[path] for path in paths if path in names)
        yield from (entry for pattern, entry in patterns if any(pattern.fullmatch(path) for path in paths))
        if op in types:
            yield types[op]

    if scope:
        hit = {entry for name, op in nodes for entry in find(name, op)}
        for entry in [*names.values(), *(entry for _, entry in patterns), *types.values()]:
            if entry not in hit:
                raise ConfigError(_unmatched(entry, nodes, model))
    return lambda name, op: next(find(name, op), None)


def held(resolved: Resolved, node: Node) -> str | None:
    """Why a node must stay float: the scope names it. None where it does not."""
    entry = resolved(node.name, node.op)
    return None if entry is None else f"the ignored scope names it ({entry})"


def _model_name(names: Sequence[str]) -> str | None:
    """The top scope that most nodes are below, which is the model's name; None where there is no such scope."""
    tops: dict[str, int] = {}
    for name in names:
        top, slash, _ = name.partition("/")
        if slash:
            tops[top] = tops.get(top, 0) + 1
    top = max(tops, key=lambda name: tops[name], default="")
    return top if tops and 2 * tops[top] > len(names) else None


def _paths(name: str, model: str | None) -> Iterator[str]:
    """The name and all paths that it lies below, the shortest first; then those without the model's name."""
    parts = name.split("/")
    for start in (0, 1) if model == parts[0] else (0,):
        yield from ("/".join(parts[start:end]) for end in range(start + 1, len(parts) + 1))


def _unmatched(entry: str, nodes: Sequence[tuple[str, str]], model: str | None) -> str:
    if entry.startswith(_TYPE):
        what, known = "an op type", dict.fromkeys(op for _, op in nodes)
    else:
        what, known = "a layer or node", dict.fromkeys(path for name, _ in nodes for path in _paths(name, model))
    # Case is no difference to the eye; of paths that differ in nothing else, the first counts.
    folded = {path.lower(): path for path in reversed(known)}
    wanted = entry.removeprefix(_TYPE).removeprefix(_PATTERN).strip("/ ").lower()
    near = [folded[path] for path in difflib.get_close_matches(wanted, list(folded), 3)]
    hint = f"the nearest are {', '.join(near)}" if near else f"the model has {', '.join(list(known)[:3])} and others"
    return f"ignored_scope must name {what} of the model; {hint}. Received: {shown(entry)}"
