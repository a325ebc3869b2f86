"""Tests of tfquant.plan: a plan on disk, edited, damaged, and applied again."""

import copy
import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

import tfquant
from tfquant.errors import ModelError, PlanError, TfquantError
from tfquant.graph.paths import normalize
from tfquant.pipeline import apply_plan
from tfquant.plan.serialize import JSON_NAME, NPZ_NAME, load_plan, save_plan
from tfquant.plan.spec import OpDecision, QuantPlan, asymmetric, symmetric
from tfquant.simplify import simplify
from tfquant.sources import open_model
from tfquant.targets import onednn

LAYERS = keras.layers
CONFIG = tfquant.QuantConfig(verify=False)


def build(last=3, extra=False):
    keras.utils.set_random_seed(2)
    image = keras.Input((8, 8, 3), name="image")
    x = LAYERS.ReLU(name="relu_a")(LAYERS.Conv2D(8, 3, padding="same", name="conv_a")(image))
    if extra:
        x = LAYERS.DepthwiseConv2D(3, name="extra")(x)
    x = skip = LAYERS.MaxPooling2D(2, name="pool")(x)
    x = LAYERS.ReLU(name="relu_b")(LAYERS.Conv2D(8, 3, padding="same", name="conv_b")(x))
    x = LAYERS.Conv2D(8, 1, name="conv_c")(x)
    x = LAYERS.ReLU(name="relu_c")(LAYERS.Add(name="add")([x, skip]))
    x = LAYERS.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, LAYERS.Dense(last, name="head")(x), name="net")


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).normal(size=(24, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def quantized(model, data):
    return tfquant.quantize(model, data, CONFIG)


@pytest.fixture
def folder(quantized, tmp_path):
    save_plan(quantized.plan, tmp_path)
    return tmp_path


def read(folder):
    return json.loads((folder / JSON_NAME).read_text())


def write(folder, content):
    (folder / JSON_NAME).write_text(json.dumps(content))


def equal(one, other):
    """Field by field; arrays make == on the whole ambiguous."""
    scales = {name: (array.dtype.str, array.tolist()) for name, array in one.weight_scales.items()}
    return (
        (one.target, one.signature_keys, one.ops, dict(one.tensors), dict(one.settings))
        == (other.target, other.signature_keys, other.ops, dict(other.tensors), dict(other.settings))
    ) and scales == {name: (array.dtype.str, array.tolist()) for name, array in other.weight_scales.items()}


def op_of(content, part):
    """The entry of the op whose name holds `part`."""
    (entry,) = [entry for entry in content["ops"] if part in entry["name"]]
    return entry


# Round trip


def test_round_trip_is_equal_and_has_the_same_bytes(quantized, folder, tmp_path):
    loaded = load_plan(folder / JSON_NAME)
    assert equal(loaded, quantized.plan)
    assert equal(load_plan(folder), loaded)
    again = tmp_path / "again"
    again.mkdir()
    save_plan(loaded, again)
    for name in (JSON_NAME, NPZ_NAME):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    with zipfile.ZipFile(folder / NPZ_NAME) as archive:
        assert {entry.date_time[0] for entry in archive.infolist()} == {1980}
    assert len(loaded.ops) == 5
    assert len(loaded.weight_scales) == 4


@pytest.mark.parametrize("seed", range(10))
def test_round_trip_of_random_plans(seed, tmp_path):
    rng = np.random.default_rng(seed)
    tensors = {}
    for index in range(20):
        low, high = -(10.0 ** rng.uniform(-12, 12)) * rng.integers(2), 10.0 ** rng.uniform(-12, 12)
        make = asymmetric if rng.integers(2) else symmetric
        tensors[f"tensor/{index}:1"] = make(low, high, "mse", f"group/{index}")
    ops = tuple(OpDecision(f"op/{i}", "Conv2D", "conv2d", f"{i:x}", bool(rng.integers(2)), 'why \u00e4 "x"') for i in range(5))
    scales = {f"op/{i}": rng.uniform(1e-20, 1e3, i + 1).astype(np.float32) for i in range(5)}
    plan = QuantPlan("onednn", ("serve",), ops, tensors, scales, {"estimator": "mse", "samples": 12})
    save_plan(plan, tmp_path)
    assert equal(load_plan(tmp_path), plan)


def test_the_plan_alone_gives_the_same_graph(model, quantized, folder):
    again = tfquant.quantize(model, plan=folder / JSON_NAME)
    assert again.graph_def.SerializeToString(deterministic=True) == quantized.graph_def.SerializeToString(deterministic=True)
    assert equal(again.plan, quantized.plan)


def test_the_same_plan_gives_the_same_bytes_in_another_process(model, quantized, folder):
    model.export(folder / "model", verbose=False)
    script = (
        "import sys, hashlib, tfquant; "
        "q = tfquant.quantize(sys.argv[1], plan=sys.argv[2]); "
        "print(hashlib.sha256(q.graph_def.SerializeToString(deterministic=True)).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(folder / "model"), str(folder)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split() == [hashlib.sha256(quantized.graph_def.SerializeToString(deterministic=True)).hexdigest()]


# Edits


@pytest.mark.parametrize(("low", "high"), [(-0.3, 2.0), (0.0, 3.0), (-4.0, 0.0), (-1e-3, 1.0)])
def test_edited_ranges_are_nudged_again(folder, low, high):
    content = read(folder)
    name = next(name for name, entry in content["tensors"].items() if "relu_b" in name)
    content["tensors"][name] |= {"dtype": "quint8", "min": low, "max": high}
    write(folder, content)
    spec = load_plan(folder).tensors[name]
    assert spec == asymmetric(low, high, "user", name)
    assert spec.low + spec.zero_point * spec.scale == pytest.approx(0, abs=1e-12)
    assert max(abs(spec.low - low), abs(spec.high - high)) <= 0.501 * (high - low) / 255
    assert spec.source == "user"


def test_edited_symmetric_range(folder):
    content = read(folder)
    content["tensors"]["image"] |= {"dtype": "qint8", "min": -3.0, "max": 2.0}
    write(folder, content)
    assert load_plan(folder).tensors["image"] == symmetric(-3.0, 2.0, "user", "image")


def test_scale_and_zero_point_follow_the_range(folder):
    content = read(folder)
    before = load_plan(folder)
    for entry in content["tensors"].values():
        entry["zero_point"] += 7
        entry["scale"] *= 1.5
    write(folder, content)
    for name, spec in load_plan(folder).tensors.items():
        assert spec.scale == pytest.approx(before.tensors[name].scale, rel=1e-6)
        assert spec.zero_point == before.tensors[name].zero_point


def test_an_edited_range_reaches_the_graph(model, quantized, folder, data):
    content = read(folder)
    name = next(name for name in content["tensors"] if "relu_b" in name)
    content["tensors"][name]["max"] = 1e-3
    write(folder, content)
    narrow = tfquant.quantize(model, plan=folder)
    assert narrow.graph_def.SerializeToString(deterministic=True) != quantized.graph_def.SerializeToString(deterministic=True)
    reference, good, bad = (np.asarray(m(data)) for m in (model, quantized, narrow))
    assert np.abs(bad - reference).mean() > 5 * np.abs(good - reference).mean()


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 2.0), (-2.0, -0.5), (0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))]
)
def test_ranges_that_cannot_be(folder, low, high):
    content = read(folder)
    content["tensors"]["image"] |= {"min": low, "max": high}
    write(folder, content)
    with pytest.raises(PlanError, match="the range of image must be finite, hold 0 and not be empty"):
        load_plan(folder)


