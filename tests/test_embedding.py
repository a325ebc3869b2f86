"""Tables of rows in 8 bits: lookups against NumPy and the simulation, in mode static and dynamic."""

import building
import numpy as np
import pytest
import tensorflow as tf
from test_lowering import Random, dense, samples
from test_pipeline import bytes_of
from test_weight_only import optimized, sqnr

import tfquant
from tfquant.targets import onednn
from tfquant.targets.onednn import embedding

MODES = {"static": building.plan_for, "dynamic": building.dynamic_plan_for}
ROWS, WIDTH = 300, 24


def ids(*shape, rows=ROWS, dtype=np.int32):
    return np.random.default_rng(3).integers(0, rows, shape).astype(dtype)


def planned(net, batch, mode="static", **options):
    """The plan of a net over ids, whose INT8 graph agrees with the simulation."""
    random = Random()
    spec = tf.TensorSpec((None, *batch.shape[1:]), batch.dtype)
    graph = building.build(lambda x: net(x, random), {"x": spec})
    found = MODES[mode](graph, [{"x": batch}], **options)
    assert building.disagreements(found, [{"x": batch}]) == []
    return found


def lowered(found):
    return onednn.lower(found.graph, found.annotation.units, found.plan)


def tables(graph):
    """Type and shape of the constants that may be tables."""
    values = [node.value for node in graph.order() if node.op == "Const"]
    return sorted((value.dtype.name, value.shape) for value in values if value.size >= ROWS)


def dequantized(table):
    """What the rows stand for, by the formula: steps of max |row| / 127."""
    largest = np.abs(table).max(1, keepdims=True)
    scales = np.where(largest > 0, largest.astype(np.float64) / 127, 1).astype(np.float32)
    return np.rint(table.astype(np.float64) / scales).astype(np.float32) * scales


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 3, 4), (0, 7)])
def test_rows_to_the_bit(shape, dtype, mode):
    table = samples(ROWS, (WIDTH,))
    batch = ids(*shape, dtype=dtype)
    found = planned(lambda x, random: tf.gather(table, x), batch, mode)
    (given,) = building.serve(lowered(found), [{"x": batch}]).values()
    np.testing.assert_array_equal(given, dequantized(table)[batch])
    assert tables(lowered(found)) == [("float32", (ROWS, 1)), ("int8", (ROWS, WIDTH))]


@pytest.mark.parametrize("rows", ["normal", "positive", "equal", "zero", "one is zero", "one is large"])
@pytest.mark.parametrize("size", [1e-35, 1e-6, 1.0, 1e30])
def test_rows_of_any_range(rows, size):
    table = samples(ROWS, (WIDTH,), rows if " " not in rows else "normal", size)
    if " " in rows:
        table[7] = 0 if rows == "one is zero" else 1000 * table[7]
    batch = np.arange(ROWS, dtype=np.int32)
    found = planned(lambda x, random: tf.gather(table, x), batch)
    (given,) = building.serve(lowered(found), [{"x": batch}]).values()
    np.testing.assert_array_equal(given, dequantized(table))
    assert (np.abs(given - table) <= 0.5001 * np.abs(table).max(1, keepdims=True) / 127).all()


@pytest.mark.parametrize(("rows", "width"), [(4096, 1), (1, 4096), (63, 65), (65, 64)])
def test_tables_of_any_shape(rows, width):
    table = samples(rows, (width,))
    batch = ids(9, rows=rows)
    found = planned(lambda x, random: tf.gather(table, x), batch)
    is_large = rows * width >= embedding.LEAST_VALUES
    assert [(decision.kernel, decision.int8) for decision in found.plan.ops] == [("embedding", True)] * is_large
    (given,) = building.serve(lowered(found), [{"x": batch}]).values()
    np.testing.assert_array_equal(given, (dequantized(table) if is_large else table)[batch])


@pytest.mark.parametrize("mode", MODES)
def test_what_reads_the_rows_in_8_bits(mode):
    def net(x, random):
        found = tf.reshape(tf.gather(random(ROWS, WIDTH), x), [-1, 4 * WIDTH])
        return dense(tf.nn.relu(dense(found, random, 32)), random, 5)

    found = planned(net, ids(16, 4), mode)
    kernels = [unit.kernel.name for unit in found.annotation.units.values() if unit.kernel.role == "compute"]
    assert kernels == ["embedding", "matmul", "matmul"]


def test_rows_are_joined_in_float_and_quantized_once():
    def net(x, random):
        return dense(tf.concat([tf.gather(random(ROWS, WIDTH), x[:, i]) for i in range(3)], 1), random, 5)

    found = planned(net, ids(6, 3))
    assert [node.op for node in lowered(found).order()].count("QuantizeV2") == 1


def test_several_lookups_of_one_table():
    def net(x, random):
        table = tf.constant(random(ROWS, WIDTH))
        return {"words": tf.gather(table, x), "next": tf.gather(table, tf.cast(x, tf.int64) + 1)}

    found = planned(net, ids(6, 4, rows=ROWS - 1))
    assert [decision.int8 for decision in found.plan.ops] == [True, True]
    assert tables(lowered(found)) == [("float32", (ROWS, 1)), ("int8", (ROWS, WIDTH))]


