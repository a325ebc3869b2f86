"""Activations that `_QuantizedMatMul` computes on its results: how they stand behind a layer, and what the kernel calls them."""

from __future__ import annotations

import dataclasses

from tfquant.graph.patterns import Match, Maybe, Op, Pattern
from tfquant.simplify import gelu

CLIPS = frozenset({"Relu", "Relu6"})
_PLAIN = "Elu|LeakyRelu|Relu|Relu6|Sigmoid|Tanh"


@dataclasses.dataclass(frozen=True)
class Activation:
    """What stands behind a layer.

    Attributes:
        name: what `fused_ops` calls it, "" for none.
        alpha: of a LeakyRelu.
    """

    name: str
    alpha: float = 0.2

    @property
    def clip(self) -> str:
        """Its name where it does no more than end a range."""
        return self.name if self.name in CLIPS else ""


def behind(layer: Pattern, optional: bool = True) -> tuple[Op, ...]:
    """The patterns of all activations of a layer.

    Args:
        layer: its pattern; several ops of a GELU read it, so that its own must be `shared`.
        optional: whether the layer alone fits too.
    """
    plain = (Maybe if optional else Op)(_PLAIN, layer, name="activation")
    return plain, gelu.exact(layer), gelu.approximate(layer)


def of(match: Match) -> Activation | None:
    """The activation of a match of `behind`, None where it is a function like GELU with other constants."""
    if "gelu" in match.nodes:
        return Activation("GeluExact" if "erf" in match.nodes else "GeluApproximate") if gelu.is_gelu(match) else None
    if "activation" not in match.nodes:
        return Activation("")
    node = match.nodes["activation"]
    return Activation(node.op, node.attr("alpha", 0.2)) if node.op == "LeakyRelu" else Activation(node.op)
