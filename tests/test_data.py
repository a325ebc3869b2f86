"""Tests of tfquant.data: what is yielded, number by number, and every error."""

import dataclasses
import io
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from tfquant.data import PREPROCESS, InputSpec, open_data
from tfquant.errors import ConfigError, DataError

X = InputSpec("x", (None, 3), "float32")
IDS = InputSpec("ids", (None, 2), "int32")
GREY = InputSpec("image", (None, 7, 7, 1), "float32")
FLAG = InputSpec("flag", (), "bool")
TEMPERATURE = InputSpec("temperature", (), "float32")
IMAGE = InputSpec("image", (None, 7, 7, 3), "float32")


def rows(count, width=3, dtype=np.float32):
    return np.arange(count * width).reshape(count, width).astype(dtype)


def join(batches, name="x"):
    return np.concatenate([batch[name] for batch in batches])


def sizes(batches, name="x"):
    return [len(batch[name]) for batch in batches]


def write_png(path, image):
    import tensorflow as tf

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tf.io.encode_png(image).numpy())


def position_image(height, width):
    """Red is the row, green the column, blue 7."""
    row, column = np.mgrid[:height, :width]
    return np.stack([row, column, np.full_like(row, 7)], -1).astype(np.uint8)


def read_one(path, spec=IMAGE, preprocess="none"):
    (batch,) = open_data(path, [spec], preprocess=preprocess)
    return batch[spec.name][0]


# Preprocessing


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tf", [-1.0, 0.0, 1.0]),
        ("torch", [-0.485 / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]),
        ("caffe", [255 - 103.939, 127.5 - 116.779, -123.68]),
        ("unit", [0.0, 0.5, 1.0]),
        ("none", [0.0, 127.5, 255.0]),
    ],
)
def test_preprocess_values(name, expected):
    pixel = np.array([[[[0.0, 127.5, 255.0]]]], np.float32)
    result = PREPROCESS[name](pixel)
    assert result.shape == (1, 1, 1, 3)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_preprocess_is_applied_to_images(tmp_path):
    write_png(tmp_path / "a.png", np.full((7, 7, 3), [255, 0, 51], np.uint8))
    np.testing.assert_allclose(read_one(tmp_path, preprocess="unit")[3, 3], [1.0, 0.0, 0.2], rtol=1e-6)
    caffe = read_one(tmp_path, preprocess="caffe")
    np.testing.assert_allclose(caffe[3, 3], [51 - 103.939, -116.779, 255 - 123.68], rtol=1e-5)
    assert caffe.flags.c_contiguous


# Images


@pytest.mark.parametrize(
    ("found", "wanted", "top", "left"),
    [
        ((8, 8), (7, 7), 0, 0),  # round(7 * 256 / 224) == 8: not resized
        ((8, 12), (7, 7), 0, 2),
        ((13, 8), (7, 7), 3, 0),
        ((8, 16), (7, 14), 0, 1),
        ((20, 8), (14, 7), 3, 0),
    ],
)
def test_crop_is_central(tmp_path, found, wanted, top, left):
    write_png(tmp_path / "a.png", position_image(*found))
    image = read_one(tmp_path, InputSpec("image", (None, *wanted, 3), "float32"))
    assert image.shape == (*wanted, 3)
    np.testing.assert_array_equal(image[:, 0, 0], np.arange(top, top + wanted[0]))
    np.testing.assert_array_equal(image[0, :, 1], np.arange(left, left + wanted[1]))
    assert (image[..., 2] == 7).all()


def test_short_side_is_resized_with_antialias(tmp_path):
    write_png(tmp_path / "a.png", position_image(32, 64))  # to 8 x 16, then 7 x 7 from (0, 4)
    image = read_one(tmp_path)
    # Pixel i of a ramp shrunk by 4 has its centre at 4 i + 1.5; the borders differ as the filter is cut off there.
    np.testing.assert_allclose(image[1:, 0, 0], 4 * np.arange(1, 7) + 1.5, atol=1e-3)
    np.testing.assert_allclose(image[0, :, 1], 4 * np.arange(4, 11) + 1.5, atol=1e-3)
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 200
    write_png(tmp_path / "a.png", stripes)
    np.testing.assert_allclose(read_one(tmp_path)[3, 1:6], 100, atol=8)  # without antialias: 200 or 0