def conv_ops(quantized):
    return sorted(node.op for node in quantized.graph_def.node if "Conv2D" in node.op or "MatMul" in node.op)


@pytest.mark.parametrize("reason", ["too sensitive", ""])
def test_an_op_that_the_plan_keeps_float(model, folder, data, reason):
    content = read(folder)
    op_of(content, "conv_b").update(int8=False, reason=reason)
    write(folder, content)
    result = tfquant.quantize(model, plan=folder)
    assert conv_ops(result) == ["Conv2D", "_FusedQuantizedConv2D", "_FusedQuantizedConv2D", "_QuantizedMatMul"]
    (node,) = [node for node in result.graph_def.node if node.op == "Conv2D"]
    assert "conv_b" in node.name
    assert np.abs(np.asarray(result(data)) - np.asarray(model(data))).max() < 0.05
    report = result.report
    assert report.int8_share < 75
    wanted = reason or "the plan keeps it in float"
    assert report.float_macs == {wanted: report.total_macs - report.int8_macs}
    assert f"{100 - report.int8_share:.2f}% in float: {wanted}\n" in str(report)


@pytest.mark.parametrize(
    "reason",
    [
        "too sensitive",
        "",
    ],
)
def test_the_report_says_why_an_op_is_float(model, folder, reason):
    content = read(folder)
    op_of(content, "conv_b").update(int8=False, reason=reason)
    write(folder, content)
    (line,) = [line for line in str(tfquant.quantize(model, plan=folder).report).splitlines() if "conv_b" in line]
    assert line.endswith(f"(Conv2D): {reason or 'the plan keeps it in float'}")


