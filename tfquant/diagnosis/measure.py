"""The errors of every layer, added up inside of one graph: the float model, its simulation, and each layer quantized alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.diagnosis.advice import advise
from tfquant.diagnosis.result import Diagnosis, InputUse, LayerDiagnosis, OutputDiagnosis
from tfquant.errors import DataError
from tfquant.graph.execution import executable
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.merging import merge
from tfquant.graph.paths import layer_of
from tfquant.observe.collector import called
from tfquant.observe.ranges import weight_scales
from tfquant.plan.edits import in_effect, uncorrected
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS, DynamicSpec, QuantPlan, QuantSpec
from tfquant.targets import fakequant, returns_float, weights
from tfquant.verify import decibels

Get = Callable[[Tensor], tf.Tensor]
Sums = dict[str, Any]  # of one tensor or pair of tensors: name of a sum to its value
_FLOAT, _SIMULATED = "float", "simulated"
# What is no sum: how the values of two batches become one.
_MERGED: Mapping[str, Callable[..., Any]] = {"low": np.minimum, "high": np.maximum}


class Measurement:
    """Runs batches and adds up what quantization does to every layer; memory does not grow with their number.

    Args:
        graph: the simplified float graph, with the edits of the plan.
        units: what runs in INT8 of it, by root node.
        plan: ranges and scales, of mode "static" or "dynamic".
    """

    def __init__(self, graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> None:
        self._units, self._plan = list(units.values()), plan
        self._before = _layers_before(graph, units)
        self._scene = Scene(graph, units, plan)
        self._probes = self._make_probes()
        self._run = executable(self._scene.graph, lambda get: [probe(get) for probe in self._probes.values()])
        self._sums: dict[tuple[str, str], Sums] = {}

    def _make_probes(self) -> dict[tuple[str, str], Callable[[Get], Sums]]:
        """(kind, name) to the sums of a batch, as ops."""
        scene = self._scene
        probes: dict[tuple[str, str], Callable[[Get], Sums]] = {}
        for unit in self._units:
            output = scene.floats[unit.output]
            probes["alone", unit.name] = _error_probe(output, scene.alone(unit))
            if scene.has_weights(unit):
                probes["weights", unit.name] = _error_probe(output, scene.alone(unit, inputs=False))
            probes["accumulated", unit.name] = _error_probe(output, scene.simulated[unit.output])
            for tensor in unit.inputs:
                probes["input", tensor.name] = _use_probe(scene.floats[tensor], *scene.quantized(tensor))
        for key, (expected, found) in scene.outputs.items():
            probes["output", key] = _error_probe(expected, found, are_all_finite=False)
        return probes

    def update(self, batch: Mapping[str, np.ndarray]) -> None:
        """Adds a batch, keyed by input name.

        Raises:
            DataError: the network makes NaN or infinity of it.
            ModelError: TensorFlow cannot run the float model on it.
        """
        results = called(self._run, self._scene.graph, batch)
        for (kind, name), result in zip(self._probes, results, strict=True):
            new = {key: value.numpy() for key, value in result.items()}
            if not np.isfinite(new["signal"]):
                raise DataError(f"The network computes NaN or infinity from this data, first seen at {layer_of(name)}.")
            old = self._sums.get((kind, name))
            merged = {key: _MERGED.get(key, np.add)(old[key], value) for key, value in new.items()} if old else new
            self._sums[kind, name] = merged

    def finish(self, name: str, samples: int, unmeasured: int = 0) -> Diagnosis:
        """What was found.

        Args:
            name: of the model.
            samples: how many the batches held.
            unmeasured: layers that run in INT8 and are not in the graph.

        Raises:
            DataError: there was no batch.
        """
        if not self._sums:
            raise DataError("The data has no samples: give at least one.")
        outputs = [
            OutputDiagnosis(key, _sqnr(sums), _mean_share(sums)) for (kind, key), sums in self._sums.items() if kind == "output"
        ]
        layers = tuple(self._layer(unit) for unit in self._units)
        return Diagnosis(name, self._plan.mode, samples, layers, tuple(outputs), unmeasured)

    def _layer(self, unit: Unit) -> LayerDiagnosis:
        alone, by_weights = self._sums["alone", unit.name], self._sums.get(("weights", unit.name))
        accumulated = self._sums["accumulated", unit.name]
        before = [_noise_to_signal(self._sums["accumulated", name]) for name in self._before[unit.name]]
        share = min(float(by_weights["noise"] / alone["noise"]), 1.0) if by_weights and alone["noise"] > 0 else 0.0
        layer = LayerDiagnosis(
            name=unit.name,
            layer=layer_of(unit.name),
            kernel=unit.kernel.name,
            moves=unit.kernel.role in ("share", "source") and not unit.own_ranges,
            weight_sqnr=self._weight_sqnr(unit, self._plan),
            output_sqnr=_sqnr(alone),
            weight_share=share,
            mean_share=_mean_share(alone),
            accumulated_sqnr=_sqnr(accumulated),
            jump=max(0.0, _noise_to_signal(accumulated) - max(before, default=0.0)),
            inputs=tuple(self._use(tensor) for tensor in unit.inputs),
        )
        bits = self._plan.weight_bits.get(unit.name)
        fewest = BITS[1] if bits is None else int(bits.min())
        applied = str(self._plan.settings.get("algorithms", "")).split(",")
        return dataclasses.replace(layer, advice=advise(layer, unit, fewest, self._per_channel_sqnr(unit), applied))

    def _weight_sqnr(self, unit: Unit, plan: QuantPlan) -> float | None:
        if not self._scene.has_weights(unit):
            return None
        assert unit.weights is not None
        exact = unit.weights.astype(np.float64)
        noise = float(((weights.dequantized(unit, plan) - exact) ** 2).sum())
        return decibels(float((exact**2).sum()), noise)

    def _per_channel_sqnr(self, unit: Unit) -> float | None:
        """Of the nearest weights with a scale per output channel, where the plan has one scale for all."""
        scales = self._plan.weight_scales.get(unit.name)
        if scales is None or len(scales) < 2 or len(set(scales.tolist())) > 1 or not self._scene.has_weights(unit):
            return None
        own = weight_scales(unit, None, ())
        plan = dataclasses.replace(self._plan, weight_scales={unit.name: own}, rounded={}, weight_bits={})
        return self._weight_sqnr(unit, plan)

    def _use(self, tensor: Tensor) -> InputUse:
        sums, spec = self._sums["input", tensor.name], self._scene.spec(tensor)
        low, high = float(sums["low"].min()), float(sums["high"].max())
        largest = np.maximum(np.abs(sums["low"]), np.abs(sums["high"]))
        source, bits, ends = "dynamic", BITS[1], (min(low, 0.0), max(high, 0.0))
        if isinstance(spec, QuantSpec):
            source, bits, ends = spec.source, spec.bits, (spec.low, spec.high)
        inside = max(0.0, min(high, ends[1]) - max(low, ends[0]))
        bound, width = max(abs(ends[0]), abs(ends[1])), ends[1] - ends[0]
        return InputUse(
            tensor=tensor.name,
            source=source,
            bits=bits,
            low=ends[0] if isinstance(spec, QuantSpec) else None,
            high=ends[1] if isinstance(spec, QuantSpec) else None,
            seen_low=low,
            seen_high=high,
            clipped=float(sums["clipped"] / sums["elements"]),
            clipping=float(sums["clipping"] / sums["rounding"]) if sums["rounding"] > 0 else 0.0,
            used=inside / width if width else 1.0,
            channel_use=float(np.minimum(largest / bound, 1.0).mean()) if bound else 1.0,
        )


class Scene:
    """The graph in which everything is measured.

    Attributes:
        graph: the float model and the simulation side by side, and each unit once more by itself.
        floats: a tensor of the float graph to that of the float model in `graph`.
        simulated: the output of a unit to that of the simulation, before it is rounded for those who read it in 8 bits.
        outputs: by their names, those that are floats: (of the float model, of the simulation).
    """

    def __init__(self, graph: Graph, units: Mapping[Node, Unit], plan: QuantPlan) -> None:
        self._plan = plan
        self._position = {node: index for index, node in enumerate(graph.order())}
        self._made = {unit.output for unit in units.values() if not returns_float(graph, unit, plan)}
        self._read = {tensor for unit in units.values() for tensor in unit.inputs}
        wanted = dict.fromkeys(unit.output for unit in units.values())
        needed = wanted | {tensor: None for unit in units.values() for tensor in (*unit.inputs, *_sources(unit))}
        reference, simulation = uncorrected(graph, in_effect(plan)), fakequant.lower(graph, units, plan)
        keys = [key for key, tensor in graph.outputs.items() if tensor.dtype is not None and tensor.dtype.is_floating]
        for side, tensors in ((reference, needed), (simulation, wanted)):
            results = {f"result/{key}": side.outputs[key] for key in keys}
            side.outputs = results | {f"tensor/{t.name}": Tensor(side.nodes[t.node.name], t.index) for t in tensors}
            side.effects = []
        for tensor in self._made - self._read:  # nobody's input: its rounding counts here
            name = f"tensor/{tensor.name}"
            simulation.outputs[name] = _rounded(simulation.outputs[name])
        self.graph = merge({_FLOAT: reference, _SIMULATED: simulation})
        found = self.graph.outputs
        self.floats = {tensor: found[f"{_FLOAT}/tensor/{tensor.name}"] for tensor in needed}
        self.simulated = {tensor: found[f"{_SIMULATED}/tensor/{tensor.name}"] for tensor in wanted}
        self.outputs = {key: (found[f"{_FLOAT}/result/{key}"], found[f"{_SIMULATED}/result/{key}"]) for key in keys}
        self._quantized: dict[tuple[Tensor, QuantSpec | DynamicSpec], Tensor] = {}
        self._constants: dict[Node, Tensor] = {}
        self._rounded_weights: dict[str, tuple[int, Tensor] | None] = {}

    def spec(self, tensor: Tensor) -> QuantSpec | DynamicSpec:
        """How the plan stores a tensor."""
        return self._plan.tensors.get(tensor.name) or self._plan.dynamic[tensor.name]

    def quantized(self, tensor: Tensor) -> tuple[Tensor, QuantSpec | DynamicSpec]:
        """The float model's tensor rounded to its steps, and these."""
        spec = self.spec(tensor)
        return self._kept(self._fake(self.floats[tensor], spec)), spec

    def has_weights(self, unit: Unit) -> bool:
        """Whether a unit has weights in 8 bits."""
        return self._weights(unit) is not None

    def alone(self, unit: Unit, inputs: bool = True) -> Tensor:
        """The output of a unit with 8-bit weights on the float model's tensors: rounded, or without `inputs` as they are."""
        twins: dict[Node, Node] = {}
        for node in sorted(unit.match.covered, key=self._position.__getitem__):
            sources = [self._input(unit, node, slot, twins, inputs) for slot in range(len(node.inputs))]
            twins[node] = self.graph.copy_of(node, sources)
        result = Tensor(twins[unit.output.node], unit.output.index)
        if inputs and unit.output in self._made - self._read:
            result = self._fake(result, self.spec(unit.output))
        return self._kept(result)

    def _kept(self, tensor: Tensor) -> Tensor:
        """Makes a tensor an output, without which the graph would be run without it."""
        self.graph.outputs[f"kept/{len(self.graph.outputs)}"] = tensor
        return tensor

    def _input(self, unit: Unit, node: Node, slot: int, twins: Mapping[Node, Node], is_rounded: bool) -> Tensor:
        """What the twin of a node of a unit reads."""
        tensor, rounded = node.inputs[slot], self._weights(unit)
        if tensor.node in twins:
            return Tensor(twins[tensor.node], tensor.index)
        if rounded is not None and node is unit.main and slot == rounded[0]:
            return rounded[1]
        if tensor.node.op == "Const":
            return self._constant(tensor)
        if not is_rounded or tensor not in unit.inputs or (node, slot) in unit.float_slots:
            return self.floats[tensor]
        # What comes in float is rounded once, where the kernel has one range for all of its inputs to that.
        return self._fake(self.floats[tensor], self.spec(unit.output if unit.own_ranges else tensor))

    def _weights(self, unit: Unit) -> tuple[int, Tensor] | None:
        if unit.name not in self._rounded_weights:
            found = fakequant.rounded_weights(unit, self._plan)
            self._rounded_weights[unit.name] = found and (
                found[0],
                self.graph.constant(found[1], name=f"{unit.name}/dequantized_weights"),
            )
        return self._rounded_weights[unit.name]

    def _constant(self, tensor: Tensor) -> Tensor:
        if tensor.node not in self._constants:
            assert tensor.value is not None
            self._constants[tensor.node] = self.graph.constant(tensor.value, name=tensor.node.name, dtype=tensor.dtype)
        return self._constants[tensor.node]

    def _fake(self, tensor: Tensor, spec: QuantSpec | DynamicSpec) -> Tensor:
        if (tensor, spec) not in self._quantized:
            name = f"{tensor.node.name}/alone"
            self._quantized[tensor, spec] = fakequant.fake_quantize(self.graph, tensor, spec, name)
        return self._quantized[tensor, spec]


