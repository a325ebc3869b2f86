"""What a diagnosis found: facts per layer, as a table for people and JSON for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tfquant.tables import table

WORST = 10
# A layer whose own error is beyond 1% of its output's power.
ALARM = 20.0


@dataclasses.dataclass(frozen=True)
class InputUse:
    """How an input of a layer fits its 8-bit range.

    Attributes:
        tensor: its name.
        source: where its range comes from: an estimator, "known", "user", or "dynamic" for one that is found at each call.
        bits: of an integer.
        low: the real value of the least integer; None for a range that is found at each call.
        high: that of the largest, likewise.
        seen_low: the least value in the data.
        seen_high: the largest.
        clipped: share of the values that lie more than half a step outside of the range.
        clipping: share of the squared error of its rounding that such values make.
        used: share of the range between the least and the largest value.
        channel_use: max |x| of a channel over the largest |x| of the range, the mean over the channels.
    """

    tensor: str
    source: str
    bits: int
    low: float | None
    high: float | None
    seen_low: float
    seen_high: float
    clipped: float
    clipping: float
    used: float
    channel_use: float


@dataclasses.dataclass(frozen=True)
class Advice:
    """What would help a layer.

    Attributes:
        kind: an algorithm (of `algorithms.ALGORITHMS`), "estimator", "data", "bits", "per_channel", or "float", to keep it so.
        text: the reason in figures, and what to do.
    """

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class LayerDiagnosis:
    """The errors of a layer: one unit of the plan, with the activation and the sum that its kernel computes too.

    Signal-to-noise ratios are in dB, of the sums of squares over all samples. An error that comes from rounding an activation
    counts at the layers that read it, or at the one that makes it where none does.

    Attributes:
        name: of its main op, as in the plan.
        layer: path of its Keras layer.
        kernel: of the target.
        moves: it only moves values or picks among them, in the range that they have.
        weight_sqnr: of its 8-bit weights; None where it has none.
        output_sqnr: of its output with this layer alone quantized: what it reads is float, and rounded on the way in.
        weight_share: share of that error that its weights make by themselves, at most 1.
        mean_share: share of that error that is a constant per output channel.
        accumulated_sqnr: of its output in the whole simulation.
        jump: noise over signal of its output in the simulation, minus that of the worst layer in front of it, with nothing but
            float ops between; 0 where it does not grow.
        inputs: those that it reads in 8 bits.
        advice: what would help, None where nothing stands out.
    """

    name: str
    layer: str
    kernel: str
    moves: bool
    weight_sqnr: float | None
    output_sqnr: float
    weight_share: float
    mean_share: float
    accumulated_sqnr: float
    jump: float
    inputs: tuple[InputUse, ...]
    advice: Advice | None = None

    @property
    def clipped(self) -> float:
        """The largest share of clipped values of an input."""
        return max((use.clipped for use in self.inputs), default=0.0)

    @property
    def used(self) -> float:
        """The least share of its range that an input uses."""
        return min((use.used for use in self.inputs), default=1.0)

    @property
    def amplifies(self) -> bool:
        """Whether most of the jump is not its own error, but errors of other layers that grow on the way through it."""
        return self.jump > 2 * 10 ** (-self.output_sqnr / 10)


@dataclasses.dataclass(frozen=True)
class OutputDiagnosis:
    """The error of an output of the model in the whole simulation.

    Attributes:
        name: of the output.
        sqnr: in dB.
        mean_share: share of the error that is a constant per channel.
    """

    name: str
    sqnr: float
    mean_share: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Where a quantized model loses what it loses; `str()` is the summary that the command line prints.

    Attributes:
        name: of the model.
        mode: of its plan.
        samples: that were run.
        layers: in topological order.
        outputs: of the model, those of floats.
        unmeasured: layers in the bodies of loops, which run in INT8 and are not among `layers`.
    """

    name: str
    mode: str
    samples: int
    layers: tuple[LayerDiagnosis, ...]
    outputs: tuple[OutputDiagnosis, ...]
    unmeasured: int = 0

    @property
    def alarms(self) -> tuple[LayerDiagnosis, ...]:
        """The layers that by themselves are below 20 dB, the worst first."""
        return tuple(layer for layer in self.worst(len(self.layers)) if layer.output_sqnr < ALARM)

    def worst(self, count: int = WORST) -> tuple[LayerDiagnosis, ...]:
        """The layers with the largest errors of their own, those left out that only move values."""
        layers = [layer for layer in self.layers if not layer.moves and math.isfinite(layer.output_sqnr)]
        return tuple(sorted(layers, key=lambda layer: layer.output_sqnr)[:count])

    def jumps(self, count: int = WORST) -> tuple[LayerDiagnosis, ...]:
        """The layers at which the accumulated error grows most."""
        layers = [layer for layer in self.layers if layer.jump > 0]
        return tuple(sorted(layers, key=lambda layer: -layer.jump)[:count])

    def to_json(self) -> dict[str, Any]:
        """All figures, for `json.dumps`; what is infinite (no error at all) is null."""
        content: dict[str, Any] = _finite(dataclasses.asdict(self))
        content["worst"] = [layer.name for layer in self.worst()]
        content["jumps"] = [layer.name for layer in self.jumps()]
        content["alarms"] = [layer.name for layer in self.alarms]
        return content

    def __str__(self) -> str:
        return "\n".join(self.lines(WORST))

    def lines(self, count: int) -> list[str]:
        """The summary, with so many layers in each table."""
        mode = "" if self.mode == "static" else f", mode {self.mode}"
        lines = [f"Diagnosis of {self.name} on {self.samples} samples: {len(self.layers)} layers in 8 bits{mode}", ""]
        worst = self.worst(count)
        lines += _errors_alone(worst) + _growth(self.jumps(count), worst)
        if self.outputs:
            rows = [["Output", "dB", "Mean shift"]]
            rows += [[output.name, _decibels(output.sqnr), f"{output.mean_share:.0%}"] for output in self.outputs]
            lines += [*table(rows), ""]
        alarms = self.alarms
        names = ", ".join(dict.fromkeys(layer.layer for layer in alarms))
        lines.append(f"Below {ALARM:g} dB by themselves: {names}" if alarms else f"No layer is below {ALARM:g} dB by itself")
        if self.unmeasured:
            lines.append(f"Not measured: {self.unmeasured} layers in the bodies of loops")
        return lines


