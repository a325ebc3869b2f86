"""A batch of 0 samples, which the INT8 kernels refuse: the network then runs on one sample of zeros, and its results are cut off.

Switch and Merge hand a tensor on as it is, and a Slice of everything is no copy, so that other batches pay next to nothing.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor


def guard(graph: Graph) -> bool:
    """Makes `graph` take an empty batch, in place; returns whether it could.

    It can where all inputs are float32 or uint8 and have a batch of unknown size and otherwise known shapes, and all outputs have
    a batch.
    """
    inputs, outputs = list(graph.inputs.values()), list(graph.outputs.values())
    if not inputs or not all(map(_is_batch, (*inputs, *outputs))) or not all(map(_is_plain, inputs)):
        return False
    if any(tensor in outputs for tensor in inputs):
        return False
    is_empty = _is_empty(graph, inputs[0])
    for tensor in inputs:
        _feed(graph, tensor, is_empty)
    for key, tensor in graph.outputs.items():
        graph.outputs[key] = _cut(graph, tensor, is_empty, key)
    graph.infer()
    return True


def _is_batch(tensor: Tensor) -> bool:
    return bool(tensor.shape) and tensor.shape is not None and tensor.shape[0] is None


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in (tf.float32, tf.uint8) and tensor.shape is not None and None not in tensor.shape[1:]


def _add(graph: Graph, op: str, inputs: list[Tensor], dtype: tf.DType, attrs: dict[str, object], name: str) -> Tensor:
    return graph.add(op, inputs, name=f"empty_batch/{name}", attrs=attrs, dtypes=[dtype]).out


def _constant(graph: Graph, value: object, name: str) -> Tensor:
    return graph.constant(np.array(value, np.int32), name=f"empty_batch/{name}")


def _is_empty(graph: Graph, tensor: Tensor) -> Tensor:
    size = _add(graph, "Size", [tensor], tf.int32, {"T": tensor.dtype, "out_type": tf.int32}, "size")
    return _add(graph, "Equal", [size, _constant(graph, 0, "zero")], tf.bool, {"T": tf.int32}, "is_empty")


def _feed(graph: Graph, tensor: Tensor, is_empty: Tensor) -> None:
    """Whoever reads the input reads zeros where it is empty."""
    assert tensor.shape is not None and tensor.dtype is not None
    dtype = tensor.dtype
    readers = [(user, slot) for user, slot in graph.users(tensor) if user.op != "Size"]
    switch = graph.add("Switch", [tensor, is_empty], name="empty_batch/switch", attrs={"T": dtype}, dtypes=[dtype, dtype])
    # The zeros must wait for the branch that needs them: they read from it.
    shape = _constant(graph, [1, *tensor.shape[1:]], "shape")
    taken = _add(
        graph,
        "Sum",
        [Tensor(switch, 1), _axes(graph, len(tensor.shape))],
        dtype,
        {"T": dtype, "Tidx": tf.int32, "keep_dims": False},
        "nothing",
    )
    zeros = _add(graph, "BroadcastTo", [taken, shape], dtype, {"T": dtype, "Tidx": tf.int32}, "zeros")
    merge = graph.add(
        "Merge",
        [Tensor(switch, 0), zeros],
        name="empty_batch/merge",
        attrs={"N": 2, "T": dtype},
        shapes=[tensor.shape, ()],
        dtypes=[dtype, tf.int32],
    )
    for user, slot in readers:
        graph.set_input(user, slot, merge.out)


def _axes(graph: Graph, rank: int) -> Tensor:
    return _constant(graph, range(rank), "axes")


def _cut(graph: Graph, tensor: Tensor, is_empty: Tensor, key: str) -> Tensor:
    assert tensor.shape is not None and tensor.dtype is not None
    rank = len(tensor.shape)
    nothing, all_of_it = (_constant(graph, [size] + [-1] * (rank - 1), "sizes") for size in (0, -1))
    size = _add(graph, "SelectV2", [is_empty, nothing, all_of_it], tf.int32, {"T": tf.int32}, "rows")
    begin = _constant(graph, [0] * rank, "begin")
    attrs = {"T": tensor.dtype, "Index": tf.int32}
    return graph.add(
        "Slice", [tensor, begin, size], name=f"{key}/rows", attrs=attrs, shapes=[tensor.shape], dtypes=[tensor.dtype]
    ).out
