"""The zeros that convolutions put around their inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfquant.graph.ir import Node, Shape


def conv_paddings(node: Node, size: Shape, kernel: Sequence[int]) -> np.ndarray | None:
    """The zeros that a conv puts around its input, (4, 2) as for a Pad op, or None where they depend on an unknown size."""
    kind = node.attr("padding")
    if kind == "EXPLICIT":
        return np.array(node.attr("explicit_paddings"), np.int64).reshape(4, 2)
    if kind == "VALID":
        return np.zeros((4, 2), np.int64)
    return same_paddings(node, size, kernel)


def same_paddings(node: Node, size: Shape, kernel: Sequence[int]) -> np.ndarray | None:
    """What SAME pads, as `conv_paddings`."""
    result = np.zeros((4, 2), np.int64)
    strides, dilations = node.attr("strides"), node.attr("dilations") or [1] * 4
    for axis in (1, 2):
        reach = (kernel[axis - 1] - 1) * dilations[axis] + 1
        length = size[axis] if size is not None else None
        if length is None and strides[axis] > 1:
            return None
        taps = -(-length // strides[axis]) if length is not None else 1
        total = max(0, (taps - 1) * strides[axis] + reach - length) if length is not None else reach - 1
        result[axis] = total // 2, total - total // 2
    return result
