"""Channel alignment (OpenVINO's POT and NNCF `channel_alignment`): channels moved to the middle of their range.

Between two convolutions without an activation between them, each channel's mean m = (lo + hi) / 2 leaves the first one's bias and
enters the second's as (sum over space of W2) * m. The tensor's range then is that of its widest channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.channels import ChannelStats
from tfquant.plan.edits import LAYERS, bias_of, value_of
from tfquant.plan.spec import Shift
from tfquant.refine.chains import Chain

# The range must shrink at least to this share.
_WORTH = 0.95


def align(
    graph: Graph, chains: Iterable[Chain], stats: Mapping[Tensor, ChannelStats], quantized: Mapping[Node, object]
) -> list[Shift]:
    """Shifts of both layers' biases, for the chains where it applies and the range shrinks.

    Args:
        graph: the float graph.
        chains: see `chains.find_chains`.
        stats: of what the consumers read.
        quantized: the layers that run in INT8.
    """
    found = []
    for chain in chains:
        if not _applies(graph, chain) or not all(node in quantized for node in chain.consumers):
            continue
        own = stats[chain.tensors[0]]
        middle = (own.low + own.high) / 2
        before = max(own.high.max(), 0.0) - min(own.low.min(), 0.0)
        after = (own.high - own.low).max()
        if after >= _WORTH * before:
            continue
        found.append(Shift(chain.producers[0].name, -middle.astype(np.float32)))
        for node in chain.consumers:
            weights = value_of(node.inputs[1]).astype(np.float64)
            weights = weights.T if node.op == "MatMul" and node.attr("transpose_b") else weights
            taps = weights.reshape(-1, *weights.shape[-2:]).sum(0)  # (C, O), of a depthwise layer (C, M)
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
