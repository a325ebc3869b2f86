"""ONNX files of small nets in OpenVINO: what it computes against the simulation in its arithmetic."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tfquant import machine
from tfquant.errors import OutputError
from tfquant.exporters import checking
from tfquant.exporters.marking import mark
from tfquant.exporters.result import Exported, judge

for _name in ("onnx", "tf2onnx", "onnxruntime"):
    pytest.importorskip(_name, reason='needs the extra "onnx"')
pytest.importorskip("openvino", reason='needs the extra "openvino"')
if machine.has_vnni() is False:
    pytest.skip("sums of 8-bit products may overflow on a CPU without VNNI", allow_module_level=True)

import onnx  # noqa: E402

from tests import test_onnx as nets  # noqa: E402
from tests.test_onnx import conv, dense, depthwise, samples  # noqa: E402
from tfquant.exporters import onnx as exporter  # noqa: E402
from tfquant.exporters.onnx import openvino_running, running, writer  # noqa: E402

MAPS = {"x": (6, 9, 8, 4)}
relu = tf.nn.relu


@pytest.fixture(autouse=True)
def _without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has tests of its own."""
    monkeypatch.setattr(running, "is_installed", lambda: False)


@pytest.fixture(scope="module", name="load")
def _load() -> Iterator[running.Load]:
    with openvino_running.process() as load:
        yield load


def checked(function: Callable[..., Any], inputs: dict[str, Any], mode: str = "static") -> checking.Check:
    batches = samples(inputs)
    _, result = exporter.export(nets.quantized(function, inputs, batches, mode), batches)
    (found,) = result.checks
    assert found.runtime.startswith("OpenVINO 20")
    judge(result)
    return found


@pytest.mark.parametrize("name", [name for name in nets.NETS if name != "pools"])
def test_the_same_integers(name):
    """All but means of four pixels, which are halves of steps: the simulation rounds these up."""
    found = checked(*nets.NETS[name])
    assert found.tensors
    assert max(tensor.off for tensor in found.tensors) == 0
    assert found.behind is not None
    assert min(found.behind, found.sqnr) > 120


@pytest.mark.parametrize("name", ["groups", "multiplier 2", "depthwise dilated", "no bias", "leaky relu", "sigmoid"])
def test_layer(name):
    function, shape = nets.LAYERS[name]
    found = checked(function, {"x": shape})
    assert max(tensor.off for tensor in found.tensors) == 0
    assert found.sqnr > 120


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_other_modes(mode):
    found = checked(lambda x: dense(relu(dense(x, 64, 48)), 48, 6), {"x": (None, 64)}, mode)
    assert found.sqnr > 100


# -- sums that convolutions compute ----------------------------------------------------------------------------------------
def wide(x: tf.Tensor, seed: int = 3, **options: Any) -> tf.Tensor:
    return conv(relu(conv(x, 3, 3, 8, 8, seed=2)), 3, 3, 8, 8, seed=seed, **options)


def stem(x: tf.Tensor) -> tf.Tensor:
    return relu(conv(x, 3, 3, 4, 8))


def twice(x: tf.Tensor) -> tf.Tensor:
    y = conv(x, 3, 3, 4, 8)
    y = y + wide(y)
    return y + wide(y, seed=7)


def read_later(x: tf.Tensor) -> tf.Tensor:
    """What is added is read behind the sum, too."""
    y = stem(x)
    z = wide(y) + y
    return wide(z, seed=7) + y


def of_input(x: tf.Tensor) -> tf.Tensor:
    return conv(stem(x), 3, 3, 8, 4, seed=3) + x


def of_means(x: tf.Tensor) -> tf.Tensor:
    y = dense(tf.reduce_mean(x, [1, 2]), 4, 8)
    return dense(relu(y), 8, 8) + y


def behind_stem(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tf.Tensor]:
    return lambda x: function(stem(x))


# Each with the inputs of sums that convolutions compute, by the order of the sums.
SUMS: dict[str, tuple[Callable[[tf.Tensor], tf.Tensor], list[int]]] = {
    "first": (behind_stem(lambda y: wide(y) + y), [0]),
    "second": (behind_stem(lambda y: y + wide(y)), [1]),
    "of two convolutions": (behind_stem(lambda y: conv(y, 1, 1, 8, 8, seed=2) + wide(y)), [0]),
    "rectified": (behind_stem(lambda y: relu(conv(y, 1, 1, 8, 8, seed=2)) + relu(wide(y))), [0]),
    "depthwise": (behind_stem(lambda y: depthwise(relu(conv(y, 3, 3, 8, 8, seed=2)), 3, 3, 8, 1) + y), [0]),
    "one behind the other": (twice, [1, 1]),
    "of the input": (of_input, [0]),
    "pooled": (behind_stem(lambda y: tf.nn.max_pool2d(y, 3, 2, "SAME") + wide(y, strides=2)), [1]),
    "of what the convolution reads": (behind_stem(lambda y: y + conv(y, 3, 3, 8, 8, seed=3)), []),
    "leaky": (behind_stem(lambda y: tf.nn.leaky_relu(wide(y), 0.1) + y), []),
    "read later": (read_later, [0]),
    "of dense layers": (of_means, []),
}


