"""Names that people know: the Keras layer paths, without what tracing and saving put around them."""

import re
from collections.abc import Iterable, Mapping

from tfquant.graph.ir import Graph

# In this scope quantization-aware training calls the model inside.
QUANTIZATION_AWARE = "fake_quantized"
_WRAPPERS = re.compile(rf"^((Stateful)?PartitionedCall(_\d+)?/|Func/|model_inlined/)*(([^/]+/)*{QUANTIZATION_AWARE}(_\d+)?/)?")
_NUMBER = re.compile(r"_\d+$")
Path = tuple[str, ...]


def normalize(graph: Graph, variables: Mapping[str, str] | None = None) -> None:
    """Renames the nodes of `graph` to their layer paths, in place; names stay unique, inputs keep theirs.

    A SavedModel prefixes every node with the call that it was inlined from, and Keras 3 exports a model under scopes that got
    a number from being traced twice ("net_1/conv_1/BiasAdd"); neither says anything about the layer.

    Args:
        graph: the frozen graph.
        variables: name of a constant to the name of the variable that it was ("net/conv/kernel"), where known.
    """
    graph.prune()
    order = graph.order()
    inputs = {tensor.node for tensor in graph.inputs.values()}
    plain = {node: tuple(_WRAPPERS.sub("", node.name).split("/")) for node in order if node not in inputs}
    scopes = _layers_of_variables(graph, {node.name: path for node, path in plain.items()}, variables or {})
    if any(scope[-1] != layer for scope, layer in scopes.items()):
        plain = {node: _without_numbers(path, scopes) for node, path in plain.items()}
    elif not scopes:
        plain = dict(zip(plain, _without_common_number(plain.values()), strict=True))
    names = {node.name: node for node in inputs}
    for node, path in plain.items():
        name = base = "/".join(path)
        count = 0
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names[name] = node
    for name, node in names.items():
        node.name = name
    graph.nodes = names


def _layers_of_variables(graph: Graph, paths: Mapping[str, Path], variables: Mapping[str, str]) -> dict[Path, str]:
    """Scopes that are a layer with weights, and the layer's name as its variables say it."""
    found: dict[Path, str] = {}
    for constant, variable in variables.items():
        node = graph.nodes.get(constant)
        layer = variable.split("/")[-2:-1]
        stack = [node] if node is not None and layer else []
        while stack:
            for user, _ in stack.pop().users:
                if user.op == "Identity":
                    stack.append(user)
                path = paths.get(user.name, ())
                for depth in range(len(path) - 1, 0, -1):
                    if re.fullmatch(re.escape(layer[0]) + r"(_\d+)?", path[depth - 1]):
                        found.setdefault(path[:depth], layer[0])
                        break
    return found


def _without_numbers(path: Path, scopes: Mapping[Path, str]) -> Path:
    """The path with the names of layers for their scopes, and other scopes without the number of their trace."""
    inner = (scopes.get(path[: i + 1]) or _NUMBER.sub("", part) for i, part in enumerate(path[:-1]))
    return (*inner, path[-1])


def _without_common_number(paths: Iterable[Path]) -> list[Path]:
    """The paths without the number that all scopes of the largest top scope end with, level by level."""
    parts = [list(path) for path in paths]
    tops: dict[str, int] = {}
    for path in parts:
        if len(path) > 1:
            tops[path[0]] = tops.get(path[0], 0) + 1
    top = max(tops, key=lambda name: tops[name], default="")
    found = _NUMBER.search(top)
    inside = [path for path in parts if path[0] == top and len(path) > 1]
    depth, suffix = 0, found.group(0) if found else ""
    while suffix and inside and all(path[depth].endswith(suffix) for path in inside):
        for path in inside:
            path[depth] = path[depth].removesuffix(suffix)
        depth += 1
        inside = [path for path in inside if len(path) > depth + 1]
    return [tuple(path) for path in parts]


def layer_of(name: str) -> str:
    """The path of the layer that a node belongs to."""
    return name.rpartition("/")[0] or name
