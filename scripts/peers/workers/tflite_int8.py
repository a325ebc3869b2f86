"""TFLite: full integer quantization by its converter, run with XNNPACK."""

import warnings
from pathlib import Path
from typing import Any

import tensorflow as tf
from worker import Options, Runner, batches, load_arrays, main


def build(options: Options) -> dict[str, Any]:
    calibration = load_arrays(options["calibration"])
    converter = tf.lite.TFLiteConverter.from_saved_model(options["float32"])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: batches(calibration, 1)
    sets = tf.lite.OpsSet  # the later ones for what has no INT8 kernel
    converter.target_spec.supported_ops = [sets.TFLITE_BUILTINS_INT8, sets.TFLITE_BUILTINS, sets.SELECT_TF_OPS]
    model = Path(options["folder"]) / "model.tflite"
    model.write_bytes(converter.convert())
    return {"model": str(model)}


class TFLite(Runner):
    """One interpreter per batch size: changing the size allocates anew."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._interpreters: dict[int, Any] = {}

    def __call__(self, feed: Any) -> Any:
        size = len(next(iter(feed.values())))
        if size not in self._interpreters:
            self._interpreters[size] = self._interpreter(feed)
        interpreter, inputs, outputs = self._interpreters[size]
        for name, array in feed.items():
            interpreter.set_tensor(inputs[name], array)
        interpreter.invoke()
        return {name: interpreter.get_tensor(index) for name, index in outputs.items()}

    def _interpreter(self, feed: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that another package will have it one day
            interpreter = tf.lite.Interpreter(self._options["model"], num_threads=self._options["threads"])
        inputs, outputs = _indices(interpreter)
        for name, array in feed.items():
            interpreter.resize_tensor_input(inputs[name], array.shape)
        interpreter.allocate_tensors()
        return interpreter, inputs, outputs


def _indices(interpreter: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Tensors of inputs and outputs by name. The runner that tells them must be gone before the interpreter allocates."""
    runner = interpreter.get_signature_runner("serving_default")
    inputs, outputs = runner.get_input_details(), runner.get_output_details()
    return ({name: details["index"] for name, details in found.items()} for found in (inputs, outputs))


if __name__ == "__main__":
    main(build, TFLite, ("tensorflow",))