def _layers_before(graph: Graph, units: Mapping[Node, Unit]) -> dict[str, frozenset[str]]:
    """Unit to the units whose outputs reach it first, with nothing but float ops between; all by name."""
    makers = {unit.output.node: unit.name for unit in units.values()}
    behind: dict[Node, frozenset[str]] = {}  # the units that reach a node first; a unit's last node shows others the unit alone
    found: dict[str, frozenset[str]] = {}
    for node in graph.order():
        reaching = frozenset().union(*(behind.get(tensor.node, frozenset()) for tensor in node.inputs))
        if node in makers:
            found[makers[node]] = reaching
            reaching = frozenset({makers[node]})
        behind[node] = reaching
    return found


def _sources(unit: Unit) -> list[Tensor]:
    """The tensors that a unit reads, in 8 bits or in float; constants left out."""
    covered = set(unit.match.covered)
    read = [tensor for node in unit.match.covered for tensor in node.inputs]
    return [tensor for tensor in read if tensor.node not in covered and tensor.node.op != "Const"]


def _rounded(tensor: Tensor) -> Tensor:
    """The fake quantization behind a tensor of the simulation that is made in 8 bits: it alone reads that."""
    ((node, _),) = tensor.node.users
    assert node.op == fakequant.OP
    return node.out


