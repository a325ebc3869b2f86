"""Where a model is fake-quantized while it trains: read off its inference graph, by the same kernel table as INT8 is.

The plan's tensors are those of the simplified graph. They are found among the tensors of the model's own graph by their values,
on a made-up batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfquant.errors import ModelError
from tfquant.graph.execution import executable
from tfquant.graph.freezing import freeze_traced
from tfquant.graph.ir import FAKE_QUANT, Graph, Node, Tensor
from tfquant.graph.loading import variable_names
from tfquant.graph.paths import normalize
from tfquant.observe.learned import MOVES, constant_nodes
from tfquant.observe.ranges import is_behind
from tfquant.plan.annotate import Annotation, Group, annotate
from tfquant.plan.kernels import Unit
from tfquant.plan.results import find_results
from tfquant.qat import biases
from tfquant.qat.biases import Affine
from tfquant.qat.tracing import ALIASES, Made
from tfquant.simplify import precision, simplify
from tfquant.targets import onednn

KeepFloat = Callable[[Node], str | None]
# A model's input is known by its number.
INPUT = "input:"
# Sizes of axes that a model leaves open: the batch, images, others.
_BATCH, _PIXELS, _LENGTH = 2, 64, 16
# Tensors of equal values have sums so close, in units of the sum of sizes.
_SAME = 1e-4
# Figures of a fingerprint.
_SUMS = 4
# The weights that a layer has in INT8 are those of its op, times a factor per channel, but for rounding.
_PROPORTIONAL = 1e-5


@dataclasses.dataclass(frozen=True)
class Activation:
    """Tensors that share one range.

    Attributes:
        name: of the first, as plans have it.
        tensors: tensor of the model's graph ("dense/Relu:0", "input:0") to the names of the ops that read it
            rounded; None: all do.
        sources: those whose values make the range.
        clip: "Relu" or "Relu6" where the range ends as these do, else "".
        known: (low, high), where it can have no other range.
        is_behind_layer: a quantized layer computes it; others, the model's inputs and results of `is_given_out`, have 8 bits.
        is_given_out: where the model gives it out, that is rounded, too.
    """

    name: str
    tensors: Mapping[str, tuple[str, ...] | None]
    sources: tuple[str, ...]
    clip: str = ""
    known: tuple[float, float] | None = None
    is_behind_layer: bool = True
    is_given_out: bool = False


@dataclasses.dataclass(frozen=True)
class Weight:
    """The weights that an op reads.

    Attributes:
        name: of the op, as plans have it.
        op: of the op, in the model's graph.
        slot: where it reads them.
        axes: of them that count output channels.
        behind: what is added to the op's result per channel: the ops up to the last that adds.
        values: what they are, float32; not kept in files.
    """

    name: str
    op: str
    slot: int
    axes: tuple[int, ...]
    behind: tuple[Affine, ...] = ()
    values: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class Design:
    """What is fake-quantized where.

    Attributes:
        activations: in topological order.
        weights: in topological order.
        results: tensors of the model's graph to their names in plans: other runtimes can store them in 8 bits.
        is_portable: other runtimes round nothing that it does not.
        notes: what is not quantized though INT8 could take it, and why, in a line each.
    """

    activations: tuple[Activation, ...]
    weights: tuple[Weight, ...]
    results: Mapping[str, str]
    notes: tuple[str, ...] = ()
    is_portable: bool = False


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What calibration needs.

    Attributes:
        graph: the model as it is.
        groups: the activations of the design.
        tensors: of `groups`, to those of `graph` with their values.
    """

    graph: Graph
    groups: tuple[Group, ...]
    tensors: Mapping[Tensor, Tensor]


