"""Tests of quantization-aware training: its arithmetic, schedule, quantizers, names, files and ways to train."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from absl.testing import flagsaver

import tfquant
from tfquant import calibrate
from tfquant.errors import ConfigError, ModelError
from tfquant.qat.core import Stage
from tfquant.qat.quantizers import Site

CLASSES, SAMPLES = 5, 200
RNG = np.random.default_rng(0)
X = RNG.normal(size=(SAMPLES, 8, 8, 3)).astype(np.float32)
Y = (X.reshape(SAMPLES, -1) @ RNG.normal(size=(192, CLASSES))).argmax(1)
EXACT = tfquant.QuantConfig(placement="int8", verify=False)
BOTH = pytest.mark.parametrize("k", [keras, tf_keras], ids=["keras", "tf_keras"])
MOSTLY_KERAS_3 = pytest.mark.parametrize("k", [keras, pytest.param(tf_keras, marks=pytest.mark.slow)], ids=["keras", "tf_keras"])
ROOT = pathlib.Path(__file__).parent.parent


def network(k=keras):
    k.utils.set_random_seed(0)
    image = k.Input((8, 8, 3), name="image")
    x = k.layers.Conv2D(8, 3, use_bias=False, name="conv")(image)
    x = k.layers.ReLU(name="relu")(k.layers.BatchNormalization(momentum=0.8, name="norm")(x))
    x = k.layers.Flatten()(k.layers.DepthwiseConv2D(3, name="depthwise")(x))
    return k.Model(image, k.layers.Dense(CLASSES, name="dense")(x), name="net")


def compiled(k, q, rate=5e-3, **options):
    q.compile(k.optimizers.Adam(rate), k.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return q


def fit(q, epochs=1, **options):
    return q.fit(X, Y, batch_size=50, epochs=epochs, verbose=0, shuffle=False, **options).history["loss"]


def predicted(q):
    return q.predict(X, verbose=0, batch_size=50)


def outputs(int8, x=X):
    return np.asarray(tf.nest.flatten(int8(x))[0])


def variables(q, site):
    return {name: np.array(tf.convert_to_tensor(v)) for name, v in q._core.value.variables[site].items()}


def in_other_process(code, **environment):
    """What a script prints."""
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


# -- arithmetic ------------------------------------------------------------------------------------------------------------
@MOSTLY_KERAS_3
def test_batch_norm_is_trained_folded(k):
    """Integers of INT8 are those of the trained weights: a factor per channel changes scales, and no integer."""
    model = network(k)
    q = compiled(k, tfquant.quantize_model(model))
    fit(q, 2)
    plan = tfquant.quantize(q, config=EXACT)
    (kernel,) = [np.asarray(w) for w in model.get_layer("conv").get_weights()]
    integers = np.round(kernel / (np.abs(kernel).max((0, 1, 2)) / 127))
    norm = model.get_layer("norm")
    gamma, _, _, variance = norm.get_weights()
    folded = kernel * gamma / np.sqrt(variance + norm.epsilon)
    (unit,) = [unit for unit in plan.annotation.units.values() if "/conv/" in unit.name]
    scales = plan.plan.weight_scales[unit.name]
    np.testing.assert_allclose(scales, np.abs(folded).max((0, 1, 2)) / 127, rtol=1e-4)
    found = np.round(unit.weights / scales)
    assert np.array_equal(found.reshape(kernel.shape), integers * np.sign(gamma))


@BOTH
def test_statistics_stand_still_after_their_step(k):
    model = network(k)
    q = compiled(k, tfquant.quantize_model(model))
    norm = model.get_layer("norm")
    schedule = tfquant.QuantizationSchedule(freeze_batch_norm_after=4)
    fit(q, callbacks=[schedule])
    after_4 = norm.get_weights()
    fit(q, callbacks=[schedule])
    gamma, beta, mean, variance = norm.get_weights()
    assert np.abs(after_4[2]).max() > 1e-3
    assert np.array_equal(mean, after_4[2])
    assert np.array_equal(variance, after_4[3])
    assert np.abs(gamma - after_4[0]).max() > 1e-3
    assert np.abs(beta - after_4[1]).max() > 1e-3
    # It trains what is used: with frozen statistics training and inference compute the same.
    q.stage = Stage(freezes_statistics=True, observes=False)
    np.testing.assert_allclose(q(X, training=True), q(X, training=False), atol=1e-5)


# -- schedule --------------------------------------------------------------------------------------------------------------
@BOTH
def test_training_begins_in_float_and_ranges_freeze(k):
    floats, model = network(k), network(k)
    compiled(k, floats), compiled(k, q := tfquant.quantize_model(model))
    schedule = tfquant.QuantizationSchedule(quantize_after=4, freeze_ranges_after=8)
    np.testing.assert_allclose(fit(q, callbacks=[schedule]), fit(floats), rtol=1e-5)
    for mine, theirs in zip(model.get_weights(), floats.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    observed = variables(q, "image")
    assert observed["observed"] == 1
    batches = X.reshape(4, 50, -1)
    low, high = batches.min((1, 2)), batches.max((1, 2))
    expected = np.array([low[0], high[0]])
    for ends in zip(low[1:], high[1:], strict=True):
        expected = 0.99 * expected + 0.01 * np.array(ends)
    np.testing.assert_allclose(observed["range"], expected, rtol=1e-5)
    assert q.stage == Stage(quantizes=False)
    fit(q, callbacks=[schedule])
    assert q.stage == Stage(quantizes=True)
    frozen = variables(q, "net/relu/Relu")
    fit(q, callbacks=[schedule])
    assert q.stage == Stage(quantizes=True, observes=False)
    assert np.array_equal(variables(q, "net/relu/Relu")["range"], frozen["range"])


@pytest.mark.parametrize("option", ["quantize_after", "freeze_ranges_after", "freeze_batch_norm_after"])
def test_a_schedule_counts_steps(option):
    with pytest.raises(ConfigError, match=rf"{option} must be a number of steps, at least 0. Received: -1"):
        tfquant.QuantizationSchedule(**{option: -1})


def test_a_schedule_is_for_quantization_aware_models():
    model = compiled(keras, network())
    with pytest.raises(ConfigError, match=r"QuantizationSchedule is for models of tfquant.quantize_model. Received: net"):
        fit(model, callbacks=[tfquant.QuantizationSchedule()])


# -- quantizers ------------------------------------------------------------------------------------------------------------
class Variables:
    """What a Keras model would make for a quantizer."""

    def __call__(self, name, shape, initial, trains):
        return tf.Variable(tf.broadcast_to(tf.cast(initial, tf.float32), shape), trainable=trains)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_values_of_a_fixed_range(bits, is_symmetric):
    x = np.linspace(-3, 3, 101).astype(np.float32)
    site = Site("x", bits, is_symmetric=is_symmetric)
    found = tfquant.FixedRangeQuantizer(-1.0, 2.0).quantize(tf.constant(x), site, {}, None).numpy()
    if is_symmetric:
        most = 2 ** (bits - 1) - 1
        expected = np.clip(np.round(x / (2 / most)), -most, most) * (2 / most)
    else:
        step = 3 / (2**bits - 1)
        zero = np.round(1 / step)
        expected = (np.clip(np.round(x / step) + zero, 0, 2**bits - 1) - zero) * step
    assert len(np.unique(found)) <= 2**bits
    is_tie = np.abs(np.abs(x / (2 / most if is_symmetric else step)) % 1 - 0.5) < 1e-3
    np.testing.assert_allclose(found[~is_tie], expected[~is_tie], atol=1e-5)


def test_last_value_follows_the_weights():
    w = RNG.normal(size=(20, 4)).astype(np.float32) * [1, 2, 4, 8]
    site = Site("w", 8, channels=4, is_symmetric=True)
    found = tfquant.LastValueQuantizer().quantize(tf.constant(w, tf.float32), site, {}, None).numpy()
    steps = np.abs(w).max(0) / 127
    np.testing.assert_allclose(found, np.round(w / steps) * steps, atol=1e-4)


def test_the_gradient_of_a_learned_step():
    """As LSQ has it (arXiv:1902.08153, equations 3 and 5)."""
    bits, most = 4, 7
    w = (RNG.normal(size=(50, 3)) * [0.5, 1.0, 2.0]).astype(np.float32)
    upstream = RNG.normal(size=w.shape).astype(np.float32)
    site = Site("w", bits, channels=3, is_symmetric=True, weights=w)
    quantizer = tfquant.LearnedStepQuantizer()
    held = quantizer.build(site, Variables())
    steps = np.exp(held["log_step"].numpy())
    plain = np.abs(w).max(0) / most
    errors = [((w - np.clip(np.round(w / step), -most, most) * step) ** 2).sum(0) for step in (steps, plain)]
    assert (errors[0] <= errors[1]).all()
    assert (errors[0] < 0.9 * errors[1]).any()
    with tf.GradientTape() as tape:
        x = tf.Variable(w)
        y = quantizer.quantize(tf.convert_to_tensor(x), site, held, None)
        loss = tf.reduce_sum(y * upstream)
    of_w, of_log_steps = tape.gradient(loss, [x, held["log_step"]])
    ratio = w / steps
    inside = np.abs(ratio) <= most * (1 + 1e-5)
    np.testing.assert_allclose(y, np.clip(np.round(ratio), -most, most) * steps, atol=1e-5)
    terms = np.where(inside, np.clip(np.round(ratio), -most, most) - ratio, np.sign(ratio) * most) * upstream
    np.testing.assert_allclose(of_w, np.where(inside, upstream, 0), atol=1e-6)
    of_steps = terms.sum(0) / np.sqrt(50 * most)
    np.testing.assert_allclose(of_log_steps, of_steps / steps, rtol=1e-3, atol=1e-4 / steps.min())


def test_a_learned_step_trains():
    config = tfquant.QuantizeConfig(
        weight_quantizer=tfquant.LearnedStepQuantizer(), activation_quantizer=tfquant.LearnedStepQuantizer(), weight_bits=4
    )
    q = compiled(keras, tfquant.quantize_model(network(), config))
    before = variables(q, "net/conv/convolution/weights")["log_step"]
    losses = fit(q, 3)
    assert losses[-1] < losses[0]
    after = variables(q, "net/conv/convolution/weights")["log_step"]
    assert (np.abs(after - before) > 1e-5).all()
    image = variables(q, "image")
    assert 1 / 2550 < np.exp(image["log_step"]) < 1
    assert image["observed"] == 1


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_fewer_bits_are_simulated(bits):
    q = compiled(keras, tfquant.quantize_model(network(), tfquant.QuantizeConfig(weight_bits=bits)))
    fit(q, 2)
    simulated = tfquant.quantize(q, config=EXACT)
    assert simulated.plan.is_simulated
    assert {int(n) for several in simulated.plan.weight_bits.values() for n in np.unique(several)} == {bits}
    expected, found = predicted(q), outputs(simulated)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.995


@pytest.mark.parametrize("quantizer", [tfquant.LastValueQuantizer, tfquant.MovingAverageQuantizer, tfquant.LearnedStepQuantizer])
def test_quantizers_say_which_bits_there_are(quantizer):
    with pytest.raises(ConfigError, match=r"num_bits must be 2 to 8. Received: 9"):
        quantizer(num_bits=9)
    assert quantizer(num_bits=5) == quantizer.from_config(quantizer(num_bits=5).get_config())


def test_configs_check_themselves():
    with pytest.raises(ConfigError, match=r"weight_bits must be 2 to 8. Received: 1"):
        tfquant.QuantizeConfig(weight_bits=1)
    with pytest.raises(ConfigError, match=r"weight_quantizer must be a quantizer.*Received: 'lsq'"):
        tfquant.QuantizeConfig(weight_quantizer="lsq")
    with pytest.raises(ConfigError, match=r"A range must hold 0.*Received: \(1, 2\)"):
        tfquant.FixedRangeQuantizer(1, 2)
    with pytest.raises(ConfigError, match=r"momentum must be at least 0 and below 1. Received: 1"):
        tfquant.MovingAverageQuantizer(momentum=1)
    config = tfquant.QuantizeConfig(weight_quantizer=tfquant.MovingAverageQuantizer())
    with pytest.raises(ConfigError, match=r"MovingAverageQuantizer is for activations.*Received: the weights of net/conv"):
        tfquant.quantize_model(network(), config)


class Coarse(tfquant.Quantizer):
    """Steps of 1/4 or whatever it is given, up to 127 of them."""

    def __init__(self, step=0.25, num_bits=None):
        super().__init__(num_bits)
        self.step = step

    def quantize(self, x, site, variables, observed):
        return tf.quantization.fake_quant_with_min_max_args(x, -127 * self.step, 127 * self.step, narrow_range=True)

    def get_config(self):
        return {"step": self.step, **super().get_config()}


@MOSTLY_KERAS_3
def test_a_quantizer_of_ones_own(k, tmp_path):
    q = compiled(k, tfquant.quantize_model(network(k), tfquant.QuantizeConfig(activation_quantizer=Coarse(0.125))))
    fit(q)
    expected = predicted(q)
    assert tfquant.quantize(q, config=EXACT).plan.tensors["image"].scale == 0.125
    q.save(tmp_path / "q.keras")
    with tfquant.quantize_scope(Coarse):
        loaded = k.models.load_model(tmp_path / "q.keras")
    assert np.array_equal(predicted(loaded), expected)


# -- annotations and configs -----------------------------------------------------------------------------------------------
def weights_of(q):
    return sorted(weight.name.split("/")[1] for weight in q.design.weights)


@MOSTLY_KERAS_3
def test_annotated_layers_alone_are_quantized(k):
    model = network(k)
    assert tfquant.quantize_annotate_layer(model.get_layer("dense"), tfquant.QuantizeConfig(weight_bits=6)) is model.get_layer(
        "dense"
    )
    q = tfquant.quantize_apply(model)
    assert weights_of(q) == ["dense"]
    (choice,) = [choice for name, choice in q._choices.value.items() if name.endswith("/weights")]
    assert choice.site.bits == 6
    whole = tfquant.quantize_apply(tfquant.quantize_annotate_model(network(k)))
    assert weights_of(whole) == ["conv", "dense", "depthwise"]


def test_annotations_are_checked():
    with pytest.raises(ConfigError, match=r"No layer is annotated: .*Received: net"):
        tfquant.quantize_apply(network())
    with pytest.raises(ConfigError, match=r"takes a Keras layer. Received: 3"):
        tfquant.quantize_annotate_layer(3)
    with pytest.raises(ConfigError, match=r"quantize_config must be a tfquant.QuantizeConfig. Received: 8"):
        tfquant.quantize_annotate_layer(network().get_layer("conv"), 8)


@pytest.mark.parametrize("pattern", ["net/conv", "conv", "c*v", "*/conv"])
def test_configs_by_pattern(pattern):
    q = tfquant.quantize_model(
        network(), configs={"*": tfquant.QuantizeConfig(5), pattern: tfquant.QuantizeConfig(weight_bits=3)}
    )
    bits = {name.split("/")[1]: c.site.bits for name, c in q._choices.value.items() if name.endswith("/weights")}
    assert bits == {"conv": 3, "depthwise": 5, "dense": 5}


def test_a_pattern_must_fit():
    with pytest.raises(ConfigError, match=r"configs must name layers that are quantized.*Received: 'cnov'; there are .*net/conv"):
        tfquant.quantize_model(network(), configs={"cnov": tfquant.QuantizeConfig()})
    with pytest.raises(ConfigError, match="cnov"):
        tfquant.quantize_model(network(), ignored_scope=["net/cnov"])


@MOSTLY_KERAS_3
def test_ignored_scope_stays_float(k):
    q = compiled(k, tfquant.quantize_model(network(k), ignored_scope=["net/depthwise"]))
    assert weights_of(q) == ["conv", "dense"]
    fit(q)
    int8 = tfquant.quantize(q, config=EXACT)
    assert [decision.name.split("/")[1] for decision in int8.report.float_ops] == ["depthwise"]
    np.testing.assert_allclose(outputs(int8), predicted(q), atol=1e-2)


# -- models that cannot be taken -------------------------------------------------------------------------------------------
def test_wrong_models(monkeypatch):
    with pytest.raises(ModelError, match=r"takes a Keras 3 or tf_keras model .*Received: builtins.str"):
        tfquant.quantize_model("model.keras")
    with pytest.raises(ModelError, match=r"quantization-aware already. Received: quantized_net"):
        tfquant.quantize_model(tfquant.quantize_model(network()))
    unbuilt = keras.Sequential([keras.layers.Dense(2)], name="unbuilt")
    with pytest.raises(ModelError, match=r"must be built: call it on a batch first. Received: unbuilt"):
        tfquant.quantize_model(unbuilt)
    image = keras.Input((4,))
    nothing = keras.Model(image, keras.layers.Softmax()(image))
    with pytest.raises(ModelError, match="Nothing of the model can run in INT8"):
        tfquant.quantize_model(nothing)
    model = network()
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(ModelError, match=r"The Keras model must run on TensorFlow. Received: backend jax"):
        tfquant.quantize_model(model)


@MOSTLY_KERAS_3
def test_a_fake_quantized_model_is_not_quantized_again(k):
    class Rounding(k.layers.Layer):
        def call(self, x):
            return tf.quantization.fake_quant_with_min_max_args(x, -1, 1)

    image = k.Input((4,))
    model = k.Model(image, k.layers.Dense(2)(Rounding(name="rounding")(image)))
    with pytest.raises(ModelError, match=r"has fake quantization already.*Received: .*rounding"):
        tfquant.quantize_model(model)


# -- files -----------------------------------------------------------------------------------------------------------------
_LOADING = """
import sys, numpy as np, {package}, tfquant
q = {package}.models.load_model(sys.argv[1] if len(sys.argv) > 1 else {path!r})
x = np.load({data!r})
np.save({result!r}, q.predict(x, verbose=0, batch_size=50))
q.fit(x, np.zeros(len(x), int), batch_size=50, verbose=0)
"""


@BOTH
def test_files(k, tmp_path):
    q = compiled(k, tfquant.quantize_model(network(k)))
    fit(q)
    expected = predicted(q)
    path = tmp_path / "q.keras"
    q.save(path)
    loaded = k.models.load_model(path)
    assert np.array_equal(predicted(loaded), expected)
    assert loaded.design == q.design
    assert variables(loaded, "image")["range"].tolist() == variables(q, "image")["range"].tolist()
    # Both go on alike: the optimizer's state is there, too.
    assert fit(loaded) == pytest.approx(fit(q), rel=1e-4)
    np.save(tmp_path / "x.npy", X)
    in_other_process(
        _LOADING.format(package=k.__name__, path=str(path), data=str(tmp_path / "x.npy"), result=str(tmp_path / "y.npy"))
    )
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)


@MOSTLY_KERAS_3
def test_weights_alone(k, tmp_path):
    q = compiled(k, tfquant.quantize_model(network(k)))
    fit(q)
    q.save_weights(tmp_path / "q.weights.h5")
    other = tfquant.quantize_model(network(k))
    assert not np.array_equal(predicted(other), predicted(q))
    other.load_weights(tmp_path / "q.weights.h5")
    assert np.array_equal(predicted(other), predicted(q))
    again = type(q).from_config(q.get_config())
    again.set_weights(q.get_weights())
    assert np.array_equal(predicted(again), predicted(q))


def test_formats_of_tf_keras(tmp_path):
    q = compiled(tf_keras, tfquant.quantize_model(network(tf_keras)))
    fit(q)
    q.save(tmp_path / "saved")
    served = tf.saved_model.load(str(tmp_path / "saved"))
    (found,) = served.signatures["serving_default"](tf.constant(X)).values()
    np.testing.assert_allclose(found, predicted(q), atol=1e-5)


@MOSTLY_KERAS_3
def test_exports_say_the_learned_ranges(k, tmp_path):
    q = compiled(k, tfquant.quantize_model(network(k)))
    fit(q)
    q.export(str(tmp_path / "saved"))
    from_file = tfquant.quantize(str(tmp_path / "saved"), config=EXACT)
    directly = tfquant.quantize(q, config=EXACT)
    assert from_file.plan.tensors.keys() == directly.plan.tensors.keys()
    assert np.array_equal(outputs(from_file), outputs(directly))


@BOTH
def test_the_command_line_takes_its_file(k, tmp_path, capsys):
    q = compiled(k, tfquant.quantize_model(network(k)))
    fit(q)
    q.save(tmp_path / "q.keras")
    words = ["--saved_model", tmp_path / "q.keras", "--output", tmp_path / "int8", "--placement", "int8", "--noverify"]
    with flagsaver.flagsaver():
        assert calibrate.main(calibrate.parse(["calibrate", *map(str, words)])) == 0, capsys.readouterr().err
    found = tf.saved_model.load(str(tmp_path / "int8")).serve(tf.constant(X))
    assert (np.asarray(tf.nest.flatten(found)[0]).argmax(1) == predicted(q).argmax(1)).mean() >= 0.995
    plan = json.loads((tmp_path / "int8" / "quant_plan.json").read_text())
    assert {spec["source"] for spec in plan["tensors"].values()} == {"learned"}


# -- calibration and teachers ----------------------------------------------------------------------------------------------
@MOSTLY_KERAS_3
def test_ranges_begin_where_calibration_ends(k):
    model = network(k)
    fit(compiled(k, model))
    q = tfquant.quantize_model(model, calibrate=X)
    plan = tfquant.quantize(model, X, tfquant.QuantConfig(placement="int8", verify=False, algorithms=(), preset="fast")).plan
    names = [activation.name for activation in q.design.activations]
    assert set(names) == {spec.group for spec in plan.tensors.values()}
    for name in names:
        low, high = variables(q, name)["range"]
        np.testing.assert_allclose([low, high], [plan.tensors[name].low, plan.tensors[name].high], rtol=1e-4, atol=1e-6)
        assert variables(q, name)["observed"] == 1
    np.testing.assert_allclose(predicted(q), predicted(model), atol=0.1)


@BOTH
def test_a_teacher_stays_as_it_was(k):
    model = network(k)
    fit(compiled(k, model))
    floats = predicted(model)
    q = compiled(k, tfquant.quantize_model(model, calibrate=X, teacher=model))
    alone = compiled(k, tfquant.quantize_model(model, calibrate=X))
    labels = alone.evaluate(X, Y, verbose=0, batch_size=50)
    students = predicted(q)
    expected = 0.5 * labels + 0.5 * ((students - floats) ** 2).mean() / floats.var()
    x, y = tf.constant(X), tf.constant(Y)
    found = float(q.compute_loss(x, y, q(x)) if k is keras else trains(q, x, y))
    assert found == pytest.approx(expected, rel=1e-3)
    fit(q, 2)
    assert np.abs(predicted(model) - floats).max() > 0.05
    np.testing.assert_allclose(tf.nest.flatten(q._teacher.value(x))[0], floats, atol=1e-5)


def trains(q, x, y):
    object.__setattr__(q, "_trains", True)
    try:
        return q.compute_loss(x, y, q(x))
    finally:
        object.__setattr__(q, "_trains", False)


@MOSTLY_KERAS_3
def test_a_teacher_counts_in_training_alone(k):
    other = network(k)
    other.get_layer("dense").set_weights([w + 1.0 for w in other.get_layer("dense").get_weights()])
    after = {}
    for name, teacher in (("none", None), ("other", other)):
        q = compiled(k, tfquant.quantize_model(network(k), teacher=teacher))
        before = q.evaluate(X, Y, verbose=0)
        assert before == pytest.approx(after.setdefault("evaluated", before), rel=1e-5)
        fit(q)
        after[name] = predicted(q)
    assert np.abs(after["other"] - after["none"]).max() > 0.05


# -- ways to train ---------------------------------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize(
    "options",
    [{"jit_compile": True}, {"jit_compile": False}, {"run_eagerly": True}, {"steps_per_execution": 2}],
    ids=["jit", "no_jit", "eager", "several_steps"],
)
def test_ways_to_compile(k, options):
    q = compiled(k, tfquant.quantize_model(network(k)), **options)
    losses = fit(q, 2, callbacks=[tfquant.QuantizationSchedule(2, 6, 6)])
    reference = compiled(k, tfquant.quantize_model(network(k)), jit_compile=False)
    np.testing.assert_allclose(losses, fit(reference, 2, callbacks=[tfquant.QuantizationSchedule(2, 6, 6)]), rtol=2e-2)
    assert losses[1] < losses[0]
    assert variables(q, "image")["observed"] == 1
    np.testing.assert_allclose(outputs(tfquant.quantize(q, config=EXACT)), predicted(q), atol=1e-2)


@BOTH
def test_it_can_be_called(k):
    q = compiled(k, tfquant.quantize_model(network(k)))
    fit(q)
    np.testing.assert_allclose(q(X), predicted(q), atol=1e-5)
    before = variables(q, "image")["range"]
    q(10 * X, training=True)
    after = variables(q, "image")["range"]
    np.testing.assert_allclose(after, 0.99 * before + 0.01 * 10 * np.array([X.min(), X.max()]), rtol=1e-4)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(q(X[:8], training=True) ** 2)
    gradients = tape.gradient(loss, [v.value if k is keras else v for v in q.trainable_variables])
    assert all(float(tf.norm(gradient)) > 0 for gradient in gradients)


@BOTH
def test_mixed_precision(k):
    k.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = network(k)
    finally:
        k.mixed_precision.set_global_policy("float32")
    q = compiled(k, tfquant.quantize_model(model))
    losses = fit(q, 3)
    assert losses[-1] < losses[0]
    int8 = tfquant.quantize(q, config=EXACT)
    assert not int8.report.float_ops
    assert (outputs(int8).argmax(1) == predicted(q).argmax(1)).mean() >= 0.97  # of 8 bits of mantissa
    assert {weight.dtype for weight in model.trainable_variables} <= {"float32", tf.float32}


_REPLICAS = """
import sys
sys.path.insert(0, {tests!r})
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import numpy as np, test_qat as t, tfquant
k = t.{package}
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = t.network(k)
    q = t.compiled(k, tfquant.quantize_model(model), jit_compile=False)
