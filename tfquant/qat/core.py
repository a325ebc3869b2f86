"""What a quantization-aware model does around the calls of the model inside it; knows no Keras."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.qat.biases import Biases
from tfquant.qat.design import INPUT, Activation, Design, Weight, ops_of
from tfquant.qat.quantizers import AddWeight, Quantizer, Site, Variables, ends_of
from tfquant.qat.tracing import Tracer, in_scope, tracing


@dataclasses.dataclass(frozen=True)
class Stage:
    """What training does at the moment.

    Attributes:
        quantizes: values are rounded; else they are observed alone.
        observes: ranges follow the values.
        freezes_statistics: BatchNorm uses its moving averages, and leaves them as they are.
    """

    quantizes: bool = True
    observes: bool = True
    freezes_statistics: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one site of a design is quantized: the quantizer, and what it is to know of the site."""

    quantizer: Quantizer
    site: Site


@dataclasses.dataclass
class _Call:
    """One call of the model: what it has met so far."""

    tracer: Tracer
    names: Mapping[str, str] | None
    stage: Stage
    is_training: bool
    biases: Biases
    met: set[str] = dataclasses.field(default_factory=set)
    sources: dict[str, tf.Tensor] = dataclasses.field(default_factory=dict)
    rounded: dict[int, tuple[tf.Tensor, tf.Tensor]] = dataclasses.field(default_factory=dict)
    ends: dict[int, tuple[tf.Tensor, tf.Tensor]] = dataclasses.field(default_factory=dict)

    def canonical(self, name: str) -> str | None:
        """The name that the design has for an op of this trace."""
        return name if self.names is None else self.names.get(name)


def weights_key(name: str) -> str:
    """What the site of the weights of an op is called."""
    return f"{name}/weights"


def result_key(name: str) -> str:
    """What the site of a tensor is called that is observed alone."""
    return f"{name}/result"


