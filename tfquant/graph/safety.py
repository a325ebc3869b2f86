"""What a model would do besides computing: ops that touch files, the network or Python, named before anything of it is run.

A model is a program. Everything here reads protos and configs; it never loads, traces or executes them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.framework import attr_value_pb2, function_pb2, graph_pb2, node_def_pb2, variable_pb2
from tensorflow.core.protobuf import meta_graph_pb2, saved_model_pb2
from tensorflow.python.framework import op_def_registry

from tfquant.errors import ModelError


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(families: Mapping[str, str]) -> dict[str, str]:
    return {op: why for why, ops in families.items() for op in sorted(words(ops))}


UNSAFE_OPS: Mapping[str, str] = _table(
    {
        "reads a file": """
            ReadFile ImmutableConst RecordInput Skipgram GenerateVocabRemapping LoadAndRemapMatrix
            WholeFileReader WholeFileReaderV2 TextLineReader TextLineReaderV2 TFRecordReader TFRecordReaderV2
            FixedLengthRecordReader FixedLengthRecordReaderV2 LMDBReader InitializeTRTResource
            TextLineDataset TFRecordDataset TFRecordDatasetV2 FixedLengthRecordDataset FixedLengthRecordDatasetV2
            CSVDataset CSVDatasetV2 ExperimentalCSVDataset LMDBDataset ExperimentalLMDBDataset
            LoadDataset SnapshotDatasetReader SnapshotChunkDataset ListSnapshotChunksDataset""",
        "lists files": "MatchingFiles MatchingFilesDataset ExperimentalMatchingFilesDataset",
        "reads a checkpoint": "Restore RestoreSlice RestoreV2 DTensorRestoreV2",
        "reads a vocabulary that is not one of the model's assets": "InitializeTableFromTextFile InitializeTableFromTextFileV2",
        "writes a file": """
            WriteFile Save SaveSlices SaveV2 MergeV2Checkpoints DumpTensor CalibrationStatisticsSaver SerializeTRTResource
            SaveDataset SaveDatasetV2 DatasetToTFRecord ExperimentalDatasetToTFRecord
            SnapshotDataset SnapshotDatasetV2 CreateSummaryFileWriter
            WriteSummary WriteScalarSummary WriteHistogramSummary WriteImageSummary WriteAudioSummary WriteGraphSummary
            WriteRawProtoSummary ImportEvent FlushSummaryWriter CloseSummaryWriter StatsAggregatorSetSummaryWriter""",
        "writes a file where its cache is one": "CacheDataset CacheDatasetV2",
        "opens a database": "SqlDataset ExperimentalSqlDataset CreateSummaryDbWriter",
        "changes how files are reached": "FileSystemSetConfiguration",
        "calls Python": "PyFunc PyFuncStateless EagerPyFunc",
        "calls compiled code by its name": "XlaCustomCall XlaCustomCallV2",
        "reaches the network": """
            RpcServer RpcServerStart RpcServerRegister RpcClient RpcCall RpcCheckStatus RpcGetValue
            DataServiceDataset DataServiceDatasetV2 DataServiceDatasetV3 DataServiceDatasetV4
            RegisterDataset RegisterDatasetV2 DistributedSave""",
        "runs a function on a device or machine that it names": "RemoteCall",
        "runs a graph that it makes of bytes": "DatasetFromGraph DeserializeIterator",
        "ends the process": "Abort",
        # These do so only with some attributes: see SAFE_ATTRS.
        "prints to a file": "PrintV2",
        "writes to files or the network for debugging": """
            DebugIdentity DebugIdentityV2 DebugIdentityV3 DebugNanCount DebugNumericSummary""",
        "reads a file of descriptors": "DecodeProtoV2 EncodeProto",
        "reads a file of candidates": "FixedUnigramCandidateSampler",
        "calls back into Python": "XlaCallModule",
    }
)


def _text(node: node_def_pb2.NodeDef, attr: str) -> bytes:
    return bytes(node.attr[attr].s) if attr in node.attr else b""


def _no_debug_urls(node: node_def_pb2.NodeDef) -> bool:
    return not (node.attr["debug_urls"].list.s if "debug_urls" in node.attr else ())


def _known_descriptors(node: node_def_pb2.NodeDef) -> bool:
    source = _text(node, "descriptor_source")
    return not source or source == b"local://" or source.startswith(b"bytes://")


# Ops of UNSAFE_OPS that most models use harmlessly, and how to tell from their attributes.
SAFE_ATTRS = {
    "PrintV2": lambda node: not _text(node, "output_stream").startswith(b"file://"),
    "DebugIdentity": _no_debug_urls,
    "DebugIdentityV2": _no_debug_urls,
    "DebugIdentityV3": _no_debug_urls,
    "DebugNanCount": _no_debug_urls,
    "DebugNumericSummary": _no_debug_urls,
    "DecodeProtoV2": _known_descriptors,
    "EncodeProto": _known_descriptors,
    "FixedUnigramCandidateSampler": lambda node: not _text(node, "vocab_file"),
    # JAX exports models as this op; a host callback is a custom call with "callback" in its name.
    "XlaCallModule": lambda node: b"callback" not in _text(node, "module").lower(),
}
_ASSET, _CHECKPOINT, _EMPTY = "asset", "checkpoint", "empty"
# Ops of UNSAFE_OPS that are ordinary when an input (by index) is what TensorFlow itself passes there.
_SAFE_INPUTS = {
    "InitializeTableFromTextFile": (1, _ASSET),
    "InitializeTableFromTextFileV2": (1, _ASSET),
    "Restore": (0, _CHECKPOINT),
    "RestoreSlice": (0, _CHECKPOINT),
    "RestoreV2": (0, _CHECKPOINT),
    "CacheDataset": (1, _EMPTY),
    "CacheDatasetV2": (1, _EMPTY),
}
# Ops whose function takes their data inputs in order, and how many inputs come before.
_CALL_OFFSETS = {"PartitionedCall": 0, "StatefulPartitionedCall": 0, "If": 1, "StatelessIf": 1, "Case": 1, "StatelessCase": 1}
_INIT_SIGNATURE = "__saved_model_init_op"
_INIT_COLLECTIONS = ("saved_model_main_op", "legacy_init_op")
# How many sets of fed tensors are followed apart; a model has a handful of signatures.
_MAX_FEEDS = 16


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something of a model that does more than compute.

    Attributes:
        op: its type: an op, a Keras layer, or "asset".
        node: its name.
        function: the function that holds the node, "" for a node of the graph itself or a layer.
        why: what it can do.
    """

    op: str
    node: str
    function: str
    why: str

    def __str__(self) -> str:
        function = re.sub(r"^__(?:inference|forward|backward)_(.+?)_\d+$", r"\1", self.function)
        return f"{self.op} at {_printable(f'{function}/{self.node}' if function else self.node)} ({_printable(self.why)})"


