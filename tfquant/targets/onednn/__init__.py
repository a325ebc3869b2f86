"""Fused INT8 kernels of stock TensorFlow, run by oneDNN: the kernel table and the lowering."""

from tfquant.plan.kernels import KernelTable
from tfquant.targets.onednn import affine, concat, conv, matmul, move, pad, pool
from tfquant.targets.onednn.lowering import lower

_MISSING = ("Conv3D", "Conv2DBackpropInput", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum")

TABLE = KernelTable(
    target="onednn",
    kernels=(*conv.KERNELS, matmul.KERNEL, *affine.KERNELS, *pool.KERNELS, concat.KERNEL, pad.KERNEL, move.KERNEL),
    missing=dict.fromkeys(_MISSING, "stock TensorFlow has no INT8 kernel for it"),
    subjects=frozenset({"Conv2D", "DepthwiseConv2dNative", "MatMul", "AddV2", "Add", "MaxPool", "AvgPool", "ConcatV2"}),
)

__all__ = ["TABLE", "lower"]
