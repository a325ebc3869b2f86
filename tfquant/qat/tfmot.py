"""Quantization-aware training by TFMOT, with a scheme for the kernels of oneDNN: `quantize_model(model, engine="tfmot")`.

TFMOT clones the model, wraps layers and keeps their ranges in the wrappers. The scheme is read off the design that tfquant's own
engine has: results of layers are rounded where INT8 stores them, weights per channel and symmetric, also those of Dense and
DepthwiseConv2D, for which TFMOT's own scheme has one range; ranges begin at the first step's values instead of -6..6.

With the same data in the same order both engines came to the same accuracy, before and after lowering (measured: ResNet-8 on
CIFAR-10). tfquant's is the default: it takes any model, trains its own variables, and has the options that TFMOT lacks.

Models of TFMOT are kept as SavedModels or .h5 files: of .keras files tf_keras cannot load its wrappers again.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from tfquant.errors import ConfigError, ModelError
from tfquant.graph.loading import first_line
from tfquant.plan.spec import BITS
from tfquant.qat.core import is_observed
from tfquant.qat.design import INPUT, Design
from tfquant.qat.keras_2 import add_variable
from tfquant.qat.model import trace
from tfquant.qat.quantizers import LastValueQuantizer, MovingAverageQuantizer, Site, ends_of
from tfquant.qat.tracing import ALIASES


@contextlib.contextmanager
def _same_keras() -> Iterator[None]:
    """Importing TFMOT sets TF_USE_LEGACY_KERAS: tf.keras, loaded lazily, and new processes would get another Keras."""
    key = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(key)
    _ = tf.keras.layers  # settles which Keras it is
    try:
        yield
    finally:
        os.environ.pop(key, None)
        if before is not None:
            os.environ[key] = before


try:
    with _same_keras():
        from tensorflow_model_optimization.python.core.quantization.keras.quantize_layer import QuantizeLayer
        from tensorflow_model_optimization.quantization import keras as tfmot
except ImportError as error:
    raise ConfigError('engine="tfmot" needs TFMOT: pip install "tfquant[qat]", or leave the engine out.') from error

_WAY_OUT = 'use engine="tfquant"'
# Layers whose weights TFMOT can round: their attribute, and how many of its last axes count output channels.
_WEIGHTS = {"Conv2D": ("kernel", 1), "Dense": ("kernel", 1), "DepthwiseConv2D": ("depthwise_kernel", 2)}
_ACTIVATION = Site("activation", BITS[1])
_registered = tf_keras.saving.register_keras_serializable(package="tfquant")


@_registered
class TfmotWeightQuantizer(tfmot.quantizers.Quantizer):
    """What `LastValueQuantizer` does, for TFMOT.

    Args:
        axes: how many of the last axes count output channels.
    """

    def __init__(self, axes: int) -> None:
        self.axes = axes

    def build(self, tensor_shape: Any, name: str, layer: Any) -> Mapping[str, Any]:
        """No variables: the range is that of the weights."""
        return {}

    def __call__(self, inputs: Any, training: bool, weights: Mapping[str, Any], **kwargs: Any) -> tf.Tensor:
        """The rounded weights."""
        x = tf.convert_to_tensor(inputs)
        channels = math.prod(x.shape[-self.axes :])
        site = Site("weights", BITS[1], channels=channels, is_symmetric=True)
        flat = tf.reshape(x, [*x.shape[: -self.axes], channels])
        return tf.reshape(LastValueQuantizer().quantize(flat, site, {}, None), x.shape)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"axes": self.axes}


@_registered
class TfmotActivationQuantizer(tfmot.quantizers.Quantizer):
    """What `MovingAverageQuantizer` does, for TFMOT."""

    def build(self, tensor_shape: Any, name: str, layer: Any) -> Mapping[str, Any]:
        """The range, and whether there is one."""
        return MovingAverageQuantizer().build(
            _ACTIVATION, lambda kind, shape, initial, trains: add_variable(layer, f"{name}_{kind}", shape, initial, trains)
        )

    def __call__(self, inputs: Any, training: bool, weights: Mapping[str, Any], **kwargs: Any) -> tf.Tensor:
        """The rounded tensor; while it trains, the range follows the values."""
        quantizer = MovingAverageQuantizer()
        is_first = not is_observed(weights)
        ends = tf.stop_gradient(ends_of(inputs, _ACTIVATION)) if training or is_first else None
        result = quantizer.quantize(inputs, _ACTIVATION, weights, ends if is_first else None)
        if training:
            quantizer.update(_ACTIVATION, weights, ends)
        return result

    def get_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


@_registered
class TfmotQuantizeConfig(tfmot.QuantizeConfig):
    """What is rounded of a layer.

    Args:
        weights: the attribute that holds weights; "" for none.
        axes: how many of their last axes count output channels.
        rounds_result: whether the result is rounded.
    """

    def __init__(self, weights: str = "", axes: int = 1, rounds_result: bool = True) -> None:
        self.weights, self.axes, self.rounds_result = weights, axes, rounds_result

    def get_weights_and_quantizers(self, layer: Any) -> list[tuple[Any, Any]]:
        """The weights."""
        return [(getattr(layer, self.weights), TfmotWeightQuantizer(self.axes))] if self.weights else []

    def set_quantize_weights(self, layer: Any, quantize_weights: Any) -> None:
        """Has the layer compute with rounded weights."""
        for rounded in quantize_weights:
            setattr(layer, self.weights, rounded)

    def get_activations_and_quantizers(self, layer: Any) -> list[tuple[Any, Any]]:
        """None: what is rounded is the layer's result."""
        return []

    def set_quantize_activations(self, layer: Any, quantize_activations: Any) -> None:
        """Nothing: there are none."""
        assert not quantize_activations

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        """Of the result."""
        return [TfmotActivationQuantizer()] if self.rounds_result else []

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"weights": self.weights, "axes": self.axes, "rounds_result": self.rounds_result}


