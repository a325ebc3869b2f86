"""Tests of tfquant.registry: functions by name, from a program and from entry points of installed packages."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

import tfquant
from tfquant import registry
from tfquant.errors import ConfigError
from tfquant.registry import GROUPS, Registry

ROOT = Path(__file__).resolve().parent.parent


def first(stats, bits):
    return 0.0, 1.0


def second(stats, bits):
    return 0.0, 2.0


@pytest.fixture
def own(monkeypatch):
    """A registry of estimators with one function, as nothing was registered before."""
    monkeypatch.setattr(registry, "_registered", {kind: {} for kind in GROUPS})
    monkeypatch.setattr(registry, "_taken", dict.fromkeys(GROUPS, frozenset()))
    return Registry("estimator", {"own": first}, reserved=("auto",))


def package(folder, name, entries, group="tfquant.estimators", **modules):
    """What an installed package leaves on `sys.path`: its modules and its metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries]) + "\n")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text)
    return folder


def test_a_decorated_function_is_found_by_its_name(own):
    assert own.names() == ("own",)
    assert tfquant.register_estimator("mine")(second) is second
    assert own.names() == ("own", "mine")
    assert list(own) == ["own", "mine"]
    assert "mine" in own
    assert "other" not in own
    assert own.get("mine") is second
    assert own.get("own") is first
    own.register("mine")(first)
    assert own.get("mine") is first


def test_kinds_do_not_mix(own):
    tfquant.register_metric("mine")(first)
    tfquant.register_strategy("plan")(second)
    assert own.names() == ("own",)
    assert Registry("metric", {}).get("mine") is first
    assert Registry("strategy", {}).names() == ("plan",)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("own", first, "The estimator 'own' is one of tfquant's own: register yours under another name."),
        ("auto", first, "The estimator 'auto' is one of tfquant's own: register yours under another name."),
        ("a b", first, "The name of a registered estimator must be a word without spaces and commas. Received: 'a b'"),
        ("", first, "The name of a registered estimator must be a word without spaces and commas. Received: ''"),
        (first, first, f"The name of a registered estimator must be a word without spaces and commas. Received: {first!r}"),
        ("mine", 3, "The estimator 'mine' must be a function. Received: 3"),
    ],
)
def test_what_cannot_be_registered(own, name, function, message):
    with pytest.raises(ConfigError) as error:
        tfquant.register_estimator(name)(function)
    assert str(error.value) == message
    assert own.names() == ("own",)


def test_a_name_that_was_registered_before_the_builtin_one_is_known(own):
    tfquant.register_metric("top1")(first)
    with pytest.raises(ConfigError, match="'top1' is one of tfquant's own"):
        Registry("metric", {"top1": second})


def test_an_unknown_name_is_told_the_known_ones(own):
    own.register("mine")(second)
    with pytest.raises(ConfigError) as error:
        own.get("x" * 500)
    assert str(error.value) == f"There is no estimator '{'x' * 96}.... Known: own, mine"


def test_an_entry_point_is_imported_when_it_is_asked_for(own, tmp_path, monkeypatch):
    source = "def estimate(stats, bits):\n    return -1.0, 1.0\n"
    folder = package(
        tmp_path, "estimators_of_others", ["late = late_estimators:estimate", "own = none:f"], late_estimators=source
    )
    monkeypatch.syspath_prepend(str(folder))
    assert own.names() == ("own", "late")
    assert "late" in own
    assert "late_estimators" not in sys.modules
    assert own.get("late")(None, 8) == (-1.0, 1.0)
    assert own.get("late") is own.get("late")
    assert own.get("own") is first  # no package takes the place of what tfquant has
    sys.modules.pop("late_estimators")


@pytest.mark.parametrize(
    ("entry", "source", "message"),
    [
        ("bad_one:estimate", "import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("bad_two:estimate", "1 / 0\n", "ZeroDivisionError: division by zero"),
        ("bad_three:estimate", "x = 1\n", "AttributeError: module 'bad_three' has no attribute 'estimate'"),
        ("bad_four:estimate", "raise ValueError('two\\nlines')\n", "ValueError: two lines"),
    ],
)
def test_a_broken_entry_point_is_one_line(own, tmp_path, monkeypatch, entry, source, message):
    folder = package(tmp_path, "broken", [f"broken = {entry}"], **{entry.partition(":")[0]: source})
    monkeypatch.syspath_prepend(str(folder))
    assert "broken" in own
    with pytest.raises(ConfigError) as error:
        own.get("broken")
    assert str(error.value) == f"The estimator 'broken' cannot be loaded from {entry}: {message}"


def test_an_entry_point_that_is_no_function(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(package(tmp_path, "plain", ["plain = plain_value:x"], plain_value="x = 1\n")))
    with pytest.raises(ConfigError) as error:
        own.get("plain")
    assert str(error.value) == "The estimator 'plain' must be a function. Received: 1"


def test_two_packages_of_one_name(own, tmp_path, monkeypatch):
    for name in ("one", "two"):
        monkeypatch.syspath_prepend(str(package(tmp_path / name, name, [f"same = {name}_module:f"])))
    with pytest.raises(ConfigError) as error:
        own.get("same")
    assert str(error.value) == "Several packages have the estimator 'same'; remove all but one: one_module:f, two_module:f"
    tfquant.register_estimator("same")(second)  # the program says which
    assert own.get("same") is second


def test_the_example_registers_an_estimator(capsys):
    try:
        runpy.run_path(str(ROOT / "examples" / "own_estimator.py"), run_name="__main__")
    finally:
        registry._registered["estimator"].pop("six_sigma", None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3
    widths = []
    for line in lines:
        own, other = (re.findall(rf"{name} (-?[\d.]+)\.\.(-?[\d.]+)", line)[0] for name in ("six_sigma", "minmax"))
        widths.append((float(own[1]) - float(own[0]), float(other[1]) - float(other[0])))
    assert all(own <= 1.01 * other for own, other in widths)
    assert widths[0][0] < 0.9 * widths[0][1]  # its input has heavy tails


def test_the_command_line_finds_the_estimator_of_a_package(tmp_path, monkeypatch):
    source = "def estimate(stats, bits):\n    return -0.75, 0.25\n"
    package(tmp_path, "ranges", ["quarters = own_ranges:estimate"], own_ranges=source)
    keras.Sequential([keras.Input((8,), name="x"), keras.layers.Dense(8)]).export(tmp_path / "float32", verbose=False)
    np.save(tmp_path / "data.npy", np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32))
    command = [
        sys.executable,
        "-m",
        "tfquant.calibrate",
        "--saved_model=float32",
        "--data=data.npy",
        "--noverify",
        "--placement=int8",
    ]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for name, code in (("quarters", 0), ("thirds", 2)):
        done = subprocess.run(
            [*command, f"--output={name}", f"--estimator={name}"], capture_output=True, text=True, cwd=tmp_path, env=variables
        )
        assert done.returncode == code, done.stderr
    assert done.stderr.endswith(
        "estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, quarters, auto. Received: 'thirds'\n"
    )
    (spec,) = tfquant.load_plan(tmp_path / "quarters" / "quant_plan.json").tensors.values()
    assert spec.source == "quarters"
    assert (spec.low, spec.high) == pytest.approx((-0.75, 0.25), abs=0.003)
