"""A plan as files: `quant_plan.json` to read and edit, `quant_plan.npz` beside it for arrays. The same plan, the same bytes."""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfquant.errors import PlanError
from tfquant.plan.spec import (
    BITS,
    MODES,
    S8,
    U8,
    DynamicSpec,
    Edit,
    OpDecision,
    QuantPlan,
    QuantSpec,
    Scaling,
    Shift,
    asymmetric,
    symmetric,
)

FORMAT = "tfquant.plan/1"
JSON_NAME, NPZ_NAME = "quant_plan.json", "quant_plan.npz"
_SCALES, _ROUNDED, _BITS, _EDITS = "weight_scales/", "rounded/", "weight_bits/", "edits/"
_OFFSETS = "weight_offsets/"
_DYNAMIC = "dynamic"


def save_plan(plan: QuantPlan, folder: str | os.PathLike[str]) -> None:
    """Writes the two files into `folder`."""
    folder = pathlib.Path(folder)
    (folder / JSON_NAME).write_text(json.dumps(_to_json(plan), indent=1) + "\n")
    arrays: dict[str, np.ndarray] = {}
    kinds = {_SCALES: plan.weight_scales, _ROUNDED: plan.rounded, _BITS: plan.weight_bits, _OFFSETS: plan.weight_offsets}
    for prefix, named in kinds.items():
        arrays |= {f"{prefix}{name}": array for name, array in named.items()}
    arrays |= {f"{_EDITS}{index}": _values(edit) for index, edit in enumerate(plan.edits)}
    np.savez(folder / NPZ_NAME, **arrays)  # type: ignore[arg-type]


