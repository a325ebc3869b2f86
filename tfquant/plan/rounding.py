"""Weights as integers, and back."""

from __future__ import annotations

import numpy as np

from tfquant.plan.spec import BITS


def levels(bits: np.ndarray) -> np.ndarray:
    """The largest integers of symmetric weights, float64 (C,), for so many bits; that of 0 bits is 0."""
    return np.maximum(2.0 ** (bits.astype(np.int64) - 1) - 1, 0)


def nearest(weights: np.ndarray, scales: np.ndarray, bits: np.ndarray | None = None) -> np.ndarray:
    """The integers nearest to `weights / scales`, int8, within what the bits allow.

    Args:
        weights: float (..., C), output channels last.
        scales: float (C,).
        bits: of each channel, int8 (C,); 8 where there are none.
    """
    limit = levels(np.full(weights.shape[-1], BITS[1]) if bits is None else bits)
    integers = np.rint(weights.astype(np.float64) / scales.astype(np.float64))
    return np.clip(integers, -limit, limit).astype(np.int8)


def dequantize(integers: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """The float32 values that integers (..., C) stand for: times scales (C,), plus offsets (C,)."""
    values = integers * scales.astype(np.float64)
    return np.asarray(values if offsets is None else values + offsets, np.float32)