losses = t.fit(q, 2, callbacks=[tfquant.QuantizationSchedule(2, 6, 6)])
int8 = tfquant.quantize(q, config=t.EXACT)
print(losses[0], losses[1], *t.variables(q, "image")["range"], (t.outputs(int8).argmax(1) == t.predicted(q).argmax(1)).mean())
"""


@MOSTLY_KERAS_3
def test_replicas(k):
    """Ranges are the mean of what the replicas saw."""
    text = in_other_process(_REPLICAS.format(tests=str(pathlib.Path(__file__).parent), package=k.__name__))
    first, last, low, high, same = (float(value) for value in text.split()[-5:])
    assert last < first
    assert same >= 0.995
    halves = X.reshape(4, 2, 25, -1)
    lows, highs = halves.min((2, 3)).mean(1), halves.max((2, 3)).mean(1)
    expected = np.array([lows[0], highs[0]])
    for step in (*range(1, 4), 0, 1):  # 6 steps observe
        expected = 0.99 * expected + 0.01 * np.array([lows[step], highs[step]])
    np.testing.assert_allclose([low, high], expected, rtol=1e-3)


@MOSTLY_KERAS_3
def test_equal_models_get_equal_designs_and_plans(k):
    model = network(k)
    first, second = tfquant.quantize_model(model, calibrate=X), tfquant.quantize_model(model, calibrate=X)
    assert first.design == second.design
    results = [tfquant.quantize(q, config=EXACT) for q in (first, second)]
    assert results[0].plan.tensors == results[1].plan.tensors
    assert results[0].plan.ops == results[1].plan.ops
    found = [result.graph_def.SerializeToString(deterministic=True) for result in results]
    assert found[0] == found[1]
