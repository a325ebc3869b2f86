"""Patterns as expressions, and a matcher that says why it did not match.

    x, w, bias = Any("x"), Const("weights"), Const("bias")
    conv = Op("Conv2D", x, w, name="conv")
    pattern = Maybe("Relu|Relu6", Maybe("BiasAdd", conv, bias, name="bias_add"), name="activation")

A pattern is matched from its last node towards the inputs. The nodes in between must be read by the match alone, unless
their `Op` says `shared=True`. `matches` yields every way in which the pattern fits (the operands of a commutative op may be
swapped), so that a check may refuse one and take the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor

COMMUTATIVE = frozenset({"AddV2", "Add", "Mul"})


class Pattern:
    """An expression that a tensor may fit."""


@dataclasses.dataclass(frozen=True)
class Any(Pattern):
    """Any tensor, bound to `name`; the same name twice means the same tensor."""

    name: str


@dataclasses.dataclass(frozen=True)
class Const(Pattern):
    """A constant, bound to `name`."""

    name: str


@dataclasses.dataclass(frozen=True, init=False)
class Op(Pattern):
    """A node of one of the ops in `ops` ("Relu|Relu6"), with these inputs; further inputs of the node are not looked at."""

    ops: frozenset[str]
    inputs: tuple[Pattern, ...]
    name: str
    shared: bool

    def __init__(self, ops: str, *inputs: Pattern, name: str = "", shared: bool = False) -> None:
        object.__setattr__(self, "ops", frozenset(ops.split("|")))
        object.__setattr__(self, "inputs", inputs)
        object.__setattr__(self, "name", name or ops)
        object.__setattr__(self, "shared", shared)


class Maybe(Op):
    """An `Op` that may be absent: then its first input stands in its place."""


@dataclasses.dataclass(frozen=True)
class As(Pattern):
    """What `pattern` fits, bound to `name`; where the name stands again, it means the same tensor."""

    name: str
    pattern: Pattern


@dataclasses.dataclass(frozen=True)
class Match:
    """How a pattern fits: what each name is bound to, and the nodes that it covers, the last of the graph first."""

    root: Node
    tensors: dict[str, Tensor]
    nodes: dict[str, Node]

    @property
    def covered(self) -> list[Node]:
        return list(self.nodes.values())

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def value(self, name: str) -> np.ndarray:
        """The constant bound to `name`."""
        result = self.tensors[name].value
        assert result is not None
        return result


@dataclasses.dataclass
class Trace:
    """The best partial match seen: how many nodes fitted, and why the next did not."""

    depth: int = -1
    reason: str = ""

    def failed(self, depth: int, reason: str) -> None:
        if depth > self.depth:
            self.depth, self.reason = depth, reason


def first_ops(pattern: Pattern) -> frozenset[str]:
    """The ops that the last node of a match can have."""
    if isinstance(pattern, As):
        return first_ops(pattern.pattern)
    if not isinstance(pattern, Op):
        return frozenset()
    return pattern.ops | first_ops(pattern.inputs[0]) if isinstance(pattern, Maybe) else pattern.ops


def matches(pattern: Pattern, graph: Graph, root: Node, trace: Trace | None = None) -> Iterator[Match]:
    """Every way in which `pattern` fits with `root` as its last node, the largest first.

    Args:
        pattern: an `Op` or `Maybe`.
        graph: the graph of `root`.
        root: the node to start at; only its output 0 is matched.
        trace: takes the reason of the best partial match.
    """
    trace = trace if trace is not None else Trace()
    for tensors, nodes in _fit(pattern, graph, root.out, {}, {}, trace):
        yield Match(root, tensors, nodes)


_Bound = tuple[dict[str, Tensor], dict[str, Node]]


def _fit(
    pattern: Pattern, graph: Graph, tensor: Tensor, tensors: dict[str, Tensor], nodes: dict[str, Node], trace: Trace
) -> Iterator[_Bound]:
    if isinstance(pattern, (Any, Const)):
        if isinstance(pattern, Const) and tensor.value is None:
            trace.failed(len(nodes), f"its {pattern.name} are not a constant (they come from {tensor.name})")
        elif tensors.get(pattern.name, tensor) == tensor:
            yield {**tensors, pattern.name: tensor}, nodes
        return
    if isinstance(pattern, As):
        if pattern.name not in tensors:
            for more_tensors, more_nodes in _fit(pattern.pattern, graph, tensor, tensors, nodes, trace):
                yield {**more_tensors, pattern.name: tensor}, more_nodes
        elif tensors[pattern.name] == tensor:
            yield tensors, nodes
        return
    assert isinstance(pattern, Op)
    node = tensor.node
    if node.pinned:
        if node.op in pattern.ops or not isinstance(pattern, Maybe):
            trace.failed(len(nodes), f"{node.name} stands in a loop or a branch")
    elif node.op in pattern.ops and tensor.index == 0 and len(node.inputs) >= len(pattern.inputs):
        reason = _not_private(graph, node) if nodes and not pattern.shared else None
        if reason:
            trace.failed(len(nodes), reason)
        else:
            yield from _fit_inputs(pattern, graph, node, tensors, {**nodes, pattern.name: node}, trace)
    elif not isinstance(pattern, Maybe):
        trace.failed(len(nodes), f"{node.name} is {node.op}, not {' or '.join(sorted(pattern.ops))}")
    if isinstance(pattern, Maybe):
        yield from _fit(pattern.inputs[0], graph, tensor, tensors, nodes, trace)


def _fit_inputs(
    pattern: Op, graph: Graph, node: Node, tensors: dict[str, Tensor], nodes: dict[str, Node], trace: Trace
) -> Iterator[_Bound]:
    orders = [list(range(len(pattern.inputs)))]
    if node.op in COMMUTATIVE and len(orders[0]) == 2:
        orders.append([1, 0])
    for order in orders:
        pairs = list(zip(pattern.inputs, (node.inputs[i] for i in order), strict=True))
        yield from _fit_all(pairs, graph, tensors, nodes, trace)


def _fit_all(
    pairs: list[tuple[Pattern, Tensor]], graph: Graph, tensors: dict[str, Tensor], nodes: dict[str, Node], trace: Trace
) -> Iterator[_Bound]:
    if not pairs:
        yield tensors, nodes
        return
    (pattern, tensor), *rest = pairs
    for more_tensors, more_nodes in _fit(pattern, graph, tensor, tensors, nodes, trace):
        yield from _fit_all(rest, graph, more_tensors, more_nodes, trace)


def _not_private(graph: Graph, node: Node) -> str | None:
    if graph.is_output(node.out):
        return f"{node.name} is an output of the model"
    users = len(node.users)
    return f"{node.name} is read by {users} ops" if users > 1 else None


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rewrite: where `pattern` fits and `check` gives no reason against it, `replace` gives what stands in its place.

    Attributes:
        name: what the report calls it.
        pattern: the expression.
        check: the reason why a match must not be rewritten, or None.
        replace: adds nodes to the graph and returns the tensor that takes the place of the match's last one.
    """

    name: str
    pattern: Pattern
    check: Callable[[Graph, Match], str | None]
    replace: Callable[[Graph, Match], Tensor]


def rewrite(graph: Graph, rule: Rule) -> int:
    """Applies a rule once wherever it fits, in one walk over the graph; returns how often it fired."""
    roots = first_ops(rule.pattern)
    fired = 0
    for node in graph.order():
        if node.op not in roots or graph.nodes.get(node.name) is not node:
            continue
        for match in matches(rule.pattern, graph, node):
            if rule.check(graph, match) is None:
                graph.replace(node.out, rule.replace(graph, match))
                graph.remove(node)
                fired += 1
                break
    return fired
