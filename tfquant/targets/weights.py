"""Quantized weights: what every target makes of a unit's float weights and the plan's scales."""

import numpy as np

from tfquant.errors import PlanError
from tfquant.plan.kernels import Unit
from tfquant.plan.rounding import dequantize, nearest
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
    return nearest(unit.weights, scales, plan.weight_bits.get(unit.name)), scales


def dequantized(unit: Unit, plan: QuantPlan) -> np.ndarray:
    """The float32 weights that the integers stand for: times their scales, and the plan's offsets, where it has some, added.

    Raises:
        PlanError: as for `quantized`, or there is not an offset per output channel.
    """
    integers, scales = quantized(unit, plan)
    offsets = plan.weight_offsets.get(unit.name)
    if offsets is not None and offsets.shape != scales.shape:
        raise PlanError(f"The plan needs {len(scales)} weight offsets for {unit.name}. Received: shape {offsets.shape}")
    return dequantize(integers, scales, offsets)
