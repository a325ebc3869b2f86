"""A graph run piece by piece over samples that are held, so that what lies ahead can still be changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.execution import executable, unfused
from tfquant.graph.ir import Graph, Node, Tensor

Values = list[np.ndarray]


class Walker:
    """Computes tensors of a graph in topological order; every node runs once.

    What later nodes read is held in memory until the last of them has run. Constants that a node reads may be replaced until
    it runs.

    Args:
        graph: one that `is_pure`.
        batches: keyed by input name.
    """

    def __init__(self, graph: Graph, batches: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._graph, self._count = graph, len(batches)
        self._position = {node: index for index, node in enumerate(graph.order())}
        self._done = {tensor.node for tensor in graph.inputs.values()}
        self._held: dict[Tensor, Values] = {tensor: [batch[key] for batch in batches] for key, tensor in graph.inputs.items()}

    def values(self, tensor: Tensor) -> Values:
        """A tensor's values, an array per batch; it must be one that is still to come, or that others still read."""
        if tensor.value is not None:
            return [tensor.value] * self._count
        if tensor not in self._held:
            self._advance(tensor)
        return self._held[tensor]

    def _advance(self, target: Tensor) -> None:
        ahead = self._ahead(target)
        piece, sources, twins = self._piece(ahead)
        outgoing = dict.fromkeys([target])
        for node in ahead:
            for user, slot in node.users:
                if user in self._position and user not in self._done and user not in ahead:
                    outgoing[user.inputs[slot]] = None
        piece.outputs = {str(index): Tensor(twins[t.node], t.index) for index, t in enumerate(outgoing)}
        run = executable(piece)
        results: list[Values] = []
        with unfused():
            for index in range(self._count):
                arguments = [tf.convert_to_tensor(self._held[source][index], source.dtype) for source in sources]
                results.append([value.numpy() for value in run(*arguments)])
        self._done |= set(ahead)
        for place, tensor in enumerate(outgoing):
            self._held[tensor] = [result[place] for result in results]
        self._forget(target)

    def _ahead(self, target: Tensor) -> list[Node]:
        """The nodes that still have to run for `target`, in order."""
        found: set[Node] = set()
        stack = [target]
        while stack:
            tensor = stack.pop()
            if tensor in self._held or tensor.node.op == "Const" or tensor.node in found:
                continue
            found.add(tensor.node)
            stack += tensor.node.inputs
        return sorted(found, key=self._position.__getitem__)

    def _piece(self, ahead: Sequence[Node]) -> tuple[Graph, list[Tensor], dict[Node, Node]]:
        """A graph of these nodes, the held tensors that are its inputs, and its nodes by those that they stand for."""
        piece = Graph()
        piece.library.CopyFrom(self._graph.library)
        piece.versions.CopyFrom(self._graph.versions)
        sources: dict[Tensor, Tensor] = {}
        twins: dict[Node, Node] = {}
        for node in ahead:
            inputs = []
            for tensor in node.inputs:
                if tensor in self._held:
                    if tensor not in sources:
                        sources[tensor] = self._placeholder(piece, tensor, len(sources))
                    inputs.append(sources[tensor])
                    continue
                if tensor.node not in twins:  # a constant
                    twins[tensor.node] = _copied(piece, tensor.node, [])
                inputs.append(Tensor(twins[tensor.node], tensor.index))
            twins[node] = _copied(piece, node, inputs)
        piece.inputs = {str(index): twin for index, twin in enumerate(sources.values())}
        return piece, list(sources), twins

    @staticmethod
    def _placeholder(piece: Graph, tensor: Tensor, index: int) -> Tensor:
        assert tensor.dtype is not None
        shape = tf.TensorShape(None if tensor.shape is None else list(tensor.shape))
        attrs = {"dtype": tensor.dtype, "shape": shape}
        name = f"held/{index}"
        return piece.add("Placeholder", name=name, attrs=attrs, shapes=[tensor.shape], dtypes=[tensor.dtype]).out

    def _forget(self, target: Tensor) -> None:
        for tensor in list(self._held):
            readers = [user for user, _ in self._graph.users(tensor) if user in self._position]
            if tensor != target and all(user in self._done for user in readers):
                del self._held[tensor]


def _copied(piece: Graph, node: Node, inputs: Sequence[Tensor]) -> Node:
    twin = piece.copy_of(node, inputs)
    twin._value = node._value
    return twin
