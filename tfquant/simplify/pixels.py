"""What scales and shifts the pixels of a uint8 image (Rescaling, Normalization, BGR) into the padded convolution that reads them.

    conv(pad(scale * p + shift)) = conv'(pad'(p)) + bias', where pad' pads with the pixel that stands for 0: -shift / scale

Exact: that pixel need not be an integer, and may differ between channels. `affine` does the same where nothing is padded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Tensor
from tfquant.graph.padding import conv_paddings
from tfquant.graph.patterns import Any, Const, Match, Maybe, Op, Rule, rewrite
from tfquant.simplify.affine import MAX_SPREAD, rebuilt, scaled, shifted_bias
from tfquant.simplify.canonical import channel_vector

# Further scales and shifts than these are no preprocessing of images.
_MAX_STEPS = 8


class _Preprocessed(NamedTuple):
    """scale * pixels + shift, float64 (C,); `pixels` is a Cast of uint8 to float32, its channels perhaps `reversed` before."""

    pixels: Tensor
    scale: np.ndarray
    shift: np.ndarray
    reversed: bool

    @property
    def changes(self) -> bool:
        return self.reversed or bool((self.scale != 1).any() or self.shift.any())


def _preprocessed(x: Tensor) -> _Preprocessed | None:
    """How `x` comes from bytes by scales and shifts per channel; None where it does not."""
    if x.shape is None or not x.shape or x.shape[-1] is None:
        return None
    scale, shift, tensor = np.ones(x.shape[-1]), np.zeros(x.shape[-1]), x
    for _ in range(_MAX_STEPS):
        node = tensor.node
        if node.pinned or tensor.dtype != tf.float32 or tensor.shape != x.shape:
            return None
        if node.op == "Cast":
            is_bytes = node.inputs[0].dtype == tf.uint8
            return _Preprocessed(tensor, scale, shift, _reverses_channels(node.inputs[0])) if is_bytes else None
        if node.op not in ("Mul", "AddV2", "Add"):
            return None
        constant, inner = sorted(node.inputs, key=lambda t: t.value is None)
        vector = channel_vector(constant.value, inner) if constant.value is not None else None
        if vector is None:
            return None
        if node.op == "Mul":
            scale = scale * vector
        else:
            shift = shift + scale * vector
        tensor = inner
    return None


def _reverses_channels(tensor: Tensor) -> bool:
    node = tensor.node
    axes = node.inputs[1].value if node.op == "ReverseV2" else None
    return (
        axes is not None and tensor.shape is not None and [axis % len(tensor.shape) for axis in axes] == [len(tensor.shape) - 1]
    )


def _zeros(found: _Preprocessed) -> np.ndarray:
    """The pixel of each channel that stands for 0, float64 (C,)."""
    return -found.shift / found.scale


def _paddings(match: Match) -> np.ndarray | None:
    """The zeros around the bytes, (4, 2); None where they depend on a size that is not known."""
    compute = match.nodes["compute"]
    own = conv_paddings(compute, compute.inputs[0].shape, match.value("weights").shape[:2])
    return own + match.value("paddings") if own is not None and "pad" in match.nodes else own


def _check(graph: Graph, match: Match) -> str | None:
    compute, x = match.nodes["compute"], match["x"]
    found = _preprocessed(x)
    if found is None or not found.changes:
        return "it does not read preprocessed pixels"
    if compute.attr("data_format", "NHWC") != "NHWC" or x.shape is None or len(x.shape) != 4:
        return "channels are not last"
    if match.value("weights").shape[2] != len(found.scale):
        return "the convolution is grouped"
    if found.reversed and compute.op != "Conv2D":
        return "its output channels would change places"
    size = np.abs(found.scale)
    if not size.min() * MAX_SPREAD >= size.max() > 0:
        return "the scales differ too much to be good 8-bit weights"
    if "pad" in match.nodes:
        pad, amounts = match.nodes["pad"], match.value("paddings")
        if pad.op == "PadV2" and (pad.inputs[2].value is None or pad.inputs[2].value != 0):
            return "it is not padded with zeros"
        if amounts.shape != (4, 2) or amounts[[0, 3]].any() or (amounts < 0).any():
            return "the padding is not of height and width"
    paddings = _paddings(match)
    if paddings is None:
        return "its padding depends on a size that is not known"
    zeros = np.floor(_zeros(found) + 0.5)
    if paddings.any() and (zeros.min() < 0 or zeros.max() > 255):
        return "no pixel stands for the zeros that it is padded with"
    return None


def _fold(graph: Graph, match: Match) -> Tensor:
    compute, found, paddings = match.nodes["compute"], _preprocessed(match["x"]), _paddings(match)
    assert found is not None and paddings is not None
    weights = scaled(match.value("weights"), compute.op, found.scale, "input")
    bias, pixels, zeros = shifted_bias(match, found.shift), found.pixels, _zeros(found)
    if found.reversed:
        cast = pixels.node
        pixels = graph.copy_of(cast, [cast.inputs[0].node.inputs[0]]).out
        weights, zeros = np.ascontiguousarray(weights[:, :, ::-1]), zeros[::-1]
    if paddings.any():
        pixels = _padded(graph, pixels, paddings, zeros, compute.name)
    return rebuilt(graph, match, weights, bias, pixels, padding="VALID", explicit_paddings=[])


def _padded(graph: Graph, pixels: Tensor, paddings: np.ndarray, fill: np.ndarray, name: str) -> Tensor:
    """`pixels` with `fill` (C,) around them. Where the channels differ in it, it is taken off before and put on behind."""
    assert pixels.shape is not None
    amounts = graph.constant(paddings.astype(np.int32), name=f"{name}/pixels/paddings")
    shape = tuple(None if size is None else size + int(more.sum()) for size, more in zip(pixels.shape, paddings, strict=True))
    attrs = {"T": tf.float32, "Tpaddings": tf.int32}

    def add(op: str, inputs: list[Tensor], like: tuple[int | None, ...] | None, attrs: dict[str, object]) -> Tensor:
        return graph.add(op, inputs, name=f"{name}/pixels/{op}", attrs=attrs, shapes=[like], dtypes=[tf.float32]).out

    if (fill == fill[0]).all():
        value = graph.constant(np.array(fill[0], np.float32), name=f"{name}/pixels/zero")
        return add("PadV2", [pixels, amounts, value], shape, attrs)
    zeros, minus = (graph.constant(sign * fill.astype(np.float32), name=f"{name}/pixels/zeros") for sign in (1, -1))
    inner = add("BiasAdd", [pixels, minus], pixels.shape, {"T": tf.float32})
    return add("BiasAdd", [add("Pad", [inner, amounts], shape, attrs), zeros], shape, {"T": tf.float32})


_PADDED = Maybe("Pad|PadV2", Any("x"), Const("paddings"), name="pad", shared=True)
_COMPUTE = Op("Conv2D|DepthwiseConv2dNative", _PADDED, Const("weights"), name="compute")
RULES = (
    Rule(
        "scales and shifts of pixels into the layer behind",
        Maybe("BiasAdd", _COMPUTE, Const("bias"), name="bias_add"),
        _check,
        _fold,
    ),
)


def run(graph: Graph) -> int:
    return sum(rewrite(graph, rule) for rule in RULES)
