"""A worker that tells the times of the ops of a model, from TensorFlow's own step statistics.

    python -m tfquant.bench.trace '{"model": "int8", "signature_key": "serving_default", "data": null}'

A process of its own because it runs the model in a session, which alone gives step statistics, and because looking on costs time:
what `serve` times is not looked at.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Mapping
from typing import Any

from tfquant.bench import serve

_LEAST_RUNS, _WARM_RUNS = 5, 3
# Of an entry's label, "name = Op(inputs)".
_OP = re.compile(r" = ([^\s(]+)\(")


class Traced:
    """A signature, or a GraphDef, in a session of its own.

    Attributes:
        inputs: name to `tf.TensorSpec`.
    """

    def __init__(self, path: str, signature_key: str) -> None:
        import tensorflow as tf

        found = serve.find(pathlib.Path(path))
        graph = tf.Graph()
        # One thread runs ops, so that their times do not overlap.
        self._session = tf.compat.v1.Session(graph=graph, config=tf.compat.v1.ConfigProto(inter_op_parallelism_threads=1))
        with graph.as_default():
            if found.is_file():
                proto = tf.compat.v1.GraphDef.FromString(found.read_bytes())
                tf.graph_util.import_graph_def(proto, name="")
                feeds, self._fetches = serve.ends(graph.get_operations())
                self._feeds = {tensor.op.name: tensor for tensor in feeds}
            else:
                signature = tf.compat.v1.saved_model.load(self._session, ["serve"], str(found)).signature_def[signature_key]
                self._feeds = {key: graph.get_tensor_by_name(info.name) for key, info in signature.inputs.items()}
                self._fetches = [graph.get_tensor_by_name(info.name) for info in signature.outputs.values()]
        self.inputs = {key: tf.TensorSpec(tensor.shape, tensor.dtype) for key, tensor in self._feeds.items()}

    def profile(self, feed: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """`{"ms": of a run, "ops": {op: [how many, ms of them all]}}`, medians over runs that alternate: looked at, and not."""
        import tensorflow as tf

        values = {self._feeds[key]: value.numpy() for key, value in feed.items()}
        options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.SOFTWARE_TRACE)
        for _ in range(_WARM_RUNS):
            self._session.run(self._fetches, values)
        runs: list[float] = []
        nodes: dict[str, list[float]] = collections.defaultdict(list)
        ops: dict[str, str] = {}
        start = time.perf_counter()
        while len(runs) < _LEAST_RUNS or time.perf_counter() - start < seconds:
            begin = time.perf_counter()
            self._session.run(self._fetches, values)
            runs.append((time.perf_counter() - begin) * 1e3)
            facts = tf.compat.v1.RunMetadata()
            self._session.run(self._fetches, values, options=options, run_metadata=facts)
            for device in facts.step_stats.dev_stats:
                for entry in device.node_stats:
                    match = _OP.search(entry.timeline_label)
                    ops[entry.node_name] = match[1] if match else entry.node_name
                    nodes[entry.node_name].append((entry.op_end_rel_nanos - entry.op_start_rel_nanos) / 1e6)
        found: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
        for name, times in nodes.items():
            count, total = found[ops[name]]
            found[ops[name]] = count + 1, total + statistics.median(times) * len(times) / len(runs)
        return {"ms": statistics.median(runs), "ops": found}


def main() -> None:
    """Answers requests `{"batch": samples, "seconds": of measurement}` with what `Traced.profile` returns."""
    options = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        traced = Traced(options["model"], options["signature_key"])
        inputs = serve.Inputs(traced.inputs, options.get("data"))
        print(json.dumps({"ready": True}), file=out, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("quit"):
                return
            answer = traced.profile(inputs.feeds(request["batch"])[0], request["seconds"])
            print(json.dumps(answer), file=out, flush=True)
    except Exception as error:  # TensorFlow raises all kinds
        print(json.dumps({"error": f"TensorFlow cannot run {options['model']}: {serve.first_line(error)}"}), file=out, flush=True)


if __name__ == "__main__":
    main()
