"""Where INT8 pays: which units run in 8 bits and which float ops in bfloat16, by what each costs, conversions counted."""

from tfquant.placement.bfloat16 import narrow
from tfquant.placement.decide import Placed, place
from tfquant.placement.loops import too_small

__all__ = ["Placed", "narrow", "place", "too_small"]
