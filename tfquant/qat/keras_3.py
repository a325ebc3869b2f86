"""The quantization-aware model of Keras 3."""

from __future__ import annotations

from typing import Any

import keras

from tfquant.qat.model import QuantizationAware
from tfquant.qat.quantizers import QUANTIZERS

for _kind in QUANTIZERS:
    keras.saving.register_keras_serializable(package="tfquant")(_kind)


@keras.saving.register_keras_serializable(package="tfquant")
class QuantizationAwareModel(QuantizationAware, keras.Model):
    """A Keras 3 model that trains with fake quantization; made by `tfquant.quantize_model`."""

    keras = keras

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """As of any Keras model, with the teacher's part where there is one."""
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        return self._teaching(x, y_pred, loss) if training else loss

    def export(self, filepath: Any, *args: Any, input_signature: Any = None, **kwargs: Any) -> Any:
        """As of any Keras model; inputs have the names that the model inside has for them."""
        return super().export(filepath, *args, input_signature=input_signature or [self.signature], **kwargs)

    def _add_variable(self, name: str, shape: tuple[int, ...], initial: Any, trains: bool) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=lambda shape, dtype=None: keras.ops.broadcast_to(keras.ops.cast(initial, dtype or "float32"), shape),
            trainable=trains,
            dtype="float32",
            autocast=False,
            aggregation="mean",
        )
