"""`--estimator auto`: for each tensor the estimator with which the layers that read it err least, measured on data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from tfquant.graph.ir import Graph, Node, Tensor
from tfquant.observe.estimators import ESTIMATORS
from tfquant.observe.ranges import group_bits, group_spec
from tfquant.observe.statistics import TensorStats
from tfquant.observe.trials import Batch, Trials, scalars, some_of, twin
from tfquant.plan.annotate import Annotation, Group
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import QuantSpec
from tfquant.progress import progress

# Of the calibration data: ranges come of all of them, the choice among ranges needs fewer.
SAMPLES = 64
_STEPS = "tfquant/steps"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which estimator is best where.

    Attributes:
        chosen: name of a group to its estimator.
        errors: name of a group to {estimator: the sum over its readers of their relative squared errors}.
    """

    chosen: Mapping[str, str]
    errors: Mapping[str, Mapping[str, float]]


def select(
    graph: Graph,
    annotation: Annotation,
    stats: Mapping[Tensor, TensorStats],
    batches: Iterable[Batch],
    *,
    activation_mode: str = "asymmetric",
    isa: str = "vnni",
    bits: int = 8,
) -> Selection:
    """Tries all estimators on every group of tensors.

    A unit is computed from the float tensor and from the quantized one, everything else being float: so what is chosen for one
    group depends on no other, and in sum the choice errs no more than any one estimator does. Where no unit computes with a
    group (it is moved, or returned), the error is that of its tensors.

    Args:
        graph: the simplified float graph.
        annotation: of it.
        stats: of the tensors that `ranges.observed` names.
        batches: calibration data; the first `SAMPLES` samples are used.
        activation_mode, isa: as for `ranges.make_plan`.
        bits: of activations.

    Raises:
        ConfigError: a registered estimator fails.
        ModelError: TensorFlow cannot run the float model on the data.
    """
    names = ESTIMATORS.names()
    groups = [(group, count) for group, count in group_bits(annotation, bits) if group.known is None]
    if not groups:
        return Selection({}, {})
    specs = [[group_spec(group, stats, name, activation_mode, isa, count) for group, count in groups] for name in names]
    probe = _Probe(graph, annotation, [group for group, _ in groups])
    some = some_of(batches, SAMPLES)
    found = np.stack([probe.errors(some, row) for row in progress(specs, "Choosing estimators", len(specs))])
    best = found.argmin(0)
    return Selection(
        {group.name: names[best[index]] for index, (group, _) in enumerate(groups)},
        {group.name: dict(zip(names, map(float, found[:, index]), strict=True)) for index, (group, _) in enumerate(groups)},
    )


class _Probe:
    """The float graph with a twin of every unit for each group that it reads; the ranges are an input."""

    def __init__(self, graph: Graph, annotation: Annotation, groups: Sequence[Group]) -> None:
        self._graph = graph.copy()
        of = {tensor: index for index, group in enumerate(groups) for tensor in group.tensors}
        # Of each group the size of a step, and the ends of the range in steps.
        self._steps = scalars(self._graph, _STEPS, 3 * len(groups))
        self._fakes: dict[tuple[Tensor, int], Tensor] = {}
        pairs: list[tuple[Tensor, Tensor]] = []
        self._owners: list[int] = []
        for unit in annotation.units.values():
            if unit.kernel.role in ("compute", "elementwise"):
                for index in sorted({of[tensor] for tensor in unit.inputs if tensor in of}):
                    pairs.append((self._own(unit.output), self._twin(unit, index, of)))
                    self._owners.append(index)
        for index in sorted(set(range(len(groups))) - set(self._owners)):
            for tensor in groups[index].tensors:
                pairs.append((self._own(tensor), self._fake(self._own(tensor), index)))
                self._owners.append(index)
        self._count = len(groups)
        self._trials = Trials(self._graph, pairs)

    def errors(self, batches: Iterable[Batch], specs: Sequence[QuantSpec]) -> np.ndarray:
        """The errors with these ranges, one spec per group: float64 (groups,)."""
        steps = np.array([(spec.scale, spec.low / spec.scale, spec.high / spec.scale) for spec in specs], np.float32)
        found = self._trials.run({**batch, _STEPS: steps.reshape(-1)} for batch in batches)
        return np.bincount(self._owners, found, self._count)

    def _own(self, tensor: Tensor) -> Tensor:
        return Tensor(self._graph.nodes[tensor.node.name], tensor.index)

    def _twin(self, unit: Unit, index: int, of: Mapping[Tensor, int]) -> Tensor:
        """The output of a unit that reads a group in few bits."""

        def other(node: Node, slot: int, tensor: Tensor) -> Tensor:
            is_read = node.inputs[slot] in unit.inputs and (node, slot) not in unit.float_slots
            return self._fake(tensor, index) if is_read and of.get(node.inputs[slot]) == index else tensor

        return twin(self._graph, unit, other)

    def _fake(self, tensor: Tensor, index: int) -> Tensor:
        """A tensor of the copied graph, rounded to the steps of a group."""
        if (tensor, index) not in self._fakes:
            step, low, high = self._steps[3 * index : 3 * index + 3]
            name = f"{tensor.node.name}/trial"
            steps = self._op("RealDiv", [tensor, step], name)
            rounded = self._op("Round", [steps], name)
            clipped = self._op("Maximum", [self._op("Minimum", [rounded, high], name), low], name)
            self._fakes[tensor, index] = self._op("Mul", [clipped, step], name)
        return self._fakes[tensor, index]

    def _op(self, op: str, inputs: list[Tensor], name: str) -> Tensor:
        shapes = [inputs[0].shape]
        return self._graph.add(op, inputs, name=name, attrs={"T": tf.float32}, shapes=shapes, dtypes=[tf.float32]).out
