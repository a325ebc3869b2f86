"""What each INT8 op does wrong by itself, and how much that matters: all ops once more, in 8 bits on float inputs, in a graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.errors import ConfigError, ModelError
from tfquant.graph.execution import executable, unfused
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.loading import first_line
from tfquant.pipeline import QuantizedModel
from tfquant.plan.edits import uncorrected
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan
from tfquant.progress import progress
from tfquant.targets.fakequant import fake_quantize, rounded_weights

# Draws per batch for the curvature, and the seed of the first.
_DRAWS, _SEED = 4, 17
_TINY = 1e-30
_LEAST_PROBABILITY = 1e-30


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Of one op, over all samples.

    Attributes:
        mse: squared error of its output as a share of the output's square.
        curvature: e' H e / 2 per sample, e being that error; 0 where it was not asked for.
    """

    mse: float
    curvature: float


def measure(
    model: QuantizedModel, batches: Sequence[Mapping[str, np.ndarray]], with_curvature: bool = False
) -> dict[str, Sensitivity]:
    """The sensitivity of each op that computes in INT8, by the name of its decision.

    H is the Gauss-Newton matrix of the loss at the float model, which is the Hessian where the loss is KL(float || INT8) of what
    a softmax ends with, or else half the squared error of the outputs, each divided by its root mean square. With labels y drawn
    from the model's own distribution p, H = E[g g'], g the gradient of log p(y) (or of u'f / rms, u being normal), so that
    e' H e = E[(g' e)^2]: a backward pass per draw gives it for all ops at once.

    Args:
        model: in static or dynamic mode; ops in the bodies of loops are left out.
        batches: samples, by input name.
        with_curvature: measure that too, which needs gradients.

    Raises:
        ConfigError: the model is of another mode, or an op of it has no gradient.
        ModelError: TensorFlow cannot run it.
    """
    if model.plan.mode == "weight_only":
        raise ConfigError("The strategies mse and hawq need 8-bit activations: choose another. Received: mode weight_only")
    graph = uncorrected(model.graph, model.plan.edits)
    shown = [tensor for tensor in graph.outputs.values() if tensor.dtype is not None and tensor.dtype.is_floating]
    units = [unit for unit in model.annotation.units.values() if unit.kernel.role == "compute"]
    shadows = [(graph.tensor(unit.output.name), _shadow(graph, model.graph, unit, model.plan)) for unit in units]

    graph.outputs |= {f"{unit.name}/shadow": other for unit, (_, other) in zip(units, shadows, strict=True)}

    def fetch(get: Callable[[Tensor], tf.Tensor]) -> list[tf.Tensor]:
        outputs = [get(one) for one, _ in shadows]
        errors = [get(other) - output for (_, other), output in zip(shadows, outputs, strict=True)]
        found = [
            tf.stack([_sum(tf.square(error)) for error in errors]),
            tf.stack([_sum(tf.square(output)) for output in outputs]),
        ]
        if with_curvature:
            found.append(_curvature([(tensor, get(tensor)) for tensor in shown], outputs, errors))
        return found

    run = executable(graph, fetch)
    totals: list[np.ndarray] | None = None
    samples = 0
    for batch in progress(batches, "Measuring sensitivity", len(batches)):
        found = [part.astype(np.float64) for part in _called(run, graph, batch)]
        totals = found if totals is None else [total + part for total, part in zip(totals, found, strict=True)]
        samples += max((len(value) for value in batch.values() if value.ndim), default=1)
    assert totals is not None
    curvature = totals[2] / (2 * _DRAWS * samples) if with_curvature else np.zeros(len(units))
    return {
        unit.name: Sensitivity(float(noise / max(signal, _TINY)), float(bend))
        for unit, noise, signal, bend in zip(units, totals[0], totals[1], curvature, strict=True)
    }


