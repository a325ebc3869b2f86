"""What a Keras file would do besides computing: bytecode, foreign functions and files that its config names.

Only the config is read; nothing of the file is loaded or run.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

from tfquant.errors import ModelError
from tfquant.graph.safety import SAFE_ATTRS, UNSAFE_OPS, Finding, words

# Modules that Keras' own functions are saved under; TensorFlow's are judged by their names.
_KERAS_MODULES = frozenset({"builtins", "keras", "tf_keras", "keras_hub", "keras_cv", "keras_nlp"})
# No layer is defined there, so naming a class of theirs means to call something else.
_FOREIGN_MODULES = frozenset({*sys.stdlib_module_names, "numpy", "torch"}) - {"builtins", "__main__"}
_FILE_MODULES = re.compile(r"(?:^|[._])(?:io|gfile|file\w*|load\w*|py_func|script_ops)(?:[._]|$)")
_SAFE_NAMESPACES = words(
    """__operators__ audio autodiff bitwise dtypes initializers linalg losses math metrics nest nn quantization ragged random sets
    signal sparse spectral strings image types"""
)
_SAFE_PREFIXES = tuple(
    sorted(
        words(
            """io.decode_ io.encode_ io.parse_ io.serialize_ io.deserialize_ io.is_jpeg io.extract_jpeg_shape
            debugging.assert_ debugging.check_numerics debugging.is_ experimental.numpy.
            keras.activations. keras.backend. keras.constraints. keras.initializers. keras.layers. keras.losses. keras.metrics.
            keras.ops. keras.random. keras.regularizers. keras.utils.normalize keras.utils.to_categorical"""
        )
    )
)
_UNSAFE_FUNCTIONS = words(
    """py_func py_function numpy_function load_library load_op_library load_file_system_library read_file write_file
    matching_files print Print import_graph_def Session InteractiveSession eval exec open compile breakpoint input
    __import__ getattr setattr delattr"""
)
_TENSOR_CLASSES = words("RaggedTensor SparseTensor sparse.SparseTensor Tensor TensorShape")
_LOOKUPS = words("StringLookup IntegerLookup TextVectorization IndexLookup")
_LOADERS = {
    "TFSMLayer": "loads another model",
    "KerasLayer": "loads another model",
    "TorchModuleWrapper": "unpickles Python objects",
}


def lambda_layers(config: Mapping[str, Any]) -> list[str]:
    """Names of the layers in a Keras model's config that carry Python bytecode."""
    return list(dict.fromkeys(finding.node for finding in _unsafe_in_config(config) if finding.op == "Lambda"))


def unsafe_in_keras_file(path: str | os.PathLike[str]) -> list[Finding]:
    """What loading or serving a Keras model would run or read besides its layers, from the config in its file.

    Args:
        path: of a `.keras`, `.h5` or `.hdf5` file.

    Raises:
        ModelError: there is no such file, or it is damaged or not what its suffix says.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ModelError(f"There is no model at {path}: give the folder of a SavedModel or a .keras file.")
    text = _zipped_config(path) if path.suffix.lower() == ".keras" else _hdf5_config(path)
    if text is None:
        return []
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: its model config is not JSON. Received: {_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is damaged: its model config is no object. Received: {type(config).__name__}")
    return list(_unsafe_in_config(config))


def _zipped_config(path: pathlib.Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read("config.json")
    except KeyError as error:
        raise ModelError(f"{path} is not a Keras model: the archive holds no config.json.") from error
    # zipfile raises what its decompressors raise, and NotImplementedError or RuntimeError on methods it does not know.
    except Exception as error:
        raise ModelError(f"{path} is damaged or not a .keras file: {_line(error)}") from error


def _hdf5_config(path: pathlib.Path) -> str | bytes | None:
    """The model config, None in a file of mere weights."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get("model_config")
    # h5py raises OSError, RuntimeError, KeyError or ValueError by what is damaged.
    except Exception as error:
        raise ModelError(f"{path} is damaged or not an HDF5 file: {_line(error)}") from error
    if text is None or isinstance(text, (str, bytes)):
        return text
    raise ModelError(f"{path} is damaged: its model config is no text. Received: {type(text).__name__}")


