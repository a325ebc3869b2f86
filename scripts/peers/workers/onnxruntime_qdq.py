"""ONNX Runtime: INT8 by quantize_static, run by the CPU provider."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from worker import Arrays, Options, Runner, batches, load_arrays, main


def _laid_out(arrays: Arrays, is_channels_first: bool) -> Arrays:
    """Images, which is what has four axes, as NCHW where the model takes them so."""
    return {
        name: np.ascontiguousarray(np.moveaxis(array, -1, 1)) if is_channels_first and array.ndim == 4 else array
        for name, array in arrays.items()
    }


def build(options: Options) -> dict[str, Any]:
    """Converts to ONNX and quantizes: `activations` QUInt8 or QInt8, `layout` of the images nchw or nhwc."""
    import tf2onnx.convert
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    calibration = load_arrays(options["calibration"])
    plain, prepared, quantized = (str(Path(options["folder"]) / f"{name}.onnx") for name in ("plain", "prepared", "model"))
    is_channels_first = options["layout"] == "nchw"
    images = [name for name, array in calibration.items() if array.ndim == 4]
    sys.argv = ["tf2onnx", "--saved-model", options["float32"], "--output", plain, "--opset", "17"]
    if is_channels_first and images:
        sys.argv += ["--inputs-as-nchw", ",".join(images)]
    tf2onnx.convert.main()
    _spell_erfc(plain)
    try:
        quant_pre_process(plain, prepared)
    except Exception:  # "Incomplete symbolic shape inference": its documentation says to do without then
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = batches(calibration, 1)

        def get_next(self) -> Arrays | None:
            batch = next(self._batches, None)
            return batch and _laid_out(batch, is_channels_first)

    quantize_static(
        prepared,
        quantized,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=False,
        activation_type=getattr(QuantType, options["activations"]),
        weight_type=QuantType.QInt8,
    )
    for path in (plain, prepared):
        Path(path).unlink()
    return {"model": quantized}


def _spell_erfc(path: str) -> None:
    """Writes Erfc, the exact GELU of Keras, as 1 - Erf: tf2onnx leaves it as it is, and ONNX has no such op."""
    model = onnx.load(path)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Erfc":
            nodes.append(node)
            continue
        one, erf = f"{node.output[0]}/one", f"{node.output[0]}/erf"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), one))
        nodes.append(onnx.helper.make_node("Erf", list(node.input), [erf]))
        nodes.append(onnx.helper.make_node("Sub", [one, erf], list(node.output)))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


class OnnxRuntime(Runner):
    def __init__(self, options: Options) -> None:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options["threads"]
        settings.inter_op_num_threads = 1
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.add_session_config_entry("session.intra_op.allow_spinning", "1")
        self._session = onnxruntime.InferenceSession(options["model"], settings, providers=["CPUExecutionProvider"])
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._is_channels_first = options["layout"] == "nchw"

    def prepare(self, arrays: Arrays) -> Arrays:
        return _laid_out(arrays, self._is_channels_first)

    def __call__(self, feed: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))


if __name__ == "__main__":
    main(build, OnnxRuntime, ("onnxruntime", "tf2onnx"))
