"""A Keras model around another that trains with fake quantization: what Keras 3 and tf_keras have in common."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.graph.execution import executable
from tfquant.graph.freezing import freeze_traced
from tfquant.graph.loading import first_line
from tfquant.qat.configs import design_from_json, site_from_json, to_json
from tfquant.qat.core import Choice, Core, Stage, result_key
from tfquant.qat.design import Design, missing
from tfquant.qat.tracing import Made, aligned, record

if TYPE_CHECKING:
    _Model: Any
else:
    _Model = object


class QuantizationAware(_Model):
    """The part of a quantization-aware model that is the same for Keras 3 and tf_keras; the other base is their Model.

    Attributes:
        inner: the model that trains. Its variables are those that it had.
        design: where it is fake-quantized.
    """

    keras: Any  # the package

    def __init__(
        self,
        inner: Any,
        signature: Any,
        design: Design,
        choices: Mapping[str, Choice],
        made: Sequence[Made] | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Made by `tfquant.quantize_model`: `signature` are the TensorSpecs of the inputs, `made` the ops of the model's
        inference, where they are known."""
        super().__init__(name=name or f"quantized_{inner.name}", **kwargs)
        self.inner = inner
        self.design = design
        self._signature, self._choices = _Opaque(signature), _Opaque(dict(choices))
        self._core = _Opaque(Core(design, choices, self._add_variable))
        self._stage = _Opaque(Stage())
        self._names = _Opaque(dict[bool, Mapping[str, str]]())
        self._teacher: Any = _Opaque(None)
        self._teacher_share = 0.0
        self._traced = _Opaque(tf.function(self._call_in_graph, autograph=False, reduce_retracing=True))
        self._inference = _Opaque(trace(inner, signature, False)[1] if made is None else made)
        lacking = missing(design, self._inference.value)
        if lacking:
            raise ModelError(f"The model is not the one that was quantized. Received: no {lacking[0]}")
        self._learn_names()
        # Once on symbols: from then on Keras knows what the model takes, and can export it.
        self(
            tf.nest.map_structure(lambda spec: self.keras.Input(spec.shape[1:], dtype=spec.dtype.name, name=spec.name), signature)
        )

    # -- calls -----------------------------------------------------------------------------------------------------------
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Keras calls it. With `training`, ranges follow the values as the stage has it."""
        is_training = bool(training)
        if tf.executing_eagerly():
            return self._traced.value(inputs, is_training)
        return self._call_in_graph(inputs, is_training)

    def _call_in_graph(self, inputs: Any, is_training: bool) -> Any:
        stage = self._stage.value
        names = self._names.value[stage.freezes_statistics] if is_training else None
        flat = [as_traced(*pair) for pair in zip(tf.nest.flatten(inputs), tf.nest.flatten(self.signature), strict=True)]
        given = tf.nest.pack_sequence_as(inputs, flat)

        def call_inner() -> Any:
            with statistics_frozen(self.inner, is_training and stage.freezes_statistics):
                return call_model(self.inner, given, is_training)

        return self._core.value.call(call_inner, flat, names, stage, is_training)

    @property
    def signature(self) -> Any:
        """The TensorSpecs of the inputs, in the structure that a call takes."""
        return self._signature.value

    # -- training --------------------------------------------------------------------------------------------------------
    @property
    def stage(self) -> Stage:
        """What training does at the moment."""
        return self._stage.value

    @stage.setter
    def stage(self, stage: Stage) -> None:
        if stage != self._stage.value:
            self._stage.value = stage
            self._learn_names()
            self._traced.value = tf.function(self._call_in_graph, autograph=False, reduce_retracing=True)
            if getattr(self, "train_function", None) is not None:
                self.train_function = None
                self.make_train_function(force=True)

    def _learn_names(self) -> None:
        """Traces the model as it trains now: names of its ops there to those of the design."""
        is_frozen = self._stage.value.freezes_statistics
        if is_frozen not in self._names.value:
            with statistics_frozen(self.inner, is_frozen):
                made = trace(self.inner, self.signature, True)[1]
            self._names.value[is_frozen] = aligned(made, self._inference.value)

    def distill(self, teacher: Callable[[Any], Any] | None, share: float) -> None:
        """Lets a float model teach.

        Args:
            teacher: returns the outputs for a batch of inputs; None for no teacher.
            share: of the loss that is the difference to its outputs, 0 to 1; the rest is what the model was compiled with.
        """
        self._teacher.value, self._teacher_share = teacher, share

    def _teaching(self, x: Any, y_pred: Any, loss: Any) -> Any:
        """The loss with the teacher's part."""
        if self._teacher.value is None:
            return loss
        wanted = tf.nest.flatten(self._teacher.value(x))
        terms = [
            difference(tf.stop_gradient(tf.cast(t, tf.float32)), tf.cast(p, tf.float32))
            for t, p in zip(wanted, tf.nest.flatten(y_pred), strict=True)
        ]
        return (1 - self._teacher_share) * loss + self._teacher_share * tf.cast(tf.add_n(terms), loss.dtype)

    # -- ranges ----------------------------------------------------------------------------------------------------------
    def observed_results(self) -> dict[str, tuple[float, float]]:
        """Names of tensors that stay float, to the least and the largest value that training saw: for other runtimes."""
        found = {}
        for name in self.design.results.values():
            variables = self._core.value.variables[result_key(name)]
            low, high = (float(end) for end in np.asarray(tf.convert_to_tensor(variables["range"])))
            if float(np.asarray(tf.convert_to_tensor(variables["observed"]))) > 0:
                found[name] = (low, high)
        return found

    # -- files -----------------------------------------------------------------------------------------------------------
    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes the model of."""
        serialize = self.keras.saving.serialize_keras_object
        specs = tf.nest.map_structure(
            lambda spec: {"shape": spec.shape.as_list(), "dtype": spec.dtype.name, "name": spec.name}, self.signature
        )
        return {
            "name": self.name,
            "inner": serialize(self.inner),
            "signature": specs,
            "design": to_json(self.design),
            "choices": {
                name: {"quantizer": serialize(choice.quantizer), "site": to_json(choice.site)}
                for name, choice in self._choices.value.items()
            },
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Any = None) -> Any:
        """The model of such a config, without its weights."""
        deserialize = functools.partial(cls.keras.saving.deserialize_keras_object, custom_objects=custom_objects)
        signature = _specs(config["signature"])
        inner = deserialize(config["inner"])
        if not inner.built:
            trace(inner, signature, False)
        choices = {
            name: Choice(deserialize(entry["quantizer"]), site_from_json(entry["site"]))
            for name, entry in config["choices"].items()
        }
        return cls(inner, signature, design_from_json(config["design"]), choices, name=config["name"])

    def get_build_config(self) -> None:
        """Nothing: it is built when it is made."""


class _Opaque:
    """Holds what Keras is not to track."""

    def __init__(self, value: Any) -> None:
        self.value = value


def as_traced(tensor: Any, spec: tf.TensorSpec) -> Any:
    """An input without the sizes that it has beyond its spec: layers that read them make other ops where they are known."""
    if not isinstance(tensor, tf.Tensor) or tensor.shape.as_list() == spec.shape.as_list():
        return tensor
    if not spec.shape.is_compatible_with(tensor.shape):
        return tensor  # the model says what is wrong with it
    return tf.compat.v1.placeholder_with_default(tensor, spec.shape)


def call_model(model: Any, inputs: Any, is_training: bool) -> Any:
    """Calls a Keras model, whether its `call` has a `training` or not."""
    try:
        return model(inputs, training=is_training)
    except TypeError as error:
        if "training" not in str(error):
            raise
        return model(inputs)


def trace(model: Any, signature: Any, is_training: bool) -> tuple[Any, list[Made]]:
    """The concrete function of a Keras model, and the ops that its code made.

    Raises:
        ModelError: it cannot be traced.
    """
    made: list[Made] = []

    def call(inputs: Any) -> Any:
        result, ops = record(lambda: call_model(model, inputs, is_training))
        made.extend(ops)
        return result

    try:
        function = tf.function(call, autograph=False).get_concrete_function(signature)
    except Exception as error:  # a model fails in its own code
        raise ModelError(f"{model.name} cannot be traced: {first_line(error)}") from error
    return function, made


@contextlib.contextmanager
def statistics_frozen(model: Any, is_frozen: bool) -> Iterator[None]:
    """While it is open, BatchNorm layers use their moving averages, also when the model trains."""
    layers = [layer for layer in layers_of(model) if "BatchNormalization" in (kind.__name__ for kind in type(layer).__mro__)]
    before = {layer: layer.call for layer in layers} if is_frozen else {}

    def frozen(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(inputs: Any, training: Any = None, **kwargs: Any) -> Any:
            return call(inputs, training=False, **kwargs)

        return run

    for layer, call in before.items():
        object.__setattr__(layer, "call", frozen(call))
    try:
        yield
    finally:
        for layer in before:
            object.__delattr__(layer, "call")


def layers_of(model: Any) -> list[Any]:
    """A Keras model's layers, those inside others included."""
    return list(model._flatten_layers(include_self=False, recursive=True))


