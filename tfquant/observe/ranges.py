"""From an annotation and statistics to a plan."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from tfquant.graph.ir import Tensor
from tfquant.observe.estimators import ESTIMATORS
from tfquant.observe.statistics import TensorStats
from tfquant.plan.annotate import Annotation, Group
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantPlan, QuantSpec, asymmetric, symmetric

# qint8 needs no zero point in a padded border, and may cost this much resolution against quint8.
_MAX_SYMMETRY_COST = 1.25
# |bias| / (input scale * weight scale) is an int32 in the kernels; half of its range is left for the products.
_MAX_BIAS_STEPS = 2.0**30


def observed(annotation: Annotation) -> list[Tensor]:
    """The tensors whose statistics `make_plan` needs."""
    return [tensor for group in annotation.groups for tensor in group.sources]


def make_plan(
    annotation: Annotation,
    stats: Mapping[Tensor, TensorStats],
    *,
    target: str,
    signature_key: str,
    estimator: str,
) -> QuantPlan:
    """Ranges for every quantized tensor, scales for all weights."""
    specs = {tensor: spec for group in annotation.groups for tensor, spec in _group_specs(group, stats, estimator)}
    scales = {
        unit.name: weight_scales(unit, specs[unit.inputs[0]], [specs[t] for t in (*unit.inputs[1:], unit.output) if t in specs])
        for unit in annotation.units.values()
        if unit.weights is not None
    }
    samples = max((entry.samples for entry in stats.values()), default=0)
    return QuantPlan(
        target=target,
        signature_key=signature_key,
        ops=annotation.decisions,
        tensors={tensor.name: spec for tensor, spec in specs.items()},
        weight_scales=scales,
        settings={"estimator": estimator, "samples": samples},
    )


def _group_specs(group: Group, stats: Mapping[Tensor, TensorStats], estimator: str) -> list[tuple[Tensor, QuantSpec]]:
    merged = functools.reduce(TensorStats.merge, (stats[tensor] for tensor in group.sources))
    low, high = ESTIMATORS[estimator](merged)
    if group.clip:
        low = 0.0
    if group.clip == "Relu6":
        high = min(high, 6.0)
    if group.needs_zero and low < 0 and not group.unsigned and 2 * max(-low, high) <= _MAX_SYMMETRY_COST * (high - low):
        spec = symmetric(low, high, estimator, group.name)
    else:
        spec = asymmetric(low, high, estimator, group.name)
    return [(tensor, spec) for tensor in group.tensors]


def weight_scales(unit: Unit, spec: QuantSpec, others: Sequence[QuantSpec]) -> np.ndarray:
    """Symmetric scales of the output channels, float32 (C,): max |w| / 127, and large enough for the bias to fit the accumulator.

    Args:
        unit: a unit with weights.
        spec: its input's.
        others: of its summand and its output: their zero points become part of the bias.

    Raises:
        ValueError: the unit has no weights.
    """
    if unit.weights is None:
        raise ValueError(f"{unit.name} has no weights")
    largest = np.abs(unit.weights.reshape(-1, unit.weights.shape[-1])).max(0).astype(np.float64)
    offset = sum(abs(other.offset) for other in others)
    bias = offset if unit.bias is None else np.abs(unit.bias) + offset
    scales = np.maximum(largest / 127, bias / (_MAX_BIAS_STEPS * spec.scale))
    return np.where(scales > 0, scales, 1.0).astype(np.float32)
