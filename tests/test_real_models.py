"""Small real models with real data: INT8 loses no more than chance, and is closer to float32 than other converters are."""

import numpy as np
import pytest
import tensorflow as tf

import tfquant
from scripts import cases, fewer_bits
from scripts.cases import Outputs

FOLDER = cases.find_assets()
# Mean KL(float32 || INT8) in nats that the best other converter without bias correction reaches with the same data.
BEST_OTHER_KL = {"keyword_spotting": 0.0103, "resnet8_cifar10": 0.0225, "xception_fer2013": 0.0089}


def sqnr(reference, other):
    return 10 * np.log10((reference.astype(np.float64) ** 2).sum() / ((reference - other).astype(np.float64) ** 2).sum())


def only(outputs):
    (value,) = outputs.values()
    return np.asarray(value)


def served(path, key):
    """The one output of the SavedModel at `path`, by stock TensorFlow."""
    loaded = tf.saved_model.load(str(path))
    return lambda x: only(loaded.signatures["serving_default"](**{key: tf.constant(x)}))


pytestmark = pytest.mark.skipif(
    not (FOLDER / "assets.py").is_file(), reason=f"no models and data in {FOLDER}: TFQUANT_ASSETS names their folder"
)


@pytest.mark.parametrize("name", BEST_OTHER_KL)
def test_real_model(name, tmp_path):
    assets = cases.load_assets()
    case = assets.CASES[name]
    path = cases.saved_model(case, tmp_path)
    result = tfquant.quantize(str(path), case.calibration(), tfquant.QuantConfig(verify=False))
    result.save(tmp_path / "int8")
    (key,) = result.input_names
    int8 = served(tmp_path / "int8", key)
    float_model, simulation = result.float_function(), result.simulation()
    x, labels = case.evaluation()

    def outputs(run):
        views, labelled = (list(case.views()), [x[start : start + 50] for start in range(0, len(x), 50)])
        return Outputs(*(np.concatenate([run(part) for part in parts]) for parts in (views, labelled)))

    reference, found = outputs(lambda part: only(float_model({key: part}))), outputs(int8)
    simulated = np.concatenate([only(simulation({key: x[start : start + 50]})) for start in range(0, len(x), 50)])
    figures = cases.judge(assets, case, labels, reference, found)
    print(figures)
    assert figures.is_chance
    assert figures.mean_kl[2] < BEST_OTHER_KL[name] / 2
    assert figures.agreement[0] > 97
    assert result.report.int8_share == 100
    assert abs(sqnr(reference.labelled, found.labelled) - sqnr(reference.labelled, simulated)) < 1
    values = cases.divergences(assets, reference.views, found.views)
    assert values.mean() == pytest.approx(figures.mean_kl[0])


def test_most_of_what_naive_4_bits_lose_comes_back():
    """W4A4 as published for ACIQ: clipping, bit allocation and bias correction, in the simulation."""
    assets = cases.load_assets()
    found = dict(fewer_bits.rows(assets.CASES["resnet8_cifar10"], 4, 4, 600, fewer_bits.STEPS))
    print("\n".join(map(str, fewer_bits.shown(found))))
    lost = {name: found["float32"]["metric"] - figures["metric"] for name, figures in found.items()}
    assert lost["naive"] > 20
    assert lost["+ clipping"] < 0.8 * lost["naive"]
    assert lost["+ bias correction"] < 0.3 * lost["naive"]
    kl = {name: figures["mean_kl"][0] for name, figures in found.items() if "mean_kl" in figures}
    assert kl["+ bias correction"] < 0.3 * kl["naive"]
    assert found["naive"]["size"] < 0.55 * found["8 bits"]["size"]
