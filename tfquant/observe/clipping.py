"""Analytic clipping (ACIQ, arXiv:1810.05723): where values of a known distribution are cut so that quantizing them errs least.

Both functions give the half-width `a` of the range [mu - a, mu + a] that is divided into 2**bits steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable


@functools.cache
def laplace(bits: int) -> float:
    """a / b of Laplace's distribution with the diversity b = E|x - mu|.

    The minimum of 2 b**2 exp(-a/b) + a**2 / (3 * 4**bits), which is where (a/b) exp(a/b) = 3 * 4**bits (Lambert's W).
    """
    return _root(lambda x: x + math.log(x) - math.log(3 * 4.0**bits), 1e-3, 100.0)


@functools.cache
def gauss(bits: int) -> float:
    """a / sigma of the normal distribution.

    The minimum of (sigma**2 + a**2) (1 - erf(a / (sqrt(2) sigma))) - sqrt(2/pi) a sigma exp(-a**2 / (2 sigma**2))
    + a**2 / (3 * 4**bits): there x (erfc(x / sqrt(2)) + 1 / (3 * 4**bits)) = sqrt(2/pi) exp(-x**2 / 2) with x = a / sigma.
    """

    def slope(x: float) -> float:
        return x * (math.erfc(x / math.sqrt(2)) + 1 / (3 * 4.0**bits)) - math.sqrt(2 / math.pi) * math.exp(-x * x / 2)

    return _root(slope, 1e-3, 30.0)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function passes from negative to positive, as exactly as floats tell."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if function(middle) < 0:
            low = middle
        else:
            high = middle