def _unsafe_in_config(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What a Keras config names that is more than layers, in the order of the config."""
    stack: list[tuple[Any, str]] = [(config, "")]
    while stack:
        value, layer = stack.pop()
        if isinstance(value, (list, tuple)):
            stack += [(item, layer) for item in reversed(value)]
        elif isinstance(value, Mapping):
            inner = value.get("config")
            if "class_name" in value:
                named = inner.get("name") if isinstance(inner, Mapping) else None
                layer = named if isinstance(named, str) and named else layer
                yield from _unsafe_object(value, inner, layer)
            stack += [(item, layer) for item in reversed(list(value.values()))]


def _unsafe_object(value: Mapping[str, Any], inner: Any, layer: str) -> Iterator[Finding]:
    kind = str(value["class_name"]).rpartition(">")[2]
    settings = inner if isinstance(inner, Mapping) else {}
    if kind == "__lambda__" or (kind == "Lambda" and _carries_bytecode(settings)):
        yield Finding("Lambda", layer or kind, "", "runs Python bytecode from the file")
    elif kind in ("TFOpLambda", "SlicingOpLambda") and not _is_safe_symbol(settings.get("function")):
        yield Finding(kind, layer, "", f"calls tf.{settings.get('function')}")
    elif kind == "ClassMethod" and settings.get("cls_symbol") not in _TENSOR_CLASSES:
        yield Finding(kind, layer, "", f"calls tf.{settings.get('cls_symbol')}.{settings.get('method_name')}")
    elif kind == "TensorFlowOpLayer" and (why := _unsafe_node_def(settings.get("node_def"))):
        yield Finding(kind, layer, "", why)
    elif kind in _LOOKUPS and isinstance(settings.get("vocabulary"), str):
        yield Finding(kind, layer, "", "reads a file")
    elif kind in _LOADERS:
        yield Finding(kind, layer, "", _LOADERS[kind])
    elif _is_foreign(kind, value.get("module"), inner):
        name = inner if kind == "function" else kind
        yield Finding(kind, layer, "", f"calls Python: {value.get('module')}.{name}")


def _carries_bytecode(settings: Mapping[str, Any]) -> bool:
    """Whether a Lambda layer of Keras 2 carries code: [code, defaults, closure]. Keras 3 says "__lambda__" within."""
    types = [settings.get(f"{key}_type") for key in ("function", "output_shape", "mask")]
    function = settings.get("function")
    is_tuple = isinstance(function, Mapping) and function.get("class_name") == "__tuple__"
    return "lambda" in types or isinstance(function, (list, tuple)) or is_tuple


def _is_foreign(kind: str, module: Any, inner: Any) -> bool:
    """Whether a config names a function or class that is neither Keras' nor looks like a registered layer."""
    if not isinstance(module, str):
        return False
    root = module.partition(".")[0]
    if kind == "function" and (not isinstance(inner, str) or inner in _UNSAFE_FUNCTIONS):
        return True
    if root == "tensorflow":
        return _FILE_MODULES.search(module) is not None
    return root not in _KERAS_MODULES if kind == "function" else root in _FOREIGN_MODULES


def _is_safe_symbol(symbol: Any) -> bool:
    """Whether a name of TensorFlow's interface only computes."""
    if not isinstance(symbol, str):
        return False
    name = re.sub(r"^(?:tf\.)?(?:compat\.v[12]\.)*", "", symbol)
    namespace, _, function = name.partition(".")
    if not function:
        return name not in _UNSAFE_FUNCTIONS and not name.endswith("Reader")
    if namespace == "raw_ops":
        return function not in UNSAFE_OPS or function in SAFE_ATTRS
    return namespace in _SAFE_NAMESPACES or name.startswith(_SAFE_PREFIXES)


def _unsafe_node_def(node: Any) -> str:
    """What the op of a layer that wraps one can do, "" for nothing. Its text is JSON, or a proto that is searched for names."""
    if isinstance(node, str):
        try:
            node = json.loads(node)
        except (ValueError, RecursionError):
            words = set(re.findall(r"\w+", node))
            return next((why for op, why in UNSAFE_OPS.items() if op in words), "")
    return UNSAFE_OPS.get(str(node.get("op")), "") if isinstance(node, Mapping) else ""


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