class Core:
    """The quantizers of a model and their variables, and the calls that pass through them.

    Args:
        design: where they are.
        choices: name of a site (an activation of the design, a weight, or a result) to what is there.
        add_weight: makes a variable that the Keras model owns.
    """

    def __init__(self, design: Design, choices: Mapping[str, Choice], add_weight: AddWeight) -> None:
        self._design, self._choices = design, choices
        self.variables: dict[str, Variables] = {
            name: choice.quantizer.build(choice.site, _prefixed(add_weight, name)) for name, choice in choices.items()
        }
        self._activations: dict[str, Activation] = {key: a for a in design.activations for key in a.tensors}
        self._weights: dict[str, Weight] = {weight.op: weight for weight in design.weights}
        self._sources = {key for a in design.activations for key in a.sources} | set(design.results)
        self._ops = ops_of(design)

    def call(
        self,
        model: Callable[[], Any],
        inputs: Sequence[tf.Tensor],
        names: Mapping[str, str] | None,
        stage: Stage,
        is_training: bool,
    ) -> Any:
        """Calls the model while a graph is built, with fake quantization.

        Args:
            model: makes the ops in the default graph; returns the outputs.
            inputs: the flat inputs that it is given.
            names: names of ops in this kind of trace to those of the design; None where they are the same.
            stage: what training does; without training, everything is rounded by the ranges as they are.
            is_training: whether the model trains.

        Raises:
            ModelError: the model's code makes another graph than the one that was designed for.
        """
        with in_scope() as scope:
            found: _Call
            tracer = Tracer(
                tf.compat.v1.get_default_graph(),
                scope,
                lambda name, op, marks, given: self._replace(found, name, marks, given),
                lambda name, op: self._made(found, name, op),
            )
            found = _Call(tracer, names, stage if is_training else Stage(), is_training, Biases(self._design.weights))
            for number, tensor in enumerate(inputs):
                self._meet(found, f"{INPUT}{number}", tensor)
            with tracing(tracer):
                result = model()
            if found.stage.quantizes:
                result = tf.nest.map_structure(lambda output: self._given_out(found, output), result)
            left = self._ops - found.met
            if left:
                raise ModelError(
                    "The model builds another graph than when it was quantized: quantize it again, or keep this layer in float "
                    f"(ignored_scope). Received: no {min(left)}"
                )
            if is_training and stage.observes:
                self._update(found)
        return result

    # -- what the tracer asks ------------------------------------------------------------------------------------------
    def _made(self, call: _Call, name: str, op: tf.Operation) -> None:
        canonical = call.canonical(name)
        if canonical not in self._ops:
            return
        call.met.add(canonical)
        for index, tensor in enumerate(op.outputs):
            self._meet(call, f"{canonical}:{index}", tensor)

    def _meet(self, call: _Call, key: str, tensor: tf.Tensor) -> None:
        if key in self._activations:
            call.tracer.mark(tensor, key)
        if key in self._sources:
            call.sources[key] = tensor

    def _replace(self, call: _Call, name: str, marks: Sequence[str | None], inputs: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        canonical = call.canonical(name)
        weight = self._weights.get(canonical) if canonical else None
        if not call.stage.quantizes:
            return inputs
        if not call.is_training or call.stage.freezes_statistics:
            inputs = call.biases.corrected(canonical, inputs)
        if weight is None and not any(marks):
            return inputs
        given = list(inputs)
        for slot, key in enumerate(marks):
            if key is not None:
                readers = self._activations[key].tensors[key]
                if readers is None or canonical in readers:
                    given[slot] = self._rounded(call, key, inputs[slot])
        if weight is not None:
            given[weight.slot] = self._rounded_weights(weight, inputs[weight.slot])
            call.biases.layer(weight, given[1 - weight.slot], given[weight.slot])
        return given

    def _given_out(self, call: _Call, output: Any) -> Any:
        """An output of the model, rounded where the design says so."""
        key = call.tracer.mark_of(output)
        return self._rounded(call, key, output) if key is not None and self._activations[key].is_given_out else output

    # -- rounding --------------------------------------------------------------------------------------------------------
    def _rounded(self, call: _Call, key: str, tensor: tf.Tensor) -> tf.Tensor:
        if id(tensor) not in call.rounded:
            name = self._activations[key].name
            choice, variables = self._choices[name], self.variables[name]
            x = tf.cast(tensor, tf.float32)
            observed = self._ends(call, tensor, choice.site) if _may_be_first(choice, variables) else None
            result = choice.quantizer.quantize(x, choice.site, variables, observed)
            call.rounded[id(tensor)] = tensor, tf.cast(result, tensor.dtype)
        return call.rounded[id(tensor)][1]

    def _rounded_weights(self, weight: Weight, tensor: tf.Tensor) -> tf.Tensor:
        choice = self._choices[weights_key(weight.name)]
        rank = tensor.shape.rank
        order = [*(axis for axis in range(rank) if axis not in weight.axes), *weight.axes]
        x = tf.cast(tensor, tf.float32)
        if order != list(range(rank)):
            x = tf.transpose(x, order)
        shape = tf.shape(x)
        x = tf.reshape(x, [*(x.shape[: rank - len(weight.axes)]), choice.site.channels])
        x = tf.reshape(choice.quantizer.quantize(x, choice.site, self.variables[weights_key(weight.name)], None), shape)
        if order != list(range(rank)):
            x = tf.transpose(x, [order.index(axis) for axis in range(rank)])
        x.set_shape(tensor.shape)
        return tf.cast(x, tensor.dtype)

    # -- ranges ----------------------------------------------------------------------------------------------------------
    def _ends(self, call: _Call, tensor: tf.Tensor, site: Site) -> tf.Tensor:
        if id(tensor) not in call.ends:
            call.ends[id(tensor)] = tensor, tf.stop_gradient(ends_of(tf.cast(tensor, tf.float32), site))
        return call.ends[id(tensor)][1]

    def _update(self, call: _Call) -> None:
        groups = {a.name: a.sources for a in self._design.activations} | {
            result_key(name): (key,) for key, name in self._design.results.items()
        }
        for name, keys in groups.items():
            choice, variables = self._choices[name], self.variables[name]
            if choice.quantizer.observes == "always" or _may_be_first(choice, variables):
                ends = tf.stack([self._ends(call, call.sources[key], choice.site) for key in keys])
                observed = tf.stack([tf.reduce_min(ends[:, 0]), tf.reduce_max(ends[:, 1])])
                choice.quantizer.update(choice.site, variables, observed)


def _may_be_first(choice: Choice, variables: Variables) -> bool:
    """Whether the ends of this call's values may count: its range may not have been observed before."""
    return choice.quantizer.observes != "never" and not is_observed(variables)


def is_observed(variables: Variables) -> bool:
    """Whether a range has been observed, at the time of the trace; True where none has to be."""
    flag = variables.get("observed")
    if flag is None:
        return True
    with tf.init_scope():
        return bool(tf.convert_to_tensor(flag).numpy() > 0)


def _prefixed(add_weight: AddWeight, name: str) -> AddWeight:
    prefix = name.replace("/", ".").replace(":", ".")
    return lambda kind, shape, initial, trains: add_weight(f"{prefix}.{kind}", shape, initial, trains)