def test_wide_crop_of_a_square_image_scales_until_it_fits(tmp_path):
    write_png(tmp_path / "a.png", position_image(16, 16))  # short side 8 would be too narrow for 14: to 14 x 14
    image = read_one(tmp_path, InputSpec("image", (None, 7, 14, 3), "float32"))
    centres = (np.arange(14) + 0.5) * 16 / 14 - 0.5
    np.testing.assert_allclose(image[0, 1:13, 1], centres[1:13], atol=0.2)
    np.testing.assert_allclose(image[:, 0, 0], centres[3:10], atol=0.2)


def bmp(image):
    """24 or 32 bit, bottom row first, each row padded to four bytes."""
    height, width, channels = image.shape
    swapped = image[::-1, :, [2, 1, 0, 3][:channels]]
    padding = b"\0" * (-width * channels % 4)
    body = b"".join(row.tobytes() + padding for row in swapped)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8 * channels, 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + header + body


@pytest.mark.parametrize("channels", [3, 4])
def test_bmp_to_rgb_and_grey(tmp_path, channels):
    image = np.full((8, 8, channels), 255, np.uint8)
    image[..., :3] = [200, 100, 50]
    (tmp_path / "a.BMP").write_bytes(bmp(image))
    np.testing.assert_array_equal(read_one(tmp_path)[2, 2], [200, 100, 50])
    assert read_one(tmp_path, GREY)[2, 2, 0] == pytest.approx(0.2989 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)


def test_grey_and_jpeg(tmp_path):
    import tensorflow as tf

    (tmp_path / "a.JPeG").write_bytes(tf.io.encode_jpeg(np.full((8, 8, 3), 90, np.uint8)).numpy())
    grey = read_one(tmp_path, GREY)
    assert grey.shape == (7, 7, 1)
    np.testing.assert_allclose(grey, 90, atol=1)
    np.testing.assert_allclose(read_one(tmp_path), 90, atol=1)


def test_images_are_an_evenly_spaced_sorted_subset(tmp_path):
    for folder in range(3):
        for index in range(4):
            write_png(tmp_path / f"class{folder}" / f"{index}.png", np.full((8, 8, 1), 10 * folder + index, np.uint8))
    (tmp_path / "class0" / "notes.txt").write_text("not an image")

    def values(**options):
        return [int(image.flat[0]) for image in join(open_data(tmp_path, [GREY], **options), "image")]

    assert values(subset_size=6, batch_size=4) == [0, 2, 10, 12, 20, 22]
    assert values(subset_size=3) == [0, 10, 20]
    assert values() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    batches = open_data(str(tmp_path), [GREY], subset_size=6, batch_size=4)
    assert batches.samples == 6
    assert batches.count == len(list(batches))
    assert sizes(batches, "image") == [4, 2]


# Arrays and files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_equals_the_arrays(tmp_path, save):
    arrays = {"x": rows(25), "ids": rows(25, 2, np.int64)}
    save(tmp_path / "d.npz", **arrays)
    batches = open_data(tmp_path / "d.npz", [X, IDS], batch_size=4, subset_size=22)
    for _ in range(2):  # re-iterable
        assert sizes(batches) == [4, 4, 4, 4, 4, 2]
        np.testing.assert_array_equal(join(batches), arrays["x"][:22])
        np.testing.assert_array_equal(join(batches, "ids"), arrays["ids"][:22])
    assert batches.samples == 22
    assert batches.count == len(list(batches))
    first = next(iter(batches))
    assert first["x"].dtype == np.float32
    assert first["ids"].dtype == np.int32
    from_dict = list(open_data(arrays, [X, IDS], batch_size=4, subset_size=22))
    for one, other in zip(batches, from_dict, strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])
        np.testing.assert_array_equal(one["ids"], other["ids"])


def test_npz_with_one_array_of_another_name(tmp_path):
    np.savez(tmp_path / "d.npz", rows(5))
    np.testing.assert_array_equal(join(open_data(str(tmp_path / "d.npz"), [X])), rows(5))


