"""Models with float16 constants, as the converter writes them: each constant behind a DEQUANTIZE."""

from __future__ import annotations

import numpy as np

from tfquant.exporters.tflite.flatbuffer import Model


def tidied(content: bytes) -> bytes:
    """A smaller file of the same model: what a DEQUANTIZE makes of a constant has the name of that, not one of its own.

    Small biases would take less as float32 without a DEQUANTIZE. But XNNPACK of TensorFlow 2.21 then takes the model in several
    parts: one with 8 to 64 channels ran half as fast.
    """
    model = Model(content)
    for index in range(len(model.root.subgraphs)):
        model.take(index)
        for op in model.graph.operators:
            if model.name_of(op) == "DEQUANTIZE" and model.dtype(op.inputs[0]) == np.float16:
                source, result = int(op.inputs[0]), int(op.outputs[0])
                if model.value(source) is not None and result not in model.graph.outputs:
                    model.tensor(result).name = model.tensor(source).name
    return model.pack()
