"""The options of a quantization, checked when they are made."""

from __future__ import annotations

import dataclasses

from tfquant.errors import ConfigError
from tfquant.observe.estimators import ESTIMATORS


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How to quantize.

    Attributes:
        signature_key: the signature of a SavedModel to quantize.
        subset_size: at most so many calibration samples are used.
        batch_size: samples per calibration batch.
        estimator: how ranges are read off the statistics: "mse", "minmax", "mean_minmax" or "percentile".
        preprocess: for a folder of images: "tf", "torch", "caffe", "unit" or "none".
        verify: compare the result with the float model on the calibration data.
        verify_batch_sizes: batch sizes at which the latency of both is measured; empty for none.

    Raises:
        ConfigError: an option has a value that it cannot have.
    """

    signature_key: str = "serving_default"
    subset_size: int = 300
    batch_size: int = 10
    estimator: str = "mse"
    preprocess: str = "none"
    verify: bool = True
    verify_batch_sizes: tuple[int, ...] = (1, 16)

    def __post_init__(self) -> None:
        for name in ("subset_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1. Received: {getattr(self, name)}")
        if self.estimator not in ESTIMATORS:
            raise ConfigError(f"estimator must be one of {', '.join(ESTIMATORS)}. Received: {self.estimator!r}")
        if any(size < 1 for size in self.verify_batch_sizes):
            raise ConfigError(f"verify_batch_sizes must be at least 1 each. Received: {list(self.verify_batch_sizes)}")