@pytest.mark.parametrize("fortran", [False, True])
def test_npy(tmp_path, fortran):
    np.save(tmp_path / "d.npy", np.asarray(rows(25, dtype=np.float64), order="F" if fortran else "C"))
    batches = open_data(tmp_path / "d.npy", [X])
    assert batches.samples == 25
    assert batches.count == len(list(batches))
    assert sizes(batches) == [10, 10, 5]
    np.testing.assert_array_equal(join(batches), rows(25))
    assert all(type(b["x"]) is np.ndarray and b["x"].flags.c_contiguous and b["x"].dtype == np.float32 for b in batches)


def test_npz_of_strings(tmp_path):
    np.savez(tmp_path / "d.npz", np.array(["one", "three"]))
    (batch,) = open_data(tmp_path / "d.npz", [InputSpec("s", (None,), "object")])
    assert batch["s"].dtype == object
    assert batch["s"].tolist() == ["one", "three"]


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_streamed(tmp_path, compressed):
    data = np.zeros((10_000, 1000), np.float32)  # 40 MB
    data[:, 0] = np.arange(10_000)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", x=data)
    del data
    spec = InputSpec("x", (None, 1000), "float32")
    seen = 0.0
    tracemalloc.start()
    for batch in open_data(tmp_path / "d.npz", [spec], subset_size=10_000, batch_size=50):
        seen += float(batch["x"][:, 0].sum(dtype=np.float64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == 10_000 * 9_999 / 2
    assert peak < 4e6  # a batch has 0.2 MB


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "uint8", "bool", ">f4"])
def test_safe_casts_to_float32(dtype):
    (batch,) = open_data(np.ones((2, 3), dtype), [X])
    assert batch["x"].dtype == np.dtype("float32")
    np.testing.assert_array_equal(batch["x"], np.ones((2, 3)))


def test_yielded_arrays_are_contiguous():
    (batch,) = open_data(np.zeros((3, 8), np.float32).T, [X])
    assert batch["x"].shape == (8, 3)
    assert batch["x"].flags.c_contiguous


# Python data


def test_items_are_rebatched():
    pieces = [rows(7), rows(1)[0], rows(12), rows(5)]  # batches, and one sample
    expected = np.concatenate([rows(7), rows(1), rows(12), rows(5)])
    for source in (pieces, tuple(pieces), lambda: iter(pieces), [[p] for p in pieces], [{"x": p} for p in pieces]):
        batches = open_data(source, [X], batch_size=6, subset_size=23)
        assert batches.samples is None
        for _ in range(2):
            assert sizes(batches) == [6, 6, 6, 5]
            np.testing.assert_array_equal(join(batches), expected[:23])


def test_items_of_two_inputs_come_in_the_order_of_the_inputs():
    source = [(rows(2), rows(2, 2, int)), (rows(1)[0], rows(1, 2, int)[0])]
    (batch,) = open_data(source, [X, IDS])
    np.testing.assert_array_equal(batch["x"], np.concatenate([rows(2), rows(1)]))
    np.testing.assert_array_equal(batch["ids"], [[0, 1], [2, 3], [0, 1]])


def test_generator_that_reuses_its_buffer():
    def reuse():
        buffer = np.zeros(3, np.float32)
        for value in range(4):
            buffer[:] = value
            yield buffer

    assert join(open_data(reuse, [X]))[:, 0].tolist() == [0, 1, 2, 3]


def test_nothing_is_asked_for_after_the_subset():
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield rows(1)[0]

    assert sizes(open_data(endless, [X], subset_size=5, batch_size=2)) == [2, 2, 1]
    assert len(asked) == 5


def test_datasets():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(rows(8))
    for source in (dataset, dataset.batch(3), dataset.map(lambda x: {"x": x}), dataset.map(lambda x: (x,)).repeat()):
        batches = open_data(source, [X], subset_size=8, batch_size=5)
        assert sizes(batches) == [5, 3]
        np.testing.assert_array_equal(join(batches), rows(8))


def test_fixed_batch():
    spec = InputSpec("x", (4, 3), "float32")
    batches = open_data(rows(11), [spec], batch_size=3)
    assert batches.samples == 8
    assert batches.count == len(list(batches))
    assert sizes(batches) == [4, 4]
    assert sizes(open_data([*rows(11)], [spec])) == [4, 4]
    assert open_data(rows(11), [spec], subset_size=7).samples == 4


