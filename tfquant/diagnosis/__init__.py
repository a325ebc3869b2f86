"""Why a quantized model is off: the error of every layer by itself and accumulated, and what would help."""

from tfquant.diagnosis.measure import Measurement
from tfquant.diagnosis.result import Advice, Diagnosis, InputUse, LayerDiagnosis, OutputDiagnosis

__all__ = ["Advice", "Diagnosis", "InputUse", "LayerDiagnosis", "Measurement", "OutputDiagnosis"]