def frozen_call(model: Any, signature: Any) -> Callable[[Any], Any]:
    """A model as it is now, for inference: a function of its inputs, with a copy of its variables."""
    function, _ = trace(model, signature, False)
    structure = function.structured_outputs
    run = executable(freeze_traced(function))
    return lambda inputs: tf.nest.pack_sequence_as(structure, tf.nest.flatten(run(*tf.nest.flatten(inputs))))


def difference(teacher: tf.Tensor, student: tf.Tensor) -> tf.Tensor:
    """How far outputs are from a teacher's: of probabilities the mean KL divergence in nats, of others the squared error in
    units of the teacher's variance."""
    sums = tf.reduce_sum(teacher, -1)
    are_shares = tf.reduce_all((tf.abs(sums - 1) < 1e-3) & (tf.reduce_min(teacher, -1) >= 0)) & (tf.shape(teacher)[-1] > 1)
    least = 1e-7
    divergence = tf.reduce_sum(teacher * (tf.math.log(teacher + least) - tf.math.log(tf.maximum(student, 0.0) + least)), -1)
    squared = tf.math.squared_difference(teacher, student) / (tf.math.reduce_variance(teacher) + least)
    return tf.where(are_shares, tf.reduce_mean(divergence), tf.reduce_mean(squared))


def _specs(config: Any) -> Any:
    if isinstance(config, Mapping) and config.keys() == {"shape", "dtype", "name"}:
        return tf.TensorSpec(config["shape"], config["dtype"], config["name"])
    if isinstance(config, Mapping):
        return {key: _specs(value) for key, value in config.items()}
    return [_specs(value) for value in config] if isinstance(config, Sequence) and not isinstance(config, str) else config
