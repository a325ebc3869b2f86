"""Bias correction: the mean that quantization moves comes back through the bias.

The fast way (NNCF's, with the real inputs in place of their means): each layer on its own, from float inputs that are rounded as
the plan says, with its weights as the plan rounds them. The full way is a step of `sequential`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph
from tfquant.observe.collector import called
from tfquant.plan.edits import value_of
from tfquant.plan.spec import QuantPlan, Shift
from tfquant.refine.layers import Layer
from tfquant.targets import weights
from tfquant.targets.fakequant import fake_quantize


def local_shifts(
    graph: Graph, layers: Sequence[Layer], plan: QuantPlan, batches: Iterable[Mapping[str, np.ndarray]]
) -> list[Shift]:
    """What each layer's bias lacks for the mean of its float result, in one pass over the data.

    Args:
        graph: the float graph; it is not changed.
        layers: of that graph.
        plan: ranges and weight scales.
        batches: keyed by input name.
    """
    copy = graph.copy()
    errors = []
    for layer in layers:
        node = copy.nodes[layer.name]
        x = node.inputs[0]
        spec = plan.tensors.get(layer.unit.inputs[0].name)
        if spec is not None:
            x = fake_quantize(copy, x, spec, f"{layer.name}/local/x")
        value = weights.dequantized(layer.unit, plan).reshape(value_of(node.inputs[1]).shape)
        constant = copy.constant(value, name=f"{layer.name}/local/weights")
        twin = copy.add(
            node.op, [x, constant], name=f"{layer.name}/local", attrs=node.attrs, shapes=node.shapes, dtypes=node.dtypes
        )
        errors.append((node.out, twin.out))
    copy.outputs |= {f"local/{index}": pair[1] for index, pair in enumerate(errors)}  # else nobody needs them
    run = executable(copy, lambda get: [_sums(get(exact) - get(rough)) for exact, rough in errors])
    totals: list[list[np.ndarray]] = []
    for batch in batches:
        new = [[part.numpy() for part in sums] for sums in called(run, copy, batch)]
        totals = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(totals, new, strict=True)] if totals else new
    shifts = [Shift(layer.name, shrunk(*sums)) for layer, sums in zip(layers, totals, strict=True)]
    return [shift for shift in shifts if shift.values.any()]


def _sums(error: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """(count, sums, sums of squares) of the means over space of each sample; rows of a matrix count as samples."""
    rows = tf.cast(tf.reduce_mean(error, list(range(1, len(error.shape) - 1))), tf.float64)
    return tf.cast(tf.shape(rows)[0], tf.float64), tf.reduce_sum(rows, 0), tf.reduce_sum(rows * rows, 0)


def shrunk(count: np.ndarray | float, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """The mean of errors, float32 (C,); less where the samples are too few to tell it from chance.

    An estimate m with the standard error e is shrunk to m * max(0, 1 - e**2 / m**2) (James and Stein, positive part).

    Args:
        count: of errors per channel.
        total: their sums, (C,).
        squares: the sums of their squares, (C,).
    """
    mean = total / count
    if count < 2:
        return np.asarray(mean.astype(np.float32))
    variance = np.maximum(squares / count - mean**2, 0.0) / (count - 1)
    share = np.maximum(0.0, 1.0 - variance / np.maximum(mean**2, np.finfo(np.float64).tiny))
    return np.asarray((mean * share).astype(np.float32))


def merged(shifts: Iterable[Shift]) -> list[Shift]:
    """One correction for each op, in the order in which ops come first."""
    found: dict[str, np.ndarray] = {}
    for shift in shifts:
        found[shift.op] = found[shift.op] + shift.values if shift.op in found else shift.values
    return [Shift(op, values, corrects=True) for op, values in found.items()]
