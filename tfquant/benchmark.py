"""python -m tfquant.benchmark: how fast models run on this machine, side by side in stock TensorFlow.

    python -m tfquant.benchmark --models float32,int8 --batch_sizes 1,16
    python -m tfquant.benchmark --models float32,int8 --profile
    python -m tfquant.benchmark --models int8 --tune_runtime
    python -m tfquant.benchmark --models float32,int8 --settings ,int8/runtime_settings.json

Every model has a process of its own that never imports tfquant. They run in turn, in short bursts whose order rotates, so that
what disturbs the machine meets all of them; "Speed" and "Throughput" are medians, over these rounds, of the ratio to the first.

--tune_runtime searches the numbers of threads and streams, and the environment variables that TensorFlow reads: all settings
briefly, the best third longer, and so on, once for the lowest latency and once for the highest throughput.

Exit code 0: all was measured. 2: the input was at fault; one line on stderr says what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from tfquant import commandline
from tfquant.bench import settings
from tfquant.bench.measure import Entry, Model, Result, compared, machine_facts, measure, results_table
from tfquant.bench.profile import Profile, profile, profile_table
from tfquant.bench.settings import Choice, Setting
from tfquant.bench.tuning import Tuning, candidates, ladder, tune
from tfquant.errors import ConfigError
from tfquant.machine import usable_cores
from tfquant.progress import progress
from tfquant.supervise import interrupt_once, interrupts, open_streams

FLAGS = flags.FlagValues()

flags.DEFINE_list(
    "models",
    [],
    "SavedModels (or folders of numbered versions), or frozen GraphDefs; the others are compared with the first.",
    flag_values=FLAGS,
)
flags.DEFINE_list("names", [], "Their names in the table; those of the folders where not given.", flag_values=FLAGS)
flags.DEFINE_string("signature_key", "serving_default", "The signature that is run.", flag_values=FLAGS)
flags.DEFINE_string(
    "data",
    None,
    ".npz keyed by input name, or .npy for one input, samples first; random values where not given (integers are 0 or 1).",
    flag_values=FLAGS,
)
flags.DEFINE_list("batch_sizes", ["1", "16"], "Samples per run.", flag_values=FLAGS)
flags.DEFINE_list("threads", [], "Sizes of the intra-op thread pool; as many as cores where not given.", flag_values=FLAGS)
flags.DEFINE_list("streams", [], "How many runs overlap; 1 where not given.", flag_values=FLAGS)
flags.DEFINE_float("seconds", 10, "Of measurement, per model and row of the table.", flag_values=FLAGS)
flags.DEFINE_bool("profile", False, "Tell the time of each model's ops too, by their type.", flag_values=FLAGS)
flags.DEFINE_multi_string("env", [], "KEY=VALUE for the models' environment. Repeat the flag for more.", flag_values=FLAGS)
flags.DEFINE_bool(
    "tune_runtime",
    False,
    "Search the runtime's settings for each model; --threads and --streams are what is tried (1, 2, 4 ... cores).",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "settings",
    [],
    "Runtime settings to run with, as --tune_runtime wrote them: one file for all models or one per model, empty for none. "
    "With --tune_runtime, where to write them; beside a model that tfquant made where not given, else nowhere.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "objective",
    settings.LATENCY,
    list(settings.OBJECTIVES),
    "Which of the --settings are taken, and which come first in a written .env.",
    flag_values=FLAGS,
)
flags.DEFINE_string("json", None, "File to write: all figures, the settings and the machine.", flag_values=FLAGS)
_GROUPS = {
    "Models": ("models", "names", "signature_key", "data"),
    "Measurement": ("batch_sizes", "threads", "streams", "seconds", "profile", "env"),
    "Runtime": ("tune_runtime", "settings", "objective"),
    "Output": ("json",),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    for number in interrupts():
        signal.signal(number, interrupt_once)  # the workers are ended on the way out
    return commandline.run("benchmark", argv, _run)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about these flags alone."""
    return commandline.parse("benchmark", argv, FLAGS, __doc__, _GROUPS)


