"""How a tensor is fake-quantized while a model trains: where the ends of its range come from, and what the gradient is.

A quantizer is stateless: its variables are made by `build` for a `Site`, and handed to each call. Another kind is a subclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.errors import ConfigError, shown
from tfquant.plan.spec import BITS, largest

# A range is at least so wide: TensorFlow makes NaN of an empty one where XLA compiles it.
_LEAST_RANGE = 1e-6
# The largest value must not be clipped by the rounding of its own scale: its gradient would be gone.
_WIDER = 1.0 + 2.0**-20
# Of the largest weight, where ranges may end.
_SHARES = np.linspace(1.0, 0.3, 36)
Variables = Mapping[str, Any]
# add_weight(name, shape, initial value, whether it is trained)
AddWeight = Callable[[str, tuple[int, ...], Any, bool], Any]


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a quantizer is used.

    Attributes:
        name: of the tensor.
        bits: of the integers, 2 to 8.
        channels: of weights, each of which has a range; 0 for activations, which have one.
        is_symmetric: the zero point is the middle, and the least integer is left out. Weights are.
        floor: the least value that the tensor can have (0 behind a ReLU), or None.
        ceiling: the largest value that it can have (6 behind a ReLU6), or None.
        initial: (low, high) to begin with, or None.
        weights: what they are when `build` is called, float32 (..., channels), or None.
    """

    name: str
    bits: int
    channels: int = 0
    is_symmetric: bool = False
    floor: float | None = None
    ceiling: float | None = None
    initial: tuple[float, float] | None = None
    weights: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


