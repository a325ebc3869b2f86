"""Bytes of a model whose weights are stored in any number of bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tfquant.graph.ir import Graph, Node
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS

# A scale, and an offset where there is one, are float32.
_SCALE_BYTES = 4


def layer_bytes(unit: Unit, bits: np.ndarray, has_offsets: bool) -> int:
    """The weights of a unit packed to `bits` per value, int (C,), each channel in whole bytes; with their scales and offsets."""
    assert unit.weights is not None
    values = unit.weights.size // len(bits)
    return int((-(-values * bits.astype(np.int64) // 8)).sum()) + len(bits) * _SCALE_BYTES * (1 + has_offsets)


def model_bytes(graph: Graph, units: Iterable[Unit], bits: Mapping[str, np.ndarray], offsets: Mapping[str, np.ndarray]) -> int:
    """All constants of the float graph, with the weights of layers stored in their bits.

    Args:
        graph: the simplified float graph.
        units: what is quantized; those that are layers with weights count.
        bits: name of a layer to the bits of its channels, (C,); 8 where it has none.
        offsets: name of a layer to the offsets of its channels.
    """
    total = graph.constant_bytes
    for constant, unit in stored_weights(units).items():
        own = bits.get(unit.name)
        assert unit.weights is not None
        channels = np.full(unit.weights.shape[-1], BITS[1]) if own is None else own
        total += layer_bytes(unit, channels, unit.name in offsets) - constant.constant_bytes
    return total


def stored_weights(units: Iterable[Unit]) -> dict[Node, Unit]:
    """The constants that are weights of layers, each with the first layer that reads it."""
    found: dict[Node, Unit] = {}
    for unit in units:
        if unit.weights is not None and unit.kernel.role == "compute":
            found.setdefault(unit.main.inputs[unit.weight_slot].node, unit)
    return found
