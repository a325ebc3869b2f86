"""Accuracy against other tools: rows of known figures, paired intervals, and a run of the sides that need no environment."""

import json

import numpy as np
import pytest

from scripts import accuracy, cases
from scripts.common import append_row

# A case as assets.py has them, with a softmax over four pixels as its model; views are the evaluation data.
ASSETS = """
import pathlib
import types
import numpy as np

def probabilities(rows, are_probabilities):
    rows = np.asarray(rows, np.float64)
    if not are_probabilities:
        rows = np.exp(rows - rows.max(-1, keepdims=True))
    return rows / rows.sum(-1, keepdims=True)

def fidelity(reference, outputs):
    p, q = (probabilities(rows, True) for rows in (reference, outputs))
    kl = float((p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum(-1).mean())
    agreement = float((p.argmax(-1) == q.argmax(-1)).mean() * 100)
    return {"agreement": (agreement, agreement - 1, agreement + 1), "mean_kl": (kl, kl / 2, kl * 2)}

def lost_won(reference, outputs, labels):
    right, other = reference.argmax(-1) == labels, outputs.argmax(-1) == labels
    return int((right & ~other).sum()), int((~right & other).sum())

SAMPLES = np.random.default_rng(0).normal(size=(230, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(230) % 10
CASES = {
    "net": types.SimpleNamespace(
        model=pathlib.Path(__file__).parent / "net",
        calibration=lambda: SAMPLES[:20],
        evaluation=lambda: (SAMPLES, LABELS),
        views=lambda: iter([SAMPLES[:150], SAMPLES[150:]]),
        metric=lambda outputs, labels: float((outputs.argmax(-1) == labels).mean() * 100),
    )
}
"""


def row(side, kl, lost=0, won=0, case="net", reason="", **more):
    figures = {"agreement": [97.5, 97, 98], "mean_kl": [kl, kl / 2, kl * 2], "metric": 80.0, "lost": lost, "won": won}
    facts = {"case": case, "side": side, "title": side.upper(), "reason": reason, "machine": "A CPU", "versions": ["tool 1.0"]}
    return facts | (figures if not reason else {}) | more


def compared(tmp_path, rows, divergences):
    for side, values in divergences.items():
        (tmp_path / "net").mkdir(exist_ok=True)
        np.save(tmp_path / "net" / f"{side}.npy", np.asarray(values))
    return accuracy.standings({(each["case"], each["side"]): each for each in rows}, tmp_path)


def test_a_paired_interval_sees_what_two_intervals_hide():
    rng = np.random.default_rng(1)
    hard = rng.exponential(size=500)  # how hard a sample is weighs more than who judges it
    value, low, high = cases.paired(hard, 0.95 * hard)
    assert value == pytest.approx(-0.05 * hard.mean())
    assert low < value < high < 0
    assert high - low == pytest.approx(2 * 1.96 * 0.05 * hard.std() / 500**0.5, rel=0.1)
    _, low, high = cases.paired(hard, rng.permutation(hard))
    assert low < 0 < high