def make_design(
    function: Any,
    made: Sequence[Made],
    ignored: Callable[[Sequence[tuple[str, str]]], KeepFloat],
    is_portable: bool = False,
) -> tuple[Design, Calibration]:
    """Reads off a model's inference function what is fake-quantized.

    Args:
        function: the concrete function; its flat inputs are the model's.
        made: the ops that the model's code made of it.
        ignored: given (name, op type) of all ops, says what the user keeps in float, and why.
        is_portable: all results that other runtimes can store in 8 bits are rounded.

    Raises:
        ModelError: the model has fake quantization already, or nothing of it can run in INT8.
    """
    own, graph = freeze_traced(function), freeze_traced(function, _anything(function))
    traced = {node: node.name for node in graph.order()}
    normalize(graph, variable_names(function))
    if any(node.op in FAKE_QUANT for node in traced):
        raise ModelError(
            "The model has fake quantization already: train it as it is, or give the float model. "
            f"Received: {next(node.name for node in traced if node.op in FAKE_QUANT)}"
        )
    names = {node.name: name for node, name in traced.items()}
    raw = graph.copy()
    for each in (own, raw):
        precision.run(each)
    simplify(graph)
    keep_float = ignored([(node.name, node.op) for node in (*raw.order(), *graph.order())])
    annotation, found, notes = _placed(raw, graph, keep_float, _out_of_reach(raw, names, made))
    computing = [unit for unit in annotation.units.values() if unit.kernel.role == "compute"]
    if not computing:
        raise ModelError(f"Nothing of the model can run in INT8{': ' + notes[0] if notes else '.'}")
    place = _Place(raw, graph, names)
    activations = _activations(place, annotation, found, {unit.main for unit in computing})
    rounded = {key for activation in activations for key in activation.tensors}
    results = _counterparts(raw, graph, find_results(graph, annotation, keep_float), up_to_factor=False)
    keys = {tensor: key for tensor, there in results.items() if (key := place.key(there)) not in rounded}
    also = [tensor for tensor in keys if is_portable and not _is_moved_to(graph, tensor, annotation.quantized)]
    found |= {tensor: results[tensor] for tensor in also}
    groups = (*annotation.groups, *(Group(tensor.name, (tensor,), (tensor,), "", False, False) for tensor in also))
    activations += tuple(
        Activation(tensor.name, {keys[tensor]: None}, (keys[tensor],), is_behind_layer=False, is_given_out=True)
        for tensor in also
    )
    weights, more = _weights(raw, own, computing, names)
    others = {key: tensor.name for tensor, key in keys.items() if tensor not in also}
    tensors = {
        tensor: Tensor(own.nodes[names[found[tensor].node.name]], found[tensor].index)
        for group in groups
        for tensor in group.sources
    }
    design = Design(activations, weights, others, (*notes, *more), is_portable)
    return design, Calibration(own, groups, tensors)


def _activations(
    place: _Place, annotation: Annotation, found: Mapping[Tensor, Tensor], layers: Collection[Node]
) -> tuple[Activation, ...]:
    """What INT8 stores in 8 bits, where it is in the model's own graph; `found` are the counterparts there."""
    return tuple(
        Activation(
            name=group.name,
            tensors=_rounded_once(
                {tensor: place.readers(found[tensor], tensor, annotation) for tensor in group.tensors},
                lambda tensor: place.key(found[tensor]),
            ),
            sources=tuple(place.key(found[tensor]) for tensor in group.sources),
            clip=group.clip,
            known=group.known,
            is_behind_layer=any(is_behind(source, layers) for source in group.sources),
        )
        for group in annotation.groups
    )


def _is_moved_to(graph: Graph, tensor: Tensor, quantized: Collection[Tensor]) -> bool:
    """Whether all that reads a tensor only moves its values, to where they are rounded."""
    users = [user for user, _ in graph.users(tensor)]
    return bool(users) and all(
        user.op in MOVES and (user.out in quantized or _is_moved_to(graph, user.out, quantized)) for user in users
    )


def _anything(function: Any) -> dict[int, np.ndarray]:
    """By the id of its handle, other values for each variable whose values are all the same.

    Where a model begins, BatchNorm does nothing and a bias adds 0; simplification would take away what training brings to life.
    """
    found = {}
    rng = np.random.default_rng(0)
    for variable in function.graph.variables:
        value = variable.numpy() if variable.dtype.is_floating else np.zeros(0)
        if value.size and (value == value.flat[0]).all():
            found[id(variable.handle)] = (value + rng.uniform(0.1, 2.0, value.shape)).astype(value.dtype)
    return found


def _out_of_reach(raw: Graph, names: Mapping[str, str], made: Sequence[Made]) -> dict[str, str]:
    """Names of the ops that the model calls as a function of its own, with why they stay float."""
    calls = tuple(f"{op.name}/" for op in made if op.op in ("PartitionedCall", "StatefulPartitionedCall"))
    why = "it is in a tf.function with jit_compile=True, in which nothing can be rounded while the model trains"
    return {node.name: why for node in raw.order() if names[node.name].startswith(calls)} if calls else {}


