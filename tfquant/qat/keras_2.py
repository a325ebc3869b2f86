"""The quantization-aware model of tf_keras."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from tfquant.qat.model import QuantizationAware
from tfquant.qat.quantizers import QUANTIZERS

for _kind in QUANTIZERS:
    tf_keras.saving.register_keras_serializable(package="tfquant")(_kind)


def add_variable(layer: Any, name: str, shape: tuple[int, ...], initial: Any, trains: bool) -> Any:
    """A float32 variable of a layer or model, for a quantizer."""
    return layer.add_weight(
        name=name,
        shape=shape,
        initializer=lambda shape, dtype=None: tf.broadcast_to(tf.cast(initial, dtype or tf.float32), shape),
        trainable=trains,
        dtype=tf.float32,
        experimental_autocast=False,
        aggregation=tf.VariableAggregation.MEAN,
    )


@tf_keras.saving.register_keras_serializable(package="tfquant")
class QuantizationAwareModel(QuantizationAware, tf_keras.Model):
    """A tf_keras model that trains with fake quantization; made by `tfquant.quantize_model`."""

    keras = tf_keras

    _trains = False  # whether a training step is being traced, in which compute_loss has no other way to know

    def train_step(self, data: Any) -> Any:
        """As of any Keras model."""
        object.__setattr__(self, "_trains", True)
        try:
            return super().train_step(data)
        finally:
            object.__setattr__(self, "_trains", False)

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None) -> Any:
        """As of any Keras model, with the teacher's part where there is one and the model trains."""
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return self._teaching(x, y_pred, loss) if self._trains else loss

    def _add_variable(self, name: str, shape: tuple[int, ...], initial: Any, trains: bool) -> Any:
        return add_variable(self, name, shape, initial, trains)
