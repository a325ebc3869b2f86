"""A job: all that `python -m tfquant.calibrate` needs, in Python as `Job` and on disk as a YAML file of the same shape.

saved_model: float32
data: samples.npz
output: int8
quantization:
  estimator: mse
  ignored_scope: [block1, "re:head/.*", "type:MatMul"]
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import re
import typing
from collections.abc import Iterator
from typing import Any

import yaml

from tfquant.config import FORMATS, QuantConfig, check_fields, option
from tfquant.errors import ConfigError, shown

# YAML takes its time; a job is a few hundred bytes.
_LARGEST_FILE = 1 << 18
_TAG = "tag:yaml.org,2002:"
_PLAIN = frozenset(f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null"))


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the command line; what is None may be given by flags.

    Attributes:
        saved_model: the model: a folder or a file.
        data: calibration data: a path or "package.module:function".
        plan: quant_plan.json of an earlier run, used instead of data.
        output: the folder to write.
        overwrite: replace the output if it exists.
        format: of the output: "saved_model", "graphdef" (one frozen GraphDef) or "fakequant" (the simulation).
        quantization: the options.

    Raises:
        ConfigError: a value that it cannot have.
    """

    saved_model: str | None = option(None, path=True)
    data: str | None = option(None, path=True)
    plan: str | None = option(None, path=True)
    output: str | None = option(None, path=True)
    overwrite: bool = False
    format: str = option("saved_model", choices=FORMATS)
    quantization: QuantConfig = dataclasses.field(default_factory=QuantConfig)

    def __post_init__(self) -> None:
        check_fields(self)


def load_job(path: str | os.PathLike[str]) -> Job:
    """Reads a job file. Its relative paths are relative to the folder that it lies in, wherever it is read from.

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds what a `Job` cannot hold; with the line.
    """
    path = pathlib.Path(path)
    job: Job = _Reader(path, _read(path)).read()
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.metadata.get("path") and value and not (field.name == "data" and re.fullmatch(r"[\w.]+:[\w.]+", value)):
            changes[field.name] = str(path.parent / value)
    return dataclasses.replace(job, **changes)


def _read(path: pathlib.Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"A job file is a YAML file. Received: {path}, which is none")
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no job file at {path}: give a YAML file.") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"The job file {path} cannot be read: {error}") from error
    if len(content) > _LARGEST_FILE:
        raise ConfigError(f"{path}:1: a job file has at most {_LARGEST_FILE} bytes. Received: more")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: a job file is text in UTF-8. Received: the byte 0x{content[error.start]:02x}"
        ) from error


class _Reader:
    """Turns the text of one file into a `Job`; knows the lines."""

    def __init__(self, path: pathlib.Path, text: str) -> None:
        self._path, self._text = path, text

    def read(self) -> Job:
        root = self._compose()
        if root is None:
            raise self._error(1, "a job file must hold options: saved_model, data, output ... Received: nothing")
        return self._section(Job, root, "")

    def _error(self, line: int, message: str) -> ConfigError:
        return ConfigError(f"{self._path}:{line}: {message}")

    def _compose(self) -> yaml.Node | None:
        """The document as YAML's tree, whose nodes know their lines; nothing is constructed or expanded."""
        try:
            return yaml.compose(self._text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise self._error(line, f"a job file is text. Received: the character #x{error.character:04x}") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            hint = "; indent with spaces, not with tabs" if "\\t" in str(error.problem) else ""
            raise self._error(line, f"this is no YAML: {error.problem or error.context}{hint}.") from error
        except RecursionError as error:
            raise self._error(1, "a job file holds options, and lists of plain values. Received: deep nesting") from error
        except (ValueError, OverflowError) as error:
            raise self._error(1, "this is no YAML: it escapes a character that Unicode does not have.") from error

    def _section(self, kind: Any, node: yaml.Node, prefix: str) -> Any:
        """An instance of the dataclass `kind`, whose fields are the options of this mapping."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
            name = prefix.rstrip(".") or "a job file"
            raise self._error(line, f"{name} must hold options, as 'name: value' lines. Received: {_described(node)}")
        hints = typing.get_type_hints(kind)
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(
                    line, f"{prefix.rstrip('.') or 'a job file'} must have options with plain names. Received: {_described(key)}"
                )
            if name not in hints:
                raise self._error(line, f"unknown option. Received: {shown(prefix + name)}; {_nearest(kind, name)}")
            if name in lines:
                raise self._error(line, f"{prefix}{name} must be given once. Received: again, after line {lines[name]}")
            lines[name] = line
            if dataclasses.is_dataclass(hints[name]):
                if value.tag != f"{_TAG}null":  # all options in it may be commented out
                    values[name] = self._section(hints[name], value, f"{prefix}{name}.")
                continue
            values[name] = self._value(prefix + name, value)
            try:
                kind(**{name: values[name]})
            except ConfigError as error:
                text = any(item.tag != f"{_TAG}str" for item in _scalars(value)) and "string" in str(error)
                hint = "; put quotes around what is text" if text else ""
                raise self._error(line, f"{prefix}{error}{hint}") from error
        return kind(**values)

    def _value(self, name: str, node: yaml.Node) -> Any:
        """A plain value, or a list of them."""
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(name, node)
        if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return [self._scalar(name, item) for item in node.value]
        inner = next((item for item in node.value if not isinstance(item, yaml.ScalarNode)), node)
        found = node if isinstance(node, yaml.MappingNode) else inner
        line = found.start_mark.line + 1
        raise self._error(line, f"{name} must be a plain value or a list of them. Received: {_described(found)}")

    def _scalar(self, name: str, node: yaml.Node) -> Any:
        line = node.start_mark.line + 1
        if node.tag in _PLAIN:
            try:
                return yaml.SafeLoader("").construct_object(node)
            except (ValueError, KeyError, IndexError, yaml.YAMLError):
                pass  # "!!int many", or a number with thousands of digits
        kind = node.tag.removeprefix(_TAG)
        message = f"{name} must be a string, a number, true or false. Received: {shown(node.value)} as {shown(kind)}"
        raise self._error(line, f"{message}; put quotes around what is text")


def _scalars(node: yaml.Node) -> Iterator[yaml.Node]:
    yield from [node] if isinstance(node, yaml.ScalarNode) else node.value


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return shown(node.value) if node.value else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _nearest(kind: Any, name: str) -> str:
    """What somebody who wrote `name` may have meant."""
    hints = typing.get_type_hints(kind)
    for section, hint in hints.items():
        if dataclasses.is_dataclass(hint) and name in typing.get_type_hints(hint):
            return f"it belongs under {section}"
    if kind is not Job and name in typing.get_type_hints(Job):
        return "it belongs to the top, without indentation"
    near = difflib.get_close_matches(name, list(hints), 3)
    return f"did you mean {' or '.join(near)}?" if near else f"the options are {', '.join(hints)}"
