"""Weights in 8 bits: what every target makes of a unit's float weights and the plan's scales."""

import numpy as np

from tfquant.errors import PlanError
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan


def quantized(unit: Unit, plan: QuantPlan) -> tuple[np.ndarray, np.ndarray]:
    """(integers, scales): int8 of the shape of `unit.weights`, symmetric in -127..127, and float32 (C,).

    Raises:
        PlanError: the plan has no scales for it, or not one per output channel.
    """
    assert unit.weights is not None
    scales = plan.weight_scales.get(unit.name)
    channels = unit.weights.shape[-1]
    if scales is None or scales.shape != (channels,):
        received = "none" if scales is None else f"shape {scales.shape}"
        raise PlanError(f"The plan needs {channels} weight scales for {unit.name}. Received: {received}")
    integers = np.rint(unit.weights.astype(np.float64) / scales.astype(np.float64))
    return np.clip(integers, -127, 127).astype(np.int8), scales


def dequantized(unit: Unit, plan: QuantPlan) -> np.ndarray:
    """The float32 weights that the 8-bit ones stand for."""
    integers, scales = quantized(unit, plan)
    return (integers * scales.astype(np.float64)).astype(np.float32)
