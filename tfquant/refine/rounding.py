"""AdaRound (arXiv:2004.10568): each weight goes to that of its two neighbouring integers which keeps the layer's result.

The squared error of a layer's result is a quadratic form of its weights: with x the float input and q what the quantized layers
before make of it, E|Wx - Vq|^2 = tr(V A V^T) - 2 tr(V B W^T) + const, A = E[q q^T], B = E[q x^T]. A and B are gathered once;
what the paper does with batches of samples is then done with them alone.
"""

from __future__ import annotations

import numpy as np

from tfquant.plan.edits import value_of
from tfquant.plan.rounding import levels
from tfquant.plan.spec import BITS
from tfquant.refine.layers import Layer, patches
from tfquant.refine.walk import Values

# Results that A and B are the mean over: so many, fewer where there are many taps, but twice as many as these.
_MOST_ROWS, _MOST_PRODUCTS = 40_000, 2e11
# Added to the diagonal of A, of its mean: the samples span not all that may come.
_DAMPING = 0.01
_SWEEPS = 6
_BLOCK = 64
# A step must gain this share of a whole step's own error, or sweeps would go to and fro.
_LEAST_GAIN = 1e-9
# A weight so near to an integer is that integer.
_WHOLE = 1e-4


def round_weights(
    layer: Layer,
    x: Values,
    q: Values,
    nearest: np.ndarray,
    scales: np.ndarray,
    offsets: np.ndarray | None = None,
    bits: np.ndarray | None = None,
) -> np.ndarray:
    """Integers for the layer's weights, each the one below or above the float value, int8 of the shape of `nearest`.

    Args:
        layer: the layer; `layer.unit.weights` are its float weights.
        x: what the float layer reads, an array per batch.
        q: what the quantized layer reads.
        nearest: int8 weights.
        scales: of the output channels, float32 (C,).
        offsets: what their integer 0 stands for, float32 (C,), where that is not 0.
        bits: of their integers, int8 (C,), where these are not 8.
    """
    node = layer.node
    assert layer.unit.weights is not None
    grams = _grams(layer, x, q)
    shape = value_of(node.inputs[1]).shape
    is_depthwise = node.op == "DepthwiseConv2dNative"
    exact = layer.unit.weights.astype(np.float64) / scales.astype(np.float64)
    start = np.zeros(len(scales)) if offsets is None else offsets / scales.astype(np.float64)
    limit = levels(np.full(len(scales), BITS[1]) if bits is None else bits)
    sides = [np.clip(side, -limit, limit) + start for side in (np.floor(exact - start + _WHOLE), np.ceil(exact - start - _WHOLE))]
    arrays = (exact, nearest + start, *sides)
    if is_depthwise:  # (taps, C, M): a problem per input channel
        taps, inputs = shape[0] * shape[1], shape[2]
        problems = [np.moveaxis(array.reshape(taps, inputs, -1), 1, 0) for array in arrays]
    else:
        problems = [array.reshape(1, -1, array.shape[-1]) for array in arrays]
    found = np.stack([_solve(*gram, *problem) for gram, problem in zip(grams, zip(*problems, strict=True), strict=True)])
    if is_depthwise:
        found = np.moveaxis(found, 0, 1)
    return np.rint(found.reshape(nearest.shape) - start).astype(np.int8)


def _grams(layer: Layer, x: Values, q: Values) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A, B) of each problem, float64 (taps, taps)."""
    total: list[np.ndarray] | None = None
    rng = np.random.default_rng(0)
    count = 0
    for one, other in zip(x, q, strict=True):
        exact, rough = patches(layer.node, one), patches(layer.node, other)
        taps = exact.shape[1]
        most = int(max(min(_MOST_ROWS, _MOST_PRODUCTS / taps**2), 2 * taps)) // len(x) + 1
        if len(exact) > most:
            picked = np.sort(rng.choice(len(exact), most, replace=False))
            exact, rough = exact[picked], rough[picked]
        count += len(exact)
        if exact.ndim == 2:
            exact, rough = exact[..., None], rough[..., None]
        by_channel = [np.moveaxis(array, 2, 0) for array in (exact, rough)]
        left = np.swapaxes(by_channel[1], 1, 2)
        new = [left @ by_channel[1], left @ by_channel[0]]
        total = new if total is None else [a + b for a, b in zip(total, new, strict=True)]
    assert total is not None
    return [(a.astype(np.float64) / count, b.astype(np.float64) / count) for a, b in zip(*total, strict=True)]


def _solve(a: np.ndarray, b: np.ndarray, exact: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Coordinate descent on the quadratic form over the two neighbours of each weight, all output channels side by side.

    Args:
        a: A, (taps, taps).
        b: B.
        exact: float weights in steps, (taps, C).
        value: quantized ones, where it begins.
        low: the neighbours below.
        high: those above.
    """
    damping = _DAMPING * np.mean(np.diag(a)) * np.eye(len(a))
    a, b = a + damping, b + damping
    value = value.copy()
    gradient = a @ value - b @ exact
    for _ in range(_SWEEPS):
        changed = 0
        for start in range(0, len(a), _BLOCK):
            taps = slice(start, start + _BLOCK)
            steps = _sweep(a[taps, taps], gradient[taps].copy(), value[taps], low[taps], high[taps])
            value[taps] += steps
            gradient += a[:, taps] @ steps  # once for the block: rows one by one would be slow
            changed += int(np.count_nonzero(steps))
        if not changed:
            break
    return value


def _sweep(a: np.ndarray, gradient: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The steps of some taps to their other neighbours that lessen the error, (taps, C), each after those before it."""
    steps = np.zeros_like(value)
    for tap in range(len(a)):
        step = np.where(value[tap] == low[tap], high[tap], low[tap]) - value[tap]
        gain = 2 * step * gradient[tap] + step * step * a[tap, tap]
        steps[tap] = np.where(gain < -_LEAST_GAIN * a[tap, tap], step, 0.0)
        if steps[tap].any():
            gradient += np.outer(a[:, tap], steps[tap])
    return steps
