"""quantize_model(): a Keras model that trains with fake quantization; and the names that users of TFMOT know."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfquant.config import QuantConfig
from tfquant.data import InputSpec, open_data
from tfquant.errors import ConfigError, ModelError, shown
from tfquant.graph.ir import Node
from tfquant.graph.loading import as_numpy_dtype
from tfquant.observe.collector import Collector, consume
from tfquant.observe.ranges import group_spec
from tfquant.plan.scope import IgnoredScope, held, resolve
from tfquant.plan.spec import S8
from tfquant.progress import progress
from tfquant.qat.configs import Configs, QuantizeConfig, Range, choices_of
from tfquant.qat.design import Calibration, KeepFloat, make_design
from tfquant.qat.model import QuantizationAware, frozen_call, layers_of, trace

# What annotating a layer leaves on it: its config.
_MARK = "_tfquant_quantize_config"
_ENGINES = ("tfquant", "tfmot")


def quantize_model(
    model: Any,
    config: QuantizeConfig | None = None,
    *,
    configs: Configs | None = None,
    ignored_scope: IgnoredScope | Sequence[str] = (),
    calibrate: Any = None,
    teacher: Any = None,
    teacher_share: float = 0.5,
    calibration: QuantConfig | None = None,
    signature: Any = None,
    portable: bool = False,
    engine: str = "tfquant",
) -> Any:
    """Makes a model that trains with fake quantization where INT8 rounds: quantization-aware training.

    The result has the variables of `model`, which trains with it. `tfquant.quantize(result)` makes INT8 of it without data.

    Args:
        model: a Keras 3 model on TensorFlow, or a tf_keras model: Sequential, Functional or subclassed, built.
        config: how layers are quantized; in 8 bits by default.
        configs: path of a layer ("block_1/conv") or a pattern of paths ("block_*/conv") to another config for it; of several that
            fit the last counts.
        ignored_scope: what stays float, as for `tfquant.quantize`.
        calibrate: a representative dataset, as for `tfquant.quantize`: ranges begin where calibration has them. Without it they
            begin at the values of the first training step.
        teacher: a float model (it may be `model`, as it is now) whose outputs the result is to have: distillation. The
            difference is the mean KL divergence of probabilities in nats, of other outputs the squared error in units of the
            teacher's variance.
        teacher_share: of the loss that is this difference, 0 to 1; the rest is the loss that the result is compiled with.
        signature: TensorSpecs of the inputs, where a subclassed model has others than one float tensor.
        calibration: options of the calibration: `estimator`, `subset_size`, `batch_size`, `preprocess`.
        portable: round all results that LiteRT stores in 8 bits, in training and in INT8: what a convolution hands to a sum,
            logits. Then the trained model, INT8 and the TFLite file give the same classes, but INT8 is further from float32, and
            its kernels that compute a sum along with a convolution, without rounding in between, are not used.
        engine: "tfquant"; or "tfmot" for TFMOT's wrappers around the layers of a Sequential or Functional tf_keras model, which
            round the same tensors (`tfquant.qat.tfmot`). Its result has copies of the model's variables, and of these arguments
            it takes `ignored_scope` and `signature`.

    Returns:
        A Keras model of the same library, to be compiled.

    Raises:
        ModelError: it is no Keras model on TensorFlow, is not built, cannot be traced, or has nothing that INT8 takes.
        ConfigError: an option names no layer, or has a value that it cannot have.
        DataError: as for `tfquant.quantize`.
    """
    if engine not in _ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(_ENGINES)}. Received: {shown(engine)}")
    given = {"config": config, "configs": configs, "calibrate": calibrate, "teacher": teacher, "calibration": calibration}
    given["portable"] = portable or None
    refused = [name for name, value in given.items() if value is not None]
    if engine == "tfmot" and refused:
        raise ConfigError(f'TFMOT has no {refused[0]}: use engine="tfquant". Received: {refused[0]}={shown(given[refused[0]])}')
    kind = _model_class(model)
    if not 0 <= teacher_share <= 1:
        raise ConfigError(f"teacher_share must be 0 to 1. Received: {shown(teacher_share)}")
    if engine == "tfmot" and kind.keras.__name__ != "tf_keras":
        raise ModelError(f'TFMOT takes models of tf_keras: use engine="tfquant". Received: {model.name}, of Keras 3')
    signature = _signature(model) if signature is None else signature
    function, made = trace(model, signature, False)
    annotated = _annotated(model)
    options = calibration or QuantConfig()

    def ignored(names: Sequence[tuple[str, str]]) -> KeepFloat:
        scope = resolve(ignored_scope, names)

        def keep_float(node: Node) -> str | None:
            if annotated and not any(layer in node.name.split("/") for layer in annotated):
                return "its layer is not annotated"
            return held(scope, node)

        return keep_float

    design, prepared = make_design(function, made, ignored, portable)
    if engine == "tfmot":
        from tfquant.qat import tfmot

        return tfmot.quantized(model, signature, design)
    ranges = {} if calibrate is None else _calibrated(prepared, calibrate, options)
    named = {name: entry for name, entry in annotated.items() if entry is not None}
    chosen = choices_of(design, config or QuantizeConfig(), {**_as_patterns(named), **(configs or {})}, ranges)
    result = kind(model, signature, design, chosen, made)
    if teacher is not None:
        _model_class(teacher)
        result.distill(frozen_call(teacher, signature), teacher_share)
    return result


# -- the model -------------------------------------------------------------------------------------------------------------
def _model_class(model: Any) -> type[QuantizationAware]:
    """The quantization-aware model for a model's library."""
    keras, tf_keras = sys.modules.get("keras"), sys.modules.get("tf_keras")
    if keras is not None and isinstance(model, keras.Model):
        if keras.config.backend() != "tensorflow":
            raise ModelError(f"The Keras model must run on TensorFlow. Received: backend {keras.config.backend()}")
        from tfquant.qat import keras_3

        kind: type[QuantizationAware] = keras_3.QuantizationAwareModel
    elif tf_keras is not None and isinstance(model, tf_keras.Model):
        from tfquant.qat import keras_2

        kind = keras_2.QuantizationAwareModel
    else:
        raise ModelError(
            "Quantization-aware training takes a Keras 3 or tf_keras model (load files with keras.models.load_model). "
            f"Received: {type(model).__module__}.{type(model).__name__}"
        )
    if isinstance(model, kind):
        raise ModelError(f"The model is quantization-aware already. Received: {model.name}")
    return kind