def test_who_is_better_and_by_how_much(tmp_path):
    easy = np.linspace(0, 0.02, 100)
    rows = [
        row("tflite", 0.02),
        row("float32", 0.0),
        row("openvino_mixed", 0.005, lost=9, won=1),
        row("tfquant_default", 0.01),
        row("tfquant_fast", 0.004, lost=30, won=2),
        row("onnxruntime", 0.0, reason="cannot quantize: no such op"),
    ]
    divergences = {"tfquant_default": easy, "openvino_mixed": easy / 2, "tflite": easy * 2, "tfquant_fast": easy / 2 - 1e-4}
    (found,) = compared(tmp_path, rows, divergences)
    assert found.better == {"tfquant_default": ("openvino_mixed",), "tfquant_fast": ()}
    cells = {each[0]: each for each in accuracy.case_cells(found)}
    assert list(cells) == ["net", "FLOAT32", "TFQUANT_FAST", "TFQUANT_DEFAULT", "OPENVINO_MIXED", "TFLITE"]
    assert cells["TFQUANT_DEFAULT"][1:3] == ["0.0100 [0.0050, 0.0200]", "2.00"]
    assert cells["TFQUANT_FAST"][2:] == ["0.80", "97.50 [97.00, 98.00]", "80.00", "30", "2", "lost beyond chance"]
    assert cells["OPENVINO_MIXED"][-1] == "lost beyond chance; better than TFQUANT_DEFAULT"
    assert accuracy.failures(found) == ["ONNXRUNTIME on net: cannot quantize: no such op"]
    fast, default = accuracy.verdicts([found])
    assert default.startswith("TFQUANT_DEFAULT: mean KL below the best peer's in 0 of 1 cases, at most 0.7 of it in 0; ")
    assert default.endswith("better beyond chance: OPENVINO_MIXED on net; lost beyond chance: no case")
    assert fast.endswith("in 1 of 1 cases, at most 0.7 of it in 0; better beyond chance: no peer; lost beyond chance: net")
    page = accuracy.document([found])
    assert "| TFQUANT_DEFAULT | 0.0100 [0.0050, 0.0200] | 2.00 |" in page
    assert "(A CPU; tool 1.0)." in page


def test_files_for_a_runtime_are_held_against_its_own(tmp_path):
    easy = np.linspace(0, 0.02, 100)
    rows = [
        row(name, kl) for name, kl in (("float32", 0.0), ("tfquant_tflite", 0.01), ("tflite", 0.02), ("openvino_mixed", 0.001))
    ]
    (found,) = compared(tmp_path, rows, {"tfquant_tflite": easy, "tflite": easy * 2, "openvino_mixed": easy / 10})
    assert found.better == {"tfquant_tflite": ()}
    assert found.ratio(found.rows["tfquant_tflite"]) == pytest.approx(0.5)
    assert accuracy.verdicts([found])[0].startswith("TFQUANT_TFLITE: mean KL below the best peer's in 1 of 1 cases")


def test_the_page_of_algorithms(tmp_path):
    rows = [row("float32", 0.0), row("tfquant_algorithms_none", 0.02), row("tfquant_algorithms_adaround", 0.005)]
    (found,) = compared(tmp_path, rows, {})
    names = [name for name in accuracy.algorithm_entries() if name != "float32"]
    page = accuracy.algorithms_document([found], names)
    assert "| adaround | 0.0050 (0.25) |" in page
    assert "| none | 0.0200 |" in page
    assert "(A CPU; tool 1.0)." in page


def test_nothing_is_said_of_others_that_are_not_there(tmp_path):
    (found,) = compared(tmp_path, [row("float32", 0.0), row("tfquant_default", 0.01), row("tflite", 0, reason="killed")], {})
    assert accuracy.verdicts([found]) == []
    assert [each[:3] for each in accuracy.case_cells(found)[1:]] == [
        ["FLOAT32", "", ""],
        ["TFQUANT_DEFAULT", "0.0100 [0.0050, 0.0200]", ""],
    ]


