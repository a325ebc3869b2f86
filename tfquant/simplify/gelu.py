"""GELU, which has no op of its own, in one spelling for each of its two kinds: those that TensorFlow and the kernels can fuse.

A function of one tensor made of elementwise ops and numbers is recognised by its values, however it is spelled:
x * (1 + erf(x / sqrt(2))) / 2, or with erfc; and x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))) / 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Any, As, Const, Match, Op, Pattern, matches
from tfquant.simplify.canonical import binary

_CUBIC, _SQRT_2_OVER_PI = 0.044715, math.sqrt(2 / math.pi)
_MAX_OPS = 14
_TOLERANCE = 3e-6  # times |x|, at least 1: the rounding of constants; the two kinds differ by 4.7e-4
_GRID = np.concatenate([np.linspace(-12, 12, 481), [-100.0, -30.0, 30.0, 100.0]])


def exact(x: Pattern) -> Op:
    """The pattern of GELU of `x`, binding its operand to "gelu_input"; see `is_gelu` for its constants."""
    x = As("gelu_input", x)
    cdf = Op("Erf", Op("Mul", x, Const("erf_scale"), name="erf_input"), name="erf")
    return _product(x, cdf)


def approximate(x: Pattern) -> Op:
    """The pattern of GELU with tanh; as `exact`."""
    x = As("gelu_input", x)
    cube = Op("Mul", Op("Pow", x, Const("exponent"), name="cube"), Const("cubic"), name="cubic_term")
    inner = Op("Mul", Op("AddV2", x, cube, name="tanh_sum"), Const("tanh_scale"), name="tanh_input")
    return _product(x, Op("Tanh", inner, name="tanh"))


def _product(x: Pattern, cdf: Op) -> Op:
    half = Op("Mul", x, Const("half"), name="half_input")
    return Op("Mul", half, Op("AddV2", cdf, Const("one"), name="cdf"), name="gelu")


_CONSTANTS = {
    "half": 0.5,
    "one": 1.0,
    "erf_scale": math.sqrt(0.5),
    "exponent": 3.0,
    "cubic": _CUBIC,
    "tanh_scale": _SQRT_2_OVER_PI,
}


def is_gelu(match: Match) -> bool:
    """Whether the constants of a match of `exact` or `approximate` are those of GELU."""
    found = {name: match.value(name) for name in _CONSTANTS if match.get(name)}
    return all(value.size == 1 and math.isclose(value.reshape(()), _CONSTANTS[key], rel_tol=1e-6) for key, value in found.items())


# -- recognising it --------------------------------------------------------------------------------------------------------
_erf = np.vectorize(math.erf, otypes=[np.float64])
_erfc = np.vectorize(math.erfc, otypes=[np.float64])
_OPS: Mapping[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "AddV2": np.add,
    "Erf": _erf,
    "Erfc": _erfc,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Pow": np.power,
    "RealDiv": np.divide,
    "Square": np.square,
    "Sub": np.subtract,
    "Tanh": np.tanh,
}


def _gelu_exact(x: np.ndarray) -> np.ndarray:
    return x * _erfc(-x * math.sqrt(0.5)) / 2


def _gelu_approximate(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x**3))) / 2


@functools.cache
def _expected(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return function(_GRID)


def run(graph: Graph) -> int:
    fired = 0
    position = {node: index for index, node in enumerate(graph.order())}
    for node in list(position):
        if node.op != "Mul" or node.pinned or graph.nodes.get(node.name) is not node or _is_canonical(graph, node):
            continue
        found = _recognised(graph, node, position)
        if found is not None:
            x, write = found
            graph.replace(node.out, write(graph, x, node))
            graph.remove(node)
            fired += 1
    return fired


def _is_canonical(graph: Graph, node: Node) -> bool:
    return any(is_gelu(match) for pattern in _CANONICAL for match in matches(pattern, graph, node))


_CANONICAL = (exact(Any("x")), approximate(Any("x")))


def _recognised(graph: Graph, root: Node, position: Mapping[Node, int]) -> tuple[Tensor, Callable[..., Tensor]] | None:
    """(x, how GELU of it is written) where the node is that, else None: ops are taken in until their values are those of GELU."""
    inside: list[Node] = []
    border = {root.out}
    while len(inside) < _MAX_OPS:
        last = max(border, key=lambda tensor: position.get(tensor.node, -1))  # so that x, which all come from, comes last
        node = last.node
        if node not in position or not _is_scalar_function(node) or (inside and _is_seen(graph, node, inside)):
            return None
        inside.append(node)
        border = (border - {last}) | {tensor for tensor in node.inputs if tensor.value is None}
        if len(border) == 1 and len(inside) > 2:
            (x,) = border
            values = _values(root.out, x)
            for function, write in _KINDS:
                if (np.abs(values - _expected(function)) <= _TOLERANCE * np.maximum(1, np.abs(_GRID))).all():
                    return x, write
    return None


def _is_scalar_function(node: Node) -> bool:
    constants = [tensor.value for tensor in node.inputs if tensor.value is not None]
    return node.op in _OPS and not node.pinned and all(value.size == 1 for value in constants) and node.out.shape is not None


def _is_seen(graph: Graph, node: Node, inside: list[Node]) -> bool:
    """Whether others than the ops that were taken in read a node."""
    return graph.is_output(node.out) or any(user not in inside for user, _ in graph.users(node.out))


def _values(tensor: Tensor, x: Tensor) -> np.ndarray:
    """What a tensor is for the values of the grid in the place of `x`."""
    if tensor == x:
        return _GRID
    if tensor.value is not None:
        return tensor.value.reshape(()).astype(np.float64)
    with np.errstate(all="ignore"):
        return _OPS[tensor.node.op](*(_values(operand, x) for operand in tensor.node.inputs))


# -- writing it ------------------------------------------------------------------------------------------------------------
def _write_exact(graph: Graph, x: Tensor, node: Node) -> Tensor:
    inner = binary(graph, "Mul", x, np.array(math.sqrt(0.5)), x, node.name)
    return _write_product(graph, x, _unary(graph, "Erf", inner, node), node)


def _write_approximate(graph: Graph, x: Tensor, node: Node) -> Tensor:
    cube = binary(graph, "Pow", x, np.array(3.0), x, node.name)
    term = binary(graph, "Mul", cube, np.array(_CUBIC), x, f"{node.name}/cubic")
    inner = binary(graph, "Mul", _both(graph, "AddV2", x, term, f"{node.name}/sum"), np.array(_SQRT_2_OVER_PI), x, node.name)
    return _write_product(graph, x, _unary(graph, "Tanh", inner, node), node)


def _write_product(graph: Graph, x: Tensor, cdf: Tensor, node: Node) -> Tensor:
    half = binary(graph, "Mul", x, np.array(0.5), x, f"{node.name}/half")
    return _both(graph, "Mul", half, binary(graph, "AddV2", cdf, np.array(1.0), x, node.name), graph.take_name(node))


def _unary(graph: Graph, op: str, x: Tensor, node: Node) -> Tensor:
    assert x.dtype is not None
    return graph.add(op, [x], name=f"{node.name}/{op}", attrs={"T": x.dtype}, shapes=[x.shape], dtypes=[x.dtype]).out


def _both(graph: Graph, op: str, one: Tensor, other: Tensor, name: str) -> Tensor:
    assert one.dtype is not None
    return graph.add(op, [one, other], name=name, attrs={"T": one.dtype}, shapes=[one.shape], dtypes=[one.dtype]).out


_KINDS: tuple[tuple[Callable[[np.ndarray], np.ndarray], Callable[..., Tensor]], ...] = (
    (_gelu_exact, _write_exact),
    (_gelu_approximate, _write_approximate),
)
