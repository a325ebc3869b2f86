"""Small real models with real data: INT8 loses no more than chance, and is closer to float32 than other converters are."""

import pytest

from scripts import fidelity

FOLDER = fidelity.find_assets()
# Mean KL(float32 || INT8) in nats that the best other converter without bias correction reaches with the same data.
BEST_OTHER_KL = {"keyword_spotting": 0.0103, "resnet8_cifar10": 0.0225, "xception_fer2013": 0.0089}


@pytest.mark.skipif(
    not (FOLDER / "assets.py").is_file(), reason=f"no models and data in {FOLDER}: TFQUANT_ASSETS names their folder"
)
@pytest.mark.parametrize("name", BEST_OTHER_KL)
def test_real_model(name, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import assets

    figures = fidelity.measure(assets, name, "mse")
    print(figures)
    assert figures.is_chance
    assert figures.mean_kl[2] < BEST_OTHER_KL[name] / 2
    assert figures.agreement[0] > 97
    assert figures.int8_share == 100
    assert abs(figures.sqnr - figures.simulated_sqnr) < 1
