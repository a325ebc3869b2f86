"""What was done to a model, for people: a table of ops, the reasons, and what it costs and gains."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from tfquant.graph.cost import macs_per_sample
from tfquant.graph.freezing import bodies
from tfquant.graph.ir import Graph, Node
from tfquant.graph.paths import layer_of
from tfquant.plan.kernels import Unit
from tfquant.plan.spec import BITS, OpDecision, QuantPlan
from tfquant.tables import table
from tfquant.verify import Fidelity, Latency

_NOT_COUNTED = frozenset({"Const", "Placeholder", "NoOp", "Identity"})
_MOST_REASONS = 3


@dataclasses.dataclass(frozen=True)
class OpCount:
    """How many ops of a type run how."""

    op: str
    total: int
    int8: int

    @property
    def float32(self) -> int:
        return self.total - self.int8


@dataclasses.dataclass
class Report:
    """The result of a quantization in figures; `str()` is the summary that the command line prints.

    Attributes:
        name: of the model.
        ops: per op type of the simplified model.
        float_ops: ops that could have been INT8 and are not, with the reason.
        total_macs: multiply-accumulates per sample, where shapes are known, outside of loops and branches.
        int8_macs: those that run in INT8.
        float_macs: the others by the reason why they do not, the most first.
        simplified: how often each simplification fired.
        size_before: bytes of the float model.
        size_after: bytes of the INT8 model.
        fidelity: against the float model on the calibration data, None where it was not measured.
        latency: against the float model, empty where it was not measured.
        left_out: functions of the source that nothing can serve and that are not in the result.
        kept_float: signatures and endpoints that compute something else and stay as they were.
        warnings: what may be wrong with the data or the machine.
        placement: what was measured to place the ops.
        bfloat16: how many float ops run in bfloat16.
        mode: how it was quantized, one of `plan.spec.MODES`.
        simulated: of fewer than 8 bits: which weights and activations have; `size_after` is what these bits take.
        has_bodies: loops, branches or functions of the model hold ops that could have been INT8.
    """

    name: str
    ops: tuple[OpCount, ...]
    float_ops: tuple[OpDecision, ...]
    total_macs: int
    int8_macs: int
    simplified: Mapping[str, int]
    size_before: int
    size_after: int
    fidelity: Fidelity | None = None
    latency: tuple[Latency, ...] = ()
    left_out: tuple[str, ...] = ()
    kept_float: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    placement: tuple[str, ...] = ()
    bfloat16: int = 0
    mode: str = "static"
    has_bodies: bool = False
    simulated: str = ""
    float_macs: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def int8_share(self) -> float:
        """Share of the multiply-accumulates that run in INT8, in percent."""
        return 100 * self.int8_macs / self.total_macs if self.total_macs else 0.0

    def __str__(self) -> str:
        is_stored = self.mode == "weight_only"
        done = "quantized" if self.simulated else "in INT8"
        column = "8-bit weights" if is_stored else "Quantized" if self.simulated else "INT8"
        rows = [("Op type", "Total", column, "Float")]
        rows += [(count.op, str(count.total), str(count.int8), str(count.float32)) for count in self.ops]
        mode = "" if self.mode == "static" else f" (mode {self.mode})"
        lines = [f"Quantized {self.name}{mode}", "", *table(rows), ""]
        if self.simulated:
            lines += [f"Simulated: {self.simulated}. Stock TensorFlow has no kernel below 8 bits.", ""]
        if self.float_ops:
            lines.append("Weights in float:" if is_stored else "Float, though they could have been INT8:")
            lines += [f"  {layer_of(d.name)} ({d.op}): {d.reason}" for d in self.float_ops]
            lines.append("")
        if self.total_macs:
            beside = ", loops and branches not counted" if self.has_bodies else ""
            lines.append(f"Multiply-accumulates {done}: {self.int8_share:.2f}% of {_si(self.total_macs)} per sample{beside}")
            rest = list(self.float_macs.items())[:_MOST_REASONS]
            lines += [f"  {100 * count / self.total_macs:.2f}% in float: {reason}" for reason, count in rest]
        if self.bfloat16:
            lines.append(f"Float ops in bfloat16: {self.bfloat16}")
        lines += self.placement
        ratio = self.size_after / self.size_before if self.size_before else 0.0
        stored = ", were its weights stored in these bits" if self.simulated else ""
        lines.append(f"Size: {_si(self.size_before)}B -> {_si(self.size_after)}B ({ratio:.2f}x){stored}")
        if self.fidelity is not None:
            found = self.fidelity
            parts = [f"SQNR {found.sqnr:.1f} dB"]
            if found.agreement is not None and found.mean_kl is not None:
                parts = [f"agreement {found.agreement:.2f}%", f"mean KL {found.mean_kl:.4f} nats", *parts]
            lines.append(f"Against float32 on {found.samples} calibration samples: {', '.join(parts)}")
        for entry in self.latency:
            lines.append(
                f"Latency at batch {entry.batch_size}: {entry.float32:.2f} ms -> {entry.int8:.2f} ms ({entry.speedup:.2f}x)"
            )
        lines += [f"Warning: {line}" for line in self.warnings]
        if self.kept_float:
            lines.append(f"Not quantized, as they compute something else: {', '.join(self.kept_float)}")
        if self.left_out:
            lines.append(f"Left out, as nothing serves them: {', '.join(self.left_out)}")
        return "\n".join(lines)


def describe_bits(plan: QuantPlan, units: Iterable[Unit]) -> str:
    """How many bits the weights of a plan's layers have, and its activations."""
    layers = [unit for unit in units if unit.weights is not None and unit.kernel.role == "compute"]
    channels, sizes = [], []
    for unit in layers:
        assert unit.weights is not None
        count = unit.weights.shape[-1]
        channels.append(plan.weight_bits.get(unit.name, np.full(count, BITS[1])))
        sizes.append(np.full(count, unit.weights.size / count))
    parts = []
    if channels:
        bits = np.concatenate(channels)
        mean = float(np.average(bits, weights=np.concatenate(sizes)))
        several = f"{bits.min()} to {bits.max()} bits, {mean:.2f} on average"
        parts.append(f"weights of {several if bits.min() < bits.max() else f'{bits[0]} bits'}")
    counts = collections.Counter(spec.bits for spec in plan.tensors.values())
    if counts:
        (most, _), *others = counts.most_common()
        rest = "".join(f", {count} of {len(plan.tensors)} of {bits}" for bits, count in others)
        parts.append(f"activations of {most} bits{rest}")
    return "; ".join(parts)


