"""Channel alignment (OpenVINO's POT and NNCF `channel_alignment`): channels moved to the middle of their range.

Between two convolutions without an activation between them, each channel's middle m = (lo + hi) / 2, of its quantiles, leaves the
first one's bias and enters the second's as (sum over space of W2) * m. The tensor's range then is that of its widest channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tfquant.graph.ir import Graph, Node
from tfquant.observe.channels import channel_quantiles
from tfquant.plan.edits import LAYERS, bias_of, taps_of, value_of
from tfquant.plan.spec import Shift
from tfquant.refine.chains import Chain

# Of the values of a channel, at each end: the few beyond count for nothing.
_SHARE = 1e-4
# The range must shrink at least to this share.
_WORTH = 0.8


def align(
    graph: Graph, chains: Iterable[Chain], batches: Iterable[Mapping[str, np.ndarray]], quantized: Mapping[Node, object]
) -> list[Shift]:
    """Shifts of both layers' biases, for the chains where it applies and the range shrinks.

    Args:
        graph: the float graph.
        chains: see `chains.find_chains`.
        batches: the data, keyed by input name.
        quantized: the layers that run in INT8.
    """
    fit = [chain for chain in chains if _applies(graph, chain) and all(node in quantized for node in chain.consumers)]
    if not fit:
        return []
    ends = channel_quantiles(graph, [chain.tensors[0] for chain in fit], batches, _SHARE)
    found = []
    for chain in fit:
        low, high = ends[chain.tensors[0]]
        middle = (low + high) / 2
        before = max(high.max(), 0.0) - min(low.min(), 0.0)
        after = (high - low).max()
        if after >= _WORTH * before:
            continue
        found.append(Shift(chain.producers[0].name, -middle.astype(np.float32)))
        for node in chain.consumers:
            taps = taps_of(node).sum(0)  # (C, O), of a depthwise layer (C, M)
            moved = (taps * middle[:, None]).reshape(-1) if node.op == "DepthwiseConv2dNative" else middle @ taps
            found.append(Shift(node.name, moved.astype(np.float32)))
    return found


def _applies(graph: Graph, chain: Chain) -> bool:
    """One layer makes the chain's only tensor, and layers read it that pad nothing."""
    if len(chain.producers) != 1 or len(chain.tensors) != 1 or chain.producers[0].op not in LAYERS:
        return False
    producer = chain.producers[0]
    bias_add = bias_of(graph, producer)
    made = producer.out if bias_add is None else bias_add.out
    return chain.tensors[0] == made and all(_pads_nothing(node) for node in chain.consumers)


def _pads_nothing(node: Node) -> bool:
    if node.op == "MatMul" or node.attr("padding") == "VALID":
        return True
    shape = value_of(node.inputs[1]).shape
    return node.attr("padding") == "SAME" and shape[:2] == (1, 1)