def test_batches_end_where_the_shape_changes():
    spec = InputSpec("x", (None, None), "float32")
    batches = list(open_data([rows(2, 4), rows(3, 4), rows(2, 5)], [spec], batch_size=4))
    assert [b["x"].shape for b in batches] == [(4, 4), (1, 4), (2, 5)]


def test_items_of_unknown_rank_are_batches():
    batches = list(open_data([rows(2), rows(3), np.zeros(2)], [InputSpec("x", None, "float32")]))
    assert [b["x"].shape for b in batches] == [(5, 3), (2,)]


# Scalars, and inputs without a batch axis


def counts(batches):
    return [batches.rows(batch) for batch in batches]


@pytest.mark.parametrize("value", [True, [True] * 7], ids=["for all", "for each"])
def test_scalar_beside_a_batched_input(value):
    batches = open_data({"x": rows(7), "flag": np.array(value)}, [X, FLAG], batch_size=4)
    assert batches.batched
    assert batches.samples == 7
    assert counts(batches) == [4, 3]
    for batch in batches:
        assert type(batch["flag"]) is np.ndarray
        assert (batch["flag"].shape, batch["flag"].dtype, bool(batch["flag"])) == ((), np.dtype(bool), True)
    np.testing.assert_array_equal(join(batches), rows(7))


def test_batches_end_where_a_scalar_changes(tmp_path):
    temperature = np.array([1, 1, 1, 2, 2, 1, 1, 1, 1], np.float64)
    arrays = {"x": rows(9), "temperature": temperature}
    np.savez(tmp_path / "d.npz", **arrays)
    items = [{"x": x, "temperature": t} for x, t in zip(rows(9), temperature, strict=True)]
    for source in (arrays, tmp_path / "d.npz", items):
        batches = open_data(source, [X, TEMPERATURE], batch_size=3)
        assert counts(batches) == [3, 2, 3, 1]
        assert [float(batch["temperature"]) for batch in batches] == [1, 2, 1, 1]
        assert all(batch["temperature"].shape == () and batch["temperature"].dtype == np.float32 for batch in batches)
        np.testing.assert_array_equal(join(batches), rows(9))


def test_scalar_changes_in_a_fixed_batch():
    arrays = {"x": rows(9), "temperature": np.array([1, 1, 1, 2, 2, 2, 2, 1, 1], np.float32)}
    batches = open_data(arrays, [InputSpec("x", (2, 3), "float32"), TEMPERATURE])
    assert batches.samples is None  # rows without a partner of their temperature are left out
    assert counts(batches) == [2, 2, 2]
    np.testing.assert_array_equal(join(batches)[:, 0] / 3, [0, 1, 3, 4, 5, 6])
    arrays["temperature"] = np.float32(1)
    assert open_data(arrays, [InputSpec("x", (2, 3), "float32"), TEMPERATURE]).samples == 8


def test_one_scalar_for_a_whole_npz(tmp_path):
    np.savez(tmp_path / "d.npz", x=rows(7), temperature=np.float32(0.5))
    batches = open_data(tmp_path / "d.npz", [X, TEMPERATURE], batch_size=3)
    assert batches.samples == 7
    assert [(batches.rows(b), float(b["temperature"])) for b in batches] == [(3, 0.5), (3, 0.5), (1, 0.5)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (np.array([3.0, 3.0, 4.0]), [3, 3, 4]),
        (np.array(5.0), [5]),
        ([1, 2.5], [1, 2.5]),
        ([{"temperature": 7}], [7]),
        (lambda: iter([1.0, 1.0]), [1, 1]),
    ],
)
def test_scalars_alone_are_a_call_each(source, expected):
    batches = open_data(source, [TEMPERATURE])
    assert not batches.batched
    assert [batch["temperature"].tolist() for batch in batches] == expected
    assert all(batch["temperature"].shape == () for batch in batches)
    assert counts(batches) == [1] * len(expected)


def test_scalars_alone_from_npy(tmp_path):
    np.save(tmp_path / "d.npy", np.float32(5))
    assert [b["temperature"].tolist() for b in open_data(tmp_path / "d.npy", [TEMPERATURE])] == [5]


