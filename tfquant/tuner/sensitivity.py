"""What each INT8 op does wrong by itself, and how much that matters to the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.diagnosis.measure import Scene
from tfquant.errors import ConfigError
from tfquant.graph.execution import executable
from tfquant.graph.ir import Tensor
from tfquant.graph.loading import first_line
from tfquant.observe.collector import called
from tfquant.pipeline import QuantizedModel
from tfquant.progress import progress
from tfquant.verify import rows_of

# Draws per batch for the curvature, and what their seed begins with.
_DRAWS, _SEED = 4, 17
_TINY = 1e-30
_LEAST_PROBABILITY = 1e-30


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Of one op, over all samples; its error e is that of 8-bit weights and inputs on what the float model hands it.

    That its result is rounded counts for who reads it, and ends when these return to float.

    Attributes:
        mse: squared error of its output as a share of the output's square.
        curvature: e' H e / 2 per sample; 0 where it was not asked for.
    """

    mse: float
    curvature: float


def measure(
    model: QuantizedModel, batches: Sequence[Mapping[str, np.ndarray]], with_curvature: bool = False
) -> dict[str, Sensitivity]:
    """The sensitivity of each op that computes in INT8, by the name of its decision.

    H is the Gauss-Newton matrix of the loss at the float model, which is the Hessian where the loss is KL(float || INT8) of what
    a softmax ends with, or else half the squared error of the outputs f, each divided by its root mean square. With u normal and
    g the gradient of u' sqrt(p) log(p), where u and sqrt(p) count as constants (or of u'f / rms), H = E[g g'], so that
    e' H e = E[(g' e)^2]: a backward pass per draw of u gives it for all ops at once.

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
    scene = Scene(model.graph, model.annotation.units, model.plan)
    units = [unit for unit in model.annotation.units.values() if unit.kernel.role == "compute"]
    pairs = [(scene.floats[unit.output], scene.alone(unit)) for unit in units]
    shown = [expected for expected, _ in scene.outputs.values()]

    def fetch(get: Callable[[Tensor], tf.Tensor]) -> list[tf.Tensor]:
        outputs = [get(one) for one, _ in pairs]
        errors = [get(other) - output for (_, other), output in zip(pairs, outputs, strict=True)]
        found = [
            tf.stack([_sum(tf.square(error)) for error in errors]),
            tf.stack([_sum(tf.square(output)) for output in outputs]),
        ]
        if with_curvature:
            found.append(_curvature([(tensor, get(tensor)) for tensor in shown], outputs, errors))
        return found

    run = executable(scene.graph, fetch)
    totals: list[np.ndarray] | None = None
    samples = 0
    for batch in progress(batches, "Measuring sensitivity", len(batches)):
        found = [part.numpy() for part in called(run, scene.graph, batch)]
        totals = found if totals is None else [total + part for total, part in zip(totals, found, strict=True)]
        samples += rows_of(batch)
    assert totals is not None
    curvature = totals[2] / (2 * _DRAWS * samples) if with_curvature else np.zeros(len(units))
    return {
        unit.name: Sensitivity(float(noise / max(signal, _TINY)), float(bend))
        for unit, noise, signal, bend in zip(units, totals[0], totals[1], curvature, strict=True)
    }


def _curvature(shown: Sequence[tuple[Tensor, tf.Tensor]], outputs: Sequence[tf.Tensor], errors: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum over samples and draws of (g' e)^2, by op; `shown` are the float outputs of the model."""
    total: Any = 0.0
    for draw in range(_DRAWS):
        drawn = tf.add_n([_projection(tensor, value, draw) for tensor, value in shown])
        try:
            gradients = tf.gradients(drawn, list(outputs), unconnected_gradients=tf.UnconnectedGradients.ZERO)
        except LookupError as error:
            raise ConfigError(f"The strategy hawq needs gradients: choose another. Received: {first_line(error)}") from error
        total += tf.stack([_sum(tf.square(_per_sample(g * e))) for g, e in zip(gradients, errors, strict=True)])
    return total


def _projection(tensor: Tensor, value: tf.Tensor, draw: int) -> tf.Tensor:
    """A random projection of an output, whose gradient has the covariance H.

    Its numbers follow from the values, so that a resumed search draws what the first one drew. Labels drawn from p have the same
    covariance, but those of low probability, seldom drawn, are then most of the sum.
    """
    value = tf.cast(value, tf.float32)
    seed = tf.stack([_SEED + draw, tf.reduce_sum(tf.bitcast(value, tf.int32))])
    noise = tf.random.stateless_normal(tf.shape(value), seed)
    if _is_softmax(tensor):
        probability = tf.maximum(value, _LEAST_PROBABILITY)
        return tf.reduce_sum(tf.stop_gradient(noise * tf.sqrt(probability)) * tf.math.log(probability))
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
