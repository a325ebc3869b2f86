"""How layers are quantized while they train: one config for all, others for the layers that are named."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from tfquant.errors import ConfigError, shown
from tfquant.graph.paths import layer_of
from tfquant.plan.spec import BITS
from tfquant.qat.biases import Affine
from tfquant.qat.core import Choice, result_key, weights_key
from tfquant.qat.design import Activation, Design, Weight, by_channels
from tfquant.qat.quantizers import (
    FixedRangeQuantizer,
    LastValueQuantizer,
    MovingAverageQuantizer,
    Quantizer,
    Site,
)


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How the weights and the results of a layer are fake-quantized.

    Attributes:
        weight_bits: of the weights, 2 to 8.
        activation_bits: of the results, 2 to 8; what no quantized layer computes (the model's inputs) has 8.
        weight_quantizer: of the weights.
        activation_quantizer: of the results.

    Raises:
        ConfigError: a value is none that it can have.
    """

    weight_bits: int = BITS[1]
    activation_bits: int = BITS[1]
    weight_quantizer: Quantizer = dataclasses.field(default_factory=LastValueQuantizer)
    activation_quantizer: Quantizer = dataclasses.field(default_factory=MovingAverageQuantizer)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
                raise ConfigError(f"{name} must be {BITS[0]} to {BITS[1]}. Received: {shown(bits)}")
        for name in ("weight_quantizer", "activation_quantizer"):
            if not isinstance(getattr(self, name), Quantizer):
                raise ConfigError(
                    f"{name} must be a quantizer, as tfquant.LearnedStepQuantizer(). Received: {shown(getattr(self, name))}"
                )


Configs = Mapping[str, QuantizeConfig]


def choices_of(design: Design, default: QuantizeConfig, configs: Configs, ranges: Mapping[str, Range]) -> dict[str, Choice]:
    """What is at each site of a design.

    Args:
        design: the design.
        default: for layers that no entry of `configs` names.
        configs: path of a layer, or a pattern of paths ("block_*/conv"), to its config; of several the last.
        ranges: what calibration found, by the name of an activation.

    Raises:
        ConfigError: an entry of `configs` names no layer that is quantized.
    """
    names = [*(a.name for a in design.activations), *(weight.name for weight in design.weights)]
    for pattern in configs:
        if not any(_names(pattern, name) for name in names):
            raise ConfigError(
                f"configs must name layers that are quantized, by path or pattern. Received: {pattern!r}; there are "
                f"{', '.join(sorted(set(map(layer_of, names)))[:5])}"
            )

    def config_of(name: str) -> QuantizeConfig:
        return next((configs[pattern] for pattern in reversed(list(configs)) if _names(pattern, name)), default)

    found = {a.name: _activation(a, config_of(a.name), ranges.get(a.name)) for a in design.activations}
    found |= {weights_key(weight.name): _weight(weight, config_of(weight.name)) for weight in design.weights}
    observer = MovingAverageQuantizer()
    found |= {result_key(name): Choice(observer, Site(name, BITS[1])) for name in design.results.values()}
    return found


@dataclasses.dataclass(frozen=True)
class Range:
    """What calibration found for an activation.

    Attributes:
        low: its least value.
        high: its largest value.
        is_symmetric: whether the zero point is the middle.
    """

    low: float
    high: float
    is_symmetric: bool


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern is a path that a name lies below, with or without the model's own name in front."""
    parts = name.split("/")
    paths = ("/".join(parts[start:end]) for start in range(min(2, len(parts))) for end in range(start + 1, len(parts) + 1))
    return any(fnmatch.fnmatchcase(path, pattern) for path in paths)


def _activation(activation: Activation, config: QuantizeConfig, given: Range | None) -> Choice:
    quantizer = config.activation_quantizer
    if activation.known is not None:
        quantizer = FixedRangeQuantizer(*activation.known)
    bits = (quantizer.num_bits or config.activation_bits) if activation.is_behind_layer else BITS[1]
    site = Site(
        activation.name,
        bits,
        is_symmetric=given.is_symmetric if given is not None else False,
        floor=0.0 if activation.clip else None,
        ceiling=6.0 if activation.clip == "Relu6" else None,
        initial=None if given is None else (given.low, given.high),
    )
    return Choice(quantizer, site)


def _weight(weight: Weight, config: QuantizeConfig) -> Choice:
    quantizer = config.weight_quantizer
    values = None if weight.values is None else by_channels(weight.values, weight.axes)
    channels = 0 if values is None else values.shape[-1]
    bits = quantizer.num_bits or config.weight_bits
    return Choice(quantizer, Site(weight.name, bits, channels=channels, is_symmetric=True, weights=values))


def to_json(value: Any) -> Any:
    """A design or a site as what JSON can hold; arrays of weights are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value) if field.compare}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def design_from_json(value: Mapping[str, Any]) -> Design:
    """The inverse of `to_json` for a design."""
    activations = [
        Activation(
            **{
                **entry,
                "tensors": {key: None if names is None else tuple(names) for key, names in entry["tensors"].items()},
                "sources": tuple(entry["sources"]),
                "known": None if entry["known"] is None else tuple(entry["known"]),
            }
        )
        for entry in value["activations"]
    ]
    weights = [
        Weight(**{**entry, "axes": tuple(entry["axes"]), "behind": tuple(Affine(**one) for one in entry["behind"])})
        for entry in value["weights"]
    ]
    return Design(tuple(activations), tuple(weights), dict(value["results"]), tuple(value["notes"]), value["is_portable"])


def site_from_json(value: Mapping[str, Any]) -> Site:
    """The inverse of `to_json` for a site."""
    return Site(**{**value, "initial": None if value["initial"] is None else tuple(value["initial"])})