def _signature(model: Any) -> Any:
    """The TensorSpecs of a model's inputs, in the structure that its call takes.

    Raises:
        ModelError: it was never called, so that nothing says what it takes.
    """
    inputs = getattr(model, "inputs", None)
    if inputs:
        structure = inputs[0] if len(inputs) == 1 and not isinstance(getattr(model, "input", None), Mapping) else model.input
        return tf.nest.map_structure(lambda given: tf.TensorSpec(_open_batch(given.shape), given.dtype, given.name), structure)
    if not model.built:
        raise ModelError(f"The model must be built: call it on a batch first. Received: {model.name}, which never was")
    spec = model.save_spec() if hasattr(model, "save_spec") else None  # of tf_keras
    if spec is not None:
        return tf.nest.map_structure(lambda given: tf.TensorSpec(_open_batch(given.shape), given.dtype), spec[0][0])
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(shapes) != 1:
        raise ModelError(
            "Nothing says what the model takes: call it on a batch of all its inputs as one nest, or give `signature`. "
            f"Received: {model.name}"
        )
    return _specs_of(shapes[0], getattr(model, "input_dtype", "float32"))


def _specs_of(shapes: Any, dtype: str) -> Any:
    if isinstance(shapes, Mapping):
        return {key: _specs_of(shape, dtype) for key, shape in shapes.items()}
    if all(isinstance(size, (int, type(None))) for size in shapes):
        return tf.TensorSpec(_open_batch(shapes), dtype)
    return [_specs_of(shape, dtype) for shape in shapes]


def _open_batch(shape: Sequence[int | None]) -> list[int | None]:
    return [None, *list(shape)[1:]]