def _called(run: Any, graph: Graph, batch: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        with unfused():
            results = run(*(tf.convert_to_tensor(batch[key], tensor.dtype) for key, tensor in graph.inputs.items()))
    except tf.errors.OpError as error:
        raise ModelError(f"TensorFlow cannot run the float model on this data: {first_line(error)}") from error
    return [result.numpy() for result in results]


def _shadow(result: Graph, graph: Graph, unit: Unit, plan: QuantPlan) -> Tensor:
    """Adds a unit once more to `result`, a copy of `graph`, as the plan runs it on the float inputs.

    Returns its output, not rounded: that counts for who reads it, and ends when these return to float.
    """
    inside = set(unit.match.covered)
    weight_slot, weights = rounded_weights(unit, plan) or (-1, None)
    quantized: dict[Tensor, Tensor] = {}
    twins: dict[Node, Node] = {}

    def read(node: Node, slot: int, tensor: Tensor) -> Tensor:
        if node is unit.main and slot == weight_slot and weights is not None:
            return result.constant(weights, name=f"{unit.name}/shadow/weights")
        if tensor in unit.inputs and (node, slot) not in unit.float_slots:
            if tensor not in quantized:
                original = Tensor(result.nodes[tensor.node.name], tensor.index)
                spec = plan.tensors.get(tensor.name) or plan.dynamic[tensor.name]
                quantized[tensor] = fake_quantize(result, original, spec, f"{unit.name}/shadow/input")
            return quantized[tensor]
        if tensor.value is not None:  # a bias, say, that corrects what quantizing does: the float model has another
            return result.constant(tensor.value, name=f"{unit.name}/shadow/constant", dtype=tensor.dtype)
        twin = twins[tensor.node] if tensor.node in inside else result.nodes[tensor.node.name]
        return Tensor(twin, tensor.index)

    for node in graph.order():
        if node in inside:
            inputs = [read(node, slot, tensor) for slot, tensor in enumerate(node.inputs)]
            name = f"{unit.name}/shadow/{node.op}"
            twins[node] = result.add(node.op, inputs, name=name, attrs=node.attrs, shapes=node.shapes, dtypes=node.dtypes)
    return Tensor(twins[unit.output.node], unit.output.index)


def _curvature(shown: Sequence[tuple[Tensor, tf.Tensor]], outputs: Sequence[tf.Tensor], errors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum over samples and draws of (g' e)^2, by op; `shown` are the float outputs of the model."""
    total: Any = 0.0
    for draw in range(_DRAWS):
        drawn = tf.add_n([_log_likelihood(tensor, value, _SEED + draw) for tensor, value in shown])
        try:
            gradients = tf.gradients(drawn, list(outputs), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        except LookupError as error:
            raise ConfigError(f"The strategy hawq needs gradients: choose another. Received: {first_line(error)}") from error
        total += tf.stack([_sum(tf.square(_per_sample(g * e))) for g, e in zip(gradients, errors, strict=True)])
    return total


def _log_likelihood(tensor: Tensor, value: tf.Tensor, seed: int) -> tf.Tensor:
    """log p(y), summed over samples, of labels y drawn from what an output says; its gradient has the covariance H."""
    value = tf.cast(value, tf.float32)
    if _is_softmax(tensor):
        rows = tf.math.log(tf.maximum(tf.reshape(value, [-1, tf.shape(value)[-1]]), _LEAST_PROBABILITY))
        labels = tf.stop_gradient(tf.random.categorical(rows, 1, seed=seed))
        return tf.reduce_sum(tf.gather(rows, labels, batch_dims=1))
    noise = tf.random.normal(tf.shape(value), seed=seed)
    size = tf.sqrt(tf.reduce_mean(tf.square(value)) + _TINY)
    return tf.reduce_sum(noise * value / tf.stop_gradient(size))


def _is_softmax(tensor: Tensor) -> bool:
    node = tensor.node
    while node.op in ("Identity", "Reshape", "Squeeze") and node.inputs:
        node = node.inputs[0].node
    return node.op == "Softmax"


def _sum(value: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.cast(value, tf.float64))


def _per_sample(value: tf.Tensor) -> tf.Tensor:
    """Sums over all axes but the first."""
    rank = value.shape.rank
    return tf.reduce_sum(value, list(range(1, rank))) if rank else value
