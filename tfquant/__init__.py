"""INT8 models for stock TensorFlow, run by oneDNN with Intel DL Boost."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfquant.config import QuantConfig
    from tfquant.diagnosis import Diagnosis
    from tfquant.errors import ConfigError, DataError, ModelError, OutputError, PlanError, TfquantError
    from tfquant.exporters.exporting import export_onnx, export_tflite
    from tfquant.exporters.result import Exported
    from tfquant.jobfile import Job, load_job
    from tfquant.pipeline import QuantizedModel, diagnose, quantize
    from tfquant.plan.scope import IgnoredScope
    from tfquant.plan.serialize import load_plan
    from tfquant.plan.spec import QuantPlan
    from tfquant.qat.api import (
        quantize_annotate_layer,
        quantize_annotate_model,
        quantize_apply,
        quantize_model,
        quantize_scope,
    )
    from tfquant.qat.configs import QuantizeConfig
    from tfquant.qat.quantizers import (
        FixedRangeQuantizer,
        LastValueQuantizer,
        LearnedStepQuantizer,
        MovingAverageQuantizer,
        Quantizer,
    )
    from tfquant.qat.schedule import QuantizationSchedule
    from tfquant.registry import register_estimator, register_metric, register_strategy
    from tfquant.tuner.loop import tune
    from tfquant.tuner.result import TuningResult
    from tfquant.tuner.validation import Validation

__version__ = "0.1.0"

# Name to module: TensorFlow is imported at the first use, so that help texts and errors of the command line come at once.
_PUBLIC = {
    "quantize": "tfquant.pipeline",
    "diagnose": "tfquant.pipeline",
    "QuantizedModel": "tfquant.pipeline",
    "export_tflite": "tfquant.exporters.exporting",
    "export_onnx": "tfquant.exporters.exporting",
    "Exported": "tfquant.exporters.result",
    "Diagnosis": "tfquant.diagnosis",
    "QuantConfig": "tfquant.config",
    "IgnoredScope": "tfquant.plan.scope",
    "Job": "tfquant.jobfile",
    "load_job": "tfquant.jobfile",
    "QuantPlan": "tfquant.plan.spec",
    "load_plan": "tfquant.plan.serialize",
    "register_estimator": "tfquant.registry",
    "register_strategy": "tfquant.registry",
    "register_metric": "tfquant.registry",
    "TfquantError": "tfquant.errors",
    "ModelError": "tfquant.errors",
    "DataError": "tfquant.errors",
    "PlanError": "tfquant.errors",
    "ConfigError": "tfquant.errors",
    "OutputError": "tfquant.errors",
    "tune": "tfquant.tuner.loop",
    "TuningResult": "tfquant.tuner.result",
    "Validation": "tfquant.tuner.validation",
    "quantize_model": "tfquant.qat.api",
    "quantize_annotate_layer": "tfquant.qat.api",
    "quantize_annotate_model": "tfquant.qat.api",
    "quantize_apply": "tfquant.qat.api",
    "quantize_scope": "tfquant.qat.api",
    "QuantizeConfig": "tfquant.qat.configs",
    "QuantizationSchedule": "tfquant.qat.schedule",
    "Quantizer": "tfquant.qat.quantizers",
    "LastValueQuantizer": "tfquant.qat.quantizers",
    "MovingAverageQuantizer": "tfquant.qat.quantizers",
    "FixedRangeQuantizer": "tfquant.qat.quantizers",
    "LearnedStepQuantizer": "tfquant.qat.quantizers",
}

__all__ = [
    "ConfigError",
    "DataError",
    "Diagnosis",
    "Exported",
    "FixedRangeQuantizer",
    "IgnoredScope",
    "Job",
    "LastValueQuantizer",
    "LearnedStepQuantizer",
    "ModelError",
    "MovingAverageQuantizer",
    "OutputError",
    "PlanError",
    "QuantConfig",
    "QuantPlan",
    "QuantizationSchedule",
    "QuantizeConfig",
    "QuantizedModel",
    "Quantizer",
    "TfquantError",
    "TuningResult",
    "Validation",
    "diagnose",
    "export_onnx",
    "export_tflite",
    "load_job",
    "load_plan",
    "quantize",
    "quantize_annotate_layer",
    "quantize_annotate_model",
    "quantize_apply",
    "quantize_model",
    "quantize_scope",
    "register_estimator",
    "register_metric",
    "register_strategy",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tfquant' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


class _Package(types.ModuleType):
    """Commands have modules (`python -m tfquant.diagnose`); importing one does not take the place of the function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _PUBLIC or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if "keras" in sys.modules:  # files of quantization-aware models can be loaded then, as those of Keras's own
    import tfquant.qat.keras_3
if "tf_keras" in sys.modules:
    import tfquant.qat.keras_2  # noqa: F401