def _errors_alone(layers: Sequence[LayerDiagnosis]) -> list[str]:
    rows = [["Layer by itself", "Weights dB", "Alone dB", "Accumulated dB", "By weights", "Mean shift", "Clipped", "Range used"]]
    for name, layer in zip(_names(layers), layers, strict=True):
        rows.append(
            [
                name,
                "" if layer.weight_sqnr is None else _decibels(layer.weight_sqnr),
                _decibels(layer.output_sqnr),
                _decibels(layer.accumulated_sqnr),
                f"{layer.weight_share:.0%}",
                f"{layer.mean_share:.0%}",
                f"{layer.clipped:.2%}",
                f"{layer.used:.0%}",
            ]
        )
    return _section(rows, [layer.advice.text if layer.advice else "" for layer in layers])


def _growth(layers: Sequence[LayerDiagnosis], told_before: Sequence[LayerDiagnosis]) -> list[str]:
    rows = [["Growth of the accumulated error", "Noise / signal", "Accumulated dB", "Alone dB"]]
    told = []
    for name, layer in zip(_names(layers), layers, strict=True):
        growth = f"+{100 * layer.jump:.3g}%"
        rows.append([name, growth, _decibels(layer.accumulated_sqnr), _decibels(layer.output_sqnr)])
        advice = layer.advice.text if layer.advice is not None and layer not in told_before else ""
        told.append(_ENLARGED if layer.amplifies and layer.output_sqnr >= ALARM else advice)
    return _section(rows, told)


_ENLARGED = "the own error is small: the layer, or float ops in front of it, enlarges that of the layers before"


def _names(layers: Sequence[LayerDiagnosis]) -> list[str]:
    """The layers' paths, where several are of one layer with the op."""
    paths = [layer.layer for layer in layers]
    return [layer.layer if paths.count(layer.layer) == 1 else layer.name for layer in layers]


def _section(rows: Sequence[Sequence[str]], told: Sequence[str]) -> list[str]:
    """A table of layers, and below it what would help them; layers of which the same is told have one line."""
    if len(rows) == 1:
        return []
    names: dict[str, list[str]] = {}
    for row, text in zip(rows[1:], told, strict=True):
        names.setdefault(text, []).append(row[0])
    return [*table(rows), *(f"  {', '.join(found)}: {text}" for text, found in names.items() if text), ""]


def _decibels(value: float) -> str:
    return "exact" if math.isinf(value) else f"{value:.1f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