@pytest.mark.parametrize("mode", MODES)
def test_a_table_that_is_a_layer_too(mode):
    def net(x, random):
        table = tf.constant(random(ROWS, WIDTH))
        return tf.matmul(tf.reduce_mean(tf.gather(table, x), 1), table, transpose_b=True)

    found = planned(net, ids(6, 4), mode)
    assert [(decision.op, decision.int8) for decision in found.plan.ops] == [("GatherV2", True), ("MatMul", True)]
    kinds = {dtype for dtype, shape in tables(lowered(found)) if len(shape) == 2 and min(shape) > 1}
    assert kinds <= {"int8", "qint8"}


@pytest.mark.parametrize(
    "net",
    [
        lambda x, random: tf.gather(random(20, WIDTH), x),  # few values
        lambda x, random: tf.gather(random(40, ROWS), x, axis=1),  # columns
        lambda x, random: tf.gather(random(ROWS, 6, 4), x),  # no rows
        lambda x, random: tf.gather(random(4, ROWS, 6), x, axis=1, batch_dims=1),
        lambda x, random: tf.gather(tf.constant(random(ROWS, WIDTH), tf.float64), x),
    ],
)
def test_what_stays_float(net):
    found = planned(net, ids(4, 3, rows=20))
    assert not found.annotation.units
    assert "Cast" not in [node.op for node in lowered(found).order()]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_table_that_is_not_finite(value):
    table = samples(ROWS, (WIDTH,))
    table[5, 3] = value
    graph = building.build(lambda x: tf.gather(table, x), {"x": tf.TensorSpec((None,), tf.int32)})
    assert not building.plan_for(graph, [{"x": ids(4)}]).annotation.units


def test_a_table_that_something_else_reads():
    def net(x, random):
        table = tf.constant(random(ROWS, WIDTH))
        return {"rows": tf.gather(table, x), "sum": tf.cast(tf.reduce_sum(x), tf.float32) * table}

    assert not planned(net, ids(4, 3)).annotation.units


def test_a_lookup_that_the_scope_names():
    found = planned(lambda x, random: tf.gather(random(ROWS, WIDTH), x), ids(5), ignored=["type:GatherV2"])
    assert [(decision.kernel, decision.int8) for decision in found.plan.ops] == [("embedding", False)]


def test_one_scale_for_all():
    found = planned(lambda x, random: tf.gather(random(ROWS, WIDTH), x), ids(5), weights="per_tensor")
    (scales,) = found.plan.weight_scales.values()
    assert (scales.shape, len(set(scales))) == ((ROWS,), 1)


def test_tensorflow_keeps_the_integers():
    """What it runs holds no float of the table's size: nothing is folded."""
    found = planned(lambda x, random: tf.gather(random(ROWS, WIDTH), x), ids(4, 3))
    nodes = [node for node in optimized(lowered(found), ids(4, 3)) if node.op == "Const"]
    sizes = {np.dtype(value.dtype).name for node in nodes if (value := tf.make_ndarray(node.attr["value"].tensor)).size > ROWS}
    assert sizes == {"int8"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with words to classes; nearly all of it is the table, a variable that is looked up as such."""
    path = tmp_path_factory.mktemp("embedding") / "model"
    random, module = Random(), tf.Module()
    module.table, module.head = tf.Variable(random(5000, 128)), tf.Variable(random.weights(128, 40))

    def call(words):
        return {"y": tf.reduce_mean(tf.nn.embedding_lookup(module.table, words), 1) @ module.head}

    specs = [tf.TensorSpec((None, 6), tf.int32, name="words")]
    module.net = tf.function(call, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.net})
    return path


def size_of(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_loaded_again(model, tmp_path, mode):
    words = ids(40, 6, rows=5000)
    result = tfquant.quantize(model, {"words": words}, tfquant.QuantConfig(mode=mode, verify_batch_sizes=()))
    assert result.report.int8_share == 100
    assert {count.op: (count.total, count.int8) for count in result.report.ops}["GatherV2"] == (1, 1)
    result.save(tmp_path / "int8")
    plan = ["quant_plan.json", "quant_plan.npz"]
    assert size_of(tmp_path / "int8") - sum((tmp_path / "int8" / name).stat().st_size for name in plan) < 0.27 * size_of(model)
    before, after = (tf.saved_model.load(str(path)).signatures["serving_default"] for path in (model, tmp_path / "int8"))
    expected, found = (function(words=tf.constant(words))["y"].numpy() for function in (before, after))
    assert sqnr(expected, found) > 35
    simulated = result.simulation()({"words": words})["y"]
    np.testing.assert_allclose(found, simulated, atol=0.02 * np.abs(expected).max())
    again = tfquant.quantize(model, plan=tmp_path / "int8")
    assert bytes_of(again) == bytes_of(result)


def test_ids_out_of_range_are_an_error_as_before(model):
    words = ids(40, 6, rows=5000)
    result = tfquant.quantize(model, {"words": words}, tfquant.QuantConfig(verify=False))
    for wrong in (-1, 5000):
        for function in (tf.saved_model.load(str(model)).signatures["serving_default"], result):
            with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{wrong} is not in \[0, 5000\)"):
                function(words=tf.constant(np.full((1, 6), wrong, np.int32)))
