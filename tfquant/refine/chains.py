"""Which layers hand channels to which: where a channel may be scaled in the one and scaled back in the other.

Tensors that have the same channels, because only ReLUs, pooling, padding or sums stand between them, form a chain. If all that
makes a chain's tensors and all that reads them are layers with weights, a factor per channel can go into the former and out of
the latter (cross-layer equalization, arXiv:1906.04721; SmoothQuant, arXiv:2211.10438, where a LayerNorm makes them).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import matches
from tfquant.plan.edits import LAYERS, bias_of, channels_of
from tfquant.simplify.normalization import CANONICAL, is_canonical

# Ops whose result has the channels of their first input, scaled as that is scaled.
_PASSES = frozenset({"Relu", "LeakyRelu", "MaxPool", "AvgPool", "Identity", "Pad"})
_SIZES = frozenset({"Shape", "Size", "Rank"})


@dataclasses.dataclass
class Chain:
    """Tensors with the same channels.

    Attributes:
        channels: their number.
        producers: what makes them: layers, and LayerNorms by their last node.
        consumers: the layers that read them.
        tensors: all of them, in topological order.
        clipped: those of them that a Relu6 makes: a channel may be scaled up as far as its values stay below 6.
    """

    channels: int
    producers: list[Node]
    consumers: list[Node]
    tensors: list[Tensor]
    clipped: list[Tensor]

    @property
    def read(self) -> list[Tensor]:
        """What the consumers read."""
        return [node.inputs[0] for node in self.consumers]

    @property
    def is_normalized(self) -> bool:
        """Whether a LayerNorm is among its producers."""
        return any(node.op not in LAYERS for node in self.producers)


def find_chains(graph: Graph) -> list[Chain]:
    """All chains that only layers and LayerNorms make and only layers read, in topological order."""
    return _Finder(graph).run()


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._order = graph.order()
        self._parent: dict[Tensor, Tensor] = {}
        self._blocked: set[Tensor] = set()
        self._clipped: set[Tensor] = set()
        self._producers: dict[Node, Tensor] = {}
        self._consumers: dict[Node, Tensor] = {}

    def run(self) -> list[Chain]:
        norms = {node for node in self._order if any(is_canonical(m) for m in matches(CANONICAL, self._graph, node))}
        inside = {inner for node in norms for m in matches(CANONICAL, self._graph, node) for inner in m.covered} - norms
        biases = {bias: node for node in self._order if node.op in LAYERS and (bias := bias_of(self._graph, node)) is not None}
        for node in self._order:
            if node.op == "Const" or (node in inside and node.op in ("Rsqrt",)):
                continue
            self._visit(node, norms, inside, biases)
        for tensor in (*self._graph.inputs.values(), *self._graph.outputs.values()):
            self._blocked.add(tensor)
        return self._chains()

    def _visit(self, node: Node, norms: set[Node], inside: set[Node], biases: dict[Node, Node]) -> None:
        out = node.out
        if node.pinned or node.control or node.control_users or len(node.dtypes) != 1:
            self._block(node)
        elif node.op in LAYERS and self._has_weights(node):
            self._consumers[node] = node.inputs[0]
            self._find(node.inputs[0])
            if bias_of(self._graph, node) is None:
                self._producers[node] = out
        elif node in biases:
            self._producers[biases[node]] = out
        elif node in norms:
            self._producers[node] = out
            self._blocked |= {tensor for tensor in node.inputs if tensor.value is None}
        elif node.op in _PASSES or (node.op == "Relu6") or self._is_mean(node) or self._keeps_channels(node):
            self._join(out, node.inputs[0])
            if node.op == "Relu6":
                self._clipped.add(out)
        elif node.op in ("AddV2", "Add") and node not in inside and self._is_sum(node):
            self._join(out, node.inputs[0])
            self._join(out, node.inputs[1])
        elif node.op not in _SIZES:
            self._block(node)

    @staticmethod
    def _has_weights(node: Node) -> bool:
        """Whether it is a layer whose input channels are those of its weights: not grouped."""
        x, weights = node.inputs[0], node.inputs[1].value
        if weights is None or x.shape is None or node.attr("data_format", "NHWC") != "NHWC" or node.attr("transpose_a"):
            return False
        return x.value is None and x.shape[-1] == channels_of(node, "input")

    @staticmethod
    def _is_mean(node: Node) -> bool:
        """Whether it is the mean over space."""
        if node.op != "Mean" or node.inputs[1].value is None or node.inputs[0].shape is None:
            return False
        rank = len(node.inputs[0].shape)
        axes = {int(axis) % rank for axis in np.ravel(node.inputs[1].value)}
        return rank == 4 and axes == {1, 2}

    @staticmethod
    def _keeps_channels(node: Node) -> bool:
        """Whether it is a Reshape or Squeeze that leaves the last axis what it is."""
        x, out = node.inputs[0].shape if node.inputs else None, node.out.shape
        if node.op not in ("Reshape", "Squeeze", "ExpandDims") or not x or not out or x[-1] is None:
            return False
        return bool(x[-1] == out[-1] and x[-1] > 1)

    @staticmethod
    def _is_sum(node: Node) -> bool:
        one, other = node.inputs
        return one.value is None and other.value is None and one.shape is not None and one.shape == other.shape

    def _block(self, node: Node) -> None:
        self._blocked |= {tensor for tensor in node.inputs if tensor.value is None}
        self._blocked |= {Tensor(node, index) for index in range(max(1, len(node.dtypes)))}

    def _find(self, tensor: Tensor) -> Tensor:
        self._parent.setdefault(tensor, tensor)
        while self._parent[tensor] != tensor:
            self._parent[tensor] = self._parent[self._parent[tensor]]
            tensor = self._parent[tensor]
        return tensor

    def _join(self, one: Tensor, other: Tensor) -> None:
        self._parent[self._find(one)] = self._find(other)

    def _chains(self) -> list[Chain]:
        for tensor in (*self._producers.values(), *self._blocked, *self._clipped):
            self._find(tensor)
        members: dict[Tensor, list[Tensor]] = {}
        position = {node: index for index, node in enumerate(self._order)}
        for tensor in sorted((t for t in self._parent if t.node in position), key=lambda t: (position[t.node], t.index)):
            members.setdefault(self._find(tensor), []).append(tensor)
        blocked = {self._find(tensor) for tensor in self._blocked}
        chains = []
        for root, tensors in members.items():
            channels = {tensor.shape[-1] if tensor.shape else None for tensor in tensors}
            producers = [node for node, tensor in self._producers.items() if self._find(tensor) == root]
            consumers = [node for node, tensor in self._consumers.items() if self._find(tensor) == root]
            if root in blocked or not producers or not consumers or len(channels) != 1 or None in channels:
                continue
            made = {self._producers[node] for node in producers}
            if any(tensor not in made and not self._is_joined(tensor) for tensor in tensors):
                continue
            clipped = [tensor for tensor in tensors if tensor in self._clipped]
            chains.append(Chain(int(channels.pop() or 0), producers, consumers, tensors, clipped))
        return chains

    def _is_joined(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of others of its chain."""
        return any(self._parent.get(other) and self._find(other) == self._find(tensor) for other in tensor.node.inputs)
