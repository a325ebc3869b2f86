"""What a target tells `annotate` about its kernels: patterns, and for each match the facts that matter, as data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.graph.patterns import Match, Op

Role = Literal["compute", "elementwise", "share", "source"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Nodes of the float graph that one kernel computes together.

    Attributes:
        kernel: the kernel.
        match: the nodes; `root` is the last one.
        main: the node that names the unit.
        inputs: the activations that it reads in 8 bits.
        output: the tensor that it makes.
        weights: its float weights with the output channels last, or None.
        is_table: these are a table of rows, transposed: each row has a scale, as an output channel has.
        bias: its float bias (C,), or None.
        clip: "Relu" or "Relu6" where the end of the output range stands for an activation, else "".
        needs_zero: the first input is padded with zeros.
        unsigned: tensors that the kernel takes as quint8 alone.
        gives_float: the kernel can return float32 instead of 8 bits.
        only_float: it can return nothing else; who reads its output in 8 bits has it quantized.
        float_slots: (node, slot) where it reads a float, though it may read the same tensor in 8 bits elsewhere.
        own_ranges: a "share" kernel whose inputs may each keep a range of their own (they are requantized on the way in).
        shrinks: its output is smaller than its input.
        known: (low, high) of the output, where the kernel makes quint8 of no other range.
        saturates: on CPUs without VNNI it adds pairs of products in 16 bits, which 8-bit weights overflow.
    """

    kernel: Kernel
    match: Match
    main: Node
    inputs: tuple[Tensor, ...]
    output: Tensor
    weights: np.ndarray | None = None
    is_table: bool = False
    bias: np.ndarray | None = None
    clip: str = ""
    needs_zero: bool = False
    unsigned: tuple[Tensor, ...] = ()
    gives_float: bool = False
    only_float: bool = False
    float_slots: tuple[tuple[Node, int], ...] = ()
    own_ranges: bool = False
    shrinks: bool = False
    saturates: bool = False
    known: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return self.main.name

    @property
    def weight_slot(self) -> int:
        """Where the main node reads the constant that the weights come from."""
        return next(slot for slot, tensor in enumerate(self.main.inputs) if tensor.value is not None)

    def as_constant(self, weights: np.ndarray) -> np.ndarray:
        """Values of the shape of `weights` as the main node reads them."""
        shape = self.main.inputs[self.weight_slot].shape
        assert shape is not None
        return (weights.T if self.is_table else weights).reshape([size or 0 for size in shape])

    def private(self, graph: Graph) -> list[Node]:
        """The nodes whose results nobody else needs, the root among them: the kernel stands for them."""
        inside = {self.match.root}
        while True:
            more = {node for node in self.match.covered if node not in inside and self._is_inside(graph, node, inside)}
            if not more:
                return [node for node in self.match.covered if node in inside]
            inside |= more

    @staticmethod
    def _is_inside(graph: Graph, node: Node, inside: set[Node]) -> bool:
        return not graph.is_output(node.out) and all(user in inside for user, _ in node.users)

    @property
    def key(self) -> str:
        """Hash of weights and bias."""
        if self.weights is None:
            return ""
        state = hashlib.blake2b(digest_size=8)
        for array in (self.weights, self.bias):
            if array is not None:
                state.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a target.

    Attributes:
        name: its name in plans and reports.
        role: "compute" runs in INT8 wherever it can; "elementwise" and "share" (moves values, or picks among them: output
            and input have one range) only where 8-bit values are at hand; "source" (what is there in 8 bits before it is
            quantized) only where another reads them.
        pattern: the float nodes that it can stand for.
        describe: the `Unit` of a match, or the reason why it cannot be used.
        lower: emits it: called with the target's lowering context and the unit.
    """

    name: str
    role: Role
    pattern: Op
    describe: Callable[[Kernel, Graph, Match], Unit | str]
    lower: Callable[[Any, Unit], None]


@dataclasses.dataclass(frozen=True)
class KernelTable:
    """All that a target can do.

    Attributes:
        target: its name.
        kernels: in the order in which they are tried at a node.
        missing: op type to the reason why it has no kernel, for ops that people expect in INT8.
        subjects: op types that a report must account for when they are float.
    """

    target: str
    kernels: tuple[Kernel, ...]
    missing: Mapping[str, str]
    subjects: frozenset[str]
