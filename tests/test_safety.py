"""What a model would do besides computing is named before anything of it runs."""

from __future__ import annotations

import json
import pathlib
import time
import zipfile

import h5py
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.framework import graph_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

from tfquant.errors import ModelError
from tfquant.graph.safety import (
    UNSAFE_OPS,
    Finding,
    refuse_unsafe,
    unsafe_in_graph_def,
    unsafe_in_saved_model,
)
from tfquant.keras_safety import lambda_layers, unsafe_in_keras_file

V1 = tf.compat.v1
SPEC = [tf.TensorSpec([None], tf.float32, name="x")]


def proto_of(folder: pathlib.Path) -> saved_model_pb2.SavedModel:
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    return proto


def check(folder: pathlib.Path) -> list[Finding]:
    return unsafe_in_saved_model(proto_of(folder), ["serve"])


def save(function, folder: pathlib.Path, spec=SPEC, **objects) -> list[Finding]:
    """What is found in a module with one function."""
    module = tf.Module()
    for name, value in objects.items():
        setattr(module, name, value)
    module.serve = tf.function(function, input_signature=spec)
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})
    return check(folder)


def places(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.op, finding.node.rpartition("/")[2]) for finding in findings]


@pytest.fixture
def vocabulary(tmp_path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("one\ntwo\n")
    return str(path)


def text_file(path) -> tf.lookup.TextFileInitializer:
    whole, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    return tf.lookup.TextFileInitializer(path, tf.string, whole, tf.int64, number)


# ordinary models


def test_keras_export(tmp_path):
    import keras

    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()])
    model.export(tmp_path / "model", verbose=False)
    assert check(tmp_path / "model") == []
    model.save(tmp_path / "model.keras")
    assert unsafe_in_keras_file(tmp_path / "model.keras") == []
    model.save(tmp_path / "model.h5")
    assert unsafe_in_keras_file(tmp_path / "model.h5") == []


def test_keras_string_lookup(tmp_path):
    import keras

    inputs = keras.Input((1,), dtype="string")
    lookup = keras.layers.StringLookup(vocabulary=["a", "b"])
    keras.Model(inputs, lookup(inputs)).export(tmp_path / "model", verbose=False)
    assert check(tmp_path / "model") == []