def test_one_axis_more_is_a_call_per_sample(tmp_path):
    spec, ids = InputSpec("image", (5, 4, 3), "float32"), InputSpec("ids", (None,), "int32")
    arrays = {
        "image": np.arange(6 * 60).reshape(6, 5, 4, 3),
        "ids": rows(6, 7, int),
        "temperature": np.arange(6.0),
    }
    np.savez(tmp_path / "d.npz", **arrays)
    for source in (arrays, tmp_path / "d.npz"):
        batches = open_data(source, [spec, ids, TEMPERATURE], subset_size=4)
        assert not batches.batched
        assert batches.samples == 4
        found = list(batches)
        assert counts(batches) == [1, 1, 1, 1]
        for index, batch in enumerate(found):
            np.testing.assert_array_equal(batch["image"], arrays["image"][index])
            np.testing.assert_array_equal(batch["ids"], arrays["ids"][index])
            assert batch["temperature"].shape == ()
            assert batch["temperature"] == index
            assert (batch["image"].dtype, batch["ids"].dtype) == (np.float32, np.int32)


def test_rank_of_the_input_is_a_batch_also_if_fixed():
    spec = InputSpec("x", (4, 3), "float32")
    assert counts(open_data(rows(9), [spec])) == [4, 4]
    calls = open_data(rows(8).reshape(2, 4, 3), [spec], subset_size=3)  # fewer than 4, but each call is a sample
    assert [batch["x"].shape for batch in calls] == [(4, 3), (4, 3)]
    assert not calls.batched
    assert [batch["x"].shape for batch in open_data([rows(4), rows(4)], [spec])] == [(4, 3), (4, 3)]


def test_images_for_an_input_without_batch(tmp_path):
    for value in (10, 20, 30):
        write_png(tmp_path / f"{value}.png", np.full((8, 8, 1), value, np.uint8))
    batches = open_data(tmp_path, [InputSpec("image", (7, 7, 1), "float32")], subset_size=2)
    assert not batches.batched
    assert batches.samples == 2
    assert [(batch["image"].shape, float(batch["image"][3, 3, 0])) for batch in batches] == [((7, 7, 1), 10), ((7, 7, 1), 20)]


def test_two_arrays_that_are_no_labels():
    assert counts(open_data((rows(8), rows(8)), [X])) == [10, 6]
    assert counts(open_data([rows(1)[0], rows(1)[0]], [X])) == [2]
    assert counts(open_data([rows(3, dtype=np.uint8)] * 2, [X])) == [6]
    assert_fails([rows(4, 5), rows(4, 5)], [X], "(None, 3)", "(4, 5)")


def test_function_by_name(tmp_path, monkeypatch):
    (tmp_path / "calib_pkg").mkdir()
    (tmp_path / "calib_pkg" / "good.py").write_text(
        "import numpy as np\ndef make():\n    for i in range(3):\n        yield np.full(3, i, 'float32')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    batches = open_data("calib_pkg.good:make", [X])
    for _ in range(2):
        assert join(batches)[:, 0].tolist() == [0, 1, 2]


def test_importing_the_module_does_not_import_tensorflow():
    code = "import sys, tfquant.data; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Errors


def assert_fails(source, inputs, *parts, error=DataError, **options):
    with pytest.raises(error) as caught:
        list(open_data(source, inputs, **options))
    message = str(caught.value)
    assert "\n" not in message
    assert "Received: " in message
    for part in parts:
        assert part in message
    return caught.value


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"preprocess": "keras"}, "'keras'"),
        ({"preprocess": "tf"}, "'tf'"),  # not a folder of images
        ({"subset_size": 0}, "subset_size"),
        ({"subset_size": 2.5}, "subset_size"),
        ({"batch_size": -1}, "batch_size"),
    ],
)
def test_wrong_options(options, part):
    assert_fails(rows(4), [X], part, error=ConfigError, **options)


def test_subset_below_the_fixed_batch():
    assert_fails(rows(9), [InputSpec("x", (8, 3), "float32")], "at least 8", error=ConfigError, subset_size=7)


NAN = rows(25)
NAN[13, 1] = np.nan


