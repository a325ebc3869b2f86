"""ONNX files of small nets: what ONNX Runtime computes against the simulation, and what it fuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests import building
from tfquant.data import InputSpec
from tfquant.errors import ConfigError, ModelError, OutputError
from tfquant.exporters import checking
from tfquant.exporters.marking import Marked, mark
from tfquant.exporters.result import Exported, judge
from tfquant.graph.ir import Graph
from tfquant.plan.annotate import Annotation
from tfquant.plan.results import find_results, head_of
from tfquant.plan.spec import QuantPlan, QuantSpec, asymmetric, symmetric
from tfquant.targets import fakequant, weightonly

onnx = pytest.importorskip("onnx", reason='needs the extra "onnx"')
pytest.importorskip("tf2onnx", reason='needs the extra "onnx"')
pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')

from tfquant.exporters import onnx as exporter  # noqa: E402
from tfquant.exporters.onnx import openvino_running, running, writer  # noqa: E402

Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has tests of its own."""
    monkeypatch.setattr(openvino_running, "why_not", lambda: "Not run in OpenVINO: left out.")


@dataclasses.dataclass(frozen=True)
class Model:
    """What the exporter needs of a `QuantizedModel`, without a source."""

    base: Graph
    graph: Graph
    annotation: Any
    plan: QuantPlan

    @property
    def signatures(self) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
        return {"serving_default": ({key: key for key in self.graph.inputs}, {key: key for key in self.graph.outputs})}

    @property
    def input_specs(self) -> list[InputSpec]:
        return [InputSpec(key, tensor.shape, tensor.dtype.name) for key, tensor in self.graph.inputs.items()]

    def simulation(self) -> Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]:
        return checking.simulation(fakequant.lower(self.graph, self.annotation.units, self.plan))


def samples(inputs: Mapping[str, Any], count: int = 3, low: float = -2.0, high: float = 3.0) -> list[Arrays]:
    """One batch of seeded values; unknown sizes but the first are 7."""
    rng = np.random.default_rng(7)
    found = {}
    for name, shape in inputs.items():
        sizes = [count if axis == 0 and size is None else size or 7 for axis, size in enumerate(shape)]
        found[name] = rng.uniform(low, high, sizes).astype(np.float32)
    return [found]


def quantized(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    batches: Sequence[Arrays],
    mode: str = "static",
    specs: Mapping[str, QuantSpec] | None = None,
    **options: Any,
) -> Model:
    graph = building.build(function, inputs)
    if mode == "weight_only":
        building.simplify(graph)
        plan = weightonly.make_weight_plan(graph, lambda node: None, signature_keys=("serving_default",))
        return Model(graph.copy(), graph, Annotation({}, (), ()), plan)
    if mode == "dynamic":
        planned = building.dynamic_plan_for(graph, batches, **options)
        return Model(graph.copy(), graph, planned.annotation, planned.plan)
    planned = building.plan_for(graph, batches, specs=specs, **options)
    kept = options.get("ignored", ())
    others = [
        one for one in find_results(graph, planned.annotation, lambda node: None) if head_of(graph, one.node).name not in kept
    ]
    values = building.joined(building.run(graph, batches, {tensor.name: tensor for tensor in others})) if others else {}
    ranges = {name: (float(value.min()), float(value.max())) for name, value in values.items()}
    return Model(graph.copy(), graph, planned.annotation, dataclasses.replace(planned.plan, ranges=ranges))


def exported(model: Model, batches: Sequence[Arrays], **options: Any) -> tuple[onnx.ModelProto, Exported]:
    content, result = exporter.export(model, batches, **options)
    return onnx.load_from_string(content), result


def check_right(result: Exported) -> None:
    """All 8-bit tensors within a step, and outputs as float ops make them of these."""
    assert result.check is not None
    assert result.check.tensors
    assert max(tensor.steps for tensor in result.check.tensors) <= 1.01
    assert result.check.behind is not None
    assert result.check.behind > 80