def test_all_ops_float_is_the_float_model(model, folder, data):
    content = read(folder)
    for entry in content["ops"]:
        entry["int8"] = False
    write(folder, content)
    result = tfquant.quantize(model, plan=folder)
    assert not [node.op for node in result.graph_def.node if "Quant" in node.op or node.op == "Dequantize"]
    assert np.abs(np.asarray(result(data)) - np.asarray(model(data))).max() < 1e-5
    assert result.report.int8_macs == 0


def test_group_members_must_agree(folder):
    content = read(folder)
    groups = {}
    for name, entry in content["tensors"].items():
        groups.setdefault(entry["group"], []).append(name)
    first, second = next(names for names in groups.values() if len(names) == 2)
    assert ("relu_a" in first, "pool" in second) == (True, True)
    content["tensors"][second]["max"] *= 2
    write(folder, content)
    with pytest.raises(PlanError, match=f"{second} must have the range of its group {first}"):
        load_plan(folder)
    content["tensors"][first]["max"] *= 2
    write(folder, content)
    plan = load_plan(folder)
    assert plan.tensors[first].scale == plan.tensors[second].scale


def test_a_range_that_begins_below_0_behind_a_relu(model, folder):
    content = read(folder)
    name = next(name for name in content["tensors"] if "relu_b" in name)
    content["tensors"][name] |= {"min": -1.0}
    write(folder, content)
    with pytest.raises(PlanError, match=r"ends with Relu: its range must begin at 0\. Received: -0\.99"):
        tfquant.quantize(model, plan=folder)


def test_a_dtype_that_a_kernel_does_not_take(model, folder):
    content = read(folder)
    for name, entry in content["tensors"].items():
        if "relu_a" in name or "pool" in name:
            entry["dtype"] = "qint8"
    write(folder, content)
    with pytest.raises(PlanError, match="quint8"):
        tfquant.quantize(model, plan=folder)


# Another model


def test_other_weights(folder):
    other = build()
    layer = other.get_layer("conv_b")
    kernel, bias = layer.get_weights()
    kernel[0, 0, 0, 0] += 1e-3
    layer.set_weights([kernel, bias])
    other.get_layer("head").set_weights([value + 1 for value in other.get_layer("head").get_weights()])
    with pytest.raises(PlanError, match=r"belongs to another model: \S*conv_b\S* has other weights"):
        tfquant.quantize(other, plan=folder)


def test_other_ops(folder):
    with pytest.raises(
        PlanError, match=r"another model: \S*extra\S* \(DepthwiseConv2dNative\) stands where the plan has net/conv_b"
    ):
        tfquant.quantize(build(extra=True), plan=folder)


def test_more_or_fewer_ops(model, folder):
    content = read(folder)
    dropped = content["ops"].pop()
    write(folder, content)
    with pytest.raises(PlanError, match="it has 3 layers to decide on, the model 4"):
        tfquant.quantize(model, plan=folder)
    content["ops"] += [dropped, dropped | {"name": "more"}]
    write(folder, content)
    with pytest.raises(PlanError, match="it has 5 layers to decide on, the model 4"):
        tfquant.quantize(model, plan=folder)