@pytest.mark.parametrize(
    ("source", "inputs", "parts"),
    [
        (rows(4, 5), [X], ["'x'", "(None, 3)", "(4, 5)"]),
        (rows(4)[0], [X], ["'x'", "(3,)"]),
        ([rows(4, 5)], [X], ["'x'", "item 0", "(4, 5)"]),
        ([rows(4), rows(2)[None]], [X], ["'x'", "item 1", "(1, 2, 3)"]),
        (rows(4, 0), [InputSpec("x", (None, None), "float32")], ["'x'", "(4, 0)"]),
        ([np.float32(1)], [InputSpec("x", None, "float32")], ["'x'", "batch dimension"]),
        (rows(4, 2), [IDS], ["'ids'", "int32", "float32"]),
        (np.array([["a", "b", "c"]]), [X], ["'x'", "float32", "<U1"]),
        (np.array([[1, None, 3]], object), [X], ["'x'", "object"]),
        (np.ones((2, 3), complex), [X], ["'x'", "complex128"]),
        (rows(4), [InputSpec("x", (None, 3), "object")], ["'x'", "strings"]),
        (np.array([["a", 5, "b"]], object), [InputSpec("x", (None, 3), "object")], ["'x'", "sample 0", "5"]),
        (np.array([[1, 2], [3, 2**40]]), [IDS], ["'ids'", "sample 1", str(2**40)]),
        (NAN, [X], ["'x'", "sample 13", "nan"]),
        ([*NAN], [X], ["'x'", "sample 13", "nan"]),
        (np.full((1, 3), 1e300), [X], ["'x'", "sample 0", "1e+300"]),
        (rows(0), [X], ["no samples"]),
        ([], [X], ["no samples", "list"]),
        ([rows(0)], [X], ["no samples"]),
        (rows(3), [InputSpec("x", (4, 3), "float32")], ["exactly 4", "3 samples"]),
        ([*rows(3)], [InputSpec("x", (4, 3), "float32")], ["exactly 4", "3 samples"]),
        ({"y": rows(4)}, [X], ["'x'", "'y'"]),
        ({"x": rows(4), "y": rows(4)}, [X], ["'x'", "'y'"]),
        ({"x": [[1, 2, 3], [4]]}, [X], ["'x'", "not an array"]),
        ([{"y": rows(4)}], [X], ["'x'", "'y'", "item 0"]),
        ({"x": rows(4), "ids": rows(3, 2, int)}, [X, IDS], ["'x': 4", "'ids': 3"]),
        ([(rows(4), rows(3, 2, int))], [X, IDS], ["'x': 4", "'ids': 3", "item 0"]),
        ([rows(4)], [X, IDS], ["'x', 'ids'", "ndarray"]),
        ([(rows(4), np.zeros(4))], [X], [".map(lambda x, y: x)"]),
        ([({"x": rows(4), "ids": rows(4, 2, int)}, np.zeros(4))], [X, IDS], [".map(lambda x, y: x)"]),
        (rows(4), [X, IDS], ["'x', 'ids'", ".npz"]),
        (iter([rows(4)]), [X], ["only once", "list_iterator"]),
        ((row for row in rows(4)), [X], ["only once", "pass the function", "generator"]),
        (7, [X], ["int"]),
        (None, [X], ["NoneType"]),
        (lambda: None, [X], ["<lambda>", "TypeError"]),
        (lambda a: [a], [X], ["<lambda>", "TypeError"]),
        (rows(4), [InputSpec("x", (), "float32")], ["'x'", "is a scalar", "(4, 3)"]),
        ([rows(1)[0]], [InputSpec("x", (), "float32")], ["'x'", "item 0", "is a scalar", "(3,)"]),
        ([(rows(2), np.ones(2))], [X, FLAG], ["'flag'", "item 0", "one value for the item", "(2,)"]),
        ({"x": rows(4), "flag": np.zeros(3, bool)}, [X, FLAG], ["'x': 4", "'flag': 3"]),
        ({"x": rows(4), "flag": np.float32(1)}, [X, FLAG], ["'flag'", "bool", "float32"]),
        (np.zeros((4, 7, 8, 3)), [InputSpec("x", (7, 7, 3), "float32")], ["'x'", "(None, 7, 7, 3)", "(4, 7, 8, 3)"]),
        (np.zeros((2, 4, 3)), [InputSpec("x", (7, 3), "float32")], ["'x'", "(None, 7, 3)", "(2, 4, 3)"]),
        (
            {"x": rows(4)[None], "ids": rows(4, 2, int)},  # one of the two has an axis more
            [X, IDS],
            ["'x'", "(None, 3)", "(1, 4, 3)"],
        ),
        ({"x": NAN[:, None], "flag": np.zeros(25, bool)}, [X, FLAG], ["'x'", "sample 13", "nan"]),
        ((rows(8), np.zeros(8)), [X], ["looks like labels: pass the inputs alone", "tuple", "(8, 3)", "(8,)"]),
        ([rows(8), np.eye(8)], [X], ["looks like labels", "list", "(8, 8)"]),
        ((rows(8, 1), np.zeros((8, 1), int)), [InputSpec("x", (None, 1), "float32")], ["looks like labels"]),
        (rows(4), [InputSpec("x", (None, 3), "nosuch")], ["'x'", "nosuch"]),
        (rows(4), [], ["inputs"]),
        ((rows(2), rows(2)), [InputSpec("x", (1, 3), "float32"), InputSpec("y", (2, 3), "float32")], ["batch dimension"]),
    ],
)
def test_data_that_do_not_fit(source, inputs, parts):
    assert_fails(source, inputs, *parts)