def load_plan(path: str | os.PathLike[str]) -> QuantPlan:
    """Reads `path`, a quant_plan.json, and the .npz beside it.

    A range whose `min` and `max` were edited counts; `scale` and `zero_point` are then computed from it again.

    Raises:
        PlanError: a file is missing or is not such a plan.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / JSON_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise PlanError(f"There is no plan at {path}: give the {JSON_NAME} that tfquant wrote.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} is not a readable plan: {_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise PlanError(f"{path} is not a plan of this version of tfquant: its format must be {FORMAT!r}. Received: {found!r}")
    arrays = _load_arrays(path.with_suffix(".npz"))
    try:
        return _from_json(content, arrays)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"{path} is damaged: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise PlanError(f"There is no {path}: the plan's .npz must lie beside its .json.")
    try:
        with zipfile.ZipFile(path):
            pass
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile and zlib raise a dozen kinds on damaged files
        raise PlanError(f"{path} is not a readable .npz: {_line(error)}") from error
    for name, array in arrays.items():
        kind, _, op = name.partition("/")
        if f"{kind}/" == _SCALES:
            if not _are_floats(array) or (array <= 0).any():
                raise PlanError(f"{path}: the scales of {op} must be positive float32 numbers (C,).")
        elif f"{kind}/" in (_EDITS, _OFFSETS):
            if not _are_floats(array):
                raise PlanError(f"{path}: {name} must be finite float32 numbers (C,).")
        elif f"{kind}/" not in (_ROUNDED, _BITS) or array.dtype != np.int8:
            raise PlanError(f"{path}: {name} is no array of a plan, or not of int8. Received: {array.dtype}")
        elif f"{kind}/" == _BITS and (array.ndim != 1 or (array < 0).any() or (array > BITS[1]).any()):
            raise PlanError(f"{path}: the bits of {op} must be whole numbers (C,) of 0 to {BITS[1]}.")
    return arrays


def _are_floats(array: np.ndarray) -> bool:
    return array.dtype == np.float32 and array.ndim == 1 and bool(np.isfinite(array).all())


def _values(edit: Edit) -> np.ndarray:
    return edit.values if isinstance(edit, Shift) else edit.factors


def _under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _edit_entry(edit: Edit) -> dict[str, Any]:
    if isinstance(edit, Shift):
        return {"kind": "shift", "op": edit.op, "corrects": edit.corrects}
    return {"kind": "scaling", "producers": list(edit.producers), "consumers": list(edit.consumers)}


def _edit(entry: Mapping[str, Any], values: np.ndarray) -> Edit:
    kind = _typed(entry, "kind", str)
    if kind == "shift":
        return Shift(_typed(entry, "op", str), values, _typed({"corrects": False, **entry}, "corrects", bool))
    if kind != "scaling" or (values <= 0).any():
        raise PlanError(f"an edit must be a 'shift', or a 'scaling' by positive numbers. Received: {kind!r}")
    producers, consumers = (tuple(map(str, _typed(entry, key, list))) for key in ("producers", "consumers"))
    return Scaling(producers, consumers, values)


def _to_json(plan: QuantPlan) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "mode": plan.mode,
        "target": plan.target,
        "signature_keys": list(plan.signature_keys),
        "settings": dict(plan.settings),
        "bfloat16": list(plan.bfloat16),
        "edits": [_edit_entry(edit) for edit in plan.edits],
        "ops": [
            {"name": d.name, "op": d.op, "kernel": d.kernel, "key": d.key, "int8": d.int8, "reason": d.reason} for d in plan.ops
        ],
        "tensors": {
            name: {
                "dtype": spec.dtype,
                "min": spec.low,
                "max": spec.high,
                "scale": spec.scale,
                "zero_point": spec.zero_point,
                "source": spec.source,
                "group": spec.group,
                "bits": spec.bits,
            }
            for name, spec in plan.tensors.items()
        }
        | {name: {"dtype": spec.dtype, "range": _DYNAMIC, "zero_point": spec.zero_point} for name, spec in plan.dynamic.items()},
        "ranges": {name: list(ends) for name, ends in plan.ranges.items()},
    }


def _from_json(content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> QuantPlan:
    ops = tuple(
        OpDecision(
            name=_typed(entry, "name", str),
            op=_typed(entry, "op", str),
            kernel=_typed(entry, "kernel", str),
            key=_typed(entry, "key", str),
            int8=_typed(entry, "int8", bool),
            reason=_typed(entry, "reason", str),
        )
        for entry in content["ops"]
    )
    entries = content["tensors"].items()
    tensors = {name: _spec(name, entry) for name, entry in entries if "range" not in entry}
    dynamic = {name: _dynamic_spec(name, entry) for name, entry in entries if "range" in entry}
    groups: dict[str, QuantSpec] = {}
    for name, spec in tensors.items():
        first = groups.setdefault(spec.group, spec)
        if (first.dtype, first.scale, first.zero_point, first.bits) != (spec.dtype, spec.scale, spec.zero_point, spec.bits):
            raise PlanError(
                f"{name} must have the range of its group {spec.group}: {first.low:g}..{first.high:g}. "
                f"Received: {spec.low:g}..{spec.high:g}"
            )
    settings = dict(content["settings"])
    keys = tuple(_typed(content, "signature_keys", list))
    if not keys or not all(isinstance(key, str) for key in keys):
        raise PlanError(f"'signature_keys' must be a list of strings. Received: {list(keys)!r}")
    bfloat16 = tuple(content.get("bfloat16", ()))
    if not all(isinstance(name, str) for name in bfloat16):
        raise PlanError(f"'bfloat16' must be a list of strings. Received: {list(bfloat16)!r}")
    mode = content.get("mode", MODES[0])  # plans from before there were others have none
    if mode not in MODES:
        raise PlanError(f"'mode' must be one of {', '.join(MODES)}. Received: {mode!r}")
    entries = content.get("edits", ())
    lacking = next((index for index in range(len(entries)) if f"{_EDITS}{index}" not in arrays), None)
    if lacking is not None:
        raise PlanError(f"the .npz beside it must hold {_EDITS}{lacking}. Received: none")
    edits = tuple(_edit(entry, arrays[f"{_EDITS}{index}"]) for index, entry in enumerate(entries))
    return QuantPlan(
        target=_typed(content, "target", str),
        signature_keys=keys,
        ops=ops,
        tensors=tensors,
        weight_scales=_under(arrays, _SCALES),
        settings=settings,
        bfloat16=bfloat16,
        dynamic=dynamic,
        mode=mode,
        edits=edits,
        rounded=_under(arrays, _ROUNDED),
        weight_bits=_under(arrays, _BITS),
        weight_offsets=_under(arrays, _OFFSETS),
        ranges={name: _ends(name, entry) for name, entry in content.get("ranges", {}).items()},
    )


def _ends(name: str, entry: Any) -> tuple[float, float]:
    low, high = (float(end) for end in entry)
    if not np.isfinite([low, high]).all() or low > high:
        raise PlanError(f"the ends of the range of {name} must be finite and in order. Received: {low}, {high}")
    return low, high


def _typed(entry: Mapping[str, Any], key: str, kind: type) -> Any:
    value = entry[key]
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise PlanError(f"{key!r} must be a {kind.__name__}. Received: {value!r}")
    return value


def _dynamic_spec(name: str, entry: Mapping[str, Any]) -> DynamicSpec:
    spec = DynamicSpec(_typed(entry, "dtype", str), entry["zero_point"])
    if entry["range"] != _DYNAMIC or (spec.dtype, spec.zero_point) not in ((U8, None), (U8, 128), (S8, 0)):
        raise PlanError(
            f"{name} must have a range, or be {U8!r} or {S8!r} with the range {_DYNAMIC!r} and the zero point null, 128 or 0. "
            f"Received: {dict(entry)}"
        )
    return spec


def _spec(name: str, entry: Mapping[str, Any]) -> QuantSpec:
    dtype, source, group = (_typed(entry, key, str) for key in ("dtype", "source", "group"))
    low, high, scale = (float(entry[key]) for key in ("min", "max", "scale"))
    if dtype not in (U8, S8):
        raise PlanError(f"the dtype of {name} must be {U8!r} or {S8!r}. Received: {dtype!r}")
    if not np.isfinite([low, high, scale]).all() or low > 0 or high < 0 or low >= high or scale <= 0:
        raise PlanError(f"the range of {name} must be finite, hold 0 and not be empty. Received: {low}..{high}, scale {scale}")
    bits = entry.get("bits", BITS[1])
    if not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
        raise PlanError(f"the bits of {name} must be {BITS[0]} to {BITS[1]}. Received: {bits!r}")
    stored = QuantSpec(dtype, float(np.float32(scale)), _typed(entry, "zero_point", int), source, group, bits)
    least, largest = stored.limits
    if least <= stored.zero_point <= largest and (low, high) == (stored.low, stored.high):
        return stored
    return (asymmetric if dtype == U8 else symmetric)(low, high, "user", group, bits=bits)
