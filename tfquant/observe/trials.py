"""Units of a graph computed twice, in float and otherwise, beside each other: how much their outputs differ on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.collector import called
from tfquant.plan.kernels import Unit

Batch = Mapping[str, np.ndarray]


def twin(graph: Graph, unit: Unit, other: Callable[[Node, int, Tensor], Tensor]) -> Tensor:
    """The output of a unit computed again.

    Args:
        graph: gets the new nodes; a copy of the unit's graph, with nodes of the same names.
        unit: whose nodes to copy.
        other: what a node of the unit reads at a slot where the unit reads a tensor (of `graph`): that tensor, or another.

    Returns:
        The copied output, a tensor of `graph`.
    """
    copies: dict[Node, Node] = {}
    covered = set(unit.match.covered)

    def copied(node: Node) -> Node:
        if node not in copies:
            inputs = [
                Tensor(copied(tensor.node), tensor.index)
                if tensor.node in covered
                else other(node, slot, Tensor(graph.nodes[tensor.node.name], tensor.index))
                for slot, tensor in enumerate(node.inputs)
            ]
            copies[node] = graph.add(
                node.op, inputs, name=f"{node.name}/twin", attrs=node.attrs, shapes=node.shapes, dtypes=node.dtypes
            )
        return copies[node]

    return Tensor(copied(unit.output.node), unit.output.index)


def network_twin(graph: Graph, other: Mapping[tuple[str, int], Tensor]) -> dict[str, Tensor]:
    """The whole graph computed again.

    Args:
        graph: gets the new nodes; without effects, control edges and loops of TensorFlow 1.
        other: what nodes read otherwise: (name, slot) to a tensor of `graph`.

    Returns:
        The copied outputs, by their names.
    """
    twins: dict[Node, Node] = {}
    for node in [node for node in graph.order() if node.inputs]:
        inputs = [
            other.get((node.name, slot), Tensor(twins.get(tensor.node, tensor.node), tensor.index))
            for slot, tensor in enumerate(node.inputs)
        ]
        twins[node] = graph.add(
            node.op, inputs, name=f"{node.name}/twin", attrs=node.attrs, shapes=node.shapes, dtypes=node.dtypes
        )
    return {key: Tensor(twins.get(tensor.node, tensor.node), tensor.index) for key, tensor in graph.outputs.items()}


def scalars(graph: Graph, name: str, count: int) -> list[Tensor]:
    """A new input of `count` float32 values, as scalars."""
    shape = (count,)
    attrs = {"dtype": tf.float32, "shape": tf.TensorShape(shape)}
    node = graph.add("Placeholder", name=name, attrs=attrs, shapes=[shape], dtypes=[tf.float32])
    graph.inputs[name] = node.out
    attrs = {"num": count, "axis": 0, "T": tf.float32}
    parts = graph.add("Unpack", [node.out], name=f"{name}/parts", attrs=attrs, shapes=[()] * count, dtypes=[tf.float32] * count)
    return [Tensor(parts, index) for index in range(count)]


class Trials:
    """Sums over data of how much pairs of tensors differ.

    Args:
        graph: computes them all.
        pairs: (exact, other), float tensors of one shape.
    """

    def __init__(self, graph: Graph, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for number, (_, tensor) in enumerate(pairs):  # what no output needs is no part of a graph
            graph.outputs[f"trial/{number}"] = tensor
        self._graph = graph
        self._run = executable(graph, lambda get: [_sums(get(exact), get(other)) for exact, other in pairs])

    def run(self, batches: Iterable[Batch]) -> np.ndarray:
        """The relative squared errors: sum (exact - other)**2 / sum exact**2, float64, one for each pair; 0 for 0 / 0."""
        totals = sum(
            np.array([[value.numpy() for value in pair] for pair in called(self._run, self._graph, batch)]) for batch in batches
        )
        noise, signal = np.asarray(totals).reshape(-1, 2).T
        return np.where(noise == 0, 0.0, noise / np.maximum(signal, np.finfo(np.float64).tiny))


def _sums(exact: tf.Tensor, other: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    exact, other = tf.cast(exact, tf.float64), tf.cast(other, tf.float64)
    return tf.reduce_sum(tf.math.squared_difference(exact, other)), tf.reduce_sum(exact**2)


def some_of(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches, as many as hold so many samples, or all there are."""
    found: list[Batch] = []
    for batch in batches:
        found.append(batch)
        samples -= next((len(array) for array in batch.values() if array.ndim), 1)
        if samples <= 0:
            break
    return found
