"""Weights in 8 bits: what every target makes of a unit's float weights and the plan's scales."""

from typing import Any

import numpy as np

from tfquant.errors import PlanError
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan


def quantized(unit: Unit, plan: QuantPlan) -> tuple[np.ndarray, np.ndarray]:
    """(integers, scales): int8 of the shape of `unit.weights`, symmetric in -127..127, and float32 (C,).

    The integers are the nearest, unless the plan has others.

    Raises:
        PlanError: the plan has no scales for it, or not one per output channel, or integers of another shape.
    """
    assert unit.weights is not None
    scales = plan.weight_scales.get(unit.name)
    channels = unit.weights.shape[-1]
    if scales is None or scales.shape != (channels,):
        received = "none" if scales is None else f"shape {scales.shape}"
        raise PlanError(f"The plan needs {channels} weight scales for {unit.name}. Received: {received}")
    rounded = plan.rounded.get(unit.name)
    if rounded is not None:
        if rounded.shape != unit.weights.shape:
            raise PlanError(
                f"The plan needs integers of shape {unit.weights.shape} for {unit.name}. Received: shape {rounded.shape}"
            )
        return rounded, scales
    integers = np.rint(unit.weights.astype(np.float64) / scales.astype(np.float64))
    bits = plan.weight_bits.get(unit.name)
    limit: Any = 127 if bits is None else np.maximum(2.0 ** (bits.astype(np.int64) - 1) - 1, 0)
    return np.clip(integers, -limit, limit).astype(np.int8), scales


def dequantized(unit: Unit, plan: QuantPlan) -> np.ndarray:
    """The float32 weights that the 8-bit ones stand for."""
    integers, scales = quantized(unit, plan)
    return (integers * scales.astype(np.float64)).astype(np.float32)