def test_tf_keras_lstm(tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    model = tf_keras.Sequential([tf_keras.layers.LSTM(2, input_shape=(3, 2))])
    model.save(tmp_path / "model", save_format="tf")
    assert check(tmp_path / "model") == []


def test_vocabulary_asset(tmp_path, vocabulary):
    table = tf.lookup.StaticVocabularyTable(text_file(vocabulary), 1)
    spec = [tf.TensorSpec([None], tf.string, name="x")]
    assert save(lambda x: table.lookup(x), tmp_path / "model", spec, table=table) == []
    # Saved again, the initializer lies behind two calls.
    tf.saved_model.save(tf.saved_model.load(str(tmp_path / "model")), str(tmp_path / "again"))
    assert check(tmp_path / "again") == []


@pytest.mark.parametrize("filename", ["/etc/passwd", "../../secret", "a/../../b", "..\\b", "C:\\b", "C:b", ""])
def test_asset_outside_of_the_folder(tmp_path, vocabulary, filename):
    table = tf.lookup.StaticHashTable(text_file(vocabulary), -1)
    spec = [tf.TensorSpec([None], tf.string, name="x")]
    assert save(lambda x: table.lookup(x), tmp_path / "model", spec, table=table) == []
    proto = proto_of(tmp_path / "model")
    proto.meta_graphs[0].asset_file_def[0].filename = filename
    found = unsafe_in_saved_model(proto, ["serve"])
    assert found[0] == Finding("asset", filename, "", "is a file outside of the model's folder")
    assert {finding.op for finding in found[1:]} == {"InitializeTableFromTextFileV2"}


def test_captured_input_that_is_no_asset(tmp_path, vocabulary):
    table = tf.lookup.StaticHashTable(text_file(vocabulary), -1)
    save(lambda x: table.lookup(x), tmp_path / "model", [tf.TensorSpec([None], tf.string, name="x")], table=table)
    for index in (7, -1):
        proto = proto_of(tmp_path / "model")
        asset = next(node for node in proto.meta_graphs[0].object_graph_def.nodes if node.WhichOneof("kind") == "asset")
        asset.asset.asset_file_def_index = index
        assert {finding.op for finding in unsafe_in_saved_model(proto, ["serve"])} == {"InitializeTableFromTextFileV2"}


def test_print_and_memory_cache_are_ordinary(tmp_path):
    def function(x):
        tf.print(x)
        return tf.data.Dataset.from_tensor_slices(x).cache().reduce(0.0, lambda a, b: a + b)

    assert save(function, tmp_path / "model") == []


# found, with the place


def test_read_file(tmp_path):
    found = save(lambda x: tf.strings.length(tf.io.read_file("/etc/passwd")), tmp_path / "model")
    assert places(found) == [("ReadFile", "ReadFile")]
    assert found[0].function.startswith("__inference_")
    assert found[0].why == "reads a file"


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "written"

    def function(x):
        tf.io.write_file(str(target), "gone wrong")
        return x

    assert places(save(function, tmp_path / "model")) == [("WriteFile", "WriteFile")]
    assert not target.exists()
    tf.saved_model.load(str(tmp_path / "model")).signatures["serving_default"](x=tf.zeros([1]))
    assert target.exists()  # so it would have been


@pytest.mark.parametrize("call", ["py_function", "numpy_function"])
def test_python_in_a_loop(tmp_path, call):
    def body(i, x):
        y = tf.py_function(lambda v: v, [x], tf.float32) if call == "py_function" else tf.numpy_function(abs, [x], tf.float32)
        return i + 1, tf.ensure_shape(y, [None])

    def function(x):
        return tf.while_loop(lambda i, x: i < 3, body, (0, x), shape_invariants=(tf.TensorShape([]), tf.TensorShape([None])))[1]

    found = save(function, tmp_path / "model")
    assert [finding.op for finding in found] == ["EagerPyFunc" if call == "py_function" else "PyFunc"]
    assert "while_body" in found[0].function


def test_file_in_a_branch(tmp_path):
    def function(x):
        return tf.cond(x[0] > 0, lambda: x, lambda: tf.zeros_like(x) + tf.cast(tf.size(tf.io.matching_files("/*")), tf.float32))

    found = save(function, tmp_path / "model")
    assert places(found) == [("MatchingFiles", "MatchingFiles")]
    assert "cond_false" in found[0].function


def test_file_in_a_case_and_a_call(tmp_path):
    @tf.function(experimental_attributes={"_noinline": True})
    def inner(x):
        tf.io.write_file("/nowhere/x", "")
        return x

    def function(x):
        return tf.switch_case(tf.cast(x[0], tf.int32), [lambda: x, lambda: inner(x)])

    found = save(function, tmp_path / "model")
    assert places(found) == [("WriteFile", "WriteFile")]
    assert "inner" in str(found[0])


def test_table_initializer(tmp_path):
    class Words(tf.lookup.TextFileInitializer):
        def initialize(self, table):
            with tf.init_scope():
                pass
            return tf.raw_ops.InitializeTableFromTextFileV2(
                table_handle=table.resource_handle, filename=tf.constant("/etc/passwd"), key_index=-2, value_index=-1
            )

    whole, number = tf.lookup.TextFileIndex.WHOLE_LINE, tf.lookup.TextFileIndex.LINE_NUMBER
    table = tf.lookup.StaticHashTable(Words("/etc/passwd", tf.string, whole, tf.int64, number), -1)
    found = save(lambda x: table.lookup(x), tmp_path / "model", [tf.TensorSpec([None], tf.string, name="x")], table=table)
    assert [finding.op for finding in found] == ["InitializeTableFromTextFileV2"]
    assert "initializer" in found[0].function


def test_print_to_a_file(tmp_path):
    def function(x):
        tf.print(x, output_stream=f"file://{tmp_path}/log")
        return x

    assert [finding.op for finding in save(function, tmp_path / "model")] == ["PrintV2"]
    assert not (tmp_path / "log").exists()


def test_datasets(tmp_path):
    def function(x):
        lines = tf.data.TextLineDataset("/etc/passwd").cache("/tmp/cache").map(tf.io.read_file)
        return x + tf.cast(lines.reduce(0, lambda count, _: count + 1), tf.float32)

    found = save(function, tmp_path / "model")
    assert sorted(finding.op for finding in found) == ["CacheDatasetV2", "ReadFile", "TextLineDataset"]


def test_restoring_in_a_signature(tmp_path):
    found = save(
        lambda x: x + tf.raw_ops.RestoreV2(prefix="/a", tensor_names=["b"], shape_and_slices=[""], dtypes=[tf.float32])[0],
        tmp_path / "m",
    )
    assert [finding.op for finding in found] == ["RestoreV2"]


def test_debug_urls(tmp_path):
    def identity(x, urls):
        return tf.raw_ops.DebugIdentity(input=x, debug_urls=urls, tensor_name="a:0", device_name="")

    assert save(lambda x: identity(x, []), tmp_path / "a") == []
    assert [finding.op for finding in save(lambda x: identity(x, ["file:///nowhere"]), tmp_path / "b")] == ["DebugIdentity"]


def test_swapped_implementation():
    """TensorFlow may run another function than the one that is called, if both say that they implement the same."""

    def function(name, op):
        return (
            f'function {{ signature {{ name: "{name}" }} node_def {{ name: "n" op: "{op}" }}'
            ' attr { key: "api_implements" value { s: "lstm" } } } '
        )

    text = f"library {{ {function('a', 'NoOp')} {function('b', 'Abort')} }}"
    text += 'node { name: "call" op: "StatefulPartitionedCall" attr { key: "f" value { func { name: "a" } } } }'
    graph = text_format.Parse(text, graph_pb2.GraphDef())
    assert unsafe_in_graph_def(graph, ["call"]) == [Finding("Abort", "n", "b", "ends the process")]


def test_constants_of_shapes_run_at_import(tmp_path):
    """Importing a function evaluates what its shapes need, also reading a file, though nobody calls it."""
    (tmp_path / "shape").write_bytes(b"\x05\0\0\0")
    save(lambda x: tf.reshape(x, tf.io.decode_raw(tf.io.read_file(str(tmp_path / "shape")), tf.int32)), tmp_path / "model")
    # Only the file knows that the result has five elements.
    assert tf.saved_model.load(str(tmp_path / "model")).serve.concrete_functions[0].output_shapes == tf.TensorShape([5])
    proto = proto_of(tmp_path / "model")
    meta_graph = proto.meta_graphs[0]
    meta_graph.ClearField("object_graph_def")
    meta_graph.signature_def.clear()
    assert [finding.op for finding in unsafe_in_saved_model(proto, ["serve"])] == ["ReadFile"]
    # A name that only a call gives is not evaluated.
    spec = [tf.TensorSpec([], tf.string, name="x")]
    save(lambda x: tf.io.read_file(x), tmp_path / "given", spec)
    proto = proto_of(tmp_path / "given")
    meta_graph = proto.meta_graphs[0]
    meta_graph.ClearField("object_graph_def")
    meta_graph.signature_def.clear()
    assert unsafe_in_saved_model(proto, ["serve"]) == []


# TensorFlow 1


def save_v1(folder, build) -> list[Finding]:
    """What is found in a TF1 model; `build` returns its inputs and outputs."""
    with tf.Graph().as_default(), V1.Session() as session:
        inputs, outputs = build()
        session.run(V1.global_variables_initializer())
        builder = V1.saved_model.Builder(str(folder))
        signatures = {"serving_default": V1.saved_model.predict_signature_def(inputs, outputs)}
        assets = V1.get_collection("asset_filepaths")
        builder.add_meta_graph_and_variables(session, ["serve"], signatures, assets, main_op=V1.tables_initializer())
        builder.save()
    return check(folder)


def test_v1_variables_and_vocabulary(tmp_path, vocabulary):
    def build():
        x = V1.placeholder(tf.string, [None])
        table = tf.lookup.StaticVocabularyTable(text_file(vocabulary), 1)
        weights = V1.get_variable("weights", [3], use_resource=True)
        return {"x": x}, {"y": tf.gather(weights, table.lookup(x))}

    assert save_v1(tmp_path / "model", build) == []
    proto = proto_of(tmp_path / "model")
    del proto.meta_graphs[0].asset_file_def[:]
    proto.meta_graphs[0].collection_def["saved_model_assets"].any_list.Clear()
    assert [finding.op for finding in unsafe_in_saved_model(proto, ["serve"])] == ["InitializeTableFromTextFileV2"]
    # The init op is fed with the asset's place; to a signature it is a constant that may say anything.
    proto = proto_of(tmp_path / "model")
    outputs = proto.meta_graphs[0].signature_def["serving_default"].outputs
    node = next(node for node in proto.meta_graphs[0].graph_def.node if node.op == "InitializeTableFromTextFileV2")
    outputs["y"].name = node.name
    assert [finding.op for finding in unsafe_in_saved_model(proto, ["serve"])] == ["InitializeTableFromTextFileV2"]
    # The saver may restore from the model's own variables, not from elsewhere.
    proto = proto_of(tmp_path / "model")
    proto.meta_graphs[0].saver_def.filename_tensor_name = "other:0"
    assert {finding.op for finding in unsafe_in_saved_model(proto, ["serve"])} == {"RestoreV2"}
    proto.meta_graphs[0].saver_def.restore_op_name = node.name
    assert {finding.op for finding in unsafe_in_saved_model(proto, ["serve"])} == {"InitializeTableFromTextFileV2"}


def test_v1_signature(tmp_path):
    def build():
        x = V1.placeholder(tf.string, [])
        V1.get_variable("weights", [3])
        return {"x": x}, {"y": tf.io.read_file(x, name="read")}

    found = save_v1(tmp_path / "model", build)
    assert found == [Finding("ReadFile", "read", "", "reads a file")]
    assert str(found[0]) == "ReadFile at read (reads a file)"


def test_v1_init_op(tmp_path):
    def build():
        x = V1.placeholder(tf.float32, [])
        V1.get_variable("weights", [3])
        V1.add_to_collection("table_initializer", tf.io.write_file("/nowhere/x", "", name="write"))
        return {"x": x}, {"y": x + 1}

    assert places(save_v1(tmp_path / "model", build)) == [("WriteFile", "write")]


def test_v1_what_does_not_run(tmp_path):
    def build():
        names = V1.placeholder(tf.string, [], name="names")
        images = tf.io.decode_raw(tf.io.read_file(names), tf.uint8)  # the input pipeline of the training
        V1.get_variable("weights", [3])
        return {"images": images}, {"y": tf.cast(images, tf.float32) + 1}

    assert save_v1(tmp_path / "model", build) == []


def test_v1_meta_graph_of_the_tags(tmp_path):
    proto = saved_model_pb2.SavedModel()
    for tag, op in (("serve", "NoOp"), ("train", "Abort")):
        meta_graph = proto.meta_graphs.add()
        meta_graph.meta_info_def.tags.append(tag)
        meta_graph.graph_def.node.add(name="end", op=op)
        meta_graph.signature_def["serving_default"].outputs["y"].name = "end:0"
    assert unsafe_in_saved_model(proto, ["serve"]) == []
    assert [finding.op for finding in unsafe_in_saved_model(proto, ["train"])] == ["Abort"]
    assert [finding.op for finding in unsafe_in_saved_model(proto, ["other"])] == ["Abort"]


# frozen graphs, damage, size


def test_graph_def():
    with tf.Graph().as_default() as graph:
        x = V1.placeholder(tf.string, [], name="x")
        tf.identity(tf.io.read_file(x, name="read"), name="y")
        tf.identity(x, name="z")
    graph_def = graph.as_graph_def()
    assert unsafe_in_graph_def(graph_def, ["y:0"]) == [Finding("ReadFile", "read", "", "reads a file")]
    assert unsafe_in_graph_def(graph_def, ["z"]) == []
    assert unsafe_in_graph_def(graph_def, ["y"], inputs=["read"]) == []
    assert len(unsafe_in_graph_def(graph_def, [])) == 1
    assert unsafe_in_graph_def(graph_def, ["absent"]) == []


def test_cycles_and_dangling_names():
    text = """
      node { name: "a" op: "Identity" input: "b" }
      node { name: "b" op: "Identity" input: "a" input: "^gone" }
      node { name: "c" op: "InitializeTableFromTextFileV2" input: "a" input: "b" }
      node { name: "d" op: "InitializeTableFromTextFileV2" }
      node { name: "e" op: "PartitionedCall" input: "a" attr { key: "f" value { func { name: "f" } } } }
      node { name: "g" op: "PartitionedCall" attr { key: "f" value { list { func { name: "gone" } } } } }
      node { name: "r" op: "ReadFile" input: "r" }
      library { function { signature { name: "f" input_arg { name: "x" } }
        node_def { name: "i" op: "InitializeTableFromTextFileV2" input: "x" input: "x" }
        node_def { name: "n" op: "f" input: "x" } } }
    """
    graph_def = text_format.Parse(text, graph_pb2.GraphDef())
    found = unsafe_in_graph_def(graph_def, ["c", "d", "e", "g", "^x"])
    assert [(finding.node, finding.function) for finding in found] == [("c", ""), ("d", ""), ("i", "f")]
    proto = saved_model_pb2.SavedModel()
    assert unsafe_in_saved_model(proto, []) == []
    objects = proto.meta_graphs.add().object_graph_def
    objects.concrete_functions["gone"].bound_inputs.extend([3, -1])
    objects.nodes.add().function.concrete_functions.append("other")
    assert unsafe_in_saved_model(proto, []) == []


def test_time_is_linear():
    graph = graph_pb2.GraphDef()
    count = 30_000
    for index in range(count):
        graph.node.add(name=f"n{index}", op="Identity", input=[f"n{index - 1}"] if index else [])
        graph.node.add(name=f"c{index}", op="CacheDataset", input=["n0", f"n{index}"])
    for index in range(3000):
        function = graph.library.function.add()
        function.signature.name = f"f{index}"
        function.signature.input_arg.add(name="x")
        for twice in range(2):
            node = function.node_def.add(name=f"call{twice}", op="PartitionedCall", input=["x"])
            node.attr["f"].func.name = f"f{index + 1}"
    graph.node.add(name="call", op="PartitionedCall", input=["n0"]).attr["f"].func.name = "f0"
    start = time.perf_counter()
    found = unsafe_in_graph_def(graph, [f"c{index}" for index in range(count)] + ["call"])
    assert len(found) == count
    assert time.perf_counter() - start < 15


def test_findings_are_in_a_fixed_order(tmp_path):
    def function(x):
        for index in range(3):
            tf.io.write_file(f"/nowhere/{index}", "")
        return x

    found = save(function, tmp_path / "model")
    assert [finding.node for finding in found] == ["WriteFile", "WriteFile_1", "WriteFile_2"]
    assert check(tmp_path / "model") == found


# the table


def test_table_names_ops_that_exist():
    """All but those of TensorRT builds are registered."""
    unknown = {op for op in UNSAFE_OPS if op_def_registry.get(op) is None}
    assert unknown <= {"InitializeTRTResource", "SerializeTRTResource", "PyFuncStateless"}


def test_table_has_every_op_with_a_file_name():
    """Ops whose arguments are called like files are in the table, or known to be harmless."""
    harmless = {"ShardedFilename", "ShardedFilespec"}
    words = (
        "filename",
        "file_pattern",
        "db_uri",
        "debug_urls",
        "vocab_file",
        "logdir",
        "ckpt_path",
        "data_source_name",
        "server_address",
    )
    found = set()
    for name in dir(tf.raw_ops):
        op = op_def_registry.get(name)
        arguments = [argument.name for argument in (*op.input_arg, *op.attr)] if op else []
        if any(word in argument for argument in arguments for word in words) or "address" in arguments:
            found.add(name)
    assert found - harmless <= set(UNSAFE_OPS)
    assert len(found) > 40


# Keras files


def lambda_h5(folder, package: str):
    keras = pytest.importorskip(package)
    target = folder / "written"
    layer = keras.layers.Lambda(eval(f"lambda x: x if open({str(target)!r}, 'w').close() is None else x"), name="evil")
    if package == "tf_keras":
        model = keras.Sequential([keras.layers.Input((2,)), layer])
    else:
        model = keras.Sequential([keras.Input((2,)), layer])
    target.unlink()  # building the model ran it
    return keras, model, target


def test_h5_with_lambda(tmp_path):
    keras, model, target = lambda_h5(tmp_path, "tf_keras")
    model.save(tmp_path / "model.h5")
    assert unsafe_in_keras_file(tmp_path / "model.h5") == [Finding("Lambda", "evil", "", "runs Python bytecode from the file")]
    assert not target.exists()
    keras.models.load_model(tmp_path / "model.h5", compile=False)
    assert target.exists()  # tf_keras runs it without asking


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_keras_3_with_lambda(tmp_path, suffix):
    _, model, target = lambda_h5(tmp_path, "keras")
    model.save(tmp_path / f"model{suffix}")
    found = unsafe_in_keras_file(tmp_path / f"model{suffix}")
    assert found
    assert {(finding.op, finding.node) for finding in found} == {("Lambda", "evil")}
    assert not target.exists()


def test_op_layers(tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    inputs = tf_keras.Input((2,))
    ordinary = tf.nn.relu(tf.reshape(inputs, [-1, 2]) * 2.0 + tf.math.sin(inputs))[:, 0]
    tf_keras.Model(inputs, ordinary).save(tmp_path / "ordinary.h5")
    assert unsafe_in_keras_file(tmp_path / "ordinary.h5") == []
    with h5py.File(tmp_path / "ordinary.h5", "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"math.sin"', '"io.read_file"')
    assert [str(finding) for finding in unsafe_in_keras_file(tmp_path / "ordinary.h5")] == [
        "TFOpLambda at tf.math.sin (calls tf.io.read_file)"
    ]


@pytest.mark.parametrize(
    ("symbol", "is_safe"),
    [
        *(("math.add", True), ("nn.conv2d", True), ("__operators__.getitem", True), ("io.decode_jpeg", True), ("reshape", True)),
        *(("compat.v1.nn.relu", True), ("raw_ops.Relu", True), ("raw_ops.ReadFile", False), ("io.write_file", False)),
        *(("py_function", False), ("compat.v1.py_func", False), ("numpy_function", False), ("io.gfile.GFile", False)),
        *(
            ("load_op_library", False),
            ("saved_model.load", False),
            ("keras.models.load_model", False),
            ("data.TextLineDataset", False),
        ),
        *((None, False), (["x"], False)),
    ],
)
def test_symbols(symbol, is_safe):
    config = {"class_name": "TFOpLambda", "config": {"name": "layer", "function": symbol}}
    path_config = {"class_name": "Functional", "config": {"layers": [config]}}
    assert lambda_layers(path_config) == []
    from tfquant import keras_safety

    assert (list(keras_safety._unsafe_in_config(path_config)) == []) == is_safe


def write_keras(path, config) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ({"class_name": "function", "module": "os", "config": "system"}, "calls Python: os.system"),
        ({"class_name": "run", "module": "subprocess", "config": {}}, "calls Python: subprocess.run"),
        ({"class_name": "function", "module": "builtins", "config": "exec"}, "calls Python: builtins.exec"),
        ({"class_name": "StringLookup", "config": {"name": "l", "vocabulary": "/etc/passwd"}}, "reads a file"),
        ({"class_name": "TFSMLayer", "config": {"name": "l", "filepath": "/a"}}, "loads another model"),
        ({"class_name": "TensorFlowOpLayer", "config": {"node_def": {"op": "ReadFile"}}}, "reads a file"),
        ({"class_name": "TensorFlowOpLayer", "config": {"node_def": '{"op": "WriteFile"}'}}, "writes a file"),
        ({"class_name": "TensorFlowOpLayer", "config": {"node_def": "\n\x04read\x12\x08ReadFile"}}, "reads a file"),
        (
            {"class_name": "ClassMethod", "config": {"cls_symbol": "io.gfile.GFile", "method_name": "x"}},
            "calls tf.io.gfile.GFile.x",
        ),
        ({"class_name": "function", "module": "builtins", "config": "relu"}, None),
        ({"class_name": "Mine", "module": "my.layers", "registered_name": "my>Mine", "config": {}}, None),
        ({"class_name": "StringLookup", "config": {"vocabulary": ["a"]}}, None),
    ],
)
def test_objects_of_configs(tmp_path, layer, why):
    path = write_keras(tmp_path / "model.keras", {"class_name": "Sequential", "config": {"name": "m", "layers": [layer]}})
    assert [finding.why for finding in unsafe_in_keras_file(path)] == ([why] if why else [])


def test_lambda_layers_are_nested():
    code = {"class_name": "__lambda__", "config": {"code": "4wE=", "defaults": None, "closure": None}}
    old = {"class_name": "Lambda", "config": {"name": "old", "function": ["4wE=", None, None], "function_type": "lambda"}}
    new = {"class_name": "Lambda", "config": {"name": "new", "function": code}}
    fine = {"class_name": "Lambda", "config": {"name": "fine", "function": "relu", "function_type": "function"}}
    activation = {"class_name": "Dense", "config": {"name": "dense", "activation": code}}
    inner = {"class_name": "Functional", "config": {"name": "inner", "layers": [old, fine]}}
    assert lambda_layers({"class_name": "Sequential", "config": {"layers": [inner, new, activation]}}) == ["old", "new", "dense"]


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.hdf5"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x89HDF\r\n\x1a\n cut off", b"text"])
def test_damaged_files(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.\w+ is damaged or not") as error:
        unsafe_in_keras_file(path)
    assert "\n" not in str(error.value)


def test_damaged_configs(tmp_path):
    with pytest.raises(ModelError, match="There is no model"):
        unsafe_in_keras_file(tmp_path / "absent.keras")
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        unsafe_in_keras_file(tmp_path / "a.keras")
    for text in ("{", "[" * 100_000, "\xff"):
        with zipfile.ZipFile(tmp_path / "b.keras", "w") as archive:
            archive.writestr("config.json", text)
        with pytest.raises(ModelError, match="not JSON"):
            unsafe_in_keras_file(tmp_path / "b.keras")
    with pytest.raises(ModelError, match="is no object"):
        unsafe_in_keras_file(write_keras(tmp_path / "c.keras", [1]))


# what the user is told


def test_refusal():
    findings = [Finding("ReadFile", f"read_{index}", "__inference_serving_default_12", "reads a file") for index in range(5)]
    refuse_unsafe([], "model", False)
    refuse_unsafe(findings, "model", True)
    with pytest.raises(ModelError) as error:
        refuse_unsafe(findings[:1], "some/model", False)
    assert str(error.value) == (
        "some/model reads or writes files, or runs code, when it is used: ReadFile at serving_default/read_0 (reads a file). "
        "Load it only if you trust its maker, then say --allow_unsafe_ops (allow_unsafe_ops=True in Python)."
    )
    with pytest.raises(ModelError, match=r"read_2 \(reads a file\) and 2 more\. Load"):
        refuse_unsafe(findings, "some/model", False)


def test_names_cannot_forge_lines():
    text = str(Finding("ReadFile", "a\n\x1b[2Jb" + "c" * 500, "", "reads a file"))
    assert not {"\n", "\x1b"} & set(text)
    assert len(text) < 200