class _RoundInputs(tfmot.graph_transformations.transforms.Transform):  # type: ignore[misc]
    """Puts a rounding behind the model's inputs."""

    def pattern(self) -> Any:
        return tfmot.graph_transformations.transforms.LayerPattern("InputLayer")

    def replacement(self, match_layer: Any) -> Any:
        layer = QuantizeLayer(TfmotActivationQuantizer(), name=f"quantize_{match_layer.layer['config']['name']}")
        config = tf_keras.layers.serialize(layer, use_legacy_format=True)
        config["name"] = layer.name
        return tfmot.graph_transformations.transforms.LayerNode(config, input_layers=[match_layer])

    def custom_objects(self) -> dict[str, Any]:
        return {"QuantizeLayer": QuantizeLayer}


class _Layout(tfmot.QuantizeLayoutTransform):  # type: ignore[misc]
    """Roundings of inputs; what is fused is in the configs of the layers."""

    def __init__(self, inputs: Collection[str]) -> None:
        self._inputs = inputs

    def apply(self, model: Any, layer_quantize_map: Mapping[str, Any]) -> Any:
        configs = {**layer_quantize_map, **{name: {} for name in self._inputs}}
        transformer = tfmot.graph_transformations.model_transformer.ModelTransformer
        return transformer(model, [_RoundInputs()] if self._inputs else [], set(configs), configs).transform()


class _Registry(tfmot.QuantizeRegistry):  # type: ignore[misc]
    """No layer is rounded but by the config that it was given."""

    def supports(self, layer: Any) -> bool:
        return False

    def get_quantize_config(self, layer: Any) -> Any:
        raise ValueError(f"{layer.name} has no config")


class _Scheme(tfmot.QuantizeScheme):  # type: ignore[misc]
    def __init__(self, inputs: Collection[str]) -> None:
        self._inputs = inputs

    def get_layout_transformer(self) -> Any:
        return _Layout(self._inputs)

    def get_quantize_registry(self) -> Any:
        return _Registry()


def quantized(model: Any, signature: Any, design: Design) -> Any:
    """A model that TFMOT made, which rounds where a design says so; its weights are copies.

    Args:
        model: a tf_keras model, Sequential or Functional.
        signature: TensorSpecs of its inputs.
        design: of the model.

    Raises:
        ModelError: it is no such model, or it has layers that TFMOT cannot round where INT8 does.
    """
    if not model._is_graph_network:
        raise ModelError(f'engine="tfmot" takes Sequential and Functional models: {_WAY_OUT}. Received: {type(model).__name__}')
    called = [node.layer.name for nodes in model._nodes_by_depth.values() for node in nodes]
    if len(called) != len(set(called)):
        raise ModelError(f'engine="tfmot" takes no layers that are called several times: {_WAY_OUT}. Received: {model.name}')
    configs, inputs = _configs(model, signature, design)

    def annotated(layer: Any) -> Any:
        return tfmot.quantize_annotate_layer(layer, configs[layer.name]) if layer.name in configs else layer

    try:
        with tfmot.quantize_scope():
            return tfmot.quantize_apply(tf_keras.models.clone_model(model, clone_function=annotated), _Scheme(inputs))
    except Exception as error:  # TFMOT fails in many ways
        raise ModelError(f"TFMOT cannot take the model: {_WAY_OUT}. Received: {first_line(error)}") from error


def scope() -> contextlib.AbstractContextManager[None]:
    """While it is open, tf_keras finds TFMOT's classes when it loads a model."""
    opened: contextlib.AbstractContextManager[None] = tfmot.quantize_scope()
    return opened


def _configs(model: Any, signature: Any, design: Design) -> tuple[dict[str, TfmotQuantizeConfig], list[str]]:
    """Names of layers to what is rounded of them, and the names of inputs that are."""
    results = _results(model, signature)
    names = [spec.name for spec in tf.nest.flatten(signature)]
    inputs, rounded = [], set()
    for activation in design.activations:
        for key in activation.sources if activation.known is None else ():
            if key.startswith(INPUT):
                inputs.append(names[int(key.removeprefix(INPUT))])
            elif key.removesuffix(":0") in results:
                rounded.add(results[key.removesuffix(":0")])
            else:
                raise ModelError(f"TFMOT rounds results of layers, and {key} is inside of one: {_WAY_OUT}.")
    weights = {}
    for weight in design.weights:
        layer = next((layer for layer in model.layers if layer.name == _layer(weight.op)), None)
        if type(layer).__name__ not in _WEIGHTS:
            raise ModelError(f"TFMOT cannot round the weights of {weight.op} per channel: {_WAY_OUT}.")
        weights[_layer(weight.op)] = _WEIGHTS[type(layer).__name__]
    return {name: TfmotQuantizeConfig(*weights.get(name, ("", 1)), name in rounded) for name in rounded | weights.keys()}, inputs


def _layer(op: str) -> str:
    """The layer of the model that made an op, by the op's name."""
    return [*op.split("/"), ""][1]


def _results(model: Any, signature: Any) -> dict[str, str]:
    """Names of ops whose results are those of layers, to the layers."""
    last: dict[str, str] = {}
    for made in trace(model, signature, False)[1]:
        if made.op not in ALIASES and made.op != "Const":
            last[_layer(made.name)] = made.name
    return {op: layer for layer, op in last.items()}