def _rounded_once(
    readers: Mapping[Tensor, tuple[str, ...] | None], key: Callable[[Tensor], str]
) -> dict[str, tuple[str, ...] | None]:
    """The tensors of a group that need rounding: not those that an op made which only moves values, all rounded before."""
    left: dict[Tensor, tuple[str, ...] | None] = {}
    whole: set[Tensor] = set()
    for tensor, names in readers.items():
        given = [parent for parent in tensor.node.inputs if parent.value is None]
        if tensor.node.op in MOVES | {"ConcatV2"} and all(parent in whole for parent in given):
            whole.add(tensor)
            continue
        left[tensor] = names
        if names is None:
            whole.add(tensor)
    return {key(tensor): names for tensor, names in left.items()}


def _kept(keep_float: KeepFloat, lost: Mapping[str, str], node: Node) -> str | None:
    return keep_float(node) or lost.get(node.name)


def _placed(
    raw: Graph, graph: Graph, keep_float: KeepFloat, hidden: Mapping[str, str]
) -> tuple[Annotation, dict[Tensor, Tensor], tuple[str, ...]]:
    """What INT8 takes of a graph, each quantized tensor's counterpart in `raw`, and what must stay float.

    Args:
        raw: the model's own graph.
        graph: simplified.
        keep_float: what the user keeps in float.
        hidden: what training cannot round, and why.
    """
    lost = dict(hidden)
    found: dict[Tensor, Tensor] = {}
    while True:
        annotation = annotate(graph, onednn.TABLE, functools.partial(_kept, keep_float, lost))
        found |= _counterparts(raw, graph, [tensor for tensor in annotation.quantized if tensor not in found])
        new = {
            node.name: f"{tensor.name} is no tensor of the model's own graph"
            for unit in annotation.units.values()
            for tensor in (*unit.inputs, unit.output)
            if tensor in annotation.quantized and tensor not in found
            for node in unit.match.covered
        }
        if not new:
            told = (name for name in lost if name not in hidden or raw.nodes[name].op in onednn.TABLE.subjects)
            return annotation, found, tuple(f"{name} stays in float: {lost[name]}." for name in told)
        lost |= new


# -- counterparts ----------------------------------------------------------------------------------------------------------
def _counterparts(raw: Graph, graph: Graph, tensors: Sequence[Tensor], up_to_factor: bool = True) -> dict[Tensor, Tensor]:
    """The tensors of `raw` with the values of some of the simplified graph; those without are left out.

    A name says nothing for certain: a layer keeps it when the BatchNorm behind it is folded in.
    """
    namesakes = {
        tensor: raw.tensor(tensor.name)
        for tensor in tensors
        if tensor.node.name in raw.nodes and tensor.index < len(raw.nodes[tensor.node.name].dtypes)
    }
    candidates = [node.out for node in raw.order() if _is_plain(node)]
    batch = [_made_up(tensor) for tensor in raw.inputs.values()]
    try:
        there = executable(raw, lambda get: [_fingerprint(get(tensor)) for tensor in (*candidates, *namesakes.values())])(*batch)
        here = executable(graph, lambda get: [_fingerprint(get(tensor)) for tensor in tensors])(*batch)
    except (tf.errors.OpError, ValueError):  # it does not take what was made up
        return namesakes
    prints = np.array([value.numpy() for value in there]).reshape(-1, _SUMS)
    named = dict(zip(namesakes, prints[len(candidates) :], strict=True))
    found = {}
    for tensor, value in zip(tensors, here, strict=True):
        own = value.numpy()
        if tensor in named and _are_equal(named[tensor][None], own)[0]:
            found[tensor] = namesakes[tensor]
            continue
        same = np.flatnonzero(_are_equal(prints[: len(candidates)], own))
        # A factor that simplification moved on to the weights stays where it is, once the tensor is rounded in front of it.
        scaled = np.flatnonzero(_are_equal(prints[: len(candidates)], own, up_to_factor))
        if same.size or scaled.size:
            found[tensor] = candidates[int(same[0] if same.size else scaled[-1])]
    return found


def _are_equal(prints: np.ndarray, own: np.ndarray, up_to_factor: bool = False) -> np.ndarray:
    """Which of some fingerprints are that of a tensor."""
    factors = own[1] / np.maximum(prints[:, 1:2], 1e-30) if up_to_factor else 1.0
    far = np.abs(prints[:, 1:] * factors - own[1:]) > _SAME * (np.abs(own[1]) + 1e-30)
    return (prints[:, 0] == own[0]) & ~far.any(1) & (own[1] > 0)


