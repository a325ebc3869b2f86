"""Settings of TensorFlow's runtime: what may be set, how it is written down and read again."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tfquant.errors import ConfigError, OutputError, shown
from tfquant.unfinished import write_file

JSON_NAME = "runtime_settings.json"
LATENCY, THROUGHPUT = OBJECTIVES = ("latency", "throughput")

# What TensorFlow reads from the environment and does not change what is computed: its default, and what else it may be. (With
# TF_SET_ONEDNN_FPMATH_MODE it computes something else; TF_ONEDNN_USE_SYSTEM_ALLOCATOR, TF_ONEDNN_ASSUME_FROZEN_WEIGHTS and
# glibc's allocation thresholds and huge pages made no difference that could be measured.)
SWITCHES: Mapping[str, tuple[str, str]] = {
    "TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE": ("1", "0"),  # 0 keeps the scratch memory of primitives
    "TF_ONEDNN_THREADPOOL_USE_CALLER_THREAD": ("0", "1"),  # the thread that runs an op takes a share: one wake-up fewer
}
INTRA, INTER = "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"


@dataclasses.dataclass(frozen=True)
class Setting:
    """How TensorFlow runs in a process.

    Attributes:
        intra_op: threads that one op is split over.
        inter_op: threads that run ops; None for TensorFlow's default.
        env: other variables and their values.
    """

    intra_op: int
    inter_op: int | None = None
    env: tuple[tuple[str, str], ...] = ()

    @property
    def variables(self) -> dict[str, str]:
        """All of it as environment variables: TensorFlow takes the numbers of threads from there too, where no code sets them."""
        inter = {} if self.inter_op is None else {INTER: str(self.inter_op)}
        return {**dict(self.env), INTRA: str(self.intra_op), **inter}

    def differences(self, default: Setting) -> dict[str, str]:
        """The variables that differ from those of another setting."""
        others = default.variables
        return {name: value for name, value in self.variables.items() if others.get(name) != value}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best setting that was found for a batch size and an objective.

    Attributes:
        batch_size: samples per run.
        objective: "latency", the median time of one run at a time, or "throughput", samples per second of all streams.
        setting: of the process.
        streams: runs at a time.
        default: TensorFlow's own setting, with one run at a time.
        ms: median milliseconds of a run.
        throughput: samples per second.
        default_ms: the same of the default, in the same run of the benchmark.
        default_throughput: the same of the default, in the same run of the benchmark.
        gain: how many times faster than the default: the median of the rounds.
    """

    batch_size: int
    objective: str
    setting: Setting
    streams: int
    default: Setting
    ms: float
    throughput: float
    default_ms: float
    default_throughput: float
    gain: float

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        title = f"batch {self.batch_size}, " + ("lowest latency" if self.objective == LATENCY else "highest throughput")
        if self.objective == LATENCY:
            figures = f"{self.ms:.2f} ms; TensorFlow's defaults {self.default_ms:.2f} ms"
        else:
            figures = f"{self.throughput:.1f} samples/s; TensorFlow's defaults {self.default_throughput:.1f}"
        yield f"# {title}: {figures}, {self.gain:.2f}x"
        changes = self.setting.differences(self.default)
        if self.streams > 1:
            yield f"# {self.streams} runs at a time"
        if not changes:
            yield "# TensorFlow's defaults: nothing to set"
        for name, value in changes.items():
            yield f"export {name}={shlex.quote(value)}"
        for name, count in ((INTRA, self.setting.intra_op), (INTER, self.setting.inter_op)):
            if name in changes:
                kind = "intra" if name == INTRA else "inter"
                yield f"# or in Python: tf.config.threading.set_{kind}_op_parallelism_threads({count})"


def save(path: pathlib.Path, choices: Sequence[Choice], facts: Mapping[str, Any]) -> pathlib.Path:
    """Writes the choices as JSON, and the same as lines for a shell beside it.

    Args:
        path: of the JSON; the other has the suffix .env.
        choices: the first is what the .env sets, the others are there as comments.
        facts: of the machine, for the reader.

    Returns:
        The path of the .env.

    Raises:
        OutputError: it cannot be written.
    """
    script = path.with_suffix(".env")
    first, *others = choices
    lines = [f"# source {script.name}   (TensorFlow reads these once, when it starts)", str(first)]
    for choice in others:
        lines += ["", *(line if line.startswith("#") else f"# {line}" for line in str(choice).splitlines())]
    content = {"machine": dict(facts), "settings": [to_json(choice) for choice in choices]}
    try:
        write_file(path, json.dumps(content, indent=1) + "\n")
        write_file(script, "\n".join(lines) + "\n")
    except OSError as error:
        raise OutputError(f"The settings cannot be written: {error}") from error
    return script


def load(path: str) -> list[Choice]:
    """Reads what `save` wrote.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"The settings cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON of runtime settings: {error}") from error
    try:
        return [_from_json(entry) for entry in content["settings"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} does not hold runtime settings as --tune_runtime writes them: {shown(error)}") from error


def to_json(choice: Choice) -> dict[str, Any]:
    """A choice as the JSON holds it."""
    entry = dataclasses.asdict(choice)
    for key in ("setting", "default"):
        entry[key]["env"] = dict(entry[key]["env"])
    return entry


def _from_json(entry: Mapping[str, Any]) -> Choice:
    if entry["objective"] not in OBJECTIVES:
        raise ValueError(f"objective {entry['objective']!r}")
    return Choice(
        batch_size=_count(entry["batch_size"]),
        objective=entry["objective"],
        setting=_setting(entry["setting"]),
        streams=_count(entry["streams"]),
        default=_setting(entry["default"]),
        ms=float(entry["ms"]),
        throughput=float(entry["throughput"]),
        default_ms=float(entry["default_ms"]),
        default_throughput=float(entry["default_throughput"]),
        gain=float(entry["gain"]),
    )


def _setting(entry: Mapping[str, Any]) -> Setting:
    inter = entry["inter_op"]
    env = tuple((str(name), str(value)) for name, value in entry["env"].items())
    return Setting(_count(entry["intra_op"]), None if inter is None else _count(inter), env)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"not a number above 0: {value!r}")
    return value