# -- sums, as ops -------------------------------------------------------------------------------------------------------------
def _error_probe(expected: Tensor, found: Tensor, are_all_finite: bool = True) -> Callable[[Get], Sums]:
    return lambda get: _error_sums(get(expected), get(found), are_all_finite)


def _use_probe(tensor: Tensor, rounded: Tensor, spec: QuantSpec | DynamicSpec) -> Callable[[Get], Sums]:
    return lambda get: _use_sums(get(tensor), get(rounded), spec)


def _error_sums(expected: tf.Tensor, found: tf.Tensor, are_all_finite: bool) -> Sums:
    """Squares of `expected` and of the error; the error added up per channel, with the number of values that each has.

    Where not all of `expected` need be finite (a model may show the logarithm of 0), what is not counts as nothing.
    """
    exact = tf.cast(expected, tf.float64)
    error = tf.cast(found, tf.float64) - exact
    if not are_all_finite:
        is_finite, nothing = tf.math.is_finite(exact), tf.zeros_like(exact)
        exact, error = tf.where(is_finite, exact, nothing), tf.where(is_finite, error, nothing)
    shift = tf.reduce_sum(error, _all_but_channels(expected))
    return {
        "signal": tf.reduce_sum(exact * exact),
        "noise": tf.reduce_sum(error * error),
        "shift": shift,
        "values": tf.size(error, tf.int64) // tf.maximum(tf.size(shift, tf.int64), 1),
    }


