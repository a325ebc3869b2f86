"""Runs a SavedModel in stock TensorFlow: float32, tfquant's and Neural Compressor's."""

import tensorflow as tf
from worker import Arrays, Options, Runner, main

Tensors = dict[str, tf.Tensor]


class TensorFlow(Runner):
    def __init__(self, options: Options) -> None:
        tf.config.threading.set_intra_op_parallelism_threads(options.get("intra_op", options["threads"]))
        if "inter_op" in options:
            tf.config.threading.set_inter_op_parallelism_threads(options["inter_op"])
        self._loaded = tf.saved_model.load(options["model"])  # owns the variables
        self._signature = self._loaded.signatures["serving_default"]

    def prepare(self, arrays: Arrays) -> Tensors:
        return {name: tf.constant(array) for name, array in arrays.items()}

    def __call__(self, feed: Tensors) -> Tensors:
        return self._signature(**feed)


if __name__ == "__main__":
    main(load=TensorFlow, packages=("tensorflow",))
