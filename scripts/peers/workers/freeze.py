"""A SavedModel becomes a frozen GraphDef, with placeholders and outputs named as the signature names them."""

from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2
from worker import Options, main


def build(options: Options) -> dict[str, Any]:
    loaded = tf.saved_model.load(options["float32"])
    signature = loaded.signatures["serving_default"]
    specs = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in signature.structured_input_signature[1].items()}
    traced = tf.function(lambda **inputs: signature(**inputs)).get_concrete_function(**specs)
    frozen = convert_variables_to_constants_v2(traced)
    definition = frozen.graph.as_graph_def()
    outputs = sorted(signature.structured_outputs)
    for name, tensor in zip(outputs, frozen.outputs, strict=True):
        end = definition.node.add(op="Identity", name=name, input=[tensor.name])
        end.attr["T"].type = tensor.dtype.as_datatype_enum
    path = Path(options["folder"]) / "frozen_float32.pb"
    path.write_bytes(definition.SerializeToString())
    return {"frozen": str(path), "outputs": outputs}


if __name__ == "__main__":
    main(build, packages=("tensorflow",))