def refuse_unsafe(findings: Sequence[Finding], what: str, allow: bool) -> None:
    """Stops at a model that does more than compute, unless its user trusts it.

    Raises:
        ModelError: there are findings and they are not allowed.
    """
    if allow or not findings:
        return
    told = list(dict.fromkeys(map(str, findings)))
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    raise ModelError(
        f"{what} reads or writes files, or runs code, when it is used: {', '.join(told[:3])}{more}. "
        "Load it only if you trust its maker, then say --allow_unsafe_ops (allow_unsafe_ops=True in Python)."
    )


def unsafe_in_saved_model(proto: saved_model_pb2.SavedModel, tags: Collection[str]) -> list[Finding]:
    """What loading or serving a SavedModel would do besides computing.

    Counted is what can run: the functions of the object graph, what the signatures and the init op need, all functions that these
    call, and what TensorFlow evaluates while it imports a graph. Restoring the model's own variables and reading its own assets
    is ordinary.

    Args:
        proto: of `saved_model.pb`.
        tags: of the meta graph to load; all meta graphs are looked at when none has these tags.
    """
    chosen = [graph for graph in proto.meta_graphs if set(graph.meta_info_def.tags) == set(tags)] or list(proto.meta_graphs)
    return [finding for meta_graph in chosen for finding in _unsafe_in_meta_graph(meta_graph)]


