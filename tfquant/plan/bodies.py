"""The bodies of loops: made ready like the graph around them, annotated, and put back once a target has lowered them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping

from tensorflow.core.framework import attr_value_pb2

from tfquant.graph.bodies import (
    LOOPS,
    UnreadableError,
    give_constants,
    is_handed_on,
    prune_library,
    read_function,
    write_function,
)
from tfquant.graph.ir import Graph, Node
from tfquant.plan.annotate import Annotation, Body, annotate
from tfquant.plan.kernels import KernelTable
from tfquant.simplify import simplify

_TRACE_NUMBERS = re.compile(r"(_\d+)+$")


def read_bodies(graph: Graph) -> dict[str, Graph]:
    """The simplified bodies of the loops of a graph and, behind each, of the loops in it, by the name of the loop.

    Their nodes have paths below that of their loop, unlike all others of the model. Constants that a loop hands on from round to
    round become constants of its body: `graph` is edited in place. What cannot be read as a graph is left out.
    """
    found: dict[str, Graph] = {}
    for name in [node.name for node in _loops(graph)]:
        try:
            body = _body(graph, name)
            node = graph.nodes[name]
            constants = {i: tensor for i, tensor in enumerate(node.inputs) if tensor.value is not None and is_handed_on(body, i)}
            if constants and give_constants(graph, node, constants):
                body = _body(graph, name)
        except UnreadableError:
            continue
        _give_paths(body, name)
        simplify(body)
        found[name] = body
        found |= read_bodies(body)
    return found


def _loops(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.order() if node.op in LOOPS and not node.pinned)


def _body(graph: Graph, loop: str) -> Graph:
    return read_function(graph.library, graph.nodes[loop].attrs["body"].func.name)


def _give_paths(body: Graph, loop: str) -> None:
    """Nodes get paths below that of their loop, arguments their position as a name."""
    names = {f"{loop}/argument_{position}": tensor.node for position, tensor in enumerate(body.inputs.values())}
    arguments = set(names.values())
    own = _TRACE_NUMBERS.sub("", loop.rpartition("/")[2])
    for node in body.order():
        if node in arguments:
            continue
        *scopes, last = node.name.split("/")
        scopes = [_TRACE_NUMBERS.sub("", scope) for scope in scopes]
        if own in scopes:  # TensorFlow names them below the loop, with the numbers of the trace
            scopes = scopes[scopes.index(own) + 1 :]
        name = base = "/".join([loop, *scopes, last])
        count = 0
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names[name] = node
    for name, node in names.items():
        node.name = name
    body.nodes = names


def annotate_bodies(
    annotation: Annotation, bodies: Mapping[str, Graph], table: KernelTable, keep_float: Callable[[Node], str | None]
) -> Annotation:
    """`annotation` with that of bodies as `read_bodies` gives them, their decisions behind its own; else as for `annotate`."""
    inside = {name: Body(body, annotate(body, table, keep_float)) for name, body in bodies.items()}
    decisions = tuple(decision for body in inside.values() for decision in body.annotation.decisions)
    return dataclasses.replace(annotation, bodies=inside, decisions=annotation.decisions + decisions)


def lower_bodies(graph: Graph, bodies: Mapping[str, Body], lower: Callable[[Body], Graph]) -> None:
    """Gives the loops of a lowered graph lowered bodies, where these hold anything that runs in INT8; in place."""
    for node in _loops(graph):
        below = [body for name, body in bodies.items() if name == node.name or name.startswith(f"{node.name}/")]
        if node.name in bodies and any(body.annotation.units for body in below):
            lowered = lower(bodies[node.name])
            lower_bodies(lowered, bodies, lower)
            attr = attr_value_pb2.AttrValue()
            attr.func.name = write_function(lowered, node.attrs["body"].func.name, graph.library)
            node.attrs["body"] = attr
    prune_library(graph)