def count_ops(graph: Graph, covered: Collection[Node], bodies: Iterable[Graph] = ()) -> tuple[tuple[OpCount, ...], int, int]:
    """(counts per op type, all multiply-accumulates, those in INT8) of the simplified float graph.

    Args:
        graph: the graph.
        covered: what is in INT8.
        bodies: of loops; their ops count, their multiply-accumulates, of nobody knows how many rounds, do not.
    """
    totals: collections.Counter[str] = collections.Counter()
    int8: collections.Counter[str] = collections.Counter()
    all_macs = int8_macs = 0
    costs = macs_per_sample(graph)
    counted = [(node, costs[node.name]) for node in graph.order()]
    counted += [(node, 0) for body in bodies for node in body.order()]
    for node, cost in counted:
        if node.op in _NOT_COUNTED:
            continue
        totals[node.op] += 1
        all_macs += cost
        if node in covered:
            int8[node.op] += 1
            int8_macs += cost
    ranked = sorted(totals, key=lambda op: (-int8[op], -totals[op], op))
    return tuple(OpCount(op, totals[op], int8[op]) for op in ranked), all_macs, int8_macs


def float_macs(graph: Graph, covered: Collection[Node], decisions: Iterable[OpDecision]) -> dict[str, int]:
    """Multiply-accumulates per sample outside of `covered`, which is in INT8, by the reason of the decision; the most first."""
    reasons = {decision.name: decision.reason for decision in decisions}
    counts: collections.Counter[str] = collections.Counter()
    costs = macs_per_sample(graph)
    for node in graph.order():
        if node not in covered and (cost := costs[node.name]):
            reason = reasons.get(node.name, f"{node.op} is none that could be INT8")
            counts[reason.partition(":")[0]] += cost  # behind the colon stand figures of the op
    return dict(counts.most_common())


def in_bodies(graph: Graph, ops: Collection[str], annotated: Collection[str] = ()) -> Iterator[OpDecision]:
    """Ops of these types in loops, branches and functions, which stay float; of `annotated` loops in the condition alone."""
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for node, inner in bodies(graph, annotated):
        if inner.op in ops:
            counts[node.name, node.op, inner.op] += 1
    for (name, kind, op), count in counts.items():
        reason = f"{count} of them stand in the body of a {kind}, which stays as it was"
        yield OpDecision(f"{name}/{op}", op, "", "", False, reason)


def _si(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit else f"{number:.0f} "
        number /= 1000
    return f"{number:.3g} G"