def test_a_missing_range(model, folder):
    content = read(folder)
    name = next(name for name in content["tensors"] if "relu_b" in name)
    del content["tensors"][name]
    write(folder, content)
    with pytest.raises(PlanError, match=f"no range for {name}"):
        tfquant.quantize(model, plan=folder)


def test_missing_or_wrong_weight_scales(model, folder):
    arrays = dict(np.load(folder / NPZ_NAME))
    name = next(name for name in arrays if name.startswith("weight_scales/") and "conv_b" in name)
    np.savez(folder / NPZ_NAME, **{**arrays, name: arrays[name][:-1]})
    with pytest.raises(PlanError, match=r"needs 8 weight scales for \S*conv_b\S*. Received: shape \(7,\)"):
        tfquant.quantize(model, plan=folder)
    np.savez(folder / NPZ_NAME, **{key: value for key, value in arrays.items() if key != name})
    with pytest.raises(PlanError, match=r"needs 8 weight scales for \S*conv_b\S*. Received: none"):
        tfquant.quantize(model, plan=folder)


@pytest.mark.parametrize(
    "bad", [np.float64([0.1] * 8), np.float32([0.1] * 7 + [0]), np.float32([0.1] * 7 + [np.nan]), np.float32(0.1)]
)
def test_weight_scales_that_cannot_be(quantized, folder, bad):
    arrays = {f"weight_scales/{name}": value for name, value in quantized.plan.weight_scales.items()}
    arrays[next(iter(arrays))] = bad
    np.savez(folder / NPZ_NAME, **arrays)
    with pytest.raises(PlanError, match=r"must be positive float32 numbers \(C,\)"):
        load_plan(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "tfquant.plan/0", "its format must be 'tfquant.plan/1'. Received: 'tfquant.plan/0'"),
        ("target", "onednm", "must be for the target 'onednn'. Received: 'onednm'"),
        ("target", 3, "'target' must be a str. Received: 3"),
        ("signature_keys", None, "'signature_keys' must be a list. Received: None"),
        ("signature_keys", [], r"'signature_keys' must be a list of strings. Received: \[\]"),
    ],
)
def test_wrong_heads(model, folder, key, value, message):
    write(folder, {**read(folder), key: value})
    with pytest.raises(PlanError, match=message):
        tfquant.quantize(model, plan=folder)


def test_a_signature_that_the_model_lacks(model, folder):
    write(folder, {**read(folder), "signature_keys": ["classify"]})
    with pytest.raises(ModelError, match="no signature 'classify'"):
        tfquant.quantize(model, plan=folder)


def test_missing_files(folder):
    with pytest.raises(PlanError, match="There is no plan at"):
        load_plan(folder / "nothing.json")
    (folder / NPZ_NAME).unlink()
    with pytest.raises(PlanError, match=r"There is no .*quant_plan.npz"):
        load_plan(folder)


# Damage


def damaged(content, rng):
    """`content` with bits flipped, bytes cut, doubled or overwritten."""
    content = bytearray(content)
    kind = rng.choice("fffcdosz")
    place = rng.randrange(len(content))
    if kind == "f":
        for _ in range(rng.choice([1, 1, 3])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "c":
        del content[place:]
    elif kind == "d":
        del content[place : place + rng.randrange(1, 30)]
    elif kind == "o":
        content[place : place + 8] = rng.randbytes(8)
    elif kind == "s":
        end = place + rng.randrange(1, 40)
        content[end:end] = content[place:end]
    else:
        content[place : place + 4] = bytes(4)
    return bytes(content)


def survives(read_plan):
    """Whether the plan could be read; anything but a PlanError passes through."""
    try:
        return isinstance(read_plan(), QuantPlan)
    except PlanError as error:
        return "\n" in str(error)


def test_damaged_json_is_an_error_or_a_plan(folder):
    original = (folder / JSON_NAME).read_bytes()
    rng = random.Random(0)
    read_well = 0
    for _ in range(400):
        (folder / JSON_NAME).write_bytes(damaged(original, rng))
        read_well += survives(lambda: load_plan(folder))
    assert 20 < read_well < 380


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"3",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100000,
        b"1" * 5000,
        b'{"format": "tfquant.plan/1"}',
    ],
)
def test_json_that_is_no_plan(folder, text):
    (folder / JSON_NAME).write_bytes(text)
    assert not survives(lambda: load_plan(folder))


