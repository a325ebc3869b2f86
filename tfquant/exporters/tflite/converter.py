"""TensorFlow's own converter, for float models alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.graph.loading import first_line
from tfquant.quiet import held_back


def convert(saved_model: str | os.PathLike[str], signature_keys: Sequence[str], float16: bool = False) -> bytes:
    """TensorFlow's converter on a SavedModel, without any quantization of its own but that to float16.

    Raises:
        ModelError: the converter cannot write it.
    """
    failure: Exception | None = None
    with held_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model), signature_keys=list(signature_keys))
        sets = tf.lite.OpsSet
        converter.target_spec.supported_ops = [sets.TFLITE_BUILTINS, sets.SELECT_TF_OPS]
        if float16:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        try:
            return bytes(converter.convert())
        except Exception as error:  # MLIR raises several kinds, with pages of text
            failure = error
    raise ModelError(f"TensorFlow's converter cannot write this model for TFLite: {first_line(failure)}") from failure