def _use_sums(x: tf.Tensor, rounded: tf.Tensor, spec: QuantSpec | DynamicSpec) -> Sums:
    """How the values of a tensor lie in its range; `low` and `high` per channel, `rounding` and `clipping` squares of errors."""
    axes = _all_but_channels(x)
    low, high = tf.reduce_min(x, axes), tf.reduce_max(x, axes)
    exact = tf.cast(x, tf.float64)
    rounding = tf.reduce_sum(tf.square(tf.cast(rounded, tf.float64) - exact))
    if isinstance(spec, QuantSpec):
        outside = exact - tf.clip_by_value(exact, spec.low, spec.high)
        is_clipped = tf.abs(outside) > spec.scale / 2
        clipped = tf.math.count_nonzero(is_clipped)
        clipping = tf.reduce_sum(tf.where(is_clipped, outside * outside, tf.zeros_like(outside)))
    else:
        clipped, clipping = tf.zeros([], tf.int64), tf.zeros([], tf.float64)
    return {
        "signal": tf.reduce_sum(exact * exact),
        "low": low,
        "high": high,
        "elements": tf.size(x, tf.int64),
        "clipped": clipped,
        "rounding": rounding,
        "clipping": clipping,
    }


def _all_but_channels(value: tf.Tensor) -> list[int] | None:
    """The axes but the last; all where the number of channels may differ from batch to batch."""
    rank = value.shape.rank
    return list(range(rank - 1)) if rank is not None and rank > 1 and value.shape[-1] is not None else None


# -- figures of the sums --------------------------------------------------------------------------------------------------------
def _sqnr(sums: Sums) -> float:
    return decibels(float(sums["signal"]), float(sums["noise"]))


def _noise_to_signal(sums: Sums) -> float:
    return float(sums["noise"]) / max(float(sums["signal"]), 1e-300)


def _mean_share(sums: Sums) -> float:
    """Share of the noise that a constant per channel makes, beyond what chance makes of so few values."""
    noise, values = float(sums["noise"]), int(sums["values"])
    if noise == 0 or values < 2:
        return 0.0
    share = float((np.square(sums["shift"]) / values).sum()) / noise
    return max(0.0, (share - 1 / values) / (1 - 1 / values))
