"""How large the exported files of real models are, and of what: against the float32 file of the same converter.

    TFQUANT_ASSETS=path python scripts/export_sizes.py [case ...]

Needs the folder of models and data that TFQUANT_ASSETS names (default ../shared/assets), and tf2onnx. In bytes: weights; biases;
scales and zero points; all else (ops, tensors, shapes, names), the graph. "at least" is the share of the float32 file that the
numbers alone take: no file of that format with a scale per channel is smaller.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx

import tfquant
from scripts import cases
from scripts.common import markdown
from scripts.peers.failure import Failure
from tfquant.exporters import exporting, tflite
from tfquant.exporters.tflite.converter import convert
from tfquant.exporters.tflite.flatbuffer import Model, schema
from tfquant.quiet import quiet_start

HEAD = ("", "file", "bytes", "of float32", "at least", "weights", "biases", "scales", "graph")


class Parts(NamedTuple):
    """Bytes of a file.

    Attributes:
        weights: of constants with two axes and more; of all that are no integers.
        biases: of vectors of integers with scales.
        scales: and zero points.
        size: of the file.
    """

    weights: int
    biases: int
    scales: int
    size: int

    @property
    def numbers(self) -> int:
        return self.weights + self.biases + self.scales


def parts_of_tflite(content: bytes) -> Parts:
    """Of a TFLite file with one subgraph."""
    file = Model(content)
    sizes = {number: len(buffer.data) for number, buffer in enumerate(file.root.buffers) if buffer.data is not None}
    constants = {tensor.buffer: tensor for tensor in file.graph.tensors if tensor.buffer in sizes}
    biases = {buffer for buffer, tensor in constants.items() if _is_quantized(tensor) and len(tensor.shape) == 1}
    indices = {buffer for buffer, tensor in constants.items() if tensor.type == schema.TensorType.INT32} - biases
    found = [tensor.quantization for tensor in file.graph.tensors if _is_quantized(tensor)]
    scales = {np.asarray(one.scale, np.float32).tobytes() for one in found}
    zero_points = {np.asarray(one.zeroPoint, np.int64).tobytes() for one in found}
    return Parts(
        sum(sizes[buffer] for buffer in {*constants} - biases - indices),
        sum(sizes[buffer] for buffer in biases),
        sum(map(len, scales | zero_points)),
        len(content),
    )


def _is_quantized(tensor: Any) -> bool:
    return tensor.quantization is not None and tensor.quantization.scale is not None


def parts_of_onnx(model: onnx.ModelProto) -> Parts:
    """Of an ONNX file whose graph has no bodies."""
    kinds = onnx.TensorProto
    entries = [(len(entry.raw_data), entry.data_type, len(entry.dims)) for entry in model.graph.initializer]
    return Parts(
        sum(size for size, dtype, rank in entries if dtype == kinds.INT8 and rank > 1),
        sum(size for size, dtype, _ in entries if dtype == kinds.INT32),
        sum(size for size, dtype, rank in entries if dtype in (kinds.FLOAT, kinds.UINT8) or (dtype == kinds.INT8 and rank < 2)),
        model.ByteSize(),
    )


def measure(name: str, case: Any, folder: Path) -> list[list[str]]:
    """The rows of a case.

    Raises:
        Failure: tf2onnx could not convert the float32 model.
    """
    path = cases.saved_model(case, folder)
    config = tfquant.QuantConfig(preset="fast", placement="int8", verify=False)
    model = tfquant.quantize(str(path), case.calibration()[:8], config)
    plain = len(convert(path, list(model.signatures)))
    rows = []
    for kind in ("int8", "float16"):
        content, _ = tflite.export(model, [], kind)
        rows.append(_row(name, f"TFLite {kind}", parts_of_tflite(content), plain))
    file = folder / "int8.onnx"
    exporting.export_onnx(model, file, overwrite=True)
    return [*rows, _row(name, "ONNX int8", parts_of_onnx(onnx.load(file)), _float_onnx(path, folder / "float32.onnx"))]


def _float_onnx(saved_model: Path, file: Path) -> int:
    """Size of what tf2onnx makes of a model."""
    arguments = ["--saved-model", str(saved_model), "--opset", "17", "--output", str(file)]
    done = subprocess.run([sys.executable, "-m", "tf2onnx.convert", *arguments], capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        raise Failure(f"tf2onnx cannot convert {saved_model}: {done.stderr.strip().splitlines()[-1:]}")
    return file.stat().st_size


def _row(name: str, file: str, parts: Parts, plain: int) -> list[str]:
    counts = (parts.weights, parts.biases, parts.scales, parts.size - parts.numbers)
    shares = (f"{parts.size / plain:.3f}", f"{parts.numbers / plain:.3f}")
    return [name, file, f"{parts.size:,}", *shares, *(f"{count:,}" for count in counts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*")
    arguments = parser.parse_args()
    quiet_start()
    try:
        known = cases.load_assets().CASES
        unknown = [name for name in arguments.cases if name not in known]
        if unknown:
            raise Failure(f"there is no case {unknown[0]}: there are {', '.join(known)}")
        rows = [[*HEAD]]
        for name in arguments.cases or known:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(name, known[name], Path(folder))
    except Failure as failure:
        print(f"export_sizes: {failure}", file=sys.stderr)
        return 2
    print("\n".join(markdown(rows, ("left", "left", *["right"] * (len(HEAD) - 2)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
