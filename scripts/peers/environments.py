"""The virtual environments of the peers, made when first needed."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.peers.failure import Failure

_VERSION = "import sys; print(*sys.version_info[:2], sep='.')"


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        name: of the folder.
        requirements: as pip takes them.
        pythons: versions of Python that the requirements exist for, the preferred first.
    """

    name: str
    requirements: tuple[str, ...]
    pythons: tuple[str, ...] = ("3.12", "3.11")


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("openvino", ("openvino>=2026.4,<2026.5", "nncf>=3.4,<3.5")),
        Environment(
            "onnxruntime",
            (
                "onnxruntime>=1.31,<1.32",
                "onnx>=1.23,<1.24",
                "tf2onnx>=1.17,<1.18",
                "sympy>=1.13,<2",  # for the symbolic shapes of quant_pre_process
                "tensorflow>=2.21,<2.22",  # reads the SavedModel
            ),
        ),
        Environment("neural_compressor", ("neural-compressor-tf>=3.10,<3.11", "tensorflow>=2.15.1,<2.16"), ("3.11",)),
    )
}


def python_of(name: str, folder: Path) -> Path:
    """The Python of a peer's environment, which is made in `folder` unless it is there.

    Raises:
        Failure: there is no Python for it, or pip cannot install it.
    """
    environment = ENVIRONMENTS[name]
    home = folder / name
    python, stamp = home / "bin" / "python", folder / f"{name}.installed"
    if python.exists() and stamp.exists() and stamp.read_text().split() == list(environment.requirements):
        return python
    print(f"installing {', '.join(environment.requirements)} into {home}", file=sys.stderr, flush=True)
    if not python.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run([_find_python(environment), "-m", "venv", str(home)], f"{home} cannot be made")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *environment.requirements], "pip cannot install it")
    stamp.write_text("\n".join(environment.requirements))  # last: an interrupted install is repeated
    return python


def _find_python(environment: Environment) -> str:
    here = ".".join(map(str, sys.version_info[:2]))
    if here in environment.pythons:
        return sys.executable
    for version in environment.pythons:
        # A launcher of a version manager may be there without the version behind it.
        path = shutil.which(f"python{version}")
        if path and subprocess.run([path, "-c", _VERSION], capture_output=True, text=True).stdout.strip() == version:
            return path
    raise Failure(f"needs python {' or '.join(environment.pythons)}, which is not on the PATH")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
        raise Failure(f"{what}: {errors[0][:300]}")
