"""Ops return to float by second-order sensitivity: what the error that each makes does to the model's loss."""

from __future__ import annotations

from tfquant.tuner.search import Search
from tfquant.tuner.strategies.in_order import revert_in_order
from tfquant.tuner.strategies.mse import by_sensitivity


def hawq(search: Search) -> str:
    """One op more in each trial, by e' H e / 2: e the error of an op's output, H the Hessian of the loss with respect to it.

    HAWQ-V2 (arXiv:1911.03852) takes tr(H) |e|^2 / n of the weights, as if their error pointed nowhere in particular, and leaves
    activations out. Here the quadratic form itself is estimated, of the error that 8-bit weights and inputs make together
    (`tfquant.tuner.sensitivity`).
    """
    return revert_in_order(search, by_sensitivity(search, "curvature"))