def test_labels_of_a_dataset():
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((rows(8), np.zeros(8))).batch(4)
    assert_fails(dataset, [X], ".map(lambda x, y: x)", "tuple")


def test_exception_of_the_user_is_chained():
    def broken():
        yield rows(1)
        raise KeyError("first line\nsecond line")

    error = assert_fails(broken, [X], "broken", "KeyError", "first line")
    assert isinstance(error.__cause__, KeyError)


def npz_bytes(save=np.savez, **arrays):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def npy_bytes(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zip_bytes(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return stream.getvalue()


def damaged_npz():
    data = npz_bytes(x=rows(50))
    middle = data.index(rows(50)[20:22].tobytes())
    return data[:middle] + b"\xff" + data[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "contents", "parts"),
    [
        ("d.npz", b"garbage", ["BadZipFile"]),
        ("d.npz", b"", ["BadZipFile"]),
        ("d.npz", npz_bytes(x=rows(50))[:300], ["BadZipFile"]),
        ("d.npz", damaged_npz(), ["BadZipFile"]),
        ("d.npz", zip_bytes(x=b"garbage"), ["ValueError"]),
        ("d.npz", zip_bytes(x=npy_bytes(rows(50))[:-8]), ["ValueError", "x.npy"]),
        ("d.npz", zip_bytes(x=b"\x93NUMPY\x03\x00" + npy_bytes(rows(5))[8:]), ["version (3, 0)"]),
        ("d.npz", zip_bytes(), ["'x'", "nothing"]),
        ("d.npz", npz_bytes(a=rows(5), b=rows(5)), ["'x'", "'a', 'b'"]),
        ("d.npz", npz_bytes(x=np.asfortranarray(rows(5))), ["x.npy", "Fortran"]),
        ("d.npz", npz_bytes(x=np.array([[1, None, 2]])), ["x.npy", "pickled"]),
        ("d.npz", npz_bytes(x=rows(5, 4)), ["'x'", "(None, 3)", "(5, 4)"]),
        ("d.npz", npz_bytes(x=NAN), ["'x'", "sample 13"]),
        ("d.npz", npz_bytes(x=rows(0)), ["no samples"]),
        ("d.npy", b"garbage", ["ValueError"]),
        ("d.npy", b"", ["EOFError"]),
        ("d.npy", npy_bytes(rows(50))[:-8], ["ValueError"]),
        ("d.npy", npy_bytes(np.array([[1, None, 2]])), ["Python objects"]),
        ("d.npy", npz_bytes(x=rows(5)), ["under the name of an .npy"]),
        ("d.npy", npy_bytes(rows(5, 4)), ["'x'", "(None, 3)", "(5, 4)"]),
        ("d.npy", npy_bytes(rows(0)), ["no samples"]),
        ("d.csv", b"1,2,3", [".npz"]),
        ("with\nnewline.npy", b"", ["newline.npy"]),
    ],
)
def test_broken_files(tmp_path, name, contents, parts):
    (tmp_path / name).write_bytes(contents)
    assert_fails(tmp_path / name, [X], name.splitlines()[-1], *parts)


def test_npz_of_different_numbers_of_samples(tmp_path):
    np.savez(tmp_path / "d.npz", x=rows(4), ids=rows(3, 2, int))
    assert_fails(tmp_path / "d.npz", [X, IDS], "'x': 4", "'ids': 3")


def test_npz_that_breaks_between_iterations(tmp_path):
    np.savez(tmp_path / "d.npz", x=rows(40))
    batches = open_data(tmp_path / "d.npz", [X])
    (tmp_path / "d.npz").unlink()
    with pytest.raises(DataError, match=r"d\.npz"):
        list(batches)


@pytest.mark.parametrize("source", ["missing.npz", "missing/folder", "bad\0name", "", "a:b:c"])
def test_missing_path(source):
    assert_fails(source, [X], "do not exist", source)


def test_files_for_one_input_only(tmp_path):
    np.save(tmp_path / "d.npy", rows(4))
    assert_fails(tmp_path / "d.npy", [X, IDS], "'x', 'ids'", ".npz")
    assert_fails(tmp_path, [X, IDS], "'x', 'ids'", ".npz")


@pytest.mark.parametrize(
    "contents",
    [b"", b"garbage", b"BM", bmp(position_image(8, 8))[:100], "png", "jpeg"],
    ids=["empty", "garbage", "bmp header", "bmp", "png", "jpeg"],
)
def test_broken_image(tmp_path, contents):
    import tensorflow as tf

    if isinstance(contents, str):
        contents = getattr(tf.io, f"encode_{contents}")(position_image(64, 64)).numpy()[:-40]
    (tmp_path / "bad.png").write_bytes(contents)
    message = str(assert_fails(tmp_path, [IMAGE], "bad.png", "InvalidArgumentError"))
    assert "{{" not in message


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (X, "'x'"),
        (InputSpec("image", None, "float32"), "None"),
        (InputSpec("image", (None, None, None, 3), "float32"), "(None, None, None, 3)"),
        (InputSpec("image", (None, 3, 7, 7), "float32"), "(None, 3, 7, 7)"),
        (InputSpec("image", (None, 7, 7, 3), "int32"), "int32"),
    ],
)
def test_inputs_that_images_cannot_feed(tmp_path, spec, part):
    write_png(tmp_path / "a.png", position_image(8, 8))
    assert_fails(tmp_path, [spec], part)


