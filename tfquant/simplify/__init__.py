"""Float-to-float passes, exact but for half precision, which they widen: afterwards a network is made of few kinds of ops.

A pass is a function of a graph that edits it and returns how often it fired. A new one is a file here and a line in `PASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tfquant.graph.ir import Graph
from tfquant.simplify import (
    affine,
    canonical,
    cleanup,
    constants,
    contractions,
    duplicates,
    gelu,
    layout,
    normalization,
    pixels,
    precision,
    reshapes,
    scalars,
    sinking,
)

PASSES: Mapping[str, Callable[[Graph], int]] = {
    "half precision to float32": precision.run,
    "drop identities": cleanup.run,
    "fold constants": constants.run,
    "static reshapes": reshapes.run,
    "drop duplicates": duplicates.run,
    "LayerNorm in one spelling": normalization.run,  # before the layout: tf_keras has it as a FusedBatchNorm in NCHW
    "NCHW to NHWC": layout.run,
    "products with a constant to MatMul": contractions.run,
    "layers beside their activations": sinking.run,
    "canonical forms": canonical.run,
    "GELU in one spelling": gelu.run,
    "numbers into weights": scalars.run,
    "fold scales and shifts (BatchNorm)": affine.run,
    "fold scales and shifts of pixels": pixels.run,
}

_MAX_ROUNDS = 20


def simplify(graph: Graph) -> dict[str, int]:
    """Runs all passes over `graph`, in place, until none fires; returns how often each fired."""
    fired = dict.fromkeys(PASSES, 0)
    for _ in range(_MAX_ROUNDS):
        before = sum(fired.values())
        for name, run in PASSES.items():
            fired[name] += run(graph)
        graph.prune()
        graph.infer()  # what one round makes constant lets the next know more shapes
        if sum(fired.values()) == before:
            break
    return fired
