"""The options of a quantization, checked when they are made."""

from __future__ import annotations

import builtins
import dataclasses
import math
import numbers
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfquant.algorithms import ALGORITHMS, PRESETS
from tfquant.data import PREPROCESS
from tfquant.errors import ConfigError, shown
from tfquant.observe.estimators import AUTO, ESTIMATORS
from tfquant.plan.scope import IgnoredScope
from tfquant.plan.spec import BITS, MODES

# What a result can be saved as.
FORMATS = ("saved_model", "graphdef", "fakequant")
# What the result takes as its input: what the model takes, or the pixels of an image.
INPUT_DTYPES = ("model", "uint8")
PLACEMENTS = ("table", "measure", "int8")


def option(default: Any, **facts: Any) -> Any:
    """A dataclass field that `check_fields` knows more of.

    Facts: `choices`; `registry`, whose names are choices too; `least` and `most` (of numbers); `some` (a list must not be empty).
    """
    return dataclasses.field(default=default, metadata=facts)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How to quantize. Lists may be given for tuples.

    Attributes:
        signature_keys: the signatures of a SavedModel to quantize.
        tags: the tags of the MetaGraph to load from a SavedModel.
        inputs: inputs of a frozen GraphDef ("image:0"); all placeholders that the outputs need where empty.
        outputs: outputs of a frozen GraphDef ("softmax:0"); the node that nothing reads where there is but one.
        mode: "static", ranges from data, or from fake quantization in the model; "dynamic", INT8 matrix products with ranges that
            are found at each call; or "weight_only", weights stored in 8 bits and computed with in float. The last two need no
            data. A plan has its own.
        subset_size: at most so many calibration samples are used.
        batch_size: samples per calibration batch.
        preset: which algorithms make the result more faithful: "fast" (none), "default" (what costs little time) or "accuracy"
            (all that help, within some minutes). None of them makes the result slower. A model that was trained with fake
            quantization gets none.
        algorithms: names of these algorithms in place of a preset's: see `tfquant.refine`. Both count in mode "static".
        estimator: how ranges are read off the statistics: "mse", "minmax", "mean_minmax", "percentile", "entropy", "aciq", one
            that was registered (`tfquant.register_estimator`), or "auto": for each tensor the one of them with which the layers
            that read it err least.
        activation_mode: "asymmetric" (zero points) or "symmetric" (ranges around 0).
        weights: "per_channel", a scale for each output channel, or "per_tensor", one for all.
        weight_bits: of the weights, 2 to 8. Below 8 the result is a simulation, for TensorFlow has no such kernels, and all
            that can be quantized is: `placement` counts for nothing.
        activation_bits: of the activations, 2 to 8, but for those that no quantized layer computes: the model's inputs have 8.
        bit_allocation: the channels of a layer have `weight_bits` on average, 0 to 8 each, by their deviations.
        weight_clipping: "aciq", weights below 8 bits are clipped where that lowers their squared error; or "none".
        weight_correction: the mean and the deviation of each channel of weights below 8 bits are restored.
        size_budget: bytes that the model may have, or, up to 1, their share of the float model's: the weights of each layer have
            2 to 8 bits so that the model's outputs err least; 0 for no budget.
        isa: the CPU's instructions: "vnni", or "no_vnni" for CPUs before AVX512-VNNI.
        placement: what runs in INT8: "table", what a table of costs says pays; "measure", what pays on this machine, measured;
            "int8", whatever can. Nothing is placed by cost where a plan is given.
        placement_batch_sizes: batch sizes that the placement is made for; each counts alike.
        placement_threads: intra-op threads that it is measured with; 0 for as many as there are cores.
        float: what runs the ops that stay float: "float32", or "bfloat16" where that pays.
        ignored_scope: what must stay float: an `IgnoredScope`, or its entries "path", "re:PATTERN" and "type:OP".
        allow_unsafe_ops: take models with ops that read or write files, or run code.
        trained_rounding: of models with fake quantization: "fused", kernels compute what lies within them without rounding in
            between, which is faster; or "all", nothing that was trained is left out (portable models have it so in any case).
        input_dtype: "model", as it is; or "uint8": the result takes the pixels of an image, and `preprocess`, which the model
            was given before, becomes part of it. The data are pixels, too. A plan has its own.
        preprocess: of images, "tf", "torch", "caffe", "unit" or "none": for a folder of them, or where `input_dtype` is "uint8".
        verify: compare the result with the float model on the calibration data.
        verify_batch_sizes: batch sizes at which the latency of both is measured; empty for none.

    Raises:
        ConfigError: an option has a value that it cannot have.
    """

    signature_keys: tuple[str, ...] = option(("serving_default",), some=True)
    tags: tuple[str, ...] = ("serve",)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    mode: str = option("static", choices=MODES)
    subset_size: int = option(300, least=1)
    batch_size: int = option(10, least=1)
    preset: str = option("default", choices=tuple(PRESETS))
    algorithms: tuple[str, ...] = ()
    estimator: str = option("mse", registry=ESTIMATORS, choices=(AUTO,))
    activation_mode: str = option("asymmetric", choices=("asymmetric", "symmetric"))
    weights: str = option("per_channel", choices=("per_channel", "per_tensor"))
    weight_bits: int = option(BITS[1], least=BITS[0], most=BITS[1])
    activation_bits: int = option(BITS[1], least=BITS[0], most=BITS[1])
    bit_allocation: bool = False
    weight_clipping: str = option("aciq", choices=("aciq", "none"))
    weight_correction: bool = True
    size_budget: builtins.float = dataclasses.field(default=0.0, metadata={"least": 0})
    isa: str = option("vnni", choices=("vnni", "no_vnni"))
    placement: str = option("table", choices=PLACEMENTS)
    placement_batch_sizes: tuple[int, ...] = option((1, 16), least=1, some=True)
    placement_threads: int = option(0, least=0)
    float: str = option("float32", choices=("float32", "bfloat16"))
    ignored_scope: IgnoredScope | Sequence[str] = ()
    allow_unsafe_ops: bool = False
    trained_rounding: str = option("fused", choices=("fused", "all"))
    input_dtype: str = option("model", choices=INPUT_DTYPES)
    preprocess: str = option("none", choices=tuple(PREPROCESS))
    verify: bool = True
    verify_batch_sizes: tuple[int, ...] = option((1, 16), least=1)

    def __post_init__(self) -> None:
        if not isinstance(self.ignored_scope, IgnoredScope):
            object.__setattr__(self, "ignored_scope", IgnoredScope.parse(self.ignored_scope))
        check_fields(self)
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise ConfigError(f"algorithms must be some of {', '.join(ALGORITHMS)}. Received: {shown(name)}")

    @property
    def chosen_algorithms(self) -> tuple[str, ...]:
        """Those of `algorithms`, or else of the preset."""
        return self.algorithms or PRESETS[self.preset]

    @property
    def fewer_bits(self) -> bool:
        """Whether the result is a simulation of fewer than 8 bits."""
        return self.weight_bits < BITS[1] or self.activation_bits < BITS[1] or self.size_budget > 0

    def check_bits(self) -> None:
        """Checks the options of fewer than 8 bits against the others.

        Raises:
            ConfigError: they contradict each other.
        """
        if self.bit_allocation and self.weight_bits == BITS[1] and not self.size_budget:
            raise ConfigError("bit_allocation needs weight_bits below 8, or a size_budget. Received: neither")
        if self.bit_allocation and self.weights == "per_tensor":
            raise ConfigError("bit_allocation needs weights per_channel. Received: per_tensor")
        if self.size_budget and self.weight_bits < BITS[1]:
            raise ConfigError("Give either weight_bits or a size_budget, which finds them. Received: both")
        if self.fewer_bits and self.mode != "static":
            raise ConfigError(f"Fewer than 8 bits need the mode static. Received: {self.mode}")
        if self.fewer_bits and self.placement == "measure":
            raise ConfigError("Fewer than 8 bits are simulated, which has no speed to place by. Received: placement measure")


def check_fields(options: Any) -> None:
    """Checks the fields of a frozen dataclass against their annotations and their `option` facts, and makes tuples of lists.

    Fields of other types than str, bool, int, tuples of these and dataclasses are left alone.

    Raises:
        ConfigError: the first field that holds what it cannot hold.
    """
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = _checked(field.name, getattr(options, field.name), hints[field.name], field.metadata)
        object.__setattr__(options, field.name, value)


def _checked(name: str, value: Any, hint: Any, facts: Mapping[str, Any]) -> Any:
    if hint == str | None:
        return None if value is None else _checked(name, value, str, facts)
    if typing.get_origin(hint) is tuple:
        return _checked_items(name, value, typing.get_args(hint)[0], facts)
    if dataclasses.is_dataclass(hint) and not isinstance(value, typing.cast(type, hint)):
        raise ConfigError(f"{name} must be a {typing.cast(type, hint).__name__}. Received: {shown(value)}")
    choices, registry = facts.get("choices", ()), facts.get("registry", ())
    if (choices or registry) and not (isinstance(value, str) and (value in choices or value in registry)):
        raise ConfigError(f"{name} must be one of {', '.join([*registry, *choices])}. Received: {shown(value)}")
    if hint is str and not isinstance(value, str):
        raise ConfigError(f"{name} must be a string. Received: {shown(value)}")
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false. Received: {shown(value)}")
    if hint is int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number. Received: {shown(value)}")
        if value < facts["least"]:
            raise ConfigError(f"{name} must be at least {facts['least']}. Received: {shown(value)}")
        if value > facts.get("most", value):
            raise ConfigError(f"{name} must be at most {facts['most']}. Received: {shown(value)}")
        return int(value)
    if hint is float:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"{name} must be a number. Received: {shown(value)}")
        if value < facts["least"]:
            raise ConfigError(f"{name} must be at least {facts['least']}. Received: {shown(value)}")
        return float(value)
    return value


def _checked_items(name: str, value: Any, kind: type, facts: Mapping[str, Any]) -> tuple[Any, ...]:
    of = "strings" if kind is str else "whole numbers"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ConfigError(f"{name} must be a list of {of}. Received: {shown(value)}")
    items = tuple(value)
    if facts.get("some") and not items:
        raise ConfigError(f"{name} must not be empty. Received: {shown(list(items))}")
    seen: set[str] = set()
    for item in items:
        if kind is int:
            _checked(f"each of {name}", item, int, facts)
        elif not isinstance(item, str) or not item.strip():
            raise ConfigError(f"{name} must be a list of strings that are not empty. Received: {shown(item)} in it")
        elif item in seen:
            raise ConfigError(f"{name} must name each but once. Received: {shown(item)} twice")
        else:
            seen.add(item)
    return tuple(int(item) for item in items) if kind is int else items
