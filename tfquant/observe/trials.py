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
