"""A metric and a strategy of your own for tuning: what is measured, and what returns to float in which order.

    python examples/own_strategy.py

In one program the decorators below are all it takes. For `python -m tfquant.tune --metric worst_class`, and for everybody who
installs your package, name the functions as entry points of it; no decorators are needed then. In pyproject.toml:

    [project.entry-points."tfquant.metrics"]
    worst_class = "my_package.tuning:worst_class"

    [project.entry-points."tfquant.strategies"]
    ends_first = "my_package.tuning:ends_first"
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import tfquant


@tfquant.register_metric("worst_class")
def worst_class(outputs, labels):
    """The accuracy of the class that fares worst, in percent.

    Args:
        outputs: of the model, (N, classes).
        labels: (N,), int64.

    Returns:
        One number for all samples, as no sample has one by itself; else it would be an array (N,), whose mean counts.
    """
    right = outputs.argmax(-1) == labels
    return 100 * min(right[labels == label].mean() for label in np.unique(labels))


@tfquant.register_strategy("ends_first")
def ends_first(search):
    """The first and the last layer return to float, then what is next to them, until the goal is met.

    Args:
        search: `tfquant.tuner.Search`: the ops that may return, trials of sets of them, scores, the goal.

    Returns:
        Why it stopped.
    """
    for count in range(1, len(search.ops) // 2 + 1):
        trial = search.trial([*search.ops[:count], *search.ops[-count:]], f"{count} from each end")
        if trial.met:
            return "the goal is met"
    return "no layer is left in the middle"


def main():
    """Tunes a small network with both, and prints what was tried."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, activation="relu") for _ in range(4)]
    model = keras.Sequential([keras.Input((16,)), *layers, keras.layers.Dense(3)])
    rng = np.random.default_rng(0)
    calibration, x = (rng.standard_t(4, (count, 16)).astype(np.float32) for count in (100, 1000))
    y = model.predict(x, verbose=0).argmax(-1)
    result = tfquant.tune(
        model,
        calibration,
        tfquant.Validation((x, y), "worst_class"),
        max_drop=3.0,
        drop_type="absolute",
        strategy="ends_first",
        config=tfquant.QuantConfig(placement="int8", preset="fast", verify=False),
    )
    print(result)


if __name__ == "__main__":
    main()
