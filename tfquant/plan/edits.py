"""Edits of the simplified float graph that a plan asks for: other biases, channels scaled from one layer to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tfquant.errors import PlanError
from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Match, matches
from tfquant.plan.spec import Edit, QuantPlan, Scaling, Shift
from tfquant.simplify.affine import scaled
from tfquant.simplify.normalization import CANONICAL, is_canonical

# Layers with weights that edits can change.
LAYERS = ("Conv2D", "DepthwiseConv2dNative", "MatMul")


def apply_edits(graph: Graph, edits: Sequence[Edit]) -> None:
    """Makes the edits, in place and in order.

    Raises:
        PlanError: a layer is not there, or has another number of channels.
    """
    for edit in edits:
        if isinstance(edit, Shift):
            _add_to_bias(graph, _layer(graph, edit.op), edit.values)
            continue
        for name in edit.producers:
            norm = _norm(graph, name)
            if norm is not None:
                _scale_norm(graph, norm, edit.factors.astype(np.float64))
                continue
            node = _layer(graph, name)
            _scale_weights(graph, node, edit.factors.astype(np.float64), "output")
            bias_add = bias_of(graph, node)
            if bias_add is not None:
                _set_bias(graph, bias_add, value_of(bias_add.inputs[1]) * edit.factors.astype(np.float64))
        for name in edit.consumers:
            _scale_weights(graph, _layer(graph, name), 1.0 / edit.factors.astype(np.float64), "input")


def in_effect(plan: QuantPlan) -> tuple[Edit, ...]:
    """The edits of a plan; what corrects the quantization of a layer that is in float becomes 0.

    It stays an edit, since a layer may have its BiasAdd, after which tensors are named, from there.
    """
    floats = {decision.name for decision in plan.ops if not decision.int8}
    return tuple(
        dataclasses.replace(edit, values=np.zeros_like(edit.values))
        if isinstance(edit, Shift) and edit.corrects and edit.op in floats
        else edit
        for edit in plan.edits
    )


def uncorrected(graph: Graph, edits: Sequence[Edit]) -> Graph:
    """A copy of an edited graph that computes what the float model does: without the shifts that correct the quantization."""
    result = graph.copy()
    for index, edit in enumerate(edits):
        if isinstance(edit, Shift) and edit.corrects:
            values = edit.values.astype(np.float64)
            for later in edits[index + 1 :]:
                if isinstance(later, Scaling) and edit.op in later.producers:
                    values = values * later.factors
            _add_to_bias(result, _layer(result, edit.op), -values)
    return result


def value_of(tensor: Tensor) -> np.ndarray:
    """The value of a constant.

    Raises:
        PlanError: it is none.
    """
    if tensor.value is None:
        raise PlanError(f"The plan belongs to another model: {tensor.name} is no constant.")
    return tensor.value


def bias_of(graph: Graph, node: Node) -> Node | None:
    """The BiasAdd with a constant that alone reads the result of a layer, or None."""
    users = graph.users(node.out)
    if len(users) != 1 or graph.is_output(node.out):
        return None
    user, slot = users[0]
    return user if user.op == "BiasAdd" and slot == 0 and user.inputs[1].value is not None else None


def channels_of(node: Node, axis: str) -> int:
    """How many "input" or "output" channels a layer's weights have; the inputs of a group, where it is grouped."""
    shape = value_of(node.inputs[1]).shape
    if node.op == "DepthwiseConv2dNative":
        return int(shape[2] if axis == "input" else shape[2] * shape[3])
    is_last = (axis == "output") != bool(node.op == "MatMul" and node.attr("transpose_b"))
    return int(shape[-1] if is_last else shape[-2])


def taps_of(node: Node) -> np.ndarray:
    """A layer's weights, float64 (taps, C, O), of a depthwise one (taps, C, M); a MatMul has one tap."""
    weights = value_of(node.inputs[1]).astype(np.float64)
    weights = weights.T if node.op == "MatMul" and node.attr("transpose_b") else weights
    return weights.reshape(-1, *weights.shape[-2:])


def _layer(graph: Graph, name: str) -> Node:
    node = graph.nodes.get(name)
    if node is None or node.op not in LAYERS:
        raise PlanError(f"The plan belongs to another model: it edits the layer {name}, which is not there.")
    return node


def _norm(graph: Graph, name: str) -> Match | None:
    """The LayerNorm whose last node has this name, or None."""
    node = graph.nodes.get(name)
    found = matches(CANONICAL, graph, node) if node is not None else ()
    return next((match for match in found if is_canonical(match)), None)


def _scale_norm(graph: Graph, norm: Match, factors: np.ndarray) -> None:
    for key, user in (("gamma", "scaled"), ("beta", "shift")):
        value, node = norm.value(key), norm.nodes[user]
        if value.shape[-1:] != factors.shape:
            raise PlanError(
                f"The plan belongs to another model: {norm.root.name} has {value.shape[-1]} channels, not {len(factors)}."
            )
        _set_constant(graph, node, node.inputs.index(norm[key]), (value * factors).astype(value.dtype))


def _scale_weights(graph: Graph, node: Node, factors: np.ndarray, axis: str) -> None:
    weights = value_of(node.inputs[1])
    if channels_of(node, axis) != len(factors):
        raise PlanError(
            f"The plan belongs to another model: {node.name} has {channels_of(node, axis)} {axis} channels, not {len(factors)}."
        )
    is_transposed = node.op == "MatMul" and node.attr("transpose_b")
    value = scaled(weights.T if is_transposed else weights, node.op, factors, axis)
    _set_constant(graph, node, 1, np.ascontiguousarray(value.T if is_transposed else value))


def _add_to_bias(graph: Graph, node: Node, values: np.ndarray) -> None:
    if channels_of(node, "output") != len(values):
        raise PlanError(
            f"The plan belongs to another model: {node.name} has {channels_of(node, 'output')} channels, not {len(values)}."
        )
    bias_add = bias_of(graph, node)
    if bias_add is not None:
        _set_bias(graph, bias_add, value_of(bias_add.inputs[1]) + values.astype(np.float64))
        return
    out = node.out
    assert out.dtype is not None
    vector = graph.constant(values.astype(out.dtype.as_numpy_dtype), name=f"{node.name}/bias")
    name = f"{node.name}/bias_add"
    added = graph.add("BiasAdd", [out, vector], name=name, attrs={"T": out.dtype}, shapes=[out.shape], dtypes=[out.dtype])
    graph.replace(out, added.out)


def _set_bias(graph: Graph, bias_add: Node, value: np.ndarray) -> None:
    _set_constant(graph, bias_add, 1, value.astype(value_of(bias_add.inputs[1]).dtype))


def _set_constant(graph: Graph, node: Node, slot: int, value: np.ndarray) -> None:
    """Another constant for an input. It has the name of the old one, unless others read that: so many edits are as one."""
    old = node.inputs[slot].node
    name = graph.take_name(old) if len(old.users) == 1 else f"{node.name}/{old.name.rpartition('/')[2]}"
    graph.set_input(node, slot, graph.constant(value, name=name))
    graph.remove(old)