def test_the_table_of_algorithms(tmp_path):
    names = ["tfquant_algorithms_none", "tfquant_algorithms_bias", "tfquant_algorithms_all"]
    rows = [row(name, kl) for name, kl in zip(names, (0.02, 0.01, 0.005), strict=True)]
    rows.append(row(names[0], 0.5, case="other"))
    rows.append(row(names[1], 0.0, case="other", reason="killed"))
    found = compared(tmp_path, rows, {})
    assert accuracy.algorithm_cells(found, names) == [
        ["Mean KL, nats", "net", "other"],
        ["none", "0.0200", "0.5000"],
        ["bias", "0.0100 (0.50)", ""],
        ["all", "0.0050 (0.25)", ""],
    ]


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A folder with an assets.py and its model."""
    import keras

    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "assets.py").write_text(ASSETS)
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 3), name="image"), keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.Flatten()]
    keras.Sequential([*layers, keras.layers.Dense(10, activation="softmax")]).export(str(folder / "net"), verbose=False)
    monkeypatch.setenv("TFQUANT_ASSETS", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(accuracy.sys.modules, "assets", raising=False)
    yield folder
    accuracy.sys.modules.pop("assets", None)


@pytest.mark.slow
def test_all_the_way(assets, tmp_path, capsys):
    page = tmp_path / "docs" / "accuracy.md"
    options = ["--only", "float32,tfquant_default,tflite", "--output", str(tmp_path / "work"), "--threads", "1"]
    options += ["--docs", str(page)]
    assert accuracy.main(options) == 0
    rows = [json.loads(line) for line in (tmp_path / "work" / "accuracy.jsonl").read_text().splitlines()]
    assert [found["side"] for found in rows] == ["float32", "tfquant_default", "tflite"]
    assert [found["reason"] for found in rows] == ["", "", ""]
    plain, ours, tflite = rows
    assert plain["mean_kl"][0] == 0
    assert plain["agreement"][0] == 100
    for found in (ours, tflite):
        assert (found["samples"], found["labelled"]) == (230, 230)  # 100, 100 and 30, a last batch among them
        assert 0 < found["mean_kl"][0] < 0.01
        assert found["agreement"][0] > 90
        # Recomputed from the outputs' own files: the samples were kept in order.
        values = np.load(tmp_path / "work" / "net" / f"{found['side']}.npy")
        assert values.mean() == pytest.approx(found["mean_kl"][0], rel=1e-6)
    assert not (tmp_path / "work" / "net" / "data").exists()
    out = capsys.readouterr().out
    assert out.startswith("net ")
    assert "better beyond chance: " in page.read_text()
    # A second run measures nothing; a third what it is told to.
    assert accuracy.main(options) == 0
    assert "preparing" not in capsys.readouterr().err
    assert accuracy.main([*options[:-2], "net", "--flags=--estimator minmax --weights per_tensor"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "work" / "accuracy.jsonl").read_text().splitlines()]
    assert [found["side"] for found in rows[3:]] == ["tfquant_--estimator minmax --weights per_tensor"]
    assert rows[3]["mean_kl"][0] > 0


def test_what_failed_is_a_row(assets, tmp_path, capsys):
    options = ["--only", "float32", "--flags=--estimator nothing", "--output", str(tmp_path / "work")]
    assert accuracy.main(options) == 1
    out = capsys.readouterr().out
    assert "tfquant, --estimator nothing on net: cannot quantize: RuntimeError: tfquant.calibrate: " in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "float32,tensorrt"], "there is no side 'tensorrt'; there are float32, tfquant_"),
        (["other"], "there is no case 'other'; there are net"),
        (["--threads", "0"], "must be above 0"),
    ],
)
def test_bad_arguments_are_one_line(assets, arguments, line, capsys):
    try:
        code = accuracy.main(arguments)
    except SystemExit as error:
        code = error.code
    error = capsys.readouterr().err
    assert code == 2
    assert line in error
    assert error.startswith("accuracy: ")
    assert error.count("\n") == 1


def test_without_assets_it_says_where_it_looked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFQUANT_ASSETS", str(tmp_path))
    assert accuracy.main(["--only", "float32", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"accuracy: there is no assets.py in {tmp_path}: set TFQUANT_ASSETS to the folder of models and data\n"
    )


def test_rows_of_a_killed_run_stay(tmp_path):
    path = tmp_path / "accuracy.jsonl"
    append_row(path, row("tflite", 0.02))
    with path.open("a") as file:
        file.write('{"case": "net", "si')
    append_row(path, row("tfquant_default", 0.01))
    assert accuracy.main(["--table", "--json", str(path), "--output", str(tmp_path)]) == 0
