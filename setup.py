"""Packaging of tfquant; pyproject.toml holds the build backend and the tools' settings."""

from setuptools import find_packages, setup

TF_KERAS = ["tf_keras>=2.18,<2.22"]
EXAMPLES = ["scikit-learn>=1.5,<2"]
TUNE = ["optuna>=4,<6"]
ONNX = ["tf2onnx>=1.17,<2", "onnx>=1.17,<2", "onnxruntime>=1.20,<2"]
OPENVINO = ["openvino>=2025.0,<2027"]
TFMOT = ["tensorflow-model-optimization>=0.8,<1"]

setup(
    name="tfquant",
    version="0.1.0",
    description="Turns a trained TensorFlow model into an INT8 SavedModel that stock TensorFlow runs through oneDNN",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["tfquant", "tfquant.*"]),
    package_data={"tfquant": ["py.typed", "placement/table.json"]},
    install_requires=[
        "tensorflow>=2.18,<2.22",
        "numpy>=1.26",
        "absl-py>=1.4",  # tensorflow-model-optimization 0.8 takes none from 2.0 on
        "tqdm>=4.66",
        "networkx>=3.2,<4",
        "PyYAML>=6",
    ],
    extras_require={
        "examples": EXAMPLES,
        # For the strategy "bayesian" of tfquant.tune.
        "tune": TUNE,
        # For models in ONNX: tf2onnx writes them, ONNX Runtime verifies them.
        "onnx": ONNX,
        # To verify them in OpenVINO as well: 180 MB.
        "openvino": [*ONNX, *OPENVINO],
        # For models of Keras 2: files that Keras 3 refuses, and models in memory. Its version is that of TensorFlow.
        "tf_keras": TF_KERAS,
        # For quantize_model(engine="tfmot"), and to load models that TFMOT made.
        "qat": [*TFMOT, *TF_KERAS],
        # ruff's formatting changes between minor versions, so its range is one minor version.
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "types-PyYAML",
            *EXAMPLES,
            *TF_KERAS,
            *TUNE,
            *ONNX,
            *OPENVINO,
            *TFMOT,
        ],
    },
)