def _is_plain(node: Node) -> bool:
    return bool(node.dtypes) and node.dtypes[0] == tf.float32 and not node.pinned and node.op not in ALIASES | {"Const"}


def _fingerprint(value: tf.Tensor) -> tf.Tensor:
    """(number of values, sum of sizes, two sums with weights that tell values at different places apart), float64
    (`_SUMS`,)."""
    flat = tf.cast(tf.reshape(value, [-1]), tf.float64)
    places = tf.cast(tf.range(tf.size(flat)), tf.float64)
    return tf.stack(
        [
            tf.cast(tf.size(flat), tf.float64),
            tf.reduce_sum(tf.abs(flat)),
            tf.reduce_sum(flat * tf.cos(places)),
            tf.reduce_sum(flat * tf.sin(1.7 * places)),
        ]
    )


def _made_up(tensor: Tensor) -> tf.Tensor:
    assert tensor.dtype is not None
    dims = list(tensor.shape or ())
    size = _PIXELS if len(dims) == 4 else _LENGTH
    shape = [length or (_BATCH if axis == 0 else size) for axis, length in enumerate(dims)]
    rng = np.random.default_rng(0)
    if tensor.dtype.is_floating:
        return tf.cast(rng.normal(size=shape), tensor.dtype)
    if tensor.dtype in (tf.string, tf.bool):
        return tf.fill(shape, "" if tensor.dtype == tf.string else True)
    return tf.cast(rng.integers(0, 2, shape), tensor.dtype)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where tensors of the plan are in the model's own graph."""

    raw: Graph
    graph: Graph
    names: Mapping[str, str]

    def key(self, tensor: Tensor) -> str:
        """What a tensor of `raw` is called when the model is traced."""
        tensor = _handed_on(tensor)
        for number, given in enumerate(self.raw.inputs.values()):
            if given == tensor:
                return f"{INPUT}{number}"
        return f"{self.names[tensor.node.name]}:{tensor.index}"

    def readers(self, tensor: Tensor, planned: Tensor, annotation: Annotation) -> tuple[str, ...] | None:
        """The ops that read a tensor of `raw` rounded, where not all do: a kernel keeps 8 bits, or gives float."""
        for unit in annotation.units.values():
            gives_float = unit.only_float or (unit.gives_float and self.graph.is_shown(unit.output))
            if unit.output == planned and not gives_float:
                return None
        rounded = {
            node.name
            for unit in annotation.units.values()
            for node in unit.match.covered
            for slot, given in enumerate(node.inputs)
            if given == planned and planned in unit.inputs and (node, slot) not in unit.float_slots
        }
        direct = list(dict.fromkeys(_users(self.raw, _handed_on(tensor))))
        found = tuple(self.names[user.name] for user in direct if self._leads_to(user, rounded))
        return None if len(found) == len(direct) else found

    def _leads_to(self, node: Node, names: Collection[str]) -> bool:
        """Whether an op is one of `names`, or became part of such when the graph was simplified."""
        if node.name in names:
            return True
        return node.name not in self.graph.nodes and any(self._leads_to(user, names) for user, _ in node.users)


def _handed_on(tensor: Tensor) -> Tensor:
    """The tensor that one repeats: traces for training and for use do not have the same ops that only hand on."""
    while tensor.node.op in ALIASES:
        before = tensor.node.inputs[tensor.index]
        if before.dtype is None or not before.dtype.is_floating:
            break
        tensor = before
    return tensor


def _users(graph: Graph, tensor: Tensor) -> Iterator[Node]:
    """What reads a tensor, seen through what only hands it on."""
    for user, slot in graph.users(tensor):
        if user.op not in ALIASES:
            yield user
        elif slot < len(user.dtypes):
            yield from _users(graph, Tensor(user, slot))


# -- weights ---------------------------------------------------------------------------------------------------------------
def _weights(
    raw: Graph, own: Graph, layers: Sequence[Unit], names: Mapping[str, str]
) -> tuple[tuple[Weight, ...], tuple[str, ...]]:
    """The weights of layers that are rounded in training, and a line for each layer whose are not; arguments as of `_weight`."""
    constants = constant_nodes(raw)
    behind = biases.find(raw, layers, constants, names, [_made_up(tensor) for tensor in raw.inputs.values()])
    made = [_weight(raw, own, unit, constants, names) for unit in layers]
    weights = (dataclasses.replace(one, behind=behind.get(one.name, ())) for one in made if isinstance(one, Weight))
    return tuple(weights), tuple(one for one in made if isinstance(one, str) and one)


