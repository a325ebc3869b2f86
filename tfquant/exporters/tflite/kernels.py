"""What LiteRT's kernels take in 8 and 16 bits: the rules of the TFLite quantization specification, by op.

https://ai.google.dev/edge/litert/models/quantization_spec
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from tfquant.exporters.marking import PROBABILITIES, SIGNED_UNITS, Kernels

Kind = Literal["layer", "own", "product", "shared", "joined", "known", "reads"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the kernel of an op is quantized.

    Attributes:
        kind: "layer": weights, bias, a range of its own; "own": every operand has its range; "product": so,
            and the scales multiply; "shared": the result has the range
            of the first input; "joined": all inputs and the result have one; "known": the result has one that is fixed; "reads":
            the result is no float.
        version: of the op with int8, and with int16 (0: it has no such kernel).
        mixed: version of the op with int8 that returns int16 (0: it has no such kernel).
        inputs: the slots of activations, all where none is given; other operands are constants or shapes.
        symmetric: the slot of an operand whose zero point must be 0 (LiteRT's product of two activations forgets that of the
            second, measured in TensorFlow 2.21), or -1.
        output: (scale, zero point) of kind "known", with int8, and with int16.
        axis: of a layer's weights, along which each slice has a scale of its own.
        weights: the slot of a layer's weights; its bias is in the last of three or four slots.
        int4: it takes weights of 4 bits.
    """

    kind: Kind
    version: int
    version16: int = 0
    inputs: tuple[int, ...] = ()
    output: tuple[tuple[float, int], tuple[float, int]] = ((1.0, 0), (1.0, 0))
    axis: int = 0
    weights: int = 1
    int4: bool = False
    symmetric: int = -1
    mixed: int = 0


_PROBABILITY = ((1 / 256, -128), (1 / 32768, 0))
_SIGNED_UNIT = ((1 / 128, 0), (1 / 32768, 0))

RULES = {
    "CONV_2D": Rule("layer", 3, 4, (0,), int4=True),
    "DEPTHWISE_CONV_2D": Rule("layer", 3, 5, (0,), axis=3, int4=True),
    "FULLY_CONNECTED": Rule("layer", 4, 4, (0,), int4=True),
    "TRANSPOSE_CONV": Rule("layer", 3, 4, (2,)),
    "ADD": Rule("own", 2, 3),
    "SUB": Rule("own", 3, 3),
    "MUL": Rule("product", 2, 4),
    "SQUARED_DIFFERENCE": Rule("own", 2),
    "BATCH_MATMUL": Rule("product", 2, 3, symmetric=1),
    "MEAN": Rule("own", 2, 3, (0,)),
    "SUM": Rule("own", 2, 0, (0,)),
    "RELU": Rule("own", 2, 3),
    "RELU6": Rule("own", 2, 0),
    "LEAKY_RELU": Rule("own", 2, 2),
    "PRELU": Rule("own", 1, 0),
    "ELU": Rule("own", 1, 0),
    "GELU": Rule("own", 2, 0),
    "HARD_SWISH": Rule("own", 1, 0),
    "AVERAGE_POOL_2D": Rule("shared", 2, 3, (0,)),
    "MAX_POOL_2D": Rule("shared", 2, 3, (0,)),
    "RESIZE_BILINEAR": Rule("shared", 2, 4, (0,)),
    "RESIZE_NEAREST_NEIGHBOR": Rule("shared", 2, 4, (0,)),
    "RESHAPE": Rule("shared", 1, 1, (0,)),
    "SQUEEZE": Rule("shared", 1, 1, (0,)),
    "EXPAND_DIMS": Rule("shared", 1, 1, (0,)),
    "TRANSPOSE": Rule("shared", 2, 4, (0,)),
    "PAD": Rule("shared", 2, 3, (0,)),
    "PADV2": Rule("joined", 2, 3, (0, 2)),
    "MIRROR_PAD": Rule("shared", 2, 3, (0,)),
    "SLICE": Rule("shared", 2, 4, (0,)),
    "STRIDED_SLICE": Rule("shared", 2, 4, (0,)),
    "SPLIT": Rule("shared", 2, 4, (1,)),
    "SPLIT_V": Rule("shared", 2, 4, (0,)),
    "UNPACK": Rule("shared", 2, 4, (0,)),
    "GATHER": Rule("shared", 2, 4, (0,)),
    "TILE": Rule("shared", 2, 0, (0,)),
    "SPACE_TO_DEPTH": Rule("shared", 2, 0, (0,)),
    "DEPTH_TO_SPACE": Rule("shared", 2, 0, (0,)),
    "SPACE_TO_BATCH_ND": Rule("shared", 2, 4, (0,)),
    "BATCH_TO_SPACE_ND": Rule("shared", 2, 4, (0,)),
    "REDUCE_MAX": Rule("shared", 2, 3, (0,)),
    "REDUCE_MIN": Rule("shared", 2, 3, (0,)),
    "CONCATENATION": Rule("joined", 2, 3),
    "PACK": Rule("joined", 2, 4),
    "MAXIMUM": Rule("joined", 2, 4),
    "MINIMUM": Rule("joined", 2, 4),
    "SOFTMAX": Rule("known", 2, 3, output=_PROBABILITY, mixed=3),
    "LOGISTIC": Rule("known", 2, 3, output=_PROBABILITY),
    "TANH": Rule("known", 2, 3, output=_SIGNED_UNIT),
    "ARG_MAX": Rule("reads", 2, 0, (0,)),
    "ARG_MIN": Rule("reads", 2, 0, (0,)),
}

# The same as TensorFlow's op types, which tell where results are marked.
KERNELS = Kernels(
    computes=frozenset(
        {
            *(
                "Conv2D",
                "DepthwiseConv2dNative",
                "MatMul",
                "BatchMatMul",
                "BatchMatMulV2",
                "BatchMatMulV3",
                "Conv2DBackpropInput",
            ),
            *("Add", "AddV2", "BiasAdd", "Sub", "Mul", "Mean", "Sum", "Relu", "Relu6", "LeakyRelu", "Elu"),
            *("Maximum", "Minimum", "ConcatV2", "Placeholder", "GlobalAvgPool"),
        }
    ),
    moves=frozenset(
        {
            *("MaxPool", "ResizeNearestNeighbor", "Reshape", "Squeeze", "ExpandDims", "Transpose"),
            *("Pad", "MirrorPad", "Slice", "StridedSlice", "SpaceToDepth", "DepthToSpace", "SpaceToBatchND", "BatchToSpaceND"),
            *("Identity", "Max", "Min"),
        }
    ),
    blends=frozenset({"AvgPool", "ResizeBilinear"}),
    rounds=frozenset({"Add", "AddV2", "BiasAdd", "Sub", "Mul", "Maximum", "Minimum"}),
    symmetric=frozenset({"BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"}),
    known={"Softmax": PROBABILITIES, "Sigmoid": PROBABILITIES, "Tanh": SIGNED_UNITS},
)