def leaves(content, path=()):
    if isinstance(content, (dict, list)) and content:
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from leaves(content[key], (*path, key))
            yield (*path, key)
    return


def test_wrong_values_anywhere_are_an_error_or_a_plan(folder):
    original = read(folder)
    rng = random.Random(1)
    places = list(leaves(original))
    values = [None, "", "x", 0, -1, 300, 1e-300, 1e300, 10**400, True, False, [], {}, [1], {"a": 1}, "quint8", "qint8", -0.0]
    read_well = 0
    for _ in range(400):
        content = copy.deepcopy(original)
        *way, last = rng.choice(places)
        inner = content
        for key in way:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = rng.choice(values)
        write(folder, content)
        read_well += survives(lambda: load_plan(folder))
    assert 20 < read_well < 380


def test_damaged_npz_is_an_error_or_a_plan(folder):
    original = (folder / NPZ_NAME).read_bytes()
    rng = random.Random(2)
    wrong = {}
    read_well = 0
    central = original.index(b"PK\x01\x02")
    cases = [damaged(original, rng) for _ in range(300)]
    for place in [*range(120), *range(central, central + 60), *range(len(original) - 22, len(original))]:
        for bit in (0, 3, 7):
            content = bytearray(original)
            content[place] ^= 1 << bit
            cases.append(bytes(content))
    for content in cases:
        (folder / NPZ_NAME).write_bytes(content)
        try:
            read_well += survives(lambda: load_plan(folder))
        except Exception as error:
            wrong[type(error).__name__] = str(error)[:80]
    assert wrong == {}
    assert 20 < read_well < 600


def test_npz_that_is_none(folder):
    np.save(folder / "array.npy", np.ones(3, np.float32))
    for content in (b"", b"PK", b"\x93NUMPY", b"x" * 100, b"\x80\x04N."):
        (folder / NPZ_NAME).write_bytes(content)
        assert not survives(lambda: load_plan(folder))


def test_npz_that_is_an_npy(folder):
    np.save(folder / "array.npy", np.ones(3, np.float32))
    (folder / "array.npy").rename(folder / NPZ_NAME)
    assert not survives(lambda: load_plan(folder))


def test_damaged_plans_lower_or_are_refused(model, folder):
    """What was read in spite of wrong values is applied: a graph that TensorFlow takes, or an error that can be mended."""
    original = read(folder)
    graph, rng = open_model(model, tfquant.QuantConfig()).graph, random.Random(4)
    simplify(graph)
    normalize(graph)
    lowered = 0
    for _ in range(60):
        content = copy.deepcopy(original)
        for _ in range(rng.choice([1, 2])):
            if rng.random() < 0.6:
                entry = content["tensors"][rng.choice(list(content["tensors"]))]
                key = rng.choice(["dtype", "min", "max", "zero_point", "group"])
                entry[key] = {
                    "dtype": rng.choice(["quint8", "qint8"]),
                    "min": rng.choice([0.0, -1.0, -1e-20, -1e20]),
                    "max": rng.choice([0.0, 1.0, 1e-20, 1e20]),
                    "zero_point": rng.choice([0, 3, 128, 255]),
                    "group": rng.choice(["a", "image"]),
                }[key]
            else:
                rng.choice(content["ops"])["int8"] = False
        write(folder, content)
        try:
            plan = load_plan(folder)
            edited = graph.copy()
            onednn.lower(edited, apply_plan(edited, plan).units, plan)
        except TfquantError:
            continue
        lowered += 1
    assert 10 < lowered < 60
