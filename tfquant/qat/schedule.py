"""When training begins to round, and when ranges and batch statistics stand still."""

from __future__ import annotations

from typing import Any

import keras

from tfquant.errors import ConfigError, shown
from tfquant.qat.core import Stage
from tfquant.qat.model import QuantizationAware


class QuantizationSchedule(keras.callbacks.Callback):
    """A callback of `fit`, for Keras 3 and tf_keras alike; steps count on over several calls.

    Args:
        quantize_after: steps that train in float, while ranges are observed.
        freeze_ranges_after: steps after which ranges no longer follow the values; None for never.
        freeze_batch_norm_after: steps after which BatchNorm uses its moving averages and leaves them as they are, as the model
            does in use (arXiv:1712.05877, section 3.2); None for never.

    Raises:
        ConfigError: a number is negative or no whole number.
    """

    def __init__(
        self, quantize_after: int = 0, freeze_ranges_after: int | None = None, freeze_batch_norm_after: int | None = None
    ) -> None:
        super().__init__()
        for name, value in (
            ("quantize_after", quantize_after),
            ("freeze_ranges_after", freeze_ranges_after),
            ("freeze_batch_norm_after", freeze_batch_norm_after),
        ):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ConfigError(f"{name} must be a number of steps, at least 0. Received: {shown(value)}")
        self._quantize, self._ranges, self._batch_norm = quantize_after, freeze_ranges_after, freeze_batch_norm_after
        self._steps = self._begun = 0

    def stage_at(self, step: int) -> Stage:
        """What is done in a step, which are counted from 0."""
        return Stage(
            quantizes=step >= self._quantize,
            observes=self._ranges is None or step < self._ranges,
            freezes_statistics=self._batch_norm is not None and step >= self._batch_norm,
        )

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the model, and sets its stage."""
        if not isinstance(self.model, QuantizationAware):
            received = getattr(self.model, "name", self.model)
            raise ConfigError(f"QuantizationSchedule is for models of tfquant.quantize_model. Received: {received}")
        self.model.stage = self.stage_at(self._steps)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Sets the stage of the step, or of all steps of one execution (`steps_per_execution`)."""
        self._begun = batch
        self.model.stage = self.stage_at(self._steps)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the steps."""
        self._steps += batch - self._begun + 1

    # What tf_keras asks its own callbacks.
    def _implements_train_batch_hooks(self) -> bool:
        return True

    def _implements_test_batch_hooks(self) -> bool:
        return False

    _implements_predict_batch_hooks = _implements_test_batch_hooks