# -- annotations -----------------------------------------------------------------------------------------------------------
def quantize_annotate_layer(layer: Any, quantize_config: QuantizeConfig | None = None) -> Any:
    """Marks a layer: `quantize_apply` quantizes the layers that are marked, and leaves the others in float.

    Args:
        layer: a Keras layer; it is returned.
        quantize_config: how it is quantized; None for the default.

    Raises:
        ConfigError: it is no layer, or no config.
    """
    if not hasattr(layer, "name") or not callable(getattr(layer, "call", None)):
        raise ConfigError(f"quantize_annotate_layer takes a Keras layer. Received: {shown(layer)}")
    if quantize_config is not None and not isinstance(quantize_config, QuantizeConfig):
        raise ConfigError(f"quantize_config must be a tfquant.QuantizeConfig. Received: {shown(quantize_config)}")
    object.__setattr__(layer, _MARK, (quantize_config,))
    return layer


def quantize_annotate_model(model: Any) -> Any:
    """Marks all layers of a model, which is returned."""
    for layer in layers_of(model):
        if not hasattr(layer, _MARK):
            quantize_annotate_layer(layer)
    return model


def quantize_apply(model: Any, **options: Any) -> Any:
    """A model that trains with fake quantization of the layers that `quantize_annotate_layer` marked.

    Args:
        model: as for `quantize_model`, with marked layers.
        options: as of `quantize_model`.

    Raises:
        ConfigError: no layer is marked; and as for `quantize_model`.
    """
    if not _annotated(model):
        raise ConfigError(
            "No layer is annotated: mark layers with quantize_annotate_layer, or call quantize_model, which takes all. "
            f"Received: {getattr(model, 'name', shown(model))}"
        )
    return quantize_model(model, **options)


@contextlib.contextmanager
def quantize_scope(*custom_objects: Any) -> Iterator[None]:
    """While it is open, Keras finds tfquant's classes, and quantizers and layers of your own, when it loads a model.

    Args:
        custom_objects: classes, or mappings of names to classes.
    """
    import tfquant.qat.keras_3  # registers its classes

    with contextlib.ExitStack() as stack:
        if "tf_keras" in sys.modules:
            import tfquant.qat.keras_2  # noqa: F401

            with contextlib.suppress(ConfigError):  # TFMOT is not installed
                from tfquant.qat import tfmot

                stack.enter_context(tfmot.scope())
        named: dict[str, Any] = {}
        for given in custom_objects:
            named |= given if isinstance(given, Mapping) else {given.__name__: given}
        for package in ("keras", "tf_keras"):
            if package in sys.modules:
                stack.enter_context(sys.modules[package].saving.custom_object_scope(named))
        yield


def _annotated(model: Any) -> dict[str, QuantizeConfig | None]:
    """Names of marked layers to their configs."""
    return {layer.name: getattr(layer, _MARK)[0] for layer in layers_of(model) if hasattr(layer, _MARK)}


def _as_patterns(configs: Mapping[str, QuantizeConfig]) -> dict[str, QuantizeConfig]:
    """Names of layers, wherever they are, as patterns of paths."""
    return {f"*{name}": config for name, config in configs.items()}


# -- calibration -----------------------------------------------------------------------------------------------------------
def _calibrated(prepared: Calibration, data: Any, options: QuantConfig) -> dict[str, Range]:
    """Ranges of the activations, as `tfquant.quantize` finds them."""
    inputs = [
        InputSpec(name, tensor.shape, as_numpy_dtype(tensor.dtype), True)
        for name, tensor in prepared.graph.inputs.items()
        if tensor.dtype is not None
    ]
    batches = open_data(
        data,
        inputs,
        preprocess=options.preprocess,
        subset_size=options.subset_size,
        batch_size=options.batch_size,
        by_position=True,
    )
    groups = [group for group in prepared.groups if group.known is None]
    collector = Collector(prepared.graph, [prepared.tensors[tensor] for group in groups for tensor in group.sources])
    stats = consume(collector, progress(batches, "Calibrating", batches.count)).stats
    stats = {tensor: stats[there] for tensor, there in prepared.tensors.items() if there in stats}
    found = {}
    for group in groups:
        spec = group_spec(group, stats, options.estimator, options.activation_mode, options.isa)
        found[group.name] = Range(spec.low, spec.high, spec.dtype == S8)
    return found
