"""What fewer than 8 bits cost real models, and what clipping, bit allocation and bias correction of the weights bring back.

    TFQUANT_ASSETS=path python scripts/fewer_bits.py [case ...] [--weight_bits 4] [--activation_bits 4] [--count 500]

Needs the folder of models and data that TFQUANT_ASSETS names (default ../shared/assets). Each row is simulated with the same
calibration data and compared with the float model: the metric on the labelled evaluation data; agreement of the largest class
and mean KL(float32 || simulation) in nats over the views with their 95% intervals; the share of what the naive row loses of
the metric that came back; the size that the bits would take.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import tfquant
from scripts import cases
from scripts.peers.failure import Failure
from tfquant.quiet import quiet_start
from tfquant.tables import table

NAIVE = {"preset": "fast", "estimator": "minmax", "weight_clipping": "none", "weight_correction": False}
# Name of a row to its options; each adds to the one before.
STEPS = {
    "naive": NAIVE,
    "+ clipping": {**NAIVE, "estimator": "aciq", "weight_clipping": "aciq"},
    "+ bit allocation": {**NAIVE, "estimator": "aciq", "weight_clipping": "aciq", "bit_allocation": True},
    "+ bias correction": {"preset": "fast", "estimator": "aciq", "bit_allocation": True},
}
# Other ways, each compared with the last row. A size budget is that of the row before: the same bytes, other bits per layer.
OTHERS = {
    "all but bit allocation": {"preset": "fast", "estimator": "aciq"},
    "estimator mse": {"preset": "fast", "estimator": "mse", "bit_allocation": True},
    "estimator auto": {"preset": "fast", "estimator": "auto", "bit_allocation": True},
    "estimator auto, preset default": {"estimator": "auto", "bit_allocation": True},
    "estimator auto, preset accuracy": {"preset": "accuracy", "estimator": "auto", "bit_allocation": True},
    "the same, by size budget": {"preset": "accuracy", "estimator": "auto", "size_budget": "the same"},
}
HEAD = ("", "metric", "back", "agreement %", "mean KL", "size")


def rows(
    case: Any, weight_bits: int, activation_bits: int, count: int | None, steps: Mapping[str, Mapping[str, Any]] = STEPS | OTHERS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures) of float32, of 8 bits, and of each step: metric, agreement, mean_kl (value, low, high) and size.

    Args:
        case: one of the assets'.
        weight_bits: of the weights.
        activation_bits: of the activations.
        count: at most so many evaluation samples and views; None for all.
        steps: name of a row to its options.
    """
    model: Any = str(case.model)
    if not case.model.is_dir():
        import keras

        model = keras.models.load_model(case.model, compile=False)
    data = case.calibration()
    x, labels = case.evaluation(*([count] if count else []))
    sets = [x]
    if case.imagenet_normalize:  # else the views are the evaluation data
        sets.append(np.concatenate(list(case.views(*([count] if count else [])))))
    plain = tfquant.quantize(model, data, tfquant.QuantConfig(verify=False, preset="fast"))
    reference = [outputs(plain.float_function(), plain, part) for part in sets]
    yield "float32", {"metric": case.metric(reference[0], labels), "size": plain.report.size_before}
    kinds: dict[str, dict[str, Any]] = {"8 bits": {"preset": "fast"}}
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    kinds |= {name: {**options, **bits} for name, options in steps.items()}
    import assets

    figures: dict[str, Any] = {}
    for name, options in kinds.items():
        if weight_bits == 8:
            options.pop("bit_allocation", None)
        if "size_budget" in options:
            del options["weight_bits"]
            options["size_budget"] = figures["size"]
        result = tfquant.quantize(model, data, tfquant.QuantConfig(verify=False, placement="int8", **options))
        simulation = result.simulation()
        found = [outputs(simulation, result, part) for part in sets]
        figures = {"metric": case.metric(found[0], labels), "size": result.report.size_after}
        yield name, figures | assets.fidelity(reference[-1], found[-1])


def outputs(function: Callable[..., Any], result: tfquant.QuantizedModel, x: np.ndarray) -> np.ndarray:
    """The first output for all samples, 50 at a time."""
    (key,) = result.input_names
    return np.concatenate([next(iter(function({key: x[i : i + 50]}).values())) for i in range(0, len(x), 50)])


def shown(found: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    best, naive = found["float32"]["metric"], found["naive"]["metric"]
    lines = [HEAD]
    for name, figures in found.items():
        back = (
            ""
            if name in ("float32", "8 bits", "naive")
            else f"{100 * (figures['metric'] - naive) / max(best - naive, 1e-9):.0f}%"
        )
        cells = [f"{figures['metric']:.2f}", back]
        for key, digits in (("agreement", 2), ("mean_kl", 4)):
            value = figures.get(key)
            cells.append("" if value is None else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*value, d=digits))
        lines.append((name, *cells, f"{figures['size'] / 1000:.0f} kB"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["resnet8_cifar10"], help="(default: %(default)s)")
    parser.add_argument("--weight_bits", type=int, default=4, choices=range(2, 9), help="(default: %(default)s)")
    parser.add_argument("--activation_bits", type=int, default=4, choices=range(2, 9), help="(default: %(default)s)")
    parser.add_argument("--count", type=int, help="at most so many evaluation samples, and views (default: all)")
    arguments = parser.parse_args()
    quiet_start()
    try:
        assets = cases.load_assets()
    except Failure as failure:
        print(f"fewer_bits: {failure}", file=sys.stderr)
        return 2
    for name in arguments.cases:
        if name not in assets.CASES:
            print(f"fewer_bits: there is no case {name!r}. Known: {', '.join(assets.CASES)}", file=sys.stderr)
            return 2
        bits = f"W{arguments.weight_bits}A{arguments.activation_bits}"
        found = dict(rows(assets.CASES[name], arguments.weight_bits, arguments.activation_bits, arguments.count))
        print("\n".join([f"{name}, {bits}", "", *table(shown(found)), ""]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
