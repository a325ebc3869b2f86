"""The model recipes: what they write, and that their weights make sense."""

import importlib
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from models import applications, digits

ROOT = Path(__file__).parents[1]
EPOCHS = 2


@pytest.fixture(scope="module")
def digits_output(tmp_path_factory):
    output = tmp_path_factory.mktemp("digits") / "new" / "directory"
    assert digits.main(["--output", str(output), "--epochs", str(EPOCHS)]) == 0
    return output


@pytest.fixture(scope="module")
def mobilenet():
    return applications.build("mobilenetv2", seed=0, input_size=96)


def unseen_images(count=8):
    return applications.images("MobileNetV2", (96, 96, 3), count, seed=1234)


def test_digits_data(digits_output):
    with np.load(digits_output / "calibration.npz") as data:
        assert data.files == ["image"]
        calibration = data["image"]
    with np.load(digits_output / "evaluation.npz") as data:
        assert sorted(data.files) == ["image", "labels"]
        images, labels = data["image"], data["labels"]
    assert calibration.shape == (200, 8, 8, 1)
    assert images.shape == (360, 8, 8, 1)
    assert labels.shape == (360,)
    assert calibration.dtype == images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == 1
    counts = np.bincount(labels)
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 3  # stratified: the classes' sizes differ by 9 in 1797

    held_out = {image.tobytes() for image in images}
    assert not any(image.tobytes() in held_out for image in calibration)


def test_digits_saved_model(digits_output):
    with np.load(digits_output / "evaluation.npz") as data:
        images, labels = data["image"], data["labels"]
    loaded = tf.saved_model.load(str(digits_output / "float32"))
    function = loaded.signatures["serving_default"]
    (spec,) = function.structured_input_signature[1].values()
    assert spec.shape.as_list() == [None, 8, 8, 1]
    (output,) = function(image=tf.constant(images)).values()
    np.testing.assert_allclose(
        output, keras.models.load_model(digits_output / "digits.keras").predict(images, verbose=0), atol=1e-5
    )
    # The recipe's own 12 epochs reach 0.99; two reached at least 0.98 with each of four seeds.
    assert np.mean(np.argmax(output, axis=-1) == labels) > 0.93


def test_digits_reports_a_wrong_argument_in_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--output", str(tmp_path), "--epochs", "0"])
    assert capsys.readouterr().err == "digits: argument --epochs: must be at least 1, got 0\n"


def test_digits_reports_an_output_that_is_a_file(capsys, tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert digits.main(["--output", str(path)]) == 1
    assert capsys.readouterr().err == f"digits: cannot write to {path}: File exists\n"


def test_application_answers_differ(mobilenet):
    images = unseen_images()
    logits = applications.logits(mobilenet, images)
    assert np.isfinite(logits).all()
    # Over images, each class: calibrated to 2 on other images.
    assert 1 < logits.std(axis=0).mean() < 4
    # No bias towards a class that outweighs the image.
    assert np.abs(logits.mean(axis=0)).mean() < logits.std(axis=0).mean()
    outputs = mobilenet(images, training=False).numpy()
    np.testing.assert_allclose(outputs.sum(axis=-1), 1, atol=1e-4)
    assert len(set(outputs.argmax(axis=-1))) >= 4


def test_application_batch_normalizations_are_in_range_at_every_depth(mobilenet):
    layers = [layer for layer in applications.leaves(mobilenet) if isinstance(layer, keras.layers.BatchNormalization)]
    assert len(layers) == 52
    outputs = keras.Model(mobilenet.inputs[0], [layer.output for layer in layers])(unseen_images(), training=False)
    spread = {layer.name: float(np.std(output)) for layer, output in zip(layers, outputs, strict=True)}
    assert {name: value for name, value in spread.items() if not 0.3 < value < 3} == {}
    for layer in layers:
        assert layer.momentum == 0.999  # MobileNetV2's own
        assert np.std(layer.gamma.numpy()) > 0.1
        assert np.std(layer.beta.numpy()) > 0.05
        assert np.std(layer.moving_variance.numpy()) > 0


def test_application_depends_on_the_seed_alone():
    first, same, other = (applications.build("MobileNetV3Small", seed=seed, input_size=32).get_weights() for seed in (3, 3, 4))
    # Reductions run on several threads, in any order: equal up to rounding.
    for a, b in zip(first, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    assert any(np.abs(a - b).max() > 0.1 for a, b in zip(first, other, strict=True))


def test_application_is_exported(capsys, tmp_path):
    output = tmp_path / "model"
    assert applications.main(["--name", "MOBILENET", "--output", str(output), "--input_size", "32"]) == 0
    assert str(output) in capsys.readouterr().out
    function = tf.saved_model.load(str(output)).signatures["serving_default"]
    (spec,) = function.structured_input_signature[1].values()
    assert spec.shape.as_list() == [None, 32, 32, 3]


@pytest.mark.parametrize("name", ["MobileNetV2", "RegNetX002"])  # the second is not in Keras 3
def test_application_of_tf_keras(name, tmp_path):
    arguments = ["--name", name.lower(), "--keras", "tf_keras", "--output", str(tmp_path), "--input_size", "32"]
    assert applications.main(arguments) == 0
    function = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    ((key, spec),) = function.structured_input_signature[1].items()
    assert spec.shape.as_list() == [None, 32, 32, 3]
    images = applications.images(name, (32, 32, 3), 8, 1, importlib.import_module("tf_keras"))
    (output,) = function(**{key: tf.constant(images)}).values()
    assert output.shape == (8, 1000)
    assert np.isfinite(output).all()
    assert np.std(output, axis=0).max() > 1e-3


def test_of_large_images_fewer_are_taken():
    sizes = {size: applications.affordable((size, size, 3), 32) for size in (32, 224, 299, 331, 480, 600, 1000)}
    assert sizes == {32: 32, 224: 32, 299: 32, 331: 26, 480: 12, 600: 8, 1000: 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "resnet5"], "no keras.applications model is named 'resnet5'; the nearest is ResNet50"),
        (["--name", "ResNet50", "--input_size", "8"], "Input size must be at least 32x32"),
    ],
)
def test_application_reports_a_wrong_argument_in_one_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        applications.main([*arguments, "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_compare_reports_both_models_without_tfquant(digits_output):
    # The float32 model stands in for both: the answers must agree.
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import compare\n"
        "status = compare.main(sys.argv[1:]); assert 'tfquant' not in sys.modules; sys.exit(status)"
    )
    model = str(digits_output / "float32")
    arguments = ["--float32", model, "--int8", model, "--data", str(digits_output / "evaluation.npz")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "same answer as float32 for 1.0000" in result.stdout
