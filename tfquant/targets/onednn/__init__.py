"""Fused INT8 kernels of stock TensorFlow, run by oneDNN: the kernel table and the lowering."""

from collections.abc import Mapping

from tfquant.plan.kernels import KernelTable
from tfquant.targets.onednn import affine, concat, conv, embedding, matmul, move, pad, pixels, pool
from tfquant.targets.onednn.lowering import lower

_MISSING = ("Conv3D", "Conv2DBackpropInput", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum")

TABLE = KernelTable(
    target="onednn",
    kernels=(
        *pixels.KERNELS,
        *conv.KERNELS,
        *matmul.KERNELS,
        *matmul.POINTWISE,
        embedding.KERNEL,
        *affine.KERNELS,
        *pool.KERNELS,
        concat.KERNEL,
        pad.KERNEL,
        move.KERNEL,
    ),
    missing=dict.fromkeys(_MISSING, "stock TensorFlow has no INT8 kernel for it"),
    subjects=frozenset({"Conv2D", "DepthwiseConv2dNative", "MatMul", "AddV2", "Add", "MaxPool", "AvgPool", "ConcatV2"}),
)

_CONVOLUTIONS = ("Conv2D", "DepthwiseConv2dNative", "Conv3D", "Conv2DBackpropInput")
_DYNAMIC_REASON = "convolutions need ranges from data: calibrate (mode static)"

# By the mode of the plan. With ranges that are found at each call matrix products alone run in INT8, and tables are looked up so:
# a convolution's result would leave its kernel in float only by way of int32, and there is more to read than to compute.
TABLES: Mapping[str, KernelTable] = {
    "static": TABLE,
    "dynamic": KernelTable(
        target=TABLE.target,
        kernels=(*matmul.KERNELS, embedding.KERNEL),
        missing={**TABLE.missing, **dict.fromkeys(_CONVOLUTIONS, _DYNAMIC_REASON)},
        subjects=frozenset({"MatMul"}),
    ),
}

__all__ = ["TABLE", "TABLES", "lower"]
