"""Whether a runtime computes what the simulation says: layer by layer, and at the outputs.

Each quantized layer is held against the simulation of what the runtime itself handed it: kernels that are right differ by the
rounding of a few values, by one step. From end to end such differences grow, and deep networks turn them into noise of the size
of the quantization's own; so the outputs tell how far the roundings lead apart, and the layers whether the file is right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.errors import OutputError
from tfquant.graph.ir import Graph, Node
from tfquant.tables import table
from tfquant.verify import Function, decibels, fidelity, rows_of, simulation

# Steps by which a value may be off. LiteRT's kernels from int16 to int16 look functions up in tables of 513 entries. Its softmax
# from int8 to int16 has a float32 exponential of each difference: of 3 million results 191 were the next integer, none further.
STEPS, STEPS_OF_TABLES = 1.01, 64.0
# The share of a tensor that may be off by more: where ranges of summands differ, one step of the wider is several of the result.
_MOST_SHARE = 0.001
# Likewise of what follows from a sum that the runtime may fuse in another way, in dB: where it computes a summand in float, as
# OpenVINO some shortcuts of ResNet50, its readers are at 36 dB and more.
_LEAST_LOOSE = 30.0
# What only moves values.
_MOVES = frozenset({"Reshape", "Squeeze", "ExpandDims", "Transpose"})


@dataclasses.dataclass(frozen=True)
class TensorCheck:
    """A quantized tensor of the runtime against the simulation of what it was computed from.

    Attributes:
        name: of the tensor in the float graph.
        steps: largest difference, in steps of its integers.
        off: share of the values that are another integer.
        beyond: share of those that are off by more than kernels may be.
        sqnr: of the difference, in dB.
        is_loose: it follows from a sum that the runtime fuses, whose values are not known.
    """

    name: str
    steps: float
    off: float
    beyond: float
    sqnr: float
    is_loose: bool = False

    @property
    def is_within_a_step(self) -> bool:
        return self.beyond <= _MOST_SHARE

    @property
    def is_right(self) -> bool:
        return self.is_within_a_step or (self.is_loose and self.sqnr >= _LEAST_LOOSE)


@dataclasses.dataclass(frozen=True)
class Check:
    """What a runtime makes of an exported file.

    Attributes:
        runtime: its name and version.
        samples: number of samples.
        sqnr: of the outputs against the simulation, in dB.
        agreement: percent of samples with the same largest class, None where no output is (N, classes).
        tensors: the quantized tensors, in the order in which they are computed; none where weights alone are quantized.
        behind: SQNR in dB of the outputs against the simulation of what the quantized tensors in front of them are; None where
            the runtime shows none of these.
    """

    runtime: str
    samples: int
    sqnr: float
    agreement: float | None
    tensors: tuple[TensorCheck, ...] = ()
    behind: float | None = None

    @property
    def wrong(self) -> tuple[TensorCheck, ...]:
        """Tensors that the runtime computes otherwise."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_right)

    def lines(self) -> list[str]:
        """For people."""
        alike = "" if self.agreement is None else f", top-1 agrees on {self.agreement:.1f}%"
        near = [tensor for tensor in self.tensors if not tensor.is_within_a_step]
        off = f"; {len(self.tensors) - len(near)} quantized tensors within a step" if self.tensors and not self.wrong else ""
        if off and near:
            off += f", {len(near)} behind sums that it fuses otherwise at {min(tensor.sqnr for tensor in near):.1f} dB or more"
        return [f"{self.runtime} against the simulation, {self.samples} samples: {self.sqnr:.1f} dB{alike}{off}"]

    def layers(self) -> list[str]:
        """A table of the tensors."""
        rows = [["Tensor", "largest, steps", "other integer", "dB"]]
        rows += [[t.name, f"{t.steps:.2f}", f"{100 * t.off:.3f}%", f"{t.sqnr:.1f}"] for t in self.tensors]
        return table(rows)


def check(
    runtime: str,
    graph: Graph,
    run: Function,
    batches: Iterable[Mapping[str, np.ndarray]],
    inner: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] | None = None,
    names: Mapping[str, str] | None = None,
    exact: Graph | None = None,
    loose: Collection[str] = (),
    steps: float = STEPS,
) -> Check:
    """Compares a runtime with the simulation.

    Args:
        runtime: its name and version.
        graph: the simulation in floats, of a `Marked`, which each tensor is held against.
        run: the file in its runtime: {input name: array} to {output name: array}.
        batches: samples, keyed by input name; tensors are compared on the first batch alone.
        inner: the real values of the runtime's quantized tensors for a batch, by the names of their marks, and the outputs that
            came of them, if it has these.
        names: of marks to those of tensors.
        exact: the simulation in integers, which the outputs are held against; by default that in floats.
        loose: marks whose tensors follow from sums that the runtime fuses.
        steps: by which values of tensors may be off.
    """
    batches = list(batches)
    simulated, checked = _alike(runtime, simulation(graph if exact is None else exact), run)
    found = fidelity(simulated, checked, batches, rows_of)
    tensors: tuple[TensorCheck, ...] = ()
    behind: float | None = None
    if inner is not None and names:
        tensors, behind = _check_layers(graph, inner, batches[:1], names, loose, steps)
    return Check(runtime, found.samples, found.sqnr, found.agreement, tensors, behind)


