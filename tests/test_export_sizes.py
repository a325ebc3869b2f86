"""Tests of scripts/export_sizes.py: what the bytes of files are."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import onnx
import tensorflow as tf

import tfquant
from scripts.export_sizes import Parts, parts_of_onnx, parts_of_tflite
from tfquant.exporters import onnx as exporter
from tfquant.exporters import tflite


def quantized(folder) -> tfquant.QuantizedModel:
    rng = np.random.default_rng(0)
    kernel, matrix = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 3, 2, 4), (4, 5)))

    def network(x):
        y = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, 1, "SAME"), np.ones(4, np.float32)))
        return {"y": tf.nn.bias_add(tf.matmul(tf.reduce_mean(y, [1, 2]), matrix), np.ones(5, np.float32))}

    module = tf.Module()
    module.f = tf.function(network, input_signature=[tf.TensorSpec((None, 6, 6, 2), tf.float32, name="x")], autograph=False)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.f})
    data = [{"x": rng.normal(size=(4, 6, 6, 2)).astype(np.float32)}]
    return tfquant.quantize(str(folder), data, tfquant.QuantConfig(verify=False, placement="int8", preset="fast"))


def test_parts(tmp_path):
    model = quantized(tmp_path)
    weights = 3 * 3 * 2 * 4 + 4 * 5
    int8, half = (tflite.export(model, [], kind)[0] for kind in ("int8", "float16"))
    # Scales of weights and of biases, and of three or four tensors; zero points of 8 bytes, of channels once for both.
    channels = (2 * 4 + 8) * (4 + 5)
    parts = parts_of_tflite(int8)
    assert parts[:2] == (weights, 4 * (4 + 5))
    assert channels + 3 * 4 < parts.scales <= channels + 4 * (4 + 8)
    assert parts.size == len(int8)
    assert parts_of_tflite(half) == Parts(2 * (weights + 4 + 5), 0, 0, len(half))
    content = exporter.export(model, [])[0]
    parts = parts_of_onnx(onnx.load_from_string(content))
    assert parts[:2] == (weights, 4 * (4 + 5))
    assert 2 * 4 * (4 + 5) < parts.scales < 2 * 4 * (4 + 5) + 40
    assert parts.size == len(content)
