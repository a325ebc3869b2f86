"""Small real models with real data: INT8 loses no more than chance, and is closer to float32 than other converters are."""

import pytest

from scripts import fewer_bits, fidelity

FOLDER = fidelity.find_assets()
# Mean KL(float32 || INT8) in nats that the best other converter without bias correction reaches with the same data.
BEST_OTHER_KL = {"keyword_spotting": 0.0103, "resnet8_cifar10": 0.0225, "xception_fer2013": 0.0089}


pytestmark = pytest.mark.skipif(
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


def test_most_of_what_naive_4_bits_lose_comes_back(monkeypatch):
    """W4A4 as published for ACIQ: clipping, bit allocation and bias correction, in the simulation."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import assets

    found = dict(fewer_bits.rows(assets.CASES["resnet8_cifar10"], 4, 4, 600, fewer_bits.STEPS))
    print("\n".join(map(str, fewer_bits.shown(found))))
    lost = {name: found["float32"]["metric"] - figures["metric"] for name, figures in found.items()}
    assert lost["naive"] > 20
    assert lost["+ clipping"] < 0.8 * lost["naive"]
    assert lost["+ bias correction"] < 0.3 * lost["naive"]
    kl = {name: figures["mean_kl"][0] for name, figures in found.items() if "mean_kl" in figures}
    assert kl["+ bias correction"] < 0.3 * kl["naive"]
    assert found["naive"]["size"] < 0.55 * found["8 bits"]["size"]
