"""Who is compared: the tools, the settings among which the fastest is looked for, and the scripts that build and run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfquant.bench.settings import SWITCHES


@dataclasses.dataclass(frozen=True)
class Step:
    """A script that builds, and the environment that it runs in; None is the one of this process."""

    script: str
    environment: str | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to build and to run.

    Attributes:
        label: how tables name it.
        build: options of the build; settings with the same ones share a model.
        run: options of the runtime.
        variables: environment variables of the process that runs it.
        environment: where it runs; None is the environment of this process.
    """

    label: str
    build: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: str | None = None


@dataclasses.dataclass(frozen=True)
class Side:
    """One of those compared.

    Attributes:
        name: key on the command line and in the JSON.
        title: how tables name it.
        build: scripts, in order, each of which gets what those before it found out; none where float32 itself is run.
        run: the script that runs it.
        settings: all that are tried; the fastest at each batch size counts.
    """

    name: str
    title: str
    build: tuple[Step, ...]
    run: str
    settings: tuple[Setting, ...]


_SWITCHED = {name: other for name, (_, other) in SWITCHES.items()}
_LABEL = " ".join(f"{name}={value}" for name, value in _SWITCHED.items())
_TENSORFLOW = (
    Setting("default environment"),
    *(Setting(f"{name}={value}", variables={name: value}) for name, value in _SWITCHED.items()),
    Setting(_LABEL, variables=_SWITCHED),
    # To wake a second thread for an op can cost more than it takes.
    Setting(f"1 intra-op and 1 inter-op thread, {_LABEL}", run={"intra_op": 1, "inter_op": 1}, variables=_SWITCHED),
)


def _neural_compressor() -> tuple[Setting, ...]:
    return tuple(
        dataclasses.replace(setting, label=f"{version}, {setting.label}", environment=environment)
        for version, environment in (("tfquant's TensorFlow", None), ("its TensorFlow 2.15", "neural_compressor"))
        for setting in _TENSORFLOW
    )


def _openvino() -> tuple[Setting, ...]:
    return tuple(
        Setting(
            f"{preset} preset, {precision} between, LATENCY hint, 1 stream",
            {"preset": preset},
            {"precision": precision},
            environment="openvino",
        )
        for preset, precision in (("performance", "f32"), ("performance", "bf16"), ("mixed", "f32"))
    )


def _onnxruntime() -> tuple[Setting, ...]:
    # The documentation names U8S8 and S8S8 for CPUs with VNNI, and QDQ with per-channel weights for both.
    return tuple(
        Setting(
            f"QDQ {activations}/QInt8 per channel, {layout.upper()} input, all optimizations, spinning",
            {"activations": activations, "layout": layout},
            {"layout": layout},
            environment="onnxruntime",
        )
        for activations, layout in (("QUInt8", "nhwc"), ("QUInt8", "nchw"), ("QInt8", "nhwc"))
    )


def _exported(side: Side, name: str, title: str, kind: str) -> Side:
    """tfquant's file in the runtime of another side, with its fastest settings."""
    settings = {(setting.environment, tuple(setting.run.items())): setting for setting in side.settings}
    ours = tuple(dataclasses.replace(setting, build={"format": kind}) for setting in settings.values())
    return Side(name, title, (Step("tfquant_export.py"),), side.run, ours)


_SIDES = {
    side.name: side
    for side in (
        Side("float32", "float32 TensorFlow", (), "tensorflow_model.py", _TENSORFLOW),
        Side("tfquant", "tfquant INT8", (Step("tfquant_calibrate.py"),), "tensorflow_model.py", _TENSORFLOW),
        Side("openvino", "OpenVINO INT8", (Step("openvino_nncf.py", "openvino"),), "openvino_nncf.py", _openvino()),
        Side(
            "onnxruntime",
            "ONNX Runtime INT8",
            (Step("onnxruntime_qdq.py", "onnxruntime"),),
            "onnxruntime_qdq.py",
            _onnxruntime(),
        ),
        Side("tflite", "TFLite INT8", (Step("tflite_int8.py"),), "tflite_int8.py", (Setting("full integer, XNNPACK"),)),
        Side(
            "neural_compressor",
            "Neural Compressor INT8",
            (Step("freeze.py"), Step("neural_compressor_tf.py", "neural_compressor")),
            "tensorflow_model.py",
            _neural_compressor(),
        ),
    )
}

_NHWC = dataclasses.replace(_SIDES["onnxruntime"], settings=_SIDES["onnxruntime"].settings[:1])
SIDES = _SIDES | {
    side.name: side
    for side in (
        _exported(_SIDES["tflite"], "tfquant_tflite", "tfquant, TFLite", "tflite"),
        _exported(_NHWC, "tfquant_onnxruntime", "tfquant, ONNX Runtime", "onnx"),
        _exported(_SIDES["openvino"], "tfquant_openvino", "tfquant, OpenVINO", "onnx"),
    )
}
