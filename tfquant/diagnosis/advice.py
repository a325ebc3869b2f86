"""From the figures of a layer to what would help it: the cause of most of its error, and the remedy for that cause."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tfquant.algorithms import PRESETS
from tfquant.diagnosis.result import ALARM, Advice, InputUse, LayerDiagnosis
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS

# Share of the error that a cause must make: without it the error is 3 dB less.
MOST = 0.5
# What a scale per channel must gain in the weights, in dB.
_GAIN = 3.0
# Two bits of the range are not used.
_SPARSE = 0.25
# Channels that fill so little of the range lose about three bits in the mean.
_UNEVEN = 0.125
# Channel ranges that such layers read can be changed by scaling; of matrix products what transformers need.
_EQUALIZED = {"conv2d": "equalization", "depthwise_conv2d": "equalization", "matmul": "smooth_quant"}


def advise(
    layer: LayerDiagnosis, unit: Unit, weight_bits: int, per_channel_sqnr: float | None, applied: Collection[str]
) -> Advice | None:
    """The advice for a layer, None where nothing stands out and it is no alarm.

    Args:
        layer: its figures.
        unit: what they are the figures of.
        weight_bits: the fewest of a channel of its weights.
        per_channel_sqnr: of its weights with a scale per output channel, in dB, where the plan has one for all.
        applied: the algorithms that the plan was made with, which are no advice.
    """
    by_inputs = layer.weight_share <= 1 - MOST
    if by_inputs and layer.inputs:
        found = next((advice for use in layer.inputs for advice in (_few_bits(use), _range(use)) if advice), None)
        if found is not None:
            return found
    elif weight_bits < BITS[1]:
        return Advice("bits", f"its weights have {weight_bits} bits: give them more")
    elif per_channel_sqnr is not None and layer.weight_sqnr is not None and per_channel_sqnr - layer.weight_sqnr >= _GAIN:
        figures = f"{layer.weight_sqnr:.1f} dB, with a scale per channel {per_channel_sqnr:.1f} dB"
        return Advice("per_channel", f"its weights have one scale for all channels: {figures}: --weights per_channel")
    advices = (rule(layer, unit) for rule in _RULES)
    return next((advice for advice in advices if advice is not None and advice.kind not in applied), None)


def _few_bits(use: InputUse) -> Advice | None:
    return Advice("bits", f"its input {use.tensor} has {use.bits} bits: give it more") if use.bits < BITS[1] else None


def _range(use: InputUse) -> Advice | None:
    """On a range that is too narrow, or too wide, for most of what it holds."""
    if use.low is None or use.high is None or use.source in ("known", "learned"):  # no data decided these
        return None
    ends = f"{use.low:.4g}..{use.high:.4g}"
    if use.clipping >= MOST:
        text = (
            f"{use.clipped:.2%} of its input {use.tensor} lie outside of {ends} and make {use.clipping:.0%} of the rounding error"
        )
        return _about_estimator(text, "minmax", is_found=use.source == "minmax")
    if use.used < _SPARSE:
        text = f"the values of its input {use.tensor}, {use.seen_low:.4g}..{use.seen_high:.4g}, use {use.used:.0%} of {ends}"
        return _about_estimator(text, "mse", is_found=use.source not in ("minmax", "mean_minmax", "user"))
    return None


def _about_estimator(text: str, name: str, is_found: bool) -> Advice:
    """Another estimator; or where one of its kind found the range already, data that are like these."""
    if is_found:
        return Advice("data", f"{text}: calibrate with more samples like these")
    return Advice("estimator", f"{text}: --estimator {name}, or more calibration samples like these")


def _mean_shift(layer: LayerDiagnosis, unit: Unit) -> Advice | None:
    if layer.mean_share < MOST or unit.kernel.role != "compute":
        return None
    return _algorithm("bias_correction", f"{layer.mean_share:.0%} of its error is a shift of the channels' means")


def _uneven_channels(layer: LayerDiagnosis, unit: Unit) -> Advice | None:
    name = _EQUALIZED.get(unit.kernel.name)
    if name is None or layer.weight_share > 1 - MOST or not layer.inputs or layer.inputs[0].channel_use >= _UNEVEN:
        return None
    use = layer.inputs[0]
    return _algorithm(name, f"the channels of its input {use.tensor} fill {use.channel_use:.0%} of its range in the mean")


def _by_weights(layer: LayerDiagnosis, unit: Unit) -> Advice | None:
    if layer.weight_share < MOST:
        return None
    return _algorithm("adaround", f"{layer.weight_share:.0%} of its error comes from its weights")


def _algorithm(name: str, reason: str) -> Advice:
    """An algorithm, with the first preset that has it."""
    preset = next(preset for preset, names in PRESETS.items() if name in names)
    return Advice(name, f"{reason}: {name}, which --preset {preset} has")


def _hopeless(layer: LayerDiagnosis, unit: Unit) -> Advice | None:
    if layer.output_sqnr >= ALARM:
        return None
    return Advice(
        "float", f"no remedy for {layer.output_sqnr:.1f} dB stands out: keep it in float, --ignored_scope {layer.layer}"
    )


# In order: the first that applies is the root of what the later ones would see.
_RULES: tuple[Callable[[LayerDiagnosis, Unit], Advice | None], ...] = (_mean_shift, _uneven_channels, _by_weights, _hopeless)