def _weight(raw: Graph, own: Graph, unit: Unit, constants: Collection[Node], names: Mapping[str, str]) -> Weight | str:
    """The weights of a unit in the model's own graph; or why they are not rounded in training, "" where nothing is lost by it.

    Args:
        raw: the model's own graph, with any values.
        own: the same with its own values, and the names of the trace.
        unit: the unit.
        constants: nodes of `raw` that no input has a part in.
        names: of nodes of `raw` in the trace.
    """
    if unit.weights is None or unit.is_table:
        return ""  # a row of a table has a scale of its own, which no training has to find
    node = raw.nodes.get(unit.name)
    if node is None:
        return f"The weights of {unit.name} are rounded after the training: its op is no op of the model's own graph."
    slots = [slot for slot, tensor in enumerate(node.inputs[:2]) if tensor.node in constants]
    if len(slots) != 1:
        return f"The weights of {unit.name} are rounded after the training: they are no constant when the model is used."
    values = _constant(raw, node.inputs[slots[0]])
    axes = channel_axes(node, slots[0], values.ndim)
    if axes is None or not _is_proportional(by_channels(values, axes), unit.weights):
        return f"The weights of {unit.name} are rounded after the training: what stands before the layer is folded into them."
    name = names[node.name]
    return Weight(unit.name, name, slots[0], axes, values=_constant(own, own.nodes[name].inputs[slots[0]]))


def _constant(graph: Graph, tensor: Tensor) -> np.ndarray:
    """The value of a tensor that no input has a part in, float32."""
    run = executable(graph, lambda get: get(tensor))
    return np.asarray(run(*[_made_up(given) for given in graph.inputs.values()]), np.float32)


def channel_axes(node: Node, slot: int, rank: int) -> tuple[int, ...] | None:
    """The axes of an op's weights that count output channels; None where that is not known."""
    if node.op == "Conv2D":
        return (3,)
    if node.op == "DepthwiseConv2dNative":
        return (2, 3)
    if node.op == "MatMul":
        return (0,) if node.attr("transpose_b", False) else (1,)
    if node.op in ("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"):
        return (rank - 2,) if node.attr("adj_y", False) else (rank - 1,)
    if node.op == "Einsum":
        operands, result = node.attr("equation", "").replace(" ", "").split("->")
        own, other = operands.split(",")[slot], operands.split(",")[1 - slot]
        return tuple(axis for axis, letter in enumerate(own) if letter in result and letter not in other)
    return None


def by_channels(values: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """(rest, channels)."""
    rest = [axis for axis in range(values.ndim) if axis not in axes]
    channels = int(np.prod([values.shape[axis] for axis in axes]))
    return np.transpose(values, [*rest, *axes]).reshape(-1, channels)


def _is_proportional(own: np.ndarray, unit: np.ndarray) -> bool:
    """Whether the columns are the same but for factors; depthwise weights have a column per channel likewise."""
    other = unit.reshape(-1, unit.shape[-1])
    if own.shape != other.shape:
        return False
    norms = np.linalg.norm(own, axis=0), np.linalg.norm(other, axis=0)
    cosines = np.abs((own * other).sum(0)) / np.maximum(norms[0] * norms[1], 1e-30)
    return bool((cosines[(norms[0] > 0) & (norms[1] > 0)] > 1 - _PROPORTIONAL).all())


# -- traces ----------------------------------------------------------------------------------------------------------------
def ops_of(design: Design) -> set[str]:
    """Names of the ops of the model's own graph that a design speaks of."""
    tensors = (key for activation in design.activations for key in activation.tensors)
    readers = (name for a in design.activations for several in a.tensors.values() for name in several or ())
    made = (key.rpartition(":")[0] for key in (*tensors, *design.results) if not key.startswith(INPUT))
    return {*made, *readers, *(weight.op for weight in design.weights)}


def missing(design: Design, ops: Iterable[Made]) -> list[str]:
    """Names of the ops of a design that are not among those of a trace."""
    return sorted(ops_of(design) - {made.name for made in ops})
