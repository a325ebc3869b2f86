"""The table of coverage: a model measured for real, rows of known figures, a file that a killed run left."""

import json

import pytest

from scripts import coverage
from scripts.common import append_row, read_rows

ROW = {
    "name": "Net",
    "keras": "keras",
    "input_size": None,
    "reason": "",
    "machine": "A CPU, 2 threads",
    "versions": ["tensorflow 2.21.0"],
    "parameters": 1_500_000,
    "int8_share": 97.5,
    "rest": [[2.0, "no kernel | none"], [0.4, "too small"], [0.1, "other"]],
    "seconds": 7.4,
    "int8_mb": 1.6,
    "sqnr": 21.04,
    "agreement": 96.9,
    "speed": {"1": {"float32_ms": 10.0, "int8_ms": 4.0, "ratio": 2.5}},
}
FAILURE = {"name": "Bad", "keras": "tf_keras", "input_size": None, "reason": "building: no such layer"}


def test_a_model_is_measured_once(tmp_path, capsys):
    page = tmp_path / "docs" / "coverage.md"
    options = ["--names", "mobilenetv2", "--input_size", "32", "--samples", "2", "--speed", "--seconds", "0.1"]
    options += ["--batch_sizes", "1,2", "--threads", "1", "--output", str(tmp_path), "--docs", str(page)]
    assert coverage.main(options) == 0
    ((key, row),) = read_rows(tmp_path / "coverage.jsonl", *coverage.KEYS).items()
    assert key == ("keras", "MobileNetV2")
    assert row["reason"] == ""
    assert row["parameters"] == 3_538_984
    assert 0 < row["int8_share"] <= 100
    assert row["int8_share"] + sum(percent for percent, _ in row["rest"]) <= 100.1
    assert row["int8_mb"] < 7  # of 14 MB; some of it is faster in float
    assert list(row["speed"]) == ["1", "2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coverage.jsonl", "docs"]
    table = capsys.readouterr().out
    assert "| MobileNetV2 (32 pixels) | keras | 3.5 M |" in table
    assert page.read_text().endswith(table)
    assert coverage.main(options) == 0
    assert "== " not in capsys.readouterr().err
    assert len((tmp_path / "coverage.jsonl").read_text().splitlines()) == 1


def test_what_fails_is_told_in_one_line(tmp_path, capsys):
    options = ["--names", "VGG16", "--input_size", "8", "--output", str(tmp_path)]
    assert coverage.main(options) == 1
    (row,) = read_rows(tmp_path / "coverage.jsonl", *coverage.KEYS).values()
    assert row["reason"].startswith("building: ValueError: Input size must be at least 32x32")
    assert f"- VGG16 (keras) {row['reason']}\n" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(path, ROW)
    with path.open("a") as file:
        file.write(json.dumps(FAILURE)[:20])
    assert list(read_rows(path, *coverage.KEYS)) == [("keras", "Net")]
    append_row(path, FAILURE)
    append_row(path, {**ROW, "seconds": 1.0})
    rows = read_rows(path, *coverage.KEYS)
    assert list(rows) == [("tf_keras", "Bad"), ("keras", "Net")]
    assert rows["keras", "Net"]["seconds"] == 1.0  # the last line counts


def test_table():
    lines = coverage.table_lines([FAILURE, ROW, {**ROW, "name": "Also", "agreement": None, "speed": {}}])
    assert lines[0].endswith("| MB | Seconds | Batch 1, ms |")
    start = "| Also | keras | 1.5 M | 97.50% | 2.00% no kernel \\| none<br>0.40% too small | 21.0 dB |"
    assert lines[2] == f"{start}  | 6.0 -> 1.6 | 7 |  |"
    assert lines[3] == f"{start.replace('Also', 'Net')} 97% | 6.0 -> 1.6 | 7 | 10.0 -> 4.0 (2.50x) |"
    assert lines[4:] == ["", "Failed:", "", "- Bad (tf_keras) building: no such layer"]
    page = coverage.document([ROW, FAILURE])
    assert "1 of 2 models" in page
    assert "    python scripts/coverage.py --keras tf_keras --speed\n" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--names", "resnet5"], "argument --names: keras has no 'resnet5'; it has ConvNeXtBase, "),
        (["--samples", "0"], "argument --samples: must be above 0. Received: 0"),
        (["--batch_sizes", "0"], "argument --batch_sizes: invalid numbers value: '0'"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        coverage.main(options)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
