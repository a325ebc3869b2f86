"""What people call a model, as a loaded SavedModel: a folder, a .keras file, a Keras 3 model."""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
from typing import Any

from tfquant.errors import ModelError
from tfquant.graph.loading import Source, first_line, load_saved_model


def open_model(model: Any, signature_key: str = "serving_default") -> Source:
    """Loads and freezes a model.

    Args:
        model: path of a SavedModel folder or of a `.keras` file, or a Keras 3 model.
        signature_key: the signature to quantize.

    Raises:
        ModelError: it is none of these, or cannot be read.
    """
    if isinstance(model, (str, os.PathLike)):
        path = pathlib.Path(model)
        if path.suffix != ".keras":
            return load_saved_model(path, signature_key)
        return _export(_load_keras(path), path.name, signature_key, path.stat().st_size)
    keras = sys.modules.get("keras")
    if keras is not None and isinstance(model, keras.Model):
        size = sum(variable.numpy().nbytes for variable in model.weights)
        return _export(model, model.name, signature_key, size)
    raise ModelError(f"A model is a path or a Keras 3 model. Received: {type(model).__module__}.{type(model).__name__}")


def _load_keras(path: pathlib.Path) -> Any:
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give the folder of a SavedModel or a .keras file.")
    try:
        import keras

        return keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras raises whatever a layer's constructor raises
        raise ModelError(f"Keras cannot load {path}: {first_line(error)}") from error


def _export(model: Any, name: str, signature_key: str, size: int) -> Source:
    import keras

    if keras.config.backend() != "tensorflow":
        raise ModelError(f"The Keras model must run on the TensorFlow backend. Received: {keras.config.backend()}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.export(folder, verbose=False)
        except Exception as error:  # an unbuilt or untraceable model fails in its own code
            raise ModelError(f"Keras cannot export {name}: {first_line(error)}") from error
        source = load_saved_model(folder, signature_key)
    source.name, source.size = name, size
    return source
