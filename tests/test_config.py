"""Tests of the options: of QuantConfig, of job files, and of the flags over them."""

import dataclasses
import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tfquant import calibrate
from tfquant.config import QuantConfig
from tfquant.errors import ConfigError
from tfquant.jobfile import Job, load_job
from tfquant.plan.scope import IgnoredScope

# QuantConfig


def test_defaults():
    config = QuantConfig()
    assert dataclasses.asdict(config) == {
        "signature_keys": ("serving_default",),
        "tags": ("serve",),
        "inputs": (),
        "outputs": (),
        "mode": "static",
        "subset_size": 300,
        "batch_size": 10,
        "preset": "default",
        "algorithms": (),
        "estimator": "mse",
        "activation_mode": "asymmetric",
        "weights": "per_channel",
        "weight_bits": 8,
        "activation_bits": 8,
        "bit_allocation": False,
        "weight_clipping": "aciq",
        "weight_correction": True,
        "size_budget": 0.0,
        "isa": "vnni",
        "placement": "table",
        "placement_batch_sizes": (1, 16),
        "placement_threads": 0,
        "float": "float32",
        "ignored_scope": {"names": (), "patterns": (), "types": ()},
        "allow_unsafe_ops": False,
        "trained_rounding": "fused",
        "input_dtype": "model",
        "preprocess": "none",
        "verify": True,
        "verify_batch_sizes": (1, 16),
    }
    assert config.ignored_scope == IgnoredScope()


def test_lists_become_tuples_and_entries_a_scope():
    config = QuantConfig(
        signature_keys=["a", "b"], verify_batch_sizes=np.array([2, 3]), subset_size=np.int64(5), ignored_scope=["x/y", "type:Add"]
    )
    assert config.signature_keys == ("a", "b")
    assert config.verify_batch_sizes == (2, 3)
    assert [type(size) for size in (*config.verify_batch_sizes, config.subset_size)] == [int] * 3
    assert config.ignored_scope == IgnoredScope(names=("x/y",), types=("Add",))
    assert dataclasses.replace(config, batch_size=2).ignored_scope == config.ignored_scope
    assert hash(config) == hash(dataclasses.replace(config))
    assert QuantConfig(tags=[], verify_batch_sizes=[]).tags == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signature_keys": "serve"}, "signature_keys must be a list of strings. Received: 'serve'"),
        ({"signature_keys": []}, "signature_keys must not be empty. Received: []"),
        ({"signature_keys": ["a", "a"]}, "signature_keys must name each but once. Received: 'a' twice"),
        ({"tags": {"serve": 1}}, "tags must be a list of strings. Received: {'serve': 1}"),
        ({"tags": [1]}, "tags must be a list of strings that are not empty. Received: 1 in it"),
        ({"inputs": [" "]}, "inputs must be a list of strings that are not empty. Received: ' ' in it"),
        ({"outputs": b"x"}, "outputs must be a list of strings. Received: b'x'"),
        ({"outputs": None}, "outputs must be a list of strings. Received: None"),
        ({"subset_size": 0}, "subset_size must be at least 1. Received: 0"),
        ({"subset_size": True}, "subset_size must be a whole number. Received: True"),
        ({"batch_size": 2.0}, "batch_size must be a whole number. Received: 2.0"),
        ({"batch_size": "2"}, "batch_size must be a whole number. Received: '2'"),
        (
            {"estimator": "best"},
            "estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: 'best'",
        ),
        (
            {"estimator": ["mse"]},
            "estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: ['mse']",
        ),
        ({"activation_mode": "x"}, "activation_mode must be one of asymmetric, symmetric. Received: 'x'"),
        ({"weights": None}, "weights must be one of per_channel, per_tensor. Received: None"),
        ({"isa": "avx2"}, "isa must be one of vnni, no_vnni. Received: 'avx2'"),
        ({"preprocess": "x"}, "preprocess must be one of tf, torch, caffe, unit, none. Received: 'x'"),
        ({"verify": 1}, "verify must be true or false. Received: 1"),
        ({"allow_unsafe_ops": "no"}, "allow_unsafe_ops must be true or false. Received: 'no'"),
        ({"verify_batch_sizes": 1}, "verify_batch_sizes must be a list of whole numbers. Received: 1"),
        ({"verify_batch_sizes": (1, 0)}, "each of verify_batch_sizes must be at least 1. Received: 0"),
        ({"verify_batch_sizes": (1, True)}, "each of verify_batch_sizes must be a whole number. Received: True"),
        ({"ignored_scope": "block1"}, "ignored_scope must be a list of strings. Received: 'block1'"),
        ({"ignored_scope": 3}, "ignored_scope must be a list of strings. Received: 3"),
        ({"ignored_scope": [3]}, "ignored_scope takes strings that are not empty. Received: 3"),
        ({"ignored_scope": ["/"]}, "ignored_scope takes strings that are not empty. Received: '/'"),
        (
            {"estimator": "x" * 500},
            f"estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: '{'x' * 96}...",
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError) as error:
        QuantConfig(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saved_model": 3}, "saved_model must be a string. Received: 3"),
        ({"format": "onnx"}, "format must be one of saved_model, graphdef, fakequant. Received: 'onnx'"),
        ({"overwrite": None}, "overwrite must be true or false. Received: None"),
        ({"quantization": {"estimator": "mse"}}, "quantization must be a QuantConfig. Received: {'estimator': 'mse'}"),
    ],
)
def test_jobs_that_cannot_be(options, message):
    with pytest.raises(ConfigError) as error:
        Job(**options)
    assert str(error.value) == message


