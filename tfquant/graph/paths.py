"""Names that people know: the Keras layer paths, without what tracing and saving put around them."""

import re

from tfquant.graph.ir import Graph

_WRAPPERS = re.compile(r"^((Stateful)?PartitionedCall(_\d+)?/|Func/|model_inlined/)+")
_RETRACE = re.compile(r"_(\d+)$")


def normalize(graph: Graph) -> None:
    """Renames the nodes of `graph` to their layer paths, in place; names stay unique, inputs keep theirs.

    A SavedModel prefixes every node with the call that it was inlined from, and Keras 3 exports a model under scopes that all
    end in the number of the trace ("net_1/conv_1/BiasAdd"); neither says anything about the layer.
    """
    order = graph.order()
    inputs = {tensor.node for tensor in graph.inputs.values()}
    plain = {node: _WRAPPERS.sub("", node.name).split("/") for node in order if node not in inputs}
    _strip_retrace(list(plain.values()))
    names = {node.name: node for node in inputs}
    for node, parts in plain.items():
        name = base = "/".join(parts)
        count = 0
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names[name] = node
    for name, node in names.items():
        node.name = name
    graph.nodes = names
    graph.prune()


def _strip_retrace(paths: list[list[str]]) -> None:
    tops: dict[str, int] = {}
    for parts in paths:
        if len(parts) > 1:
            tops[parts[0]] = tops.get(parts[0], 0) + 1
    if not tops:
        return
    top = max(tops, key=lambda name: tops[name])
    found = _RETRACE.search(top)
    inside = [parts for parts in paths if parts[0] == top and len(parts) > 1]
    depth, suffix = 0, found.group(0) if found else ""
    while suffix and inside and all(parts[depth].endswith(suffix) for parts in inside):
        for parts in inside:
            parts[depth] = parts[depth].removesuffix(suffix)
        depth += 1
        inside = [parts for parts in inside if len(parts) > depth + 1]


def layer_of(name: str) -> str:
    """The path of the layer that a node belongs to."""
    return name.rpartition("/")[0] or name