def _alike(runtime: str, simulated: Function, run: Function) -> tuple[Function, Function]:
    """Both functions, of which the second, called after the first, raises `OutputError` where its outputs are of other shapes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def reference(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        expected = simulated(batch)
        shapes.update({key: value.shape for key, value in expected.items()})
        return expected

    def checked(batch: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        found = run(batch)
        for key, shape in shapes.items():
            if found[key].shape != shape:
                raise OutputError(
                    f"{runtime} returns {key} in the shape {found[key].shape}, the simulation in {shape}. Nothing was written; "
                    "please report it with the model's structure."
                )
        return found

    return reference, checked


def _check_layers(
    graph: Graph,
    inner: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    batches: Iterable[Mapping[str, np.ndarray]],
    names: Mapping[str, str],
    loose: Collection[str],
    most: float,
) -> tuple[tuple[TensorCheck, ...], float | None]:
    sums: dict[str, np.ndarray] = {}
    run: Function | None = None
    steps: dict[str, float] = {}
    shown: list[tuple[float, float]] = []
    for batch in batches:
        values = inner(batch)
        outputs = {key: value for key, value in values.items() if key in graph.outputs}
        values = _as_marked(graph, {name: value for name, value in values.items() if name not in outputs})
        if run is None:
            part = cut(graph, values, outputs)
            run = simulation(part)
            steps = {name: _step(part, name) for name in values}
        for name, expected in run({**batch, **values}).items():
            if name in outputs:
                if expected.dtype.kind == "f":
                    difference = expected.astype(np.float64) - outputs[name]
                    shown.append((float(np.square(expected.astype(np.float64)).sum()), float(np.square(difference).sum())))
                continue
            off = np.abs(expected.astype(np.float64) - values[name]) / steps[name]
            noise = np.square(expected.astype(np.float64) - values[name]).sum()
            signal = np.square(expected.astype(np.float64)).sum()
            new = np.array([off.max(initial=0), (off > 0.5).sum(), (off > most).sum(), off.size, signal, noise])
            old = sums.get(name, np.zeros(6))
            sums[name] = np.concatenate([[max(old[0], new[0])], old[1:] + new[1:]])
    tensors = tuple(
        TensorCheck(
            names[name], float(largest), off / max(size, 1), beyond / max(size, 1), decibels(signal, noise), name in loose
        )
        for name, (largest, off, beyond, size, signal, noise) in sums.items()
    )
    return tensors, decibels(sum(signal for signal, _ in shown), sum(noise for _, noise in shown)) if shown else None


def _as_marked(graph: Graph, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values in the shapes that the graph has: converters move what rounds behind reshapes and transpositions."""
    return {name: _moved_back(graph.nodes[name], value) for name, value in values.items()}


def _moved_back(node: Node, value: np.ndarray) -> np.ndarray:
    for moves in _moves_behind(node):
        if _is_of(value.shape, moves[-1].out.shape):
            for move in reversed(moves[1:]):
                order = move.inputs[1].value if move.op == "Transpose" else None
                value = value.transpose(np.argsort(order)) if order is not None else _reshaped(value, move.inputs[0].shape)
            return value
    return _reshaped(value, node.out.shape)


def _moves_behind(node: Node) -> Iterator[list[Node]]:
    """The chains of ops behind a node that only move its values; the node itself is the first of each, and is one."""
    chains = [[node]]
    while chains:
        chain = chains.pop(0)
        yield chain
        chains += [[*chain, user] for user, slot in chain[-1].users if user.op in _MOVES and slot == 0]


def _reshaped(value: np.ndarray, shape: Sequence[int | None] | None) -> np.ndarray:
    if shape is None or sum(size is None for size in shape) > 1:
        return value
    return value.reshape([-1 if size is None else size for size in shape])


def _is_of(shape: Sequence[int], wanted: Sequence[int | None] | None) -> bool:
    return (
        wanted is not None
        and len(shape) == len(wanted)
        and all(size in (None, own) for own, size in zip(shape, wanted, strict=True))
    )


def cut(graph: Graph, marks: Iterable[str], keys: Iterable[str] = ()) -> Graph:
    """The graph with what stands behind each mark read from an input of its name; its outputs are what the marks compute, and
    the outputs of these keys.
    """
    result = graph.copy()
    outputs = {}
    for name in marks:
        node = result.nodes[name]
        fed = result.add(
            "Placeholder", name=f"{name}fed", attrs={"dtype": tf.float32}, shapes=[node.out.shape], dtypes=[tf.float32]
        ).out
        result.replace(node.out, fed)
        result.inputs[name] = fed
        outputs[name] = node.out
    result.outputs = {key: result.outputs[key] for key in keys} | outputs
    result.prune()
    return result


def _step(graph: Graph, name: str) -> float:
    node = graph.nodes[name]
    low, high = (float(tensor.value) for tensor in node.inputs[1:3] if tensor.value is not None)
    return (high - low) / (2 ** _bits(graph, name) - 1 - bool(node.attr("narrow_range")))


def _bits(graph: Graph, name: str) -> int:
    return int(graph.nodes[name].attr("num_bits"))
