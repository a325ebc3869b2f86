"""Hard-swish, x * relu6(x + 3) / 6, as networks spell it."""

from __future__ import annotations

import tensorflow as tf

from tfquant.graph.patterns import Any, Const, Match, Op

X = Any("x")
_SHIFTED = Op("Relu6", Op("AddV2|Add", X, Const("three"), name="add"), name="relu6")
_SIXTH = Const("sixth")
# The last two are what `targets/onednn/detours.py` makes of any: that which TensorFlow fuses into a layer, and that with the
# factor outside.
PATTERNS = (
    Op("Mul", Op("Mul", _SHIFTED, _SIXTH, name="gate"), X),
    Op("Mul", Op("Mul", X, _SIXTH, name="fused"), _SHIFTED),
    Op("Mul", Op("Mul", _SHIFTED, X, name="outside"), _SIXTH),
)


def is_hard_swish(match: Match) -> bool:
    """Whether the constants of a match of one of `PATTERNS` are those of hard-swish; "sixth" may be any number."""
    three, sixth = match.value("three"), match.value("sixth")
    return three.size == 1 and sixth.size == 1 and bool((three == 3).all()) and match["x"].dtype == tf.float32
