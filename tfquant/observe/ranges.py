"""From an annotation and statistics to a plan."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tfquant.graph.ir import Node, Tensor
from tfquant.observe.estimators import estimate
from tfquant.observe.fewer_bits import Bits, Weights, quantize_weights
from tfquant.observe.learned import Learned, learned_spec, learned_weights
from tfquant.observe.statistics import TensorStats
from tfquant.plan.annotate import Annotation, Group
from tfquant.plan.kernels import Unit
from tfquant.plan.rounding import nearest
from tfquant.plan.spec import BITS, S8, U8, DynamicSpec, QuantPlan, QuantSpec, asymmetric, largest, symmetric

# The source of ranges that no data are needed for.
KNOWN = "known"
# qint8 needs no zero point in a padded border, and may cost this much resolution against quint8.
_MAX_SYMMETRY_COST = 1.25
# |bias| / (input scale * weight scale) is an int32 in the kernels; half of its range is left for the products.
_MAX_BIAS_STEPS = 2.0**30
# Two products of quint8 and weights of +-64 are at most 2 * 255 * 64 < 2**15.
_LEVELS_WITHOUT_VNNI = 64


def observed(annotation: Annotation, learned: Learned | None = None) -> list[Tensor]:
    """The tensors whose statistics `make_plan` needs."""
    return [tensor for group in unknown(annotation, learned) for tensor in group.sources]


def unknown(annotation: Annotation, learned: Learned | None = None) -> list[Group]:
    """The groups whose ranges data decide."""
    ranges = learned.ranges(annotation) if learned else {}
    return [group for group in annotation.groups if group.known is None and group.name not in ranges]


def make_plan(
    annotation: Annotation,
    stats: Mapping[Tensor, TensorStats],
    *,
    target: str,
    signature_keys: tuple[str, ...],
    estimator: str,
    activation_mode: str = "asymmetric",
    weights: str = "per_channel",
    isa: str = "vnni",
    bits: Bits | None = None,
    chosen: Mapping[str, str] | None = None,
    learned: Learned | None = None,
) -> QuantPlan:
    """Ranges for every quantized tensor, scales for all weights.

    Args:
        annotation: what runs in INT8.
        stats: of the tensors that `observed` names.
        target: whose kernels were annotated.
        signature_keys: of the signatures that the graph computes.
        estimator: a name in `ESTIMATORS`; or, with `chosen`, "auto".
        activation_mode: "asymmetric", or "symmetric": ranges that hold negative values are symmetric about 0.
        weights: "per_channel", or "per_tensor": one scale for all output channels.
        isa: "vnni", or "no_vnni": weights of 7 bits where sums of products would overflow 16 bits, and quint8 activations alone.
        bits: fewer than 8, for the simulation.
        chosen: name of a group to its estimator, where that is another.
        learned: what fake quantization says: it comes before all of this.
    """
    bits, chosen, learned = bits or Bits(), chosen or {}, learned or Learned()
    ranges = learned.ranges(annotation)
    specs: dict[Tensor, QuantSpec] = {}
    for group, count in group_bits(annotation, bits.activations):
        if group.name in ranges:
            spec = learned_spec(group, ranges[group.name], isa)
        else:
            spec = group_spec(group, stats, chosen.get(group.name, estimator), activation_mode, isa, count)
        specs |= dict.fromkeys(group.tensors, spec)
    scales: dict[str, np.ndarray] = {}
    fewer: dict[str, Weights] = {}
    for unit in annotation.units.values():
        if unit.weights is None:
            continue
        others = [specs[tensor] for tensor in (*unit.inputs[1:], unit.output) if tensor in specs]
        own = specs[unit.inputs[0]] if unit.inputs else None
        trained = trained_weights(unit, learned, own, others, isa)
        if trained is not None:
            scales[unit.name] = trained.scales
            if (trained.bits < BITS[1]).any() or not np.array_equal(nearest(unit.weights, trained.scales), trained.integers):
                fewer[unit.name] = trained
        elif bits.of(unit) < BITS[1]:
            fewer[unit.name] = quantize_weights(unit.weights, bits.of(unit), bits, weights == "per_tensor")
            scales[unit.name] = fewer[unit.name].scales
        else:
            scales[unit.name] = _weight_scales(unit, own, others, weights, isa)
    samples = max((entry.samples for entry in stats.values()), default=0)
    return QuantPlan(
        target=target,
        signature_keys=signature_keys,
        ops=annotation.decisions,
        tensors={tensor.name: spec for tensor, spec in specs.items()},
        weight_scales=scales,
        settings={
            "estimator": estimator,
            "activation_mode": activation_mode,
            "weights": weights,
            "isa": isa,
            "samples": samples,
            **bits.settings,
        },
        rounded={name: found.integers for name, found in fewer.items()},
        weight_bits={name: found.bits for name, found in fewer.items() if (found.bits < BITS[1]).any()},
        weight_offsets={name: found.offsets for name, found in fewer.items() if found.offsets is not None},
    )


def group_bits(annotation: Annotation, bits: int) -> list[tuple[Group, int]]:
    """The groups, each with `bits`; those that no quantized layer computes (the model's inputs) with 8."""
    layers = {unit.main for unit in annotation.units.values() if unit.kernel.role == "compute"}
    return [
        (group, bits if any(is_behind(source, layers) for source in group.sources) else BITS[1]) for group in annotation.groups
    ]


def is_behind(tensor: Tensor, layers: Collection[Node]) -> bool:
    """Whether one of the layers computes what a tensor is made of."""
    stack, seen = [tensor.node], {tensor.node}
    while stack:
        node = stack.pop()
        if node in layers:
            return True
        parents = {parent.node for parent in node.inputs} - seen
        seen |= parents
        stack.extend(parents)
    return False


def make_dynamic_plan(
    annotation: Annotation,
    *,
    target: str,
    signature_keys: tuple[str, ...],
    activation_mode: str = "asymmetric",
    weights: str = "per_channel",
    isa: str = "vnni",
) -> QuantPlan:
    """A plan that needs no data: ranges of activations are found at each call. Arguments as for `make_plan`."""
    spec = DynamicSpec(U8, None)
    if activation_mode == "symmetric":
        spec = DynamicSpec(U8, 128) if isa == "no_vnni" else DynamicSpec(S8, 0)
    units = [unit for part in annotation.parts for unit in part.units.values() if unit.weights is not None]
    return QuantPlan(
        target=target,
        signature_keys=signature_keys,
        ops=annotation.decisions,
        tensors={},
        weight_scales={unit.name: _weight_scales(unit, None, (), weights, isa) for unit in units},
        settings={"activation_mode": activation_mode, "weights": weights, "isa": isa},
        dynamic={tensor.name: spec for part in annotation.parts for tensor in part.quantized},
        mode="dynamic",
    )


def group_spec(
    group: Group,
    stats: Mapping[Tensor, TensorStats],
    estimator: str,
    activation_mode: str = "asymmetric",
    isa: str = "vnni",
    bits: int = 8,
) -> QuantSpec:
    """How the tensors of a group are quantized.

    Args:
        group: the group.
        stats: of its sources, unless its range is known.
        estimator: a name in `ESTIMATORS`.
        activation_mode, isa: as for `make_plan`.
        bits: of the integers.
    """
    if group.known is not None:
        return asymmetric(*group.known, KNOWN, group.name)
    merged = functools.reduce(TensorStats.merge, (stats[tensor] for tensor in group.sources))
    low, high = estimate(estimator, merged, bits, group.name)
    if group.clip:
        low = 0.0
    if group.clip == "Relu6":
        high = min(high, 6.0)
    # Without VNNI the kernels are wrong on qint8 activations (up to 8 steps of an 8-bit result, measured).
    unsigned = group.unsigned or isa == "no_vnni"
    if activation_mode == "symmetric" and low < 0:
        return symmetric(low, high, estimator, group.name, U8 if unsigned else S8, bits)
    if group.needs_zero and low < 0 and not unsigned and 2 * max(-low, high) <= _MAX_SYMMETRY_COST * (high - low):
        return symmetric(low, high, estimator, group.name, bits=bits)
    return asymmetric(low, high, estimator, group.name, bits)


def trained_weights(
    unit: Unit, learned: Learned, spec: QuantSpec | None, others: Sequence[QuantSpec], isa: str = "vnni"
) -> Weights | None:
    """The integers of a layer that was trained with fake-quantized weights; None for other units.

    Args:
        unit: the unit.
        learned: what is known of its weights.
        spec, others: as for `weight_scales`.
        isa: as for `make_plan`.
    """
    count = learned.bits_of(unit) if unit.kernel.role == "compute" else None
    if count is None or unit.weights is None:
        return None
    return learned_weights(unit.weights, count, _least_scales(unit, spec, others), _most(unit, isa))


def _most(unit: Unit, isa: str) -> int:
    """The largest integer of a unit's weights."""
    return _LEVELS_WITHOUT_VNNI if isa == "no_vnni" and unit.saturates else largest(BITS[1])


def _weight_scales(unit: Unit, spec: QuantSpec | None, others: Sequence[QuantSpec], weights: str, isa: str) -> np.ndarray:
    """Those that the options ask for."""
    own = weight_scales(unit, spec, others, _most(unit, isa))
    is_shared = weights == "per_tensor" and unit.kernel.role == "compute"
    return np.full_like(own, own.max()) if is_shared else own


def weight_scales(unit: Unit, spec: QuantSpec | None, others: Sequence[QuantSpec], levels: int = 127) -> np.ndarray:
    """Symmetric scales of the output channels, float32 (C,): max |w| / levels, or as large as the bias needs to fit int32.

    Args:
        unit: a unit with weights.
        spec: its input's; None where it has none in 8 bits, or its kernel adds the bias in float.
        others: of its summand and its output: their zero points become part of the bias.
        levels: the integer that stands for max |w|.

    Raises:
        ValueError: the unit has no weights.
    """
    if unit.weights is None:
        raise ValueError(f"{unit.name} has no weights")
    scales = np.abs(unit.weights.reshape(-1, unit.weights.shape[-1])).max(0).astype(np.float64) / levels
    scales = np.maximum(scales, _least_scales(unit, spec, others))
    return np.where(scales > 0, np.maximum(scales, np.finfo(np.float32).tiny), 1.0).astype(np.float32)


def _least_scales(unit: Unit, spec: QuantSpec | None, others: Sequence[QuantSpec]) -> np.ndarray | float:
    """How large the scales of the output channels must be for the bias, float64 (C,), or one number for all."""
    if spec is None:
        return 0.0
    offset = sum(abs(other.offset) for other in others)
    bias = offset if unit.bias is None else np.abs(unit.bias) + offset
    return bias / (_MAX_BIAS_STEPS * spec.scale)
