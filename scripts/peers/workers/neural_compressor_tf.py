"""Neural Compressor: INT8 for TensorFlow, from a frozen GraphDef; tensorflow_model.py runs it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf
from neural_compressor.tensorflow import StaticQuantConfig, quantize_model
from worker import Arrays, Options, batches, load_arrays, main


class Loader:
    """Calibration samples as Neural Compressor takes them: (inputs, labels)."""

    batch_size = 1

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(self._arrays, self.batch_size):
            inputs = list(batch.values())
            yield (inputs if len(inputs) > 1 else inputs[0]), None

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))


def build(options: Options) -> dict[str, Any]:
    arrays = load_arrays(options["calibration"])
    loader, config = Loader(arrays), StaticQuantConfig(weight_granularity="per_channel")
    quantized = quantize_model(options["frozen"], config, loader, calib_iteration=len(loader))
    folder = Path(options["folder"])
    quantized.save(str(folder / "frozen_graph.pb"))
    _to_saved_model(folder / "frozen_graph.pb", folder / "model", list(arrays), options["outputs"])
    return {"model": str(folder / "model")}


def _to_saved_model(path: Path, folder: Path, inputs: list[str], outputs: list[str]) -> None:
    graph = tf.compat.v1.GraphDef()
    graph.ParseFromString(path.read_bytes())
    with tf.Graph().as_default() as scratch, tf.compat.v1.Session(graph=scratch) as session:
        tf.import_graph_def(graph, name="")
        ends = [{name: scratch.get_tensor_by_name(f"{name}:0") for name in names} for names in (inputs, outputs)]
        tf.compat.v1.saved_model.simple_save(session, str(folder), *ends)


if __name__ == "__main__":
    main(build, packages=("neural-compressor-tf", "tensorflow"))