def unsafe_in_graph_def(graph_def: graph_pb2.GraphDef, outputs: Collection[str], inputs: Collection[str] = ()) -> list[Finding]:
    """What running a frozen graph would do besides computing.

    Args:
        graph_def: the graph.
        outputs: names of its outputs, as nodes or tensors; with none, every node counts.
        inputs: names of tensors that are fed: what only they need does not run.
    """
    scan = _Scan(graph_def)
    roots = list(outputs) or [node.name for node in graph_def.node]
    scan.run(roots, frozenset(map(_tensor, inputs)), scan.served)
    return scan.findings()


def _unsafe_in_meta_graph(meta_graph: meta_graph_pb2.MetaGraphDef) -> list[Finding]:
    scan = _Scan(meta_graph.graph_def)
    findings = []
    assets = _asset_files(meta_graph)
    for asset in assets:
        if _is_inside(asset.filename):
            scan.known[_ASSET].add(_tensor(asset.tensor_info.name))
        else:
            findings.append(Finding("asset", asset.filename, "", "is a file outside of the model's folder"))

    objects = meta_graph.object_graph_def
    for name in sorted(objects.concrete_functions):
        scan.bound[name] = [
            0 <= node < len(objects.nodes) and _is_asset(objects.nodes[node], assets)
            for node in objects.concrete_functions[name].bound_inputs
        ]
    for node in objects.nodes:
        for name in [*node.function.concrete_functions, node.bare_concrete_function.concrete_function_name]:
            if name:
                scan.bound.setdefault(name, [])
    for name in scan.bound:
        scan.reach(name)

    by_feeds: dict[frozenset[str], list[str]] = {}
    for key in sorted(meta_graph.signature_def):
        signature = meta_graph.signature_def[key]
        fetches = _tensor_names(signature.outputs)
        if key != _INIT_SIGNATURE:
            by_feeds.setdefault(frozenset(map(_tensor, _tensor_names(signature.inputs))), []).extend(fetches)
    groups = list(by_feeds.items())
    if len(groups) > _MAX_FEEDS:
        groups = [(frozenset.intersection(*by_feeds), [fetch for _, fetches in groups for fetch in fetches])]
    for feeds, fetches in groups:
        scan.run(fetches, feeds, scan.served)
    scan.run(_init_ops(meta_graph), frozenset(scan.known[_ASSET]), scan.initialized)
    saver = meta_graph.saver_def
    if saver.restore_op_name:
        scan.known[_CHECKPOINT].add(_tensor(saver.filename_tensor_name))
        scan.run([saver.restore_op_name], frozenset(scan.known[_CHECKPOINT]), scan.restored)
    return findings + scan.findings()


def _asset_files(meta_graph: meta_graph_pb2.MetaGraphDef) -> list[meta_graph_pb2.AssetFileDef]:
    """The assets, from where TensorFlow's loader takes them."""
    if meta_graph.asset_file_def or "saved_model_assets" not in meta_graph.collection_def:
        return list(meta_graph.asset_file_def)
    files = []
    for packed in meta_graph.collection_def["saved_model_assets"].any_list.value:
        file = meta_graph_pb2.AssetFileDef()
        try:
            file.ParseFromString(packed.value)
        except DecodeError:
            continue
        files.append(file)
    return files


def _is_inside(filename: str) -> bool:
    """Whether a file's name stays in the folder that it is relative to, also on Windows."""
    parts = re.split(r"[/\\]", filename)
    return bool(parts[0]) and ".." not in parts and ":" not in parts[0] and "\0" not in filename


def _is_asset(node: Any, assets: Sequence[meta_graph_pb2.AssetFileDef]) -> bool:
    """Whether an object of the object graph is a file of the model's folder. A registered class could make anything of it."""
    index = node.asset.asset_file_def_index
    return (
        node.WhichOneof("kind") == "asset"
        and not node.registered_name
        and 0 <= index < len(assets)
        and _is_inside(assets[index].filename)
    )


def _tensor_names(infos: Mapping[str, Any]) -> list[str]:
    names = []
    for key in sorted(infos):
        info = infos[key]
        sparse = info.coo_sparse
        names += [info.name, sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name]
        names += [component.name for component in info.composite_tensor.components]
    return [name for name in names if name]


