"""An estimator of your own: how ranges are read off what was seen of an activation.

    python examples/own_estimator.py

In one program the decorator below is all that it takes. For `python -m tfquant.calibrate --estimator six_sigma`, and for
everybody who installs your package, name the function as an entry point of it; no decorator is needed then. In pyproject.toml:

    [project.entry-points."tfquant.estimators"]
    six_sigma = "my_package.ranges:six_sigma"

or in setup.py:

    setup(..., entry_points={"tfquant.estimators": ["six_sigma = my_package.ranges:six_sigma"]})
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tfquant


@tfquant.register_estimator("six_sigma")
def six_sigma(stats, bits):
    """Six standard deviations around the mean, within what was seen.

    Args:
        stats: `tfquant.observe.statistics.TensorStats`: extremes, sums, and a histogram of all values.
        bits: of the integers; 8, or fewer where fewer are simulated.

    Returns:
        (low, high); the quantizer widens it to hold 0.
    """
    edges, counts = stats.histogram()
    centers, shares = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    mean = (shares * centers).sum()
    deviation = np.sqrt((shares * (centers - mean) ** 2).sum())
    return max(stats.low, mean - 6 * deviation), min(stats.high, mean + 6 * deviation)


def main():
    """Quantizes a small network with it, and prints the ranges beside those of "minmax"."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(16, 3, activation="relu"),
        keras.layers.Conv2D(16, 3, strides=2),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10),
    ]
    model = keras.Sequential([keras.Input((16, 16, 3)), *layers])
    samples = np.random.default_rng(0).standard_t(4, (64, 16, 16, 3)).astype(np.float32)
    plans = [
        tfquant.quantize(model, samples, tfquant.QuantConfig(estimator=name, verify=False)).plan
        for name in ("six_sigma", "minmax")
    ]
    for name, spec in plans[0].tensors.items():
        other = plans[1].tensors[name]
        print(f"{name}: {spec.source} {spec.low:.3f}..{spec.high:.3f}, {other.source} {other.low:.3f}..{other.high:.3f}")


if __name__ == "__main__":
    main()
