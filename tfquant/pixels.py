"""A model of preprocessed images becomes one of their pixels: what was done to them before it does itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.data import PREPROCESS, Preprocessing
from tfquant.errors import ConfigError
from tfquant.graph.ir import Graph, Tensor, to_attr
from tfquant.graph.loading import Endpoint, Source


def take_pixels(source: Source, preprocess: str) -> None:
    """Makes the input of a loaded model, in place, uint8 of 0..255 (RGB), and puts the preprocessing in front of it, in float32.

    Args:
        source: a model of one floating-point input (N, H, W, C) or (H, W, C), C being 1 or 3.
        preprocess: key of `PREPROCESS`; how images were preprocessed for it.

    Raises:
        ConfigError: the model has another kind of input.
    """
    chosen = PREPROCESS[preprocess]
    _check(source.graph, preprocess, chosen)
    ((key, tensor),) = source.graph.inputs.items()
    dtype = tensor.dtype
    assert dtype is not None
    _insert(source.graph, key, tensor, chosen)
    source.signatures = {name: _of_bytes(endpoint) for name, endpoint in source.signatures.items()}
    source.endpoints = {name: _of_bytes(endpoint) for name, endpoint in source.endpoints.items()}
    source.original = {name: _preprocessing(run, chosen, dtype) for name, run in source.original.items()}


def _check(graph: Graph, preprocess: str, chosen: Preprocessing) -> None:
    told = ", ".join(f"{key!r} {t.dtype.name if t.dtype else 'of unknown type'} {t.shape}" for key, t in graph.inputs.items())
    inputs = list(graph.inputs.values())
    if len(inputs) != 1:
        raise ConfigError(f"input_dtype uint8 is for models of one input, an image. Received: {len(inputs)} inputs: {told}")
    (tensor,) = inputs
    if tensor.dtype == tf.uint8:
        raise ConfigError(f"The model takes uint8 already: leave input_dtype out. Received: input {told}")
    if tensor.dtype is None or not tensor.dtype.is_floating:
        raise ConfigError(f"input_dtype uint8 is for models of floating-point images. Received: input {told}")
    shape = tensor.shape
    if shape is None or len(shape) not in (3, 4) or shape[-1] not in (1, 3):
        raise ConfigError(f"input_dtype uint8 is for images (N, H, W, C) or (H, W, C) of 1 or 3 channels. Received: input {told}")
    if chosen.needs_rgb and shape[-1] != 3:
        raise ConfigError(f"preprocess {preprocess!r} needs RGB. Received: input {told}")


def _insert(graph: Graph, key: str, tensor: Tensor, chosen: Preprocessing) -> None:
    dtype, shape, place = tensor.dtype, tensor.shape, tensor.node
    readers = graph.users(tensor)
    shown = [name for name, output in graph.outputs.items() if output == tensor]
    place.attrs["dtype"], place.dtypes = to_attr(tf.uint8), [tf.uint8]

    def add(op: str, inputs: list[Tensor], made: tf.DType, **attrs: object) -> Tensor:
        return graph.add(op, inputs, name=f"{key}/preprocess/{op}", attrs=attrs, shapes=[shape], dtypes=[made]).out

    def constant(values: tuple[float, ...]) -> Tensor:
        return graph.constant(np.array(values, np.float32), name=f"{key}/preprocess/constant")

    image = tensor
    if chosen.bgr:
        axis = graph.constant(np.array([-1], np.int32), name=f"{key}/preprocess/axis")
        image = add("ReverseV2", [image, axis], tf.uint8, T=tf.uint8, Tidx=tf.int32)
    image = add("Cast", [image], tf.float32, SrcT=tf.uint8, DstT=tf.float32, Truncate=False)
    image = add("Sub", [image, constant(chosen.mean)], tf.float32, T=tf.float32)
    image = add("RealDiv", [image, constant(chosen.deviation)], tf.float32, T=tf.float32)
    if dtype != tf.float32:
        assert dtype is not None
        image = add("Cast", [image], dtype, SrcT=tf.float32, DstT=dtype, Truncate=False)
    for user, slot in readers:
        graph.set_input(user, slot, image)
    graph.outputs.update(dict.fromkeys(shown, image))


def _of_bytes(endpoint: Endpoint) -> Endpoint:
    def as_bytes(spec: Any) -> Any:
        return tf.TensorSpec(spec.shape, tf.uint8, name=spec.name)

    return dataclasses.replace(endpoint, arguments=tf.nest.map_structure(as_bytes, endpoint.arguments))


def _preprocessing(
    run: Callable[..., Mapping[str, Any]], chosen: Preprocessing, dtype: tf.DType
) -> Callable[..., Mapping[str, Any]]:
    """The float model behind the same preprocessing."""

    def of_pixels(**tensors: Any) -> Mapping[str, Any]:
        images = {key: tf.constant(chosen(tensor.numpy().astype(np.float32))) for key, tensor in tensors.items()}
        return run(**{key: tf.cast(image, dtype) for key, image in images.items()})

    return of_pixels
