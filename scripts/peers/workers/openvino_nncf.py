"""OpenVINO: INT8 by NNCF's post-training quantization, run by the CPU plugin."""

from pathlib import Path
from typing import Any

import openvino
from worker import Options, Runner, batches, load_arrays, main


def build(options: Options) -> dict[str, Any]:
    """Quantizes; `preset` is performance (symmetric activations) or mixed, `transformer` tells what the model is.

    `calibration_batch` samples go together (default: 1).
    """
    import nncf

    samples = list(batches(load_arrays(options["calibration"]), options.get("calibration_batch", 1)))
    quantized = nncf.quantize(
        openvino.convert_model(options["float32"]),
        nncf.Dataset(samples),
        preset=nncf.QuantizationPreset(options["preset"]),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if options["transformer"] else None,
    )
    model = Path(options["folder"]) / "model.xml"
    openvino.save_model(quantized, model, compress_to_fp16=False)
    return {"model": str(model), "files": [str(model), str(model.with_suffix(".bin"))]}


class OpenVINO(Runner):
    """One compiled model per batch size: static shapes are the faster ones."""

    def __init__(self, options: Options) -> None:
        self._core = openvino.Core()
        self._path = options["model"]
        self._settings = {
            "INFERENCE_NUM_THREADS": options["threads"],
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": options["precision"],
        }
        self._requests: dict[int, Any] = {}

    def __call__(self, feed: Any) -> Any:
        size = len(next(iter(feed.values())))
        if size not in self._requests:
            model = self._core.read_model(self._path)
            model.reshape({port: [size, *port.partial_shape[1:]] for port in model.inputs})
            self._requests[size] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        outputs = self._requests[size].infer(feed, share_inputs=True, share_outputs=True)
        return {port.any_name: value for port, value in outputs.items()}


if __name__ == "__main__":
    main(build, OpenVINO, ("openvino", "nncf"))
