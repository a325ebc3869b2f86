"""Whether a matrix product in a loop is worth the range that is found for it in each round."""

from __future__ import annotations

from collections.abc import Collection

from tfquant.graph.ir import Node

# Weights, and multiply-accumulates of a round, from either of which on INT8 is faster, on one thread and on two; with one row
# float waits for its weights. Min, Max, QuantizeV2 and the zero point's bias cost 10 to 20 us, whatever the product does.
# Measured on LSTM and GRU layers of 64 to 1024 units, time in float32 / INT8: 256 units 0.63 to 0.93 at batch 1 and 1.3 to 1.8
# at batch 16, 128 units 0.87 to 0.96 at batch 16, 512 units 1.45 to 2.4 at either.
_LEAST_WEIGHTS = 1 << 19
_LEAST_MACS = 1 << 21


def too_small(node: Node, ops: Collection[str], batch_sizes: Collection[int]) -> str | None:
    """The reason why an op in a loop is faster in float, or None.

    Args:
        node: of the body.
        ops: the op types that could be INT8 there.
        batch_sizes: that the model is placed for.
    """
    if node.op not in ops:
        return None
    weights = max((tensor.value.size for tensor in node.inputs if tensor.value is not None), default=0)
    shape = node.inputs[0].shape
    rows = (shape[0] if shape else None) or min(batch_sizes)
    if weights >= _LEAST_WEIGHTS or weights * rows >= _LEAST_MACS:
        return None
    return f"in a loop, it takes less time in float than it takes to find a range: weights {weights}, rows {rows}"