def _run() -> None:
    models, batch_sizes = _models(), _counts("batch_sizes") or [1, 16]
    if not (math.isfinite(FLAGS.seconds) and FLAGS.seconds > 0):
        raise ConfigError(f"--seconds must be above 0. Received: {FLAGS.seconds}")
    if FLAGS.json:
        commandline.check_file("json", pathlib.Path(FLAGS.json))
    text, content = (_tuned if FLAGS.tune_runtime else _measured)(models, batch_sizes)
    if FLAGS.json:
        commandline.write_json("json", pathlib.Path(FLAGS.json), content)
    with contextlib.suppress(OSError):  # nobody listens; the file is there
        print("\n".join(text).rstrip(), flush=True)


def _measured(models: Sequence[Model], batch_sizes: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """The comparison as lines and as JSON."""
    results, tensorflow = measure(_races(models, batch_sizes), FLAGS.seconds)
    rows = [result for race in results for result in race]
    facts = machine_facts(tensorflow)
    text = [_title(facts), "", *results_table(rows), ""]
    changed = dict.fromkeys((row.entry.model.name, row.entry.batch, row.entry.setting) for row in rows)
    text += [f"{name}, batch {size}: {line}" for name, size, setting in changed if (line := _told(setting))]
    if any(len(race) > 1 for race in results):
        rounds = min(len(row.times.rounds) for row in rows)
        base = models[0].name if len(models) > 1 else "the first row of each batch size and number of streams"
        text.append(f"Speed and throughput against {base}: medians of the ratios of {rounds} rounds or more.")
    profiles = _profiles(rows)
    text += itertools.chain.from_iterable(("", *profile_table(found)) for found in profiles)
    content = {"machine": facts, "options": _options(), "results": [row.to_json() for row in rows]}
    return text, content | ({"profiles": [found.to_json() for found in profiles]} if FLAGS.profile else {})


def _profiles(rows: Sequence[Result]) -> list[Profile]:
    """Where the time goes, for all that was measured with one stream."""
    entries = [row.entry for row in rows if row.entry.streams == 1] if FLAGS.profile else []
    return [profile(entry, FLAGS.seconds) for entry in progress(entries, "profiling", len(entries))]


def _told(setting: Setting) -> str:
    """The variables of a setting besides the threads that the table shows."""
    return " ".join(f"{name}={value}" for name, value in setting.variables.items() if name != settings.INTRA)


def _races(models: Sequence[Model], batch_sizes: Sequence[int]) -> list[tuple[Entry, ...]]:
    """What is measured side by side: the models, under all numbers of threads or their settings."""
    env = _env()
    threads, streams = _counts("threads") or [usable_cores()], _counts("streams") or [1]
    tuned = _settings(models)
    races: dict[tuple[Entry, ...], None] = {}
    for size, count in itertools.product(batch_sizes, streams):
        entries: list[Entry] = []
        for model, choices in zip(models, tuned, strict=True):
            if choices:
                choice = _chosen(choices, size)
                setting = dataclasses.replace(choice.setting, env=tuple({**dict(choice.setting.env), **dict(env)}.items()))
                entries.append(Entry(model, setting, size, choice.streams))
            else:
                entries += [Entry(model, Setting(number, None, env), size, count) for number in threads]
        races[tuple(entries)] = None  # --streams makes no difference where all have settings
    return list(races)


def _tuned(models: Sequence[Model], batch_sizes: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """The search as lines and as JSON; the settings are written when all are found."""
    paths = [_settings_path(model, len(models)) for model in models]
    cores = usable_cores()
    streams = _counts("streams") or ladder(cores)
    arms = candidates(_counts("threads") or ladder(cores), streams, cores, _env())
    found = [tune(model.start, arms, batch_sizes, FLAGS.seconds, streams, f"tuning {model.name}") for model in models]
    facts = machine_facts(found[0].tensorflow)
    text, content = [_title(facts)], []
    for model, path, tuning in zip(models, paths, found, strict=True):
        choices = sorted(tuning.choices, key=lambda choice: choice.objective != FLAGS.objective)
        text += ["", f"{model.name}: the best of {len(arms)} settings", *(f"\n{choice}" for choice in choices), ""]
        if path is None:
            text.append(f"Not written: tfquant did not make {model.path}; name a file with --settings.")
        else:
            text.append(f"Written to {path} and {settings.save(path, choices, facts).name}")
        choices_json = [settings.to_json(choice) for choice in choices]
        content.append({"model": model.name, "settings": choices_json, "measured": _measured_json(model, tuning)})
    return text, {"machine": facts, "options": _options(), "models": content}


def _measured_json(model: Model, tuning: Tuning) -> list[dict[str, Any]]:
    """All that a search measured, once each."""
    entries = []
    for found in tuning.measured:
        entry = Entry(model, found.arm.setting, found.contest.batch_size, found.arm.streams)
        result = compared([entry, entry], [found.default_times, found.times])[1]
        entries.append({"stage": found.stage, "objective": found.contest.objective, **result.to_json()})
    return entries


def _models() -> list[Model]:
    paths = [path for path in FLAGS.models if path]
    if not paths:
        raise ConfigError("--models is missing: see --help.")
    names = list(FLAGS.names) or _names(paths)
    if len(names) != len(paths) or len(set(names)) != len(names) or not all(names):
        raise ConfigError(f"--names must be as many as --models, and distinct. Received: {','.join(names)}")
    return [Model(name, path, FLAGS.signature_key, FLAGS.data) for name, path in zip(names, paths, strict=True)]


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, with so many before it as make them distinct."""
    parts = [pathlib.Path(path).absolute().parts for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(part[-depth:]) for part in parts]
    return names


def _counts(flag: str) -> list[int]:
    """The numbers of a flag, each once."""
    words: list[str] = FLAGS[flag].value or []
    counts = list(dict.fromkeys(commandline.numbers(flag, words)))
    if any(count < 1 for count in counts):
        raise ConfigError(f"--{flag} takes numbers above 0. Received: {','.join(words)}")
    return counts


def _env() -> tuple[tuple[str, str], ...]:
    searched = {*settings.SWITCHES, settings.INTER} if FLAGS.tune_runtime else set()
    env = {}
    for word in FLAGS.env:
        name, separator, value = word.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--env takes KEY=VALUE. Received: {word}")
        if name == settings.INTRA:
            raise ConfigError(f"The size of the intra-op pool is given by --threads. Received: --env {word}")
        if name in searched:
            raise ConfigError(f"--tune_runtime searches the values of {name}. Received: --env {word}")
        env[name] = value
    return tuple(env.items())


def _settings(models: Sequence[Model]) -> list[list[Choice]]:
    """Per model the choices of its --settings, empty where it has none."""
    paths = list(FLAGS.settings) or [""]
    if len(paths) == 1:
        paths *= len(models)
    if len(paths) != len(models):
        raise ConfigError(f"--settings takes one file, or one per model. Received: {len(paths)} for {len(models)} models")
    return [settings.load(path) if path else [] for path in paths]


def _chosen(choices: Sequence[Choice], batch_size: int) -> Choice:
    for choice in choices:
        if (choice.batch_size, choice.objective) == (batch_size, FLAGS.objective):
            return choice
    known = ", ".join(f"{choice.batch_size} ({choice.objective})" for choice in choices) or "nothing"
    raise ConfigError(f"--settings has no entry for batches of {batch_size} ({FLAGS.objective}); it has {known}.")


def _settings_path(model: Model, models: int) -> pathlib.Path | None:
    """Where the settings of a model are written."""
    if FLAGS.settings:
        path = pathlib.Path(FLAGS.settings[0])
        if models > 1 or len(FLAGS.settings) > 1 or path.suffix != ".json":
            received = ",".join(FLAGS.settings)
            raise ConfigError(f"With --tune_runtime, --settings names one .json file, for one model. Received: {received}")
        commandline.check_file("settings", path)
        return path
    folder = pathlib.Path(model.path)
    folder = folder.parent if folder.is_file() else folder
    return folder / settings.JSON_NAME if (folder / "quant_plan.json").is_file() else None


def _options() -> dict[str, Any]:
    return {name: FLAGS[name].value for names in _GROUPS.values() for name in names}


def _title(facts: Mapping[str, Any]) -> str:
    features = [name for key, name in (("vnni", "VNNI"), ("bf16", "bfloat16"), ("amx", "AMX")) if facts[key]]
    return ", ".join([f"TensorFlow {facts['tensorflow']}", facts["cpu"], f"{facts['usable_cores']} cores", *features])


if __name__ == "__main__":
    open_streams()
    sys.exit(main(parse(sys.argv)))