def _init_ops(meta_graph: meta_graph_pb2.MetaGraphDef) -> list[str]:
    """What TensorFlow runs once a model is loaded: its init op, or else the initializers of its tables and local variables."""
    names = []
    if _INIT_SIGNATURE in meta_graph.signature_def:
        names += _tensor_names(meta_graph.signature_def[_INIT_SIGNATURE].outputs)
    collections = meta_graph.collection_def
    for key in _INIT_COLLECTIONS:
        names += collections[key].node_list.value if key in collections else ()
    if names:
        return names
    for key in ("table_initializer", "local_variables", "local_resources"):
        if key not in collections:
            continue
        names += collections[key].node_list.value
        for packed in collections[key].bytes_list.value:
            try:
                names.append(variable_pb2.VariableDef.FromString(packed).initializer_name)
            except DecodeError:
                continue
    return names


def _tensor(name: str) -> str:
    """A tensor of a graph with its index, "^" and all."""
    return name if ":" in name else f"{name}:0"


def _node_of(reference: str) -> str:
    return reference.lstrip("^").partition(":")[0]


def _data(node: node_def_pb2.NodeDef) -> list[str]:
    return [reference for reference in node.input if not reference.startswith("^")]


class _Body:
    """The nodes of a graph or a function by name."""

    def __init__(self, nodes: Iterable[node_def_pb2.NodeDef], arguments: Sequence[Any] = ()) -> None:
        self.nodes: dict[str, node_def_pb2.NodeDef] = {}
        for node in nodes:
            self.nodes.setdefault(node.name, node)
        self._sources: dict[str, str] = {}
        # An argument that stands for a list would shift those behind it.
        is_flat = not any(argument.number_attr or argument.type_list_attr for argument in arguments)
        self.arguments = {argument.name: index if is_flat else -1 for index, argument in enumerate(arguments)}

    def source(self, reference: str) -> str:
        """The tensor that a tensor is a mere copy of."""
        path: list[str] = []
        seen: set[str] = set()
        while reference not in self._sources and reference not in seen:
            node = self.nodes.get(_node_of(reference))
            data = _data(node) if node is not None and node.op == "Identity" else []
            if not data:
                break
            path.append(reference)
            seen.add(reference)
            reference = data[0]
        reference = self._sources.get(reference, reference)
        self._sources.update(dict.fromkeys(path, reference))
        return reference


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a function: the function that holds it ("" the graph), its node, the number of inputs before the arguments."""

    holder: str
    node: node_def_pb2.NodeDef
    offset: int | None


class _Scan:
    """Follows a graph from what is run to all nodes and functions that run with it.

    Attributes:
        known: by kind, tensors of the graph that TensorFlow feeds with file names of its own.
        bound: functions of the object graph; for each captured input whether it is an asset.
        served, initialized, restored: nodes of the graph that run with signatures, the init op and the restoring of variables.
    """

    def __init__(self, graph_def: graph_pb2.GraphDef) -> None:
        self._library = {function.signature.name: function for function in graph_def.library.function}
        self._gradients = {gradient.function_name: gradient.gradient_func for gradient in graph_def.library.gradient}
        # TensorFlow swaps functions that say they implement the same (Keras' LSTM on CPU and GPU).
        self._implementations: dict[bytes, list[str]] = {}
        for name, function in self._library.items():
            if key := _implements(function):
                self._implementations.setdefault(key, []).append(name)
        self._graph = _Body(graph_def.node)
        self._bodies: dict[str, _Body] = {}
        self._reached: dict[str, None] = {}
        self._calls: dict[str, list[_Call]] = {}
        self._expanded: set[str] = set()
        self._assigned: dict[str, list[node_def_pb2.NodeDef]] | None = None
        self.known: dict[str, set[str]] = {_ASSET: set(), _CHECKPOINT: set(), _EMPTY: set()}
        self.bound: dict[str, list[bool]] = {}
        self.served: set[str] = set()
        self.initialized: set[str] = set()
        self.restored: set[str] = set()

    def run(self, fetches: Iterable[str], feeds: frozenset[str], ran: set[str]) -> None:
        """Marks the nodes of the graph that fetching names runs, and reaches the functions that they call."""
        stack = [_node_of(name) for name in fetches if _tensor(name) not in feeds]
        seen: set[str] = set()
        while stack:
            name = stack.pop()
            node = self._graph.nodes.get(name)
            if node is None or name in seen:
                continue
            seen.add(name)
            stack += [_node_of(reference) for reference in node.input if _tensor(reference) not in feeds]
            if name not in self._expanded:
                self._expanded.add(name)
                self._follow("", node)
        ran |= seen

    def reach(self, name: str) -> None:
        """Reaches a function and all that it calls; all of a function's nodes count."""
        stack = [name]
        while stack:
            name = stack.pop()
            function = self._library.get(name)
            if function is None or name in self._reached:
                continue
            self._reached[name] = None
            for other in [*self._implementations.get(_implements(function), ()), self._gradients.get(name, "")]:
                if other != name:
                    self._calls.setdefault(other, []).append(_Call(name, node_def_pb2.NodeDef(), None))
                    stack.append(other)
            for node in self._body(name).nodes.values():
                stack += self._called(name, node)

    def findings(self) -> list[Finding]:
        """What was found, in the order of the graph, then of the functions' names."""
        ran = self.served | self.initialized | self.restored
        found = []
        for holder in ["", *sorted(self._library)]:
            body = self._body(holder)
            is_reached = holder in self._reached
            folded: dict[str, bool | None] = {}
            for name, node in body.nodes.items():
                if node.op not in UNSAFE_OPS:
                    continue
                if not (is_reached or (not holder and name in ran) or _is_folded(body, name, folded)):
                    continue
                if not self._is_harmless(holder, node):
                    found.append(Finding(node.op, name, holder, UNSAFE_OPS[node.op]))
        return found

    def _body(self, name: str) -> _Body:
        if not name:
            return self._graph
        if name not in self._bodies:
            function = self._library[name]
            self._bodies[name] = _Body(function.node_def, function.signature.input_arg)
        return self._bodies[name]

    def _follow(self, holder: str, node: node_def_pb2.NodeDef) -> None:
        for name in self._called(holder, node):
            self.reach(name)

    def _called(self, holder: str, node: node_def_pb2.NodeDef) -> list[str]:
        """The functions that a node calls; notes the calls."""
        called = list(dict.fromkeys(name for value in node.attr.values() for name in _functions(value)))
        for name in called:
            self._calls.setdefault(name, []).append(_Call(holder, node, _CALL_OFFSETS.get(node.op)))
        if node.op in self._library:
            self._calls.setdefault(node.op, []).append(_Call(holder, node, 0))
            called.append(node.op)
        return called

    def _is_harmless(self, holder: str, node: node_def_pb2.NodeDef) -> bool:
        if node.op in SAFE_ATTRS:
            return bool(SAFE_ATTRS[node.op](node))
        if node.op in _SAFE_INPUTS:
            index, kind = _SAFE_INPUTS[node.op]
            return self._always_is(kind, holder, node, index)
        return False

    def _always_is(self, kind: str, holder: str, node: node_def_pb2.NodeDef, index: int) -> bool:
        """Whether an input is of a kind wherever its function is called."""
        stack, seen = [(holder, node, index)], set()
        while stack:
            holder, node, index = stack.pop()
            data = _data(node)
            if index >= len(data):
                return False
            body = self._body(holder)
            source = body.source(data[index])
            if not holder:
                if not self._is_in_graph(kind, node, source):
                    return False
                continue
            argument = body.arguments.get(source)
            if argument is None:
                if kind != _EMPTY or not _is_empty_string(body.nodes.get(_node_of(source))):
                    return False
                continue
            if argument < 0:
                return False
            if (holder, argument) in seen:
                continue
            seen.add((holder, argument))
            if holder in self.bound:
                captured = argument - (len(body.arguments) - len(self.bound[holder]))
                if kind != _ASSET or captured < 0 or not self.bound[holder][captured]:
                    return False
            elif holder not in self._calls:
                return False
            for call in self._calls.get(holder, ()):
                if call.offset is None:
                    return False
                stack.append((call.holder, call.node, argument + call.offset))
        return True

    def _is_in_graph(self, kind: str, reader: node_def_pb2.NodeDef, source: str) -> bool:
        """Whether a tensor of the graph is of a kind when `reader` reads it."""
        node = self._graph.nodes.get(_node_of(source))
        if node is None:
            return False
        if kind == _EMPTY:
            return _is_empty_string(node)
        if node.op == "ReadVariableOp" and kind == _ASSET:
            # TensorFlow 2 keeps the names of assets in variables that the init op assigns.
            written = self._assignments().get(_node_of(_data(node)[0]) if _data(node) else "", [])
            return bool(written) and all(
                one.op == "AssignVariableOp"
                and len(_data(one)) > 1
                and self._is_fed(kind, one, self._graph.source(_data(one)[1]))
                for one in written
            )
        return self._is_fed(kind, reader, source)

    def _is_fed(self, kind: str, reader: node_def_pb2.NodeDef, source: str) -> bool:
        """Whether TensorFlow feeds a tensor whenever `reader` runs; what was fed is a constant of unknown value to other runs."""
        if _tensor(source) not in self.known[kind]:
            return False
        node = self._graph.nodes[_node_of(source)]
        if node.op == "Placeholder":
            return True
        others = self.served | (self.restored if kind == _ASSET else self.initialized)
        return reader.name not in others

    def _assignments(self) -> dict[str, list[node_def_pb2.NodeDef]]:
        """Of each variable of the graph all nodes that may write it."""
        if self._assigned is None:
            self._assigned = {}
            for node in self._graph.nodes.values():
                if node.op in ("ReadVariableOp", "VarIsInitializedOp"):
                    continue
                for name in {_node_of(reference) for reference in _data(node)}:
                    if name in self._graph.nodes and self._graph.nodes[name].op == "VarHandleOp":
                        self._assigned.setdefault(name, []).append(node)
        return self._assigned


