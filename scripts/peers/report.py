"""What a comparison tells: tables for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scripts.peers.building import Build
from scripts.peers.comparison import OURS, Outcome, Timing
from tfquant.tables import table

_QUIET = 0.1  # share of the time that threads may wait for a core: those of a side start and end together


def model_lines(name: str, outcomes: Sequence[Outcome], batch_sizes: Sequence[int]) -> list[str]:
    """All of one model: times, what quantizing took and gave, and the settings by name."""
    return [
        *_times(name, outcomes, batch_sizes),
        "",
        *_costs(outcomes),
        "",
        "Settings, the fastest of those tried:",
        *_settings(outcomes),
    ]


def summary_lines(results: Mapping[str, Sequence[Outcome]], batch_sizes: Sequence[int]) -> list[str]:
    """A column per model and batch size: how many times as long as tfquant's a run of each side takes."""
    columns = [(name, batch) for name in results for batch in batch_sizes]
    rows = [["Time / tfquant's", *(f"{name} b{batch}" for name, batch in columns)]]
    for position, outcome in enumerate(next(iter(results.values()))):
        if outcome.side.name != OURS:
            found = [results[name][position].timings.get(batch) for name, batch in columns]
            rows.append([outcome.side.title, *(_ratio(timing) for timing in found)])
    return table(rows)


def _times(name: str, outcomes: Sequence[Outcome], batch_sizes: Sequence[int]) -> list[str]:
    heading = [name]
    for batch in batch_sizes:
        heading += [f"b{batch} ms", "/ tfquant's"]
    rows = [heading]
    for outcome in outcomes:
        row = [outcome.side.title]
        for batch in batch_sizes:
            timing = outcome.timings.get(batch)
            row += ["failed", ""] if timing is None else [f"{timing.times.median:.2f}", _ratio(timing)]
        rows.append(row)
    lines = table(rows)
    for outcome in outcomes:
        reasons: dict[str, list[int]] = {}
        for batch, reason in outcome.failures.items():
            reasons.setdefault(reason, []).append(batch)
        lines += [f"{outcome.side.title} at batch {_listed(batches)}: {reason}" for reason, batches in reasons.items()]
    for batch in batch_sizes:
        shares = [outcome.timings[batch].waited for outcome in outcomes if batch in outcome.timings]
        if shares and shares[0] is not None and shares[0] > _QUIET:
            lines.append(f"Batch {batch}: threads waited for a core {shares[0]:.0%} of the time: other programs ran beside these")
    return lines


def _ratio(timing: Timing | None) -> str:
    return "" if timing is None or timing.ratio is None else f"{timing.ratio:.2f}"


def _listed(batches: Iterable[int]) -> str:
    return ", ".join(map(str, batches))


def _costs(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [["Quantizing", "seconds", "peak MB", "MB on disk", "agreement", "mean KL", "SQNR dB"]]
    for outcome in outcomes:
        for timing in _by_build(outcome).values():
            build, close = timing.candidate.build, timing.fidelity
            rows.append(
                [
                    f"{outcome.side.title}{f', {build.label}' if build.label else ''}",
                    _figure(build.seconds, ".0f"),
                    _figure(build.peak_megabytes, ".0f"),
                    f"{build.megabytes:.1f}",
                    _figure(close and close.agreement, ".1f", "%"),
                    _figure(close and close.mean_kl, ".4f"),
                    _figure(close and close.sqnr, ".1f"),
                ]
            )
    return table(rows)


def _by_build(outcome: Outcome) -> dict[int, Timing]:
    """A timing of each model that a side has run."""
    return {id(timing.candidate.build): timing for timing in outcome.timings.values()}


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _settings(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        labels: dict[str, list[int]] = {}
        for batch, timing in outcome.timings.items():
            labels.setdefault(timing.candidate.setting.label, []).append(batch)
        for label, batches in labels.items():
            lines.append(f"  {outcome.side.title}, batch {_listed(batches)}: {label}")
        versions = dict.fromkeys(version for timing in outcome.timings.values() for version in timing.versions)
        if versions:
            lines.append(f"    with {', '.join(versions)}")
    return lines


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One model, by side."""
    return {outcome.side.name: _side(outcome) for outcome in outcomes}


def _side(outcome: Outcome) -> dict[str, Any]:
    return {
        "title": outcome.side.title,
        "batches": {str(batch): _timing(timing) for batch, timing in outcome.timings.items()},
        "failures": {str(batch): reason for batch, reason in outcome.failures.items()},
    }


def _timing(timing: Timing) -> dict[str, Any]:
    times = timing.times
    return {
        "median_ms": times.median,
        "p90_ms": times.percentile(90),
        "rounds_ms": [list(burst) for burst in times.rounds],
        "ratio_to_tfquant": timing.ratio,
        "waited_for_cores": timing.waited,
        "setting": timing.candidate.setting.label,
        "versions": list(timing.versions),
        "build": _build(timing.candidate.build),
        "fidelity": timing.fidelity and dataclasses.asdict(timing.fidelity),
        "searched_ms": dict(timing.searched),
    }


def _build(build: Build) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(build).items() if key != "report"}