class Quantizer:
    """Base of all quantizers.

    Args:
        num_bits: of the integers; None for what the layer has.

    Raises:
        ConfigError: `num_bits` is not 2 to 8.
    """

    # Whether it needs to know what values there are: "always", while it trains; "first", in the first step; or "never".
    observes = "never"

    def __init__(self, num_bits: int | None = None) -> None:
        if num_bits is not None and not (isinstance(num_bits, int) and BITS[0] <= num_bits <= BITS[1]):
            raise ConfigError(f"num_bits must be {BITS[0]} to {BITS[1]}. Received: {shown(num_bits)}")
        self.num_bits = num_bits

    def build(self, site: Site, add_weight: AddWeight) -> Variables:
        """Makes its variables for a site."""
        return {}

    def quantize(self, x: tf.Tensor, site: Site, variables: Variables, observed: tf.Tensor | None) -> tf.Tensor:
        """The fake-quantized tensor.

        Args:
            x: float32; of weights (..., channels).
            site: where it is.
            variables: what `build` made.
            observed: (low, high) of this step where they may be used, float32 (2,): while it trains, and as long as nothing
                has been observed.
        """
        raise NotImplementedError

    def update(self, site: Site, variables: Variables, observed: tf.Tensor) -> None:
        """Takes notice of the ends of this step's values, float32 (2,), once in each training step."""

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"num_bits": self.num_bits}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantizer:
        """The quantizer of such arguments."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Quantizer) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(self.get_config().items()))))


class LastValueQuantizer(Quantizer):
    """The range is that of the values at hand; for weights."""

    def quantize(self, x: tf.Tensor, site: Site, variables: Variables, observed: tf.Tensor | None) -> tf.Tensor:
        if site.channels:
            bound = tf.stop_gradient(tf.reduce_max(tf.abs(x), axis=list(range(x.shape.rank - 1))))
            return fake_quantize(x, -bound, bound, site)
        ends = tf.stop_gradient(ends_of(x, site))
        return fake_quantize(x, ends[0], ends[1], site)


class MovingAverageQuantizer(Quantizer):
    """The range is the exponential moving average of the least and the largest value of each step; for activations.

    Args:
        num_bits: as for `Quantizer`.
        momentum: of the average, which begins at the first step's values.
    """

    observes = "always"

    def __init__(self, num_bits: int | None = None, momentum: float = 0.99) -> None:
        super().__init__(num_bits)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum must be at least 0 and below 1. Received: {shown(momentum)}")
        self.momentum = momentum

    def build(self, site: Site, add_weight: AddWeight) -> Variables:
        _only_activations(self, site)
        return {
            "range": add_weight("range", (2,), site.initial or (0.0, 0.0), False),
            "observed": add_weight("observed", (), float(site.initial is not None), False),
        }

    def quantize(self, x: tf.Tensor, site: Site, variables: Variables, observed: tf.Tensor | None) -> tf.Tensor:
        ends = _or_observed(variables["range"], variables, observed)
        return fake_quantize(x, ends[0], ends[1], site)

    def update(self, site: Site, variables: Variables, observed: tf.Tensor) -> None:
        before = tf.convert_to_tensor(variables["range"])
        share = tf.where(tf.convert_to_tensor(variables["observed"]) > 0, self.momentum, 0.0)
        variables["range"].assign(share * before + (1.0 - share) * observed)
        variables["observed"].assign(tf.ones(()))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "momentum": self.momentum}


class FixedRangeQuantizer(Quantizer):
    """The range is given.

    Args:
        low: its least value, at most 0.
        high: its largest value, at least 0.
        num_bits: as for `Quantizer`.
    """

    def __init__(self, low: float, high: float, num_bits: int | None = None) -> None:
        super().__init__(num_bits)
        if not low <= 0 <= high or low == high:
            raise ConfigError(f"A range must hold 0 and another number. Received: {shown((low, high))}")
        self.low, self.high = float(low), float(high)

    def quantize(self, x: tf.Tensor, site: Site, variables: Variables, observed: tf.Tensor | None) -> tf.Tensor:
        count = site.channels
        return fake_quantize(
            x, tf.fill([count], self.low) if count else self.low, tf.fill([count], self.high) if count else self.high, site
        )

    def get_config(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, **super().get_config()}


class LearnedStepQuantizer(Quantizer):
    """The step is trained, the zero point stays where the first range has it (LSQ, arXiv:1902.08153).

    The gradient of the step s is g * (round(x / s) - x / s) where x is within the range, and g times the integer at its end
    elsewhere, summed and divided by sqrt(elements * largest integer). The variable is ln s with that gradient divided by s: plain
    gradient descent changes s by the same share, and optimizers that norm gradients (Adam) change it by a share, too, for which
    s itself would be too small a number.

    For activations the step begins at the range that calibration gave, or that of the first step's values; for weights where
    their squared error is least.

    Args:
        num_bits: as for `Quantizer`.
    """

    observes = "first"

    def build(self, site: Site, add_weight: AddWeight) -> Variables:
        if site.channels:
            return {"log_step": add_weight("log_step", (site.channels,), np.log(best_steps(site)), True)}
        low, high = site.initial or (0.0, 0.0)
        step, zero = _grid(tf.constant(low), tf.constant(high), site)
        return {
            "log_step": add_weight("log_step", (), float(tf.math.log(step)), True),
            "zero_point": add_weight("zero_point", (), float(zero), False),
            "observed": add_weight("observed", (), float(site.initial is not None), False),
        }

    def quantize(self, x: tf.Tensor, site: Site, variables: Variables, observed: tf.Tensor | None) -> tf.Tensor:
        log_step = tf.convert_to_tensor(variables["log_step"])
        zero = 0.0 if site.channels else tf.convert_to_tensor(variables["zero_point"])
        if observed is not None and not site.channels:
            # The first step's own range; the gradient is the variable's, which is set to it before it is trained.
            first, first_zero = _grid(observed[0], observed[1], site)
            is_first = tf.convert_to_tensor(variables["observed"]) == 0
            log_step += tf.where(is_first, tf.stop_gradient(tf.math.log(first) - log_step), 0.0)
            zero = tf.where(is_first, first_zero, zero)
        most = float(largest(site.bits)) if site.is_symmetric else 2.0**site.bits - 1 - zero
        least = -float(largest(site.bits)) if site.is_symmetric else -zero
        return _learned_step(x, log_step, least, most, site)

    def update(self, site: Site, variables: Variables, observed: tf.Tensor) -> None:
        is_first = tf.convert_to_tensor(variables["observed"]) == 0
        step, zero = _grid(observed[0], observed[1], site)
        for name, value in (("log_step", tf.math.log(step)), ("zero_point", zero)):
            variables[name].assign(tf.where(is_first, value, tf.convert_to_tensor(variables[name])))
        variables["observed"].assign(tf.ones(()))


def best_steps(site: Site) -> np.ndarray:
    """The steps with the least squared error of a site's weights, of those that end at 0.3 to 1 of the largest, float32 (C,).

    Raises:
        ValueError: the site has no weights.
    """
    if site.weights is None:
        raise ValueError(f"{site.name} has no weights")
    flat = site.weights.reshape(-1, site.channels).astype(np.float64)
    most = largest(site.bits)
    plain = np.maximum(np.abs(flat).max(0), _LEAST_RANGE) / most
    best, least = plain, np.full(site.channels, np.inf)
    for share in _SHARES:
        steps = share * plain
        error = ((flat - np.clip(np.rint(flat / steps), -most, most) * steps) ** 2).sum(0)
        best, least = np.where(error < least, steps, best), np.minimum(error, least)
    return best.astype(np.float32)


def _only_activations(quantizer: Quantizer, site: Site) -> None:
    if site.channels:
        raise ConfigError(
            f"{type(quantizer).__name__} is for activations: give weights a LastValueQuantizer or a LearnedStepQuantizer. "
            f"Received: the weights of {site.name}"
        )


def ends_of(x: tf.Tensor, site: Site) -> tf.Tensor:
    """The least and the largest value of a tensor, within what it can have, float32 (2,)."""
    low = tf.constant(site.floor, tf.float32) if site.floor is not None else tf.minimum(tf.reduce_min(x), 0.0)
    high = tf.maximum(tf.reduce_max(x), 0.0)
    if site.ceiling is not None:
        high = tf.minimum(high, site.ceiling)
    return tf.stack([low, high])


def _or_observed(ends: Any, variables: Variables, observed: tf.Tensor | None) -> tf.Tensor:
    """The ends that a variable holds; as long as it holds none, those of this step."""
    ends = tf.convert_to_tensor(ends)
    return ends if observed is None else tf.where(tf.convert_to_tensor(variables["observed"]) > 0, ends, observed)


def fake_quantize(x: tf.Tensor, low: Any, high: Any, site: Site) -> tf.Tensor:
    """x on a grid of 2**bits values that holds 0; gradients of what is clipped are 0 for x, and go to the ends.

    Args:
        x: float32; of weights (..., channels).
        low: the least value, at most 0; of weights (channels,).
        high: the largest value, at least 0; likewise.
        site: where it is.
    """
    if site.is_symmetric:
        high = tf.maximum(-low, high)
        low = -high
    if site.channels:
        high = tf.maximum(high * _WIDER, _LEAST_RANGE)
        return tf.quantization.fake_quant_with_min_max_vars_per_channel(
            x, -high if site.is_symmetric else low, high, num_bits=site.bits, narrow_range=site.is_symmetric
        )
    high = tf.maximum(high, _LEAST_RANGE)
    if site.is_symmetric:
        low = -high
    return tf.quantization.fake_quant_with_min_max_vars(x, low, high, num_bits=site.bits, narrow_range=site.is_symmetric)


def _grid(low: tf.Tensor, high: tf.Tensor, site: Site) -> tuple[tf.Tensor, tf.Tensor]:
    """Step and zero point of a range."""
    if site.is_symmetric:
        return tf.maximum(tf.maximum(-low, high), _LEAST_RANGE) / float(largest(site.bits)), tf.zeros(())
    step = tf.maximum(high - low, _LEAST_RANGE) / (2.0**site.bits - 1)
    return step, tf.round(-low / step)


def _learned_step(x: tf.Tensor, log_step: tf.Tensor, least: Any, most: Any, site: Site) -> tf.Tensor:
    """x on the grid exp(log_step) * n, n from least to most, with the gradients of LSQ."""
    axes = list(range(x.shape.rank - 1)) if site.channels else None
    elements = tf.cast(tf.size(x), tf.float32) / max(site.channels, 1)

    @tf.custom_gradient
    def rounded(x: tf.Tensor, log_step: tf.Tensor) -> Any:
        step = tf.exp(log_step)
        low, high = least * step, most * step
        y = fake_quantize(x, low, high, site)

        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            kind = "per_channel_gradient" if site.channels else "gradient"
            backward = getattr(tf.quantization, f"fake_quant_with_min_max_vars_{kind}")
            inside, below, above = backward(upstream, x, low, high, num_bits=site.bits, narrow_range=site.is_symmetric)
            total = tf.reduce_sum(inside * (y - x), axes) / step + below * least + above * most
            return inside, total / step * tf.math.rsqrt(elements * float(largest(site.bits)))

        return y, gradient

    return rounded(x, log_step)


QUANTIZERS: tuple[type[Quantizer], ...] = (
    LastValueQuantizer,
    MovingAverageQuantizer,
    FixedRangeQuantizer,
    LearnedStepQuantizer,
)