@pytest.mark.parametrize("name", SUMS)
def test_sum(name, load):
    """A kernel that adds does not round what it adds to: so each of these is another sum where that is told wrong."""
    function, slots = SUMS[name]

    def net(x: tf.Tensor) -> tf.Tensor:
        y = relu(function(x))
        return dense(y, y.shape[-1], 6) if len(y.shape) == 2 else conv(y, 1, 1, y.shape[-1], 6, seed=9)

    batches = samples(MAPS)
    marked = mark(nets.quantized(net, MAPS, batches), exporter.KERNELS)
    assert [entry.slot for entry in marked.joined_sums()] == slots
    names = {"x": "x", "output_0": "output_0"}
    written = writer.write(marked, names, 17)
    file = running.File(writer.pack(written.model), names, (), load)
    specs = {place.mark.name: place.mark.stored for place in written.places}
    found = checking.check("OpenVINO", marked.graph, file.run, batches, exact=marked.in_integers_of_openvino(specs))
    rounded = checking.check("OpenVINO", marked.graph, file.run, batches, exact=marked.in_integers())
    assert found.sqnr > 120
    assert (rounded.sqnr < 60) == bool(slots)


# -- wrong files -----------------------------------------------------------------------------------------------------------
def residual(x: tf.Tensor) -> tf.Tensor:
    y = stem(x)
    return dense(tf.reduce_mean(relu(y + wide(y)), [1, 2]), 8, 5)


RIGHT = {"classifier": (nets.classifier, nets.IMAGES), "residual": (residual, MAPS)}


@pytest.mark.parametrize("net", RIGHT)
@pytest.mark.parametrize("name", nets.WRONG)
def test_wrong_numbers_are_found(name, net, load):
    function, inputs = RIGHT[net]
    batches = samples(inputs)
    marked = mark(nets.quantized(function, inputs, batches), exporter.KERNELS)
    names = {"x": "x", "output_0": "output_0"}

    def judged(edit: Callable[[onnx.ModelProto], None]) -> None:
        written = writer.write(marked, names, 17)
        specs = {place.mark.name: place.mark.stored for place in written.places}
        edit(written.model)
        hidden = {one for entry in marked.joined_sums() for one in (entry.own, entry.other)}
        file = running.File(written.model.SerializeToString(), names, (), load)
        inner = file.inner(written.model, [place for place in written.places if place.mark.name not in hidden])
        exact = marked.in_integers_of_openvino(specs)
        loose = marked.behind_joined_sums(hidden)
        assert len(loose) == len(marked.joined_sums())
        found = checking.check("OpenVINO", exact, file.run, batches, inner, marked.names, exact, loose)
        judge(Exported("onnx", "int8", 0, 0, 0, (), None, exact=True, others=(found,)))

    judged(lambda proto: None)
    with pytest.raises(OutputError, match=r"OpenVINO computes .* otherwise than the simulation says"):
        judged(nets.WRONG[name])


# -- where it does not run -------------------------------------------------------------------------------------------------
def test_a_file_that_it_does_not_take(load):
    with pytest.raises(openvino_running.CannotRun) as raised:
        load(b"nothing")({"x": np.zeros((1, 2), np.float32)})
    assert raised.value.label.startswith("OpenVINO 20")
    assert raised.value.reason


def test_its_crash_is_told(monkeypatch, tmp_path: pathlib.Path):
    worker = tmp_path / "worker.py"
    worker.write_text("import os\nprint('{\"ready\": true}', flush=True)\ninput()\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setattr(openvino_running, "_WORKER", worker)
    batches = samples(nets.IMAGES)
    _, result = exporter.export(nets.quantized(nets.two_convs, nets.IMAGES, batches), batches)
    assert result.checks == ()
    assert any("cannot run the file: ended by SIGSEGV" in line for line in result.lines())
    assert result.lines()[-1] == "Not verified: no runtime ran the file."


def test_without_openvino(monkeypatch):
    monkeypatch.setattr(openvino_running.importlib.util, "find_spec", lambda name: None)
    assert openvino_running.why_not() == "To run the file in OpenVINO here, install it: pip install openvino"
    monkeypatch.undo()
    monkeypatch.setattr(machine, "has_vnni", lambda: False)
    assert "without VNNI" in str(openvino_running.why_not())
    batches = samples(nets.IMAGES)
    _, result = exporter.export(nets.quantized(nets.two_convs, nets.IMAGES, batches), batches)
    assert result.others == ()
    assert any("without VNNI" in line for line in result.lines())