def test_empty_folder_and_grey_with_rgb_preprocess(tmp_path):
    assert_fails(tmp_path, [IMAGE], "no images", str(tmp_path))
    assert_fails(tmp_path, [GREY], "'torch'", error=ConfigError, preprocess="torch")


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("calib_nosuch:make", ["calib_nosuch", "ModuleNotFoundError"]),
        ("calib_bad:make", ["calib_bad", "SyntaxError"]),
        ("calib_exit:make", ["calib_exit", "SystemExit"]),
        ("calib_ok:nosuch", ["calib_ok", "'nosuch'"]),
        ("calib_ok:NUMBER", ["calib_ok:NUMBER", "int"]),
        ("calib_ok:fails", ["calib_ok:fails", "RuntimeError", "camera is off"]),
    ],
)
def test_function_by_name_errors(tmp_path, monkeypatch, source, parts):
    (tmp_path / "calib_bad.py").write_text("def (:\n")
    (tmp_path / "calib_exit.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "calib_ok.py").write_text("NUMBER = 3\ndef fails():\n    raise RuntimeError('camera\\nis off')\n    yield\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert assert_fails(source, [X], *parts).__cause__ is not None or "NUMBER" in source


def test_images_for_an_input_of_bytes(tmp_path):
    write_png(tmp_path / "a.png", np.full((7, 9, 3), [255, 0, 51], np.uint8))
    spec = dataclasses.replace(IMAGE, dtype="uint8")
    read = read_one(tmp_path, spec)
    assert read.dtype == np.uint8
    assert read[3, 3].tolist() == [255, 0, 51]
    assert_fails(tmp_path, [spec], "takes pixels as they are, uint8", "'unit'", error=ConfigError, preprocess="unit")
