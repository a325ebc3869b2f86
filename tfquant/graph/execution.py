"""A `Graph` as something to call: in Python, or inside of another function."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import wrap_function
from tensorflow.python.framework import func_graph

from tfquant.graph.ir import Graph, Node, Tensor

# A GraphDef is a proto, which cannot hold 2 GiB. Beyond this, large constants become variables.
MAX_CONSTANT_BYTES = 1_500_000_000


@dataclasses.dataclass(frozen=True)
class Executable:
    """A graph that runs.

    Attributes:
        function: the concrete function: the graph's inputs, then `externals`, then the values of `variables`.
        externals: handles of tables and variables that belong to others.
        variables: constants that are too large for a GraphDef, with the dtype that they have in the graph.
    """

    function: Any
    externals: tuple[Any, ...]
    variables: tuple[tuple[tf.Variable, tf.DType], ...]

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs, *self.externals, *(_read(variable, dtype) for variable, dtype in self.variables))


def _read(variable: tf.Variable, dtype: tf.DType) -> tf.Tensor:
    value = variable.value()
    return value if value.dtype == dtype else tf.bitcast(value, dtype)  # no variable is of a quantized type


def executable(graph: Graph, fetch: Callable[[Callable[[Tensor], tf.Tensor]], Any] | None = None) -> Executable:
    """Makes a graph callable with its inputs in order; effects run too.

    Args:
        graph: the graph.
        fetch: called once inside the TensorFlow graph with a function from a tensor to TensorFlow's; what it returns (any nest
            of tensors) is what a call returns. By default the outputs in order.
    """
    externals = [node for node in graph.order() if node.external is not None]
    large = _large_constants(graph)
    content = graph.to_graph_def(placeholders=large)
    feeds = [*(tensor.node for tensor in graph.inputs.values()), *externals, *large]
    # A graph of its own, as `wrap_function` makes one, but without the copy that its `prune` would be.
    inner = func_graph.FuncGraph("graph")
    with inner.as_default():
        tf.graph_util.import_graph_def(content, name="")
        outputs = graph.outputs.values()
        results = fetch(lambda tensor: _tensor(inner, tensor)) if fetch is not None else [_tensor(inner, t) for t in outputs]
        # What is an input and an output, or twice an output, must be tensors of their own.
        results = tf.nest.map_structure(tf.identity, results)
    inner.inputs = [_tensor(inner, node.out) for node in feeds]
    inner.outputs = tf.nest.flatten(results)
    inner.structured_outputs = results
    inner.control_outputs = [inner.get_operation_by_name(node.name) for node in graph.effects]
    function = wrap_function.WrappedFunction(inner, variable_holder=wrap_function.VariableHolder())
    function._num_positional_args = len(feeds)
    function._arg_keywords = [node.name for node in feeds]
    variables = tuple((tf.Variable(node.value, trainable=False), node.dtypes[0]) for node in large)
    return Executable(function, tuple(node.external for node in externals), variables)


def _tensor(scratch: tf.Graph, tensor: Tensor) -> tf.Tensor:
    return scratch.get_tensor_by_name(f"{tensor.node.name}:{tensor.index}")


def _large_constants(graph: Graph) -> list[Node]:
    """The largest constants, as many as do not fit."""
    constants = sorted((node for node in graph.order() if node.op == "Const"), key=lambda node: -node.constant_bytes)
    total, moved = sum(node.constant_bytes for node in constants), 0
    while total > MAX_CONSTANT_BYTES:
        total -= constants[moved].constant_bytes
        moved += 1
    return constants[:moved]


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Lets TensorFlow run float ops one by one.

    Its fused float kernels crash on some graphs that run well unfused: convolutions with explicit padding and a bias, or with
    a bias, a residual add and a ReLU.
    """
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"remapping": False})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({"remapping": before.get("remapping", True)})