# Job files

WHOLE = """\
# everything that there is
saved_model: models/float32
data: ../samples.npz
output: /elsewhere/int8
overwrite: yes
format: fakequant
quantization:
  signature_keys: [serve, classify]
  tags:
    - serve
    - gpu
  inputs: ["x:0"]
  outputs: ["y:0", "z:1"]
  subset_size: 50
  batch_size: 5
  mode: dynamic
  preset: fast
  algorithms: [adaround]
  estimator: minmax
  activation_mode: symmetric
  weights: per_tensor
  weight_bits: 4
  activation_bits: 6
  bit_allocation: true
  weight_clipping: none
  weight_correction: false
  size_budget: 0.25
  isa: no_vnni
  placement: measure
  placement_batch_sizes: [4]
  placement_threads: 2
  float: bfloat16
  ignored_scope: [block1, "re:head/.*, x", "type:MatMul"]
  allow_unsafe_ops: true
  trained_rounding: all
  input_dtype: uint8
  preprocess: torch
  verify: false
  verify_batch_sizes: []
"""


def load(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_job(path)


def test_a_whole_job(tmp_path):
    config = QuantConfig(
        signature_keys=("serve", "classify"),
        tags=("serve", "gpu"),
        inputs=("x:0",),
        outputs=("y:0", "z:1"),
        mode="dynamic",
        subset_size=50,
        batch_size=5,
        preset="fast",
        algorithms=("adaround",),
        estimator="minmax",
        activation_mode="symmetric",
        weights="per_tensor",
        weight_bits=4,
        activation_bits=6,
        bit_allocation=True,
        weight_clipping="none",
        weight_correction=False,
        size_budget=0.25,
        isa="no_vnni",
        placement="measure",
        placement_batch_sizes=(4,),
        placement_threads=2,
        float="bfloat16",
        ignored_scope=IgnoredScope(("block1",), ("head/.*, x",), ("MatMul",)),
        allow_unsafe_ops=True,
        trained_rounding="all",
        input_dtype="uint8",
        preprocess="torch",
        verify=False,
        verify_batch_sizes=(),
    )
    expected = Job(
        saved_model=str(tmp_path / "models/float32"),
        data=str(tmp_path / "../samples.npz"),
        output="/elsewhere/int8",
        overwrite=True,
        format="fakequant",
        quantization=config,
    )
    assert load(tmp_path, WHOLE) == expected
    assert load(tmp_path, b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode()) == expected
    used = set(re.findall(r"^ *(\w+):", WHOLE, re.MULTILINE))
    assert used == {field.name for kind in (Job, QuantConfig) for field in dataclasses.fields(kind)} - {"plan"}


def test_little_jobs(tmp_path, monkeypatch):
    assert load(tmp_path, "data: package.feeds:samples\nplan:\nquantization:\n  # estimator: mse\n") == Job(
        data="package.feeds:samples"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "job.yaml").write_text("saved_model: m\nplan: ~\n")
    assert load_job("sub/job.yaml").saved_model == "sub/m"
    monkeypatch.chdir(tmp_path / "sub")
    assert load_job("job.yaml").saved_model == "m"
    (tmp_path / "sub" / "job.yaml").write_text("quantization:\n  tags: &t [a]\n  inputs: *t\n")
    assert load_job("job.yaml").quantization == QuantConfig(tags=("a",), inputs=("a",))


Q = "saved_model: m\n\nquantization:\n  batch_size: 4\n"  # what follows is line 5
BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            Q + "  estimator: foo\n",
            5,
            "quantization.estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: 'foo'",
        ),
        (Q + "\n  # why\n  isa: 3\n", 7, "quantization.isa must be one of vnni, no_vnni. Received: 3"),
        (
            Q + "  estimater: mse\n",
            5,
            "unknown option. Received: 'quantization.estimater'; did you mean estimator?",
        ),
        (Q + "  signature_key: x\n", 5, "unknown option. Received: 'quantization.signature_key'; did you mean signature_keys?"),
        ("saved_modle: m\n", 1, "unknown option. Received: 'saved_modle'; did you mean saved_model?"),
        ("\nestimator: mse\n", 2, "unknown option. Received: 'estimator'; it belongs under quantization"),
        (
            Q + "  output: x\n",
            5,
            "unknown option. Received: 'quantization.output'; it belongs to the top, without indentation",
        ),
        (
            "zzz: 1\n",
            1,
            "unknown option. Received: 'zzz'; the options are saved_model, data, plan, output, overwrite, format, quantization",
        ),
        (Q + "  batch_size: 5\n", 5, "quantization.batch_size must be given once. Received: again, after line 4"),
        (Q + "saved_model: n\n", 5, "saved_model must be given once. Received: again, after line 1"),
        (Q + "  subset_size: yes\n", 5, "quantization.subset_size must be a whole number. Received: True"),
        (Q + "  subset_size: 1e3\n", 5, "quantization.subset_size must be a whole number. Received: '1e3'"),
        (Q + "  subset_size: -1\n", 5, "quantization.subset_size must be at least 1. Received: -1"),
        (Q + "  verify: 'no'\n", 5, "quantization.verify must be true or false. Received: 'no'"),
        (Q + "  tags: serve\n", 5, "quantization.tags must be a list of strings. Received: 'serve'"),
        (
            Q + "  outputs:\n    - y\n    - no\n",
            5,
            "quantization.outputs must be a list of strings that are not empty. Received: False in it; "
            "put quotes around what is text",
        ),
        ("output: 3\n", 1, "output must be a string. Received: 3; put quotes around what is text"),
        (
            "output: 2024-01-02\n",
            1,
            "output must be a string, a number, true or false. Received: '2024-01-02' as 'timestamp'; "
            "put quotes around what is text",
        ),
        (
            Q + "  tags:\n    - a\n    - !!python/object:os.system x\n",
            7,
            "quantization.tags must be a string, a number, true or false. Received: 'x' as 'python/object:os.system'; "
            "put quotes around what is text",
        ),
        (
            Q + "  subset_size: !!int many\n",
            5,
            "quantization.subset_size must be a string, a number, true or false. Received: 'many' as 'int'; "
            "put quotes around what is text",
        ),
        (
            Q + "  inputs:\n    - a\n    - [b]\n",
            7,
            "quantization.inputs must be a plain value or a list of them. Received: a list",
        ),
        (
            Q + "  estimator:\n    name: mse\n",
            6,
            "quantization.estimator must be a plain value or a list of them. Received: a mapping",
        ),
        (
            Q + "  estimator:\n",
            5,
            "quantization.estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: None",
        ),
        (
            Q + "  ignored_scope: ['re:a(b']\n",
            5,
            "quantization.ignored_scope holds a pattern that is no regular expression: missing ), unterminated subpattern at "
            "position 1. Received: 'a(b'",
        ),
        (Q + "  ignored_scope: ['']\n", 5, "quantization.ignored_scope takes strings that are not empty. Received: ''"),
        ("quantization: mse\n", 1, "quantization must hold options, as 'name: value' lines. Received: 'mse'"),
        (
            "output: x\nquantization:\n  - estimator\n",
            3,
            "quantization must hold options, as 'name: value' lines. Received: a list",
        ),
        ("- output: x\n", 1, "a job file must hold options, as 'name: value' lines. Received: a list"),
        ("\njust words\n", 2, "a job file must hold options, as 'name: value' lines. Received: 'just words'"),
        ("", 1, "a job file must hold options: saved_model, data, output ... Received: nothing"),
        ("# nothing\n\n", 1, "a job file must hold options: saved_model, data, output ... Received: nothing"),
        (
            "output: x\nquantization:\n\tbatch_size: 4\n",
            3,
            "this is no YAML: found character '\\t' that cannot start any token; indent with spaces, not with tabs.",
        ),
        ("output: x\ndata: [a, b\nformat: x\n", 3, "this is no YAML: expected ',' or ']', but got ':'."),
        ("output: 'x\n", 2, "this is no YAML: found unexpected end of stream."),
        ("output: x\n overwrite: true\n", 2, "this is no YAML: mapping values are not allowed here."),
        ("output: *x\n", 1, "this is no YAML: found undefined alias 'x'."),
        ("output: x\n---\noutput: y\n", 2, "this is no YAML: but found another document."),
        ('output: "\\UFFFFFFFF"\n', 1, "this is no YAML: it escapes a character that Unicode does not have."),
        (b"output: x\ndata: \xff\xfe\n", 2, "a job file is text in UTF-8. Received: the byte 0xff"),
        (b"output: x\n\ndata: \x00\n", 3, "a job file is text. Received: the character #x0000"),
        ("output: " + "[" * 200_000, 1, "a job file holds options, and lists of plain values. Received: deep nesting"),
        ("a: " * 80_000, 1, "this is no YAML: mapping values are not allowed here."),
        (" " * 300_000, 1, "a job file has at most 262144 bytes. Received: more"),
        (
            BOMB,
            1,
            "unknown option. Received: 'a'; the options are saved_model, data, plan, output, overwrite, format, quantization",
        ),
        (
            Q + "  tags: &a [x, x]\n  inputs: &b [*a, *a]\n  outputs: [*b, *b]\n",
            5,
            "quantization.tags must name each but once. Received: 'x' twice",
        ),
        ("output: &a [*a]\n", 1, "output must be a plain value or a list of them. Received: a list"),
        ("? [a]\n: b\n", 1, "a job file must have options with plain names. Received: a list"),
        ("output: " + "9" * 10_000, 1, None),
    ],
)
def test_bad_job_files(tmp_path, text, line, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'job.yaml'}:{line}: ")
    assert len(str(error.value).splitlines()) == 1
    if message is not None:
        assert str(error.value).removeprefix(f"{tmp_path / 'job.yaml'}:{line}: ") == message


