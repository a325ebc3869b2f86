"""What people call a model, as a loaded `Source`: a SavedModel, a GraphDef, a Keras file, a Keras 3 or tf_keras model."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import zipfile
from typing import Any

from tfquant.config import QuantConfig
from tfquant.errors import ConfigError, ModelError
from tfquant.graph.loading import Source, first_line, load_graph_def, load_saved_model
from tfquant.graph.safety import refuse_unsafe
from tfquant.keras_safety import unsafe_in_keras_file
from tfquant.pixels import take_pixels

_KERAS_FILES = frozenset({".keras", ".h5", ".hdf5"})
_GRAPH_DEFS = frozenset({".pb", ".pbtxt"})


def open_model(model: Any, config: QuantConfig) -> Source:
    """Loads and freezes a model.

    Args:
        model: path of a SavedModel folder, of a `.keras`, `.h5` or `.hdf5` file, or of a frozen GraphDef (`.pb`, `.pbtxt`), or
            a Keras 3 or tf_keras model.
        config: which signatures, tags, inputs and outputs, and whether it is to take pixels.

    Raises:
        ModelError: it is none of these, or cannot be read.
        ConfigError: options are given that this kind of model does not have.
    """
    source = _open(model, config)
    if config.input_dtype == "uint8":
        take_pixels(source, config.preprocess)
    return source


def _open(model: Any, config: QuantConfig) -> Source:
    if isinstance(model, (str, os.PathLike)):
        path = pathlib.Path(model)
        suffix = path.suffix if not path.is_dir() else ""
        if suffix in _GRAPH_DEFS and path.name != "saved_model.pb":
            return load_graph_def(path, config.inputs, config.outputs, config.allow_unsafe_ops)
        _no_graph_def_options(config, str(path))
        if suffix in _KERAS_FILES:
            return _export(_load_keras(path, config), path.name, config, path.stat().st_size, config.allow_unsafe_ops)
        return load_saved_model(path, config.signature_keys, config.tags, config.allow_unsafe_ops)
    for package in ("keras", "tf_keras"):
        keras = sys.modules.get(package)
        if keras is not None and isinstance(model, keras.Model):
            _no_graph_def_options(config, "a Keras model")
            size = sum(variable.numpy().nbytes for variable in model.weights)
            return _export(model, model.name, config, size, allow_unsafe_ops=True)  # its code is the caller's own
    raise ModelError(f"A model is a path or a Keras model. Received: {type(model).__module__}.{type(model).__name__}")


def _no_graph_def_options(config: QuantConfig, what: str) -> None:
    if config.inputs or config.outputs:
        raise ConfigError(f"inputs and outputs are for frozen GraphDefs (.pb); others have signatures. Received: {what}")


def _load_keras(path: pathlib.Path, config: QuantConfig) -> Any:
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give the folder of a SavedModel, or a .keras, .h5 or .pb file.")
    refuse_unsafe(unsafe_in_keras_file(path), str(path), config.allow_unsafe_ops)
    try:
        return _load_keras_3(path, config)
    except Exception as error:  # Keras raises whatever a layer's constructor raises
        if path.suffix.lower() == ".keras" and not _is_of_tf_keras(path):
            raise ModelError(f"Keras cannot load {path}: {_told(error)}") from error
        return _load_tf_keras(path, error)


def _is_of_tf_keras(path: pathlib.Path) -> bool:
    """Whether Keras 2 wrote a `.keras` file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return str(json.loads(archive.read("metadata.json"))["keras_version"]).startswith("2.")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def _load_keras_3(path: pathlib.Path, config: QuantConfig) -> Any:
    import keras

    import tfquant.qat.keras_3  # registers its models  # noqa: F401

    return keras.models.load_model(path, compile=False, safe_mode=not config.allow_unsafe_ops)


def _load_tf_keras(path: pathlib.Path, before: Exception) -> Any:
    """For files of Keras 2 that Keras 3 refuses."""
    try:
        import tf_keras

        import tfquant.qat.keras_2  # registers its models  # noqa: F401
    except ImportError:
        raise ModelError(
            f"Keras 3 cannot load {path}: {first_line(before)}; files of Keras 2 need tf_keras: pip install 'tfquant[tf_keras]'"
        ) from before
    try:
        return tf_keras.models.load_model(path, compile=False)
    except Exception as error:  # as above
        raise ModelError(f"Neither Keras 3 nor tf_keras can load {path}: {first_line(before)}; {first_line(error)}") from error


def _told(error: Exception) -> str:
    """What Keras says; of a class that it does not know the name, which stands far behind in its text."""
    found = re.search(r"(Could not locate|Unknown) (class|function|layer):? '[^']*'", str(error))
    if not found:
        return first_line(error)
    return f"{found.group(0)}: load it in Python, where its code is, and pass the model to tfquant.quantize"


def _export(model: Any, name: str, config: QuantConfig, size: int, allow_unsafe_ops: bool) -> Source:
    is_keras_3 = "keras" in sys.modules and isinstance(model, sys.modules["keras"].Model)
    if is_keras_3 and sys.modules["keras"].config.backend() != "tensorflow":
        raise ModelError(f"The Keras model must run on TensorFlow. Received: backend {sys.modules['keras'].config.backend()}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            if is_keras_3:
                model.export(folder, verbose=False)
            else:
                with contextlib.redirect_stdout(io.StringIO()):  # tf_keras lists every variable
                    model.export(folder)
        except Exception as error:  # an unbuilt or untraceable model fails in its own code
            raise ModelError(f"Keras cannot export {name}: {first_line(error)}") from error
        source = load_saved_model(folder, config.signature_keys, config.tags, allow_unsafe_ops)
    source.name, source.size = name, size
    source.ranges = getattr(model, "observed_results", dict)()  # of quantization-aware training
    source.keeps_rounding = getattr(getattr(model, "design", None), "is_portable", False)
    return source