def _implements(function: function_pb2.FunctionDef) -> bytes:
    return bytes(function.attr["api_implements"].s) if "api_implements" in function.attr else b""


def _functions(value: attr_value_pb2.AttrValue) -> Iterator[str]:
    """Names of the functions in an attribute, also of those that are attributes of functions."""
    stack = [value]
    while stack:
        value = stack.pop()
        kind = value.WhichOneof("value")
        functions = [value.func] if kind == "func" else value.list.func if kind == "list" else ()
        for function in functions:
            yield function.name
            stack += function.attr.values()


def _is_empty_string(node: node_def_pb2.NodeDef | None) -> bool:
    if node is None or node.op != "Const" or "value" not in node.attr:
        return False
    tensor = node.attr["value"].tensor
    return not tensor.tensor_content and not any(tensor.string_val)


def _is_folded(body: _Body, name: str, known: dict[str, bool | None]) -> bool:
    """Whether TensorFlow may evaluate a node while it merely imports its graph.

    Shape inference evaluates what a shape depends on, where all of it is constant and has no state - and reading a file has none.
    `known` keeps the answers; None stands for a node whose inputs are being looked at, which ends cycles.
    """
    stack = [name]
    while stack:
        top = stack[-1]
        if known.get(top) is not None:
            stack.pop()
            continue
        node = body.nodes.get(top)
        if node is None or not _is_stateless(node):
            known[top] = False
            continue
        inputs = [_node_of(reference) for reference in _data(node)]
        if top in known:
            known[top] = all(known.get(one) for one in inputs)
        else:
            known[top] = None
            stack += [one for one in inputs if one not in known]
    return bool(known[name])


def _is_stateless(node: node_def_pb2.NodeDef) -> bool:
    op = op_def_registry.get(node.op)
    return op is not None and not op.is_stateful and not node.op.startswith("Placeholder")


def _printable(name: str) -> str:
    """A name of an untrusted file, fit for a line on a terminal."""
    clean = name.encode("unicode_escape").decode()
    return clean if len(clean) <= 120 else f"{clean[:117]}..."