def test_a_large_job(tmp_path):
    entries = [f"l{i}" for i in range(20_000)]
    job = load(tmp_path, "quantization:\n  outputs:\n" + "".join(f"  - {entry}\n" for entry in entries))
    assert job.quantization.outputs == tuple(entries)


def test_files_that_are_no_job_files(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no job file at .*none\.yaml: give a YAML file"):
        load_job(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"A job file is a YAML file. Received: .*, which is none"):
        load_job(tmp_path)
    with pytest.raises(ConfigError, match="Received: /dev/zero, which is none"):
        load_job("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(tmp_path / ("x" * 300))


# Flags


def job_of(*words):
    with flagsaver.flagsaver():
        calibrate.parse(["calibrate", *map(str, words)])
        return calibrate.job_from_flags()


def test_flags_say_what_the_fields_say():
    """Their defaults, choices and bounds are those of the dataclasses, and every field has a flag."""
    config, job = QuantConfig(), Job()
    for instance in (config, job):
        for field in dataclasses.fields(instance):
            if field.name in ("quantization", "ignored_scope"):
                continue
            flag, expected = flags.FLAGS[field.name], getattr(instance, field.name)
            default = tuple(flag.default) if isinstance(expected, tuple) else flag.default
            assert default == (tuple(map(str, expected)) if isinstance(expected, tuple) else expected), field.name
            choices = () if "registry" in field.metadata else field.metadata.get("choices", ())
            assert tuple(getattr(flag.parser, "enum_values", None) or ()) == tuple(choices), field.name
            if isinstance(expected, (int, float)) and not isinstance(expected, bool):
                assert flag.parser.lower_bound == field.metadata["least"]
                assert flag.parser.upper_bound == field.metadata.get("most")
    named = {name for names in calibrate.GROUPS.values() for name in names}
    fields = {field.name for kind in (Job, QuantConfig) for field in dataclasses.fields(kind)}
    assert named == fields - {"quantization"} | {"config"}


def test_a_job_from_flags_alone():
    rest = ["--saved_model=m", "--output=o"]
    assert job_of(*rest, "--data=d") == Job(saved_model="m", output="o", data="d")
    found = job_of(
        *rest, "--plan=p", "--ignored_scope=re:a{1,2}", "--ignored_scope", "b", "--signature_keys=x,y", "--verify_batch_sizes=4,"
    )
    config = QuantConfig(ignored_scope=["re:a{1,2}", "b"], signature_keys=("x", "y"), verify_batch_sizes=(4,))
    assert found == Job(saved_model="m", output="o", plan="p", quantization=config)


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("saved_model: m\ndata: d\noutput: o\noverwrite: true\nquantization:\n  batch_size: 4\n  ignored_scope: [a]\n")
    whole = job_of("--config", path)
    assert whole == load_job(path)
    assert job_of("--config", path, "--batch_size=10", "--output=x", "--nooverwrite") == dataclasses.replace(
        whole, output="x", overwrite=False, quantization=dataclasses.replace(whole.quantization, batch_size=10)
    )
    assert job_of("--config", path, "--plan=p") == dataclasses.replace(whole, data=None, plan="p")
    assert job_of("--config", path, "--ignored_scope=b").quantization.ignored_scope == IgnoredScope(("b",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--saved_model is missing: see --help."),
        (["--saved_model=m"], "--output is missing: see --help."),
        (["--saved_model=m", "--output=o", "--data=d", "--plan=p"], "Give either --data or --plan. Received: both"),
        (["--verify_batch_sizes=1,x"], "--verify_batch_sizes takes numbers with commas between. Received: 1,x"),
        (["--verify_batch_sizes=0"], "each of verify_batch_sizes must be at least 1. Received: 0"),
        (["--signature_keys="], "signature_keys must not be empty. Received: []"),
        (["--config=none.yaml"], "There is no job file at none.yaml: give a YAML file."),
        (["--ignored_scope=re:*"], None),
        (
            ["--estimator=best"],
            "estimator must be one of minmax, mean_minmax, percentile, mse, entropy, aciq, auto. Received: 'best'",
        ),
        (["--weight_bits=1"], None),
        (["--size_budget=-1"], None),
        (
            ["--saved_model=m", "--output=o", "--data=d", "--activation_bits=4"],
            "TensorFlow has no kernels below 8 bits: add --format fakequant, which writes the simulation. Received: saved_model",
        ),
        (["--batch_size=0"], None),
        (["--signature_key=x"], None),
        (["--format=onnx"], None),
        (["stray"], "Every argument is a --flag. Received: stray"),
    ],
)
def test_refusals_in_one_line(words, message, capfd):
    with flagsaver.flagsaver():
        try:
            code = calibrate.main(calibrate.parse(["calibrate", *words]))
        except SystemExit as error:
            code = error.code
    out, err = capfd.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("tfquant.calibrate: ")
    if message is not None:
        assert err == f"tfquant.calibrate: {message}\n"