def count(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def weights(*shape: int, seed: int = 0, size: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(0, size / np.sqrt(max(np.prod(shape[:-1]), 1)), shape) * rng.uniform(0.2, 2, shape[-1])).astype(np.float32)


def bias(size: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, size).astype(np.float32)


def conv(x: tf.Tensor, *shape: int, strides: Any = 1, padding: Any = "SAME", dilations: Any = 1, seed: int = 0) -> tf.Tensor:
    return tf.nn.bias_add(tf.nn.conv2d(x, weights(*shape, seed=seed), strides, padding, dilations=dilations), bias(shape[-1]))


def depthwise(x: tf.Tensor, *shape: int, stride: int = 1, padding: Any = "SAME", dilations: Any = (1, 1)) -> tf.Tensor:
    result = tf.nn.depthwise_conv2d(x, weights(*shape, seed=3, size=0.5), [1, stride, stride, 1], padding, dilations=dilations)
    return tf.nn.bias_add(result, bias(shape[2] * shape[3]))


def dense(x: tf.Tensor, inputs: int, outputs: int, seed: int = 5) -> tf.Tensor:
    return tf.matmul(x, weights(inputs, outputs, seed=seed)) + bias(outputs)


def flat(x: tf.Tensor, size: int) -> tf.Tensor:
    return tf.reshape(x, [-1, size])


def two_convs(x: tf.Tensor) -> tf.Tensor:
    return conv(tf.nn.relu(conv(x, 3, 3, 3, 8)), 1, 1, 8, 5, seed=1)


def residual(x: tf.Tensor) -> tf.Tensor:
    left = tf.nn.relu(conv(x, 3, 3, 4, 8))
    right = conv(tf.nn.relu(conv(left, 3, 3, 8, 8, seed=2)), 3, 3, 8, 8, seed=3)
    return dense(tf.reduce_mean(tf.nn.relu(left + right), [1, 2]), 8, 5)


def joined(x: tf.Tensor) -> tf.Tensor:
    stem = tf.nn.relu(conv(x, 3, 3, 3, 8))
    both = tf.concat([tf.nn.relu(conv(stem, 1, 1, 8, 4)), tf.nn.relu(conv(stem, 3, 3, 8, 6, seed=2))], 3)
    return conv(tf.nn.max_pool2d(both, 3, 2, "SAME"), 1, 1, 10, 3, seed=4)


def inverted(x: tf.Tensor) -> tf.Tensor:
    stem = tf.nn.relu6(conv(x, 3, 3, 3, 8, strides=2))
    wide = tf.nn.relu6(conv(stem, 1, 1, 8, 16, seed=1))
    narrow = conv(tf.nn.relu6(depthwise(wide, 3, 3, 16, 1)), 1, 1, 16, 8, seed=2)
    return dense(tf.reduce_mean(conv(narrow + stem, 1, 1, 8, 12, seed=4), [1, 2]), 12, 4)


def explicit(x: tf.Tensor) -> tf.Tensor:
    padded = tf.pad(x, [[0, 0], [2, 1], [0, 3], [0, 0]])
    y = tf.nn.relu(conv(padded, 3, 3, 3, 8, strides=2, padding="VALID"))
    return depthwise(tf.pad(y, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 3, 8, 1, padding="VALID")


def conv1d(x: tf.Tensor) -> tf.Tensor:
    y = tf.nn.relu(tf.nn.conv1d(x, weights(3, 4, 8), 1, "SAME") + bias(8))
    return tf.nn.conv1d(y, weights(5, 8, 6, seed=2), 2, "VALID") + bias(6)


def on_sequences(x: tf.Tensor) -> tf.Tensor:
    y = tf.nn.relu(tf.tensordot(x, weights(6, 16), 1) + bias(16))
    return tf.tensordot(y, weights(16, 5, seed=2), 1) + bias(5)


def perceptron(x: tf.Tensor) -> tf.Tensor:
    return dense(tf.nn.relu(dense(tf.nn.relu(dense(x, 9, 32)), 32, 16, seed=6)), 16, 3, seed=7)


def turned(x: tf.Tensor) -> tf.Tensor:
    """Weights stored the other way up."""
    y = tf.nn.relu(tf.matmul(x, weights(16, 9), transpose_b=True) + bias(16))
    return tf.matmul(y, weights(4, 16, seed=2), transpose_b=True)


def several(x: tf.Tensor, y: tf.Tensor) -> dict[str, tf.Tensor]:
    one, other = tf.nn.relu(conv(x, 3, 3, 3, 8)), tf.nn.relu(conv(y, 3, 3, 2, 8, seed=2))
    both = one + other
    return {"scores": dense(tf.reduce_mean(conv(both, 1, 1, 8, 6, seed=3), [1, 2]), 6, 3), "map": conv(both, 3, 3, 8, 2, seed=4)}


def pooled(x: tf.Tensor) -> tf.Tensor:
    y = tf.nn.avg_pool2d(tf.nn.relu(conv(x, 3, 3, 3, 8)), 2, 2, "VALID")
    y = tf.nn.max_pool2d(tf.nn.relu(conv(y, 3, 3, 8, 8, seed=1)), 2, 2, "VALID")
    return dense(flat(y, 8 * 2 * 2), 32, 4)


IMAGES = {"x": (None, 8, 8, 3)}
NETS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "two convolutions": (two_convs, IMAGES),
    "any size": (two_convs, {"x": (None, None, None, 3)}),
    "fixed batch": (two_convs, {"x": (1, 5, 9, 3)}),
    "residual": (residual, {"x": (None, 6, 7, 4)}),
    "concat, max pool": (joined, {"x": (None, 9, 7, 3)}),
    "inverted residual": (inverted, {"x": (None, 9, 9, 3)}),
    "explicit padding": (explicit, {"x": (None, 7, 6, 3)}),
    "conv1d": (conv1d, {"x": (None, 11, 4)}),
    "dense of rank 3": (on_sequences, {"x": (None, 5, 6)}),
    "dense": (perceptron, {"x": (None, 9)}),
    "transposed weights": (turned, {"x": (None, 9)}),
    "several": (several, {"x": (None, 6, 6, 3), "y": (None, 6, 6, 2)}),
    "pools": (pooled, {"x": (None, 8, 8, 3)}),
}


@pytest.mark.parametrize("name", NETS)
def test_net(name):
    function, inputs = NETS[name]
    batches = samples(inputs)
    model, result = exported(quantized(function, inputs, batches), batches)
    check_right(result)
    assert not any(op in ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul") for op, _ in result.float_ops), result.float_ops
    assert count(model, "Conv") + count(model, "Gemm") + count(model, "MatMul") >= 2
    assert count(model, "Transpose") <= len(model.graph.input) + len(model.graph.output)
    assert [entry.name for entry in model.graph.input] == list(inputs)


def deep(x: tf.Tensor) -> tf.Tensor:
    for seed in range(8):
        x = tf.nn.relu(conv(depthwise(x, 3, 3, 6, 1), 3, 3, 6, 6, seed=seed))
    return dense(flat(x, 6 * 6 * 6), 216, 5)


def test_the_same_integers_behind_many_layers():
    inputs, count_of = {"x": (None, 6, 6, 6)}, 40
    batches = samples(inputs, count_of)
    model = quantized(deep, inputs, batches)
    _, result = exported(model, batches)
    check_right(result)
    assert result.check is not None
    assert result.check.sqnr > 120


LAYERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "one channel": (lambda x: conv(tf.nn.relu(conv(x, 3, 3, 1, 1)), 3, 3, 1, 1), (None, 6, 6, 1)),
    "one pixel": (lambda x: conv(tf.nn.relu(conv(x, 1, 1, 5, 8)), 3, 3, 8, 4), (None, 1, 1, 5)),
    "stride 2": (lambda x: conv(tf.nn.relu(conv(x, 3, 3, 3, 8, strides=2)), 3, 3, 8, 4, strides=2), (None, 9, 8, 3)),
    "strides 2, 1": (lambda x: conv(tf.nn.relu(conv(x, 2, 3, 3, 8, strides=[1, 2, 1, 1])), 1, 1, 8, 4), (None, 9, 8, 3)),
    "even kernel": (lambda x: conv(tf.nn.relu(conv(x, 4, 2, 3, 8)), 2, 4, 8, 4), (None, 7, 7, 3)),
    "valid": (lambda x: conv(tf.nn.relu(conv(x, 3, 5, 3, 8, padding="VALID")), 3, 1, 8, 4, padding="VALID"), (None, 8, 8, 3)),
    "dilated": (
        lambda x: conv(tf.nn.relu(conv(x, 3, 3, 3, 8, dilations=2)), 3, 3, 8, 4, dilations=[1, 2, 1, 1]),
        (None, 9, 9, 3),
    ),
    "groups": (lambda x: conv(tf.nn.relu(conv(x, 3, 3, 2, 8)), 3, 3, 4, 6), (None, 6, 6, 4)),
    "depthwise": (lambda x: conv(tf.nn.relu(depthwise(x, 3, 3, 4, 1)), 1, 1, 4, 6), (None, 6, 6, 4)),
    "multiplier 2": (lambda x: conv(tf.nn.relu(depthwise(x, 3, 3, 4, 2, stride=2)), 1, 1, 8, 6), (None, 7, 6, 4)),
    "multiplier 3 of one": (lambda x: conv(tf.nn.relu(depthwise(x, 5, 3, 1, 3)), 1, 1, 3, 6), (None, 7, 6, 1)),
    "depthwise dilated": (lambda x: conv(depthwise(x, 3, 3, 4, 1, dilations=(2, 2)), 1, 1, 4, 6), (None, 8, 8, 4)),
    "no bias": (
        lambda x: tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, weights(3, 3, 3, 8), 1, "SAME")), weights(1, 1, 8, 4), 1, "SAME"),
        (None, 6, 6, 3),
    ),
    "leaky relu": (lambda x: conv(tf.nn.leaky_relu(conv(x, 3, 3, 3, 8), 0.1), 3, 3, 8, 4), (None, 6, 6, 3)),
    "sigmoid": (lambda x: conv(tf.nn.sigmoid(conv(x, 3, 3, 3, 8)), 3, 3, 8, 4), (None, 6, 6, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    function, shape = LAYERS[name]
    batches = samples({"x": shape})
    _, result = exported(quantized(function, {"x": shape}, batches), batches)
    check_right(result)
    assert result.quantized_ops >= 2


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_any_batch_size(batch):
    model = quantized(joined, IMAGES, samples(IMAGES))
    content, _ = exporter.export(model, [])
    file = running.File(content, {"x": "x", "output_0": "output_0"}, ())
    given = samples(IMAGES, batch)[0]
    wanted = checking.simulation(mark(model, exporter.KERNELS).graph)(given)["output_0"]
    found = file.run(given)["output_0"]
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


RANGES = {
    "one-sided": (0.5, 4.0),
    "negative": (-4.0, -0.5),
    "tiny": (-1e-6, 2e-6),
    "huge": (-1e7, 3e6),
    "far from even": (-0.01, 50.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_range(name):
    low, high = RANGES[name]
    batches = samples(IMAGES, low=low, high=high)
    _, result = exported(quantized(two_convs, IMAGES, batches), batches)
    check_right(result)


def test_symmetric_tensors_are_stored_around_128():
    batches = samples(IMAGES)
    model = quantized(two_convs, IMAGES, batches, activation_mode="symmetric")
    specs = {name: symmetric(spec.low, spec.high, "user", name, "qint8") for name, spec in model.plan.tensors.items()}
    plan = dataclasses.replace(model.plan, tensors=specs)
    written, result = exported(dataclasses.replace(model, plan=plan), batches)
    check_right(result)
    points = [onnx.numpy_helper.to_array(entry) for entry in constants(written, "QuantizeLinear", 2)]
    assert points[0] == 128
    assert points[0].dtype == np.uint8


@pytest.mark.parametrize("opset", exporter.OPSETS)
def test_opset(opset):
    batches = samples(IMAGES)
    for function in (joined, residual):
        inputs = IMAGES if function is joined else {"x": (None, 6, 7, 4)}
        batches = samples(inputs)
        model, result = exported(quantized(function, inputs, batches), batches, opset=opset)
        check_right(result)
        assert model.opset_import[0].version == opset


def test_the_plans_numbers_are_in_the_file():
    batches = samples(IMAGES)
    model = quantized(two_convs, IMAGES, batches)
    written, _ = exported(model, batches)
    values = {entry.name: onnx.numpy_helper.to_array(entry) for entry in written.graph.initializer}
    makers = {node.output[0]: node for node in written.graph.node}
    convs = [node for node in written.graph.node if node.op_type == "Conv"]
    marked = mark(model, exporter.KERNELS)
    for node, entry in zip(convs, marked.weights, strict=True):
        dequantize = makers[node.input[1]]
        np.testing.assert_array_equal(values[dequantize.input[0]], entry.integers.transpose(3, 2, 0, 1))
        np.testing.assert_array_equal(values[dequantize.input[1]], entry.scales)
        assert dequantize.attribute[0].i == 0
        read = makers[node.input[0]]
        spec = model.plan.tensors["x" if read.input[0].startswith("x/") else next(n for n in model.plan.tensors if n != "x")]
        assert float(values[read.input[1]]) == np.float32(spec.scale)
        assert int(values[read.input[2]]) == (128 if spec.dtype == "qint8" else spec.zero_point)
        biases = makers[node.input[2]]
        assert values[biases.input[0]].dtype == np.int32
        np.testing.assert_allclose(values[biases.input[1]], np.float32(spec.scale) * entry.scales, rtol=1e-6)


def test_a_file_is_the_same_each_time():
    batches = samples(IMAGES)
    one, other = (exporter.export(quantized(joined, IMAGES, batches), [])[0] for _ in range(2))
    assert one == other


def test_what_a_file_holds_besides_its_numbers():
    batches = samples(IMAGES)
    model, _ = exported(quantized(inverted, IMAGES, batches), batches)
    numbers = sum(len(entry.raw_data) for entry in model.graph.initializer)
    nodes, constant = model.graph.node, model.graph.initializer
    assert model.ByteSize() < numbers + 48 * len(nodes) + 24 * len(constant) + 500
    stored = [node.output[0] for node in nodes if node.op_type == "QuantizeLinear"]
    tensors = ["x", "Relu6", "Relu6_1", "Relu6_2", "BiasAdd_3", "add", "BiasAdd_4", "Mean"]
    assert stored == [f"{name}/quantized" for name in tensors]
    weights = [entry.name for entry in constants(model, "DequantizeLinear", 0, onnx.TensorProto.INT8)]
    layers = ["Conv2D", "Conv2D_1", "depthwise", "Conv2D_2", "Conv2D_3", "MatMul"]
    assert sorted(weights) == sorted(f"{name}/weights" for name in layers)
    assert [node.name for node in nodes if node.op_type in ("Add", "Gemm")] == ["add", "output_0"]


def test_images_with_channels_first():
    batches = samples(IMAGES)
    model, result = exported(quantized(two_convs, IMAGES, batches), batches, inputs_as_nchw=["x"])
    check_right(result)
    assert [size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim][1:] == [3, 8, 8]
    assert count(model, "Transpose") <= 1  # of the output


# -- modes -----------------------------------------------------------------------------------------------------------------
def test_weights_alone():
    def net(x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(conv(x, 3, 3, 3, 64))
        return dense(tf.reduce_mean(tf.nn.relu(depthwise(y, 5, 5, 64, 1)), [1, 2]), 64, 20)

    batches = samples(IMAGES)
    model, result = exported(quantized(net, IMAGES, batches, mode="weight_only"), batches)
    stored = [entry for entry in model.graph.initializer if entry.data_type == onnx.TensorProto.INT8]
    assert sorted(tuple(entry.dims) for entry in stored) == [(64, 1, 5, 5), (64, 3, 3, 3), (64, 20)]
    assert count(model, "QuantizeLinear") == 0
    assert result.check.sqnr > 100


def test_ranges_found_at_each_call():
    inputs = {"x": (None, 64)}
    batches = samples(inputs)
    model, result = exported(quantized(lambda x: dense(tf.nn.relu(dense(x, 64, 48)), 48, 6), inputs, batches, "dynamic"), batches)
    assert count(model, "MatMulInteger") == 2
    assert result.quantized_ops == 2
    assert result.check.sqnr > 60


def test_rows_are_looked_up_in_8_bits():
    def net(x: tf.Tensor) -> tf.Tensor:
        return dense(tf.reduce_mean(tf.gather(weights(50, 32, seed=9), tf.cast(tf.abs(x), tf.int32)), 1), 32, 8)

    inputs = {"x": (None, 6)}
    batches = samples(inputs, low=0, high=49)
    model, result = exported(quantized(net, inputs, batches, "weight_only"), batches)
    assert result.check.sqnr > 100
    tables = [entry for entry in model.graph.initializer if entry.data_type == onnx.TensorProto.INT8]
    assert [tuple(entry.dims) for entry in tables] == [(50, 32)]
    assert any(node.op_type == "Gather" and node.input[0] == tables[0].name for node in model.graph.node)


def test_weights_with_scales_along_two_axes():
    inputs = {"x": (None, 4, 1, 16)}
    batches = samples(inputs)
    model, result = exported(quantized(lambda x: tf.matmul(x, weights(1, 4, 16, 24)), inputs, batches, "weight_only"), batches)
    assert [entry.data_type for entry in model.graph.initializer].count(onnx.TensorProto.INT8) == 1
    assert result.check.sqnr > 100


def test_layers_kept_in_float_keep_their_weights():
    """ONNX Runtime quantizes the weights of a convolution between 8-bit tensors by itself."""

    def net(x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(conv(x, 3, 3, 3, 8))
        y = tf.nn.bias_add(tf.nn.conv2d(y, weights(3, 3, 8, 8, seed=1), 1, "SAME", name="kept"), bias(8))
        return conv(tf.nn.relu(y), 3, 3, 8, 4, seed=2)

    batches = samples(IMAGES)
    _, result = exported(quantized(net, IMAGES, batches, ignored=["kept"]), batches)
    check_right(result)
    assert result.quantized_ops == 2
    assert sum(op in ("Conv", "FusedConv") for op, _ in result.float_ops) == 1


def test_dilations_of_images_of_any_size():
    """ONNX Runtime refuses dilated convolutions whose padding it is to find out."""
    function = LAYERS["dilated"][0]
    inputs = {"x": (None, None, None, 3)}
    batches = samples(inputs)
    _, result = exported(quantized(function, inputs, batches), batches)
    check_right(result)


def test_a_mean_over_the_image_is_an_int8_op():
    """OpenVINO has no quantized tensor of scale 1, and keeps averages in float that are rounded behind a reshape."""

    def net(x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(conv(x, 3, 3, 3, 8))
        return dense(flat(tf.nn.avg_pool2d(y, 8, 8, "VALID"), 8), 8, 4)

    batches = samples(IMAGES, low=0, high=255)
    model = quantized(net, IMAGES, batches)
    specs = {**model.plan.tensors, "x": QuantSpec("quint8", 1.0, 0, "user", "x")}
    model = dataclasses.replace(model, plan=dataclasses.replace(model.plan, tensors=specs))
    written, result = exported(model, batches)
    check_right(result)
    assert result.float_ops == ()
    makers = {node.output[0]: node for node in written.graph.node}
    pool = next(node for node in written.graph.node if node.op_type == "GlobalAveragePool")
    assert any(node.op_type == "QuantizeLinear" and node.input[0] == pool.output[0] for node in written.graph.node)
    first = next(node for node in written.graph.node if node.op_type == "Conv")
    scales = {entry.name: onnx.numpy_helper.to_array(entry) for entry in written.graph.initializer}
    assert 0 < scales[makers[first.input[0]].input[1]] - 1 < 1e-6


def test_gelu():
    """ONNX has no Erfc."""

    def net(x: tf.Tensor) -> tf.Tensor:
        y = dense(x, 9, 16)
        return dense(0.5 * y * tf.math.erfc(-y * np.float32(np.sqrt(0.5))), 16, 3, seed=6)

    batches = samples({"x": (None, 9)})
    _, result = exported(quantized(net, {"x": (None, 9)}, batches), batches)
    check_right(result)
    assert any(op in ("Erf", "Gelu", "BiasGelu", "QuickGelu") for op, _ in result.float_ops)


def test_branches_of_equal_names():
    """Tensors in the two bodies of a branch may have one name."""

    def net(x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(conv(x, 3, 3, 3, 8))
        z = tf.cond(tf.reduce_sum(x) > 0, lambda: tf.multiply(y, 2.0, name="same"), lambda: tf.multiply(y, 3.0, name="same"))
        return conv(z, 1, 1, 8, 4, seed=1)

    batches = samples(IMAGES)
    model, result = exported(quantized(net, IMAGES, batches), batches)
    check_right(result)
    assert count(model, "If") == 1


# -- wrong files -----------------------------------------------------------------------------------------------------------
def constants(model: onnx.ModelProto, op: str, slot: int, dtype: Any = None) -> list[onnx.TensorProto]:
    """The constants that nodes of this type read in this slot, each once; of those whose first operand is of this dtype."""
    entries = {entry.name: entry for entry in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == op and len(node.input) > slot]
    if dtype is not None:
        nodes = [node for node in nodes if node.input[0] in entries and entries[node.input[0]].data_type == dtype]
    return [entries[name] for name in dict.fromkeys(node.input[slot] for node in nodes)]


def edited(entry: onnx.TensorProto, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    entry.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(entry).copy()), entry.name))


def of_weights(slot: int, edit: Callable[[np.ndarray], np.ndarray], which: int = 0) -> Callable[[onnx.ModelProto], None]:
    """Changes weights (0) or their scales (1)."""
    return lambda model: edited(constants(model, "DequantizeLinear", slot, onnx.TensorProto.INT8)[which], edit)


def of_bias(model: onnx.ModelProto) -> None:
    edited(constants(model, "DequantizeLinear", 0, onnx.TensorProto.INT32)[0], in_one_channel(0.0))


def of_tensor(model: onnx.ModelProto) -> None:
    edited(constants(model, "QuantizeLinear", 1)[1], lambda value: (value * 1.02).astype(np.float32))


def one_more(values: np.ndarray) -> np.ndarray:
    return values + np.ones((), values.dtype)


def in_one_channel(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(values: np.ndarray) -> np.ndarray:
        values[0] = (values[0] * factor).astype(values.dtype)
        return values

    return edit


def of_reader(model: onnx.ModelProto) -> None:
    """A zero point that the DequantizeLinear alone has."""
    node = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) == 3][1]
    value = next(onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer if entry.name == node.input[2])
    model.graph.initializer.append(onnx.numpy_helper.from_array(one_more(value), "other"))
    node.input[2] = "other"


WRONG: dict[str, Callable[[onnx.ModelProto], None]] = {
    "zero point of one side": of_reader,
    "scale of a channel": of_weights(1, in_one_channel(1.1)),
    "scale of a channel of the last layer": of_weights(1, in_one_channel(1.1), -1),
    "axes of weights": of_weights(0, lambda values: np.ascontiguousarray(values.swapaxes(2, 3))),
    "a bias": of_bias,
    "scale of a tensor": of_tensor,
}


def judged(model: Model, batches: Sequence[Arrays], edit: Callable[[onnx.ModelProto], None]) -> None:
    marked: Marked = mark(model, exporter.KERNELS)
    names = {"x": "x", "output_0": "output_0"}
    written = writer.write(marked, names, 17)
    edit(written.model)
    file = running.File(written.model.SerializeToString(), names, ())
    inner = file.inner(written.model, written.places)
    found = checking.check("ONNX Runtime", marked.graph, file.run, batches, inner, marked.names)
    judge(Exported("onnx", "int8", 0, 0, 0, (), found, exact=True))


def classifier(x: tf.Tensor) -> tf.Tensor:
    y = tf.nn.relu(conv(tf.nn.relu(conv(x, 3, 3, 3, 8)), 3, 3, 8, 8, seed=1))
    return dense(tf.reduce_mean(y, [1, 2]), 8, 5)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers_are_found(name):
    batches = samples(IMAGES)
    model = quantized(classifier, IMAGES, batches)
    judged(model, batches, lambda proto: None)
    with pytest.raises(OutputError, match="otherwise than the simulation says"):
        judged(model, batches, WRONG[name])


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_wrong_weights_are_found_where_no_tensors_are_stored(mode, monkeypatch):
    def marked(*arguments: Any) -> Marked:
        right = mark(*arguments)
        first, *others = right.weights
        wrong = dataclasses.replace(first, scales=(first.scales * np.float32(1.03)).astype(np.float32))
        return dataclasses.replace(right, weights=(wrong, *others))

    inputs = {"x": (None, 64)}
    batches = samples(inputs)
    model = quantized(lambda x: dense(tf.nn.relu(dense(x, 64, 48)), 48, 32), inputs, batches, mode)
    judge(exporter.export(model, batches)[1])
    monkeypatch.setattr(exporter, "mark", marked)
    with pytest.raises(OutputError, match="are not those of the simulation"):
        judge(exporter.export(model, batches)[1])


# -- refusals --------------------------------------------------------------------------------------------------------------
def test_refusals():
    batches = samples(IMAGES)
    model = quantized(two_convs, IMAGES, batches)
    with pytest.raises(ConfigError, match=r"opset must be from 13 to 18\. Received: 12"):
        exporter.export(model, batches, opset=12)
    with pytest.raises(ConfigError, match=r"rank 4 or 5: x\. Received: y"):
        exporter.export(model, batches, inputs_as_nchw=["y"])
    fewer = {name: asymmetric(spec.low, spec.high, "user", name, bits=4) for name, spec in model.plan.tensors.items()}
    with pytest.raises(ConfigError, match="activations of 8"):
        exporter.export(dataclasses.replace(model, plan=dataclasses.replace(model.plan, tensors=fewer)), batches)


def test_an_op_without_a_counterpart():
    batches = samples(IMAGES)
    model = quantized(lambda x: tf.raw_ops.Betainc(a=tf.abs(conv(x, 1, 1, 3, 2)) + 1.0, b=2.0, x=0.5), IMAGES, batches)
    with pytest.raises(ModelError, match="no counterpart of Betainc at opset 17"):
        exporter.export(model, batches)


def test_without_tf2onnx(monkeypatch):
    model = quantized(two_convs, IMAGES, samples(IMAGES))
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "tfquant\[onnx\]"'):
        exporter.export(model, [])


def test_without_onnxruntime(monkeypatch):
    batches = samples(IMAGES)
    model = quantized(two_convs, IMAGES, batches)
    monkeypatch.setattr(running, "is_installed", lambda: False)
    _, result = exporter.export(model, batches)
    assert result.check is None
    assert any("pip install onnxruntime" in line for line in result.lines())
