"""The names of the algorithms in `refine/`, and the presets: options know them before TensorFlow is imported."""

from collections.abc import Mapping

ALGORITHMS = (
    "channel_alignment",
    "equalization",
    "smooth_quant",
    "sequential_ranges",
    "adaround",
    "bias_correction",
    "full_bias_correction",
)
PRESETS: Mapping[str, tuple[str, ...]] = {
    "fast": (),
    "default": ("equalization", "smooth_quant", "bias_correction"),
    "accuracy": (
        "equalization",
        "smooth_quant",
        "sequential_ranges",
        "adaround",
        "full_bias_correction",
    ),
}
