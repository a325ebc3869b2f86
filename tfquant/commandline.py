"""What the commands have in common: their flags and help, and one line with exit code 2 for what they refuse."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import flags

from tfquant.errors import ConfigError, OutputError, TfquantError
from tfquant.quiet import quiet_libraries
from tfquant.supervise import REFUSED, open_streams, supervise
from tfquant.unfinished import write_file


def parse(
    command: str, argv: Sequence[str], values: flags.FlagValues, description: str | None, groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """Parses the flags; a wrong one is a line and exit code 2, --help is about the flags of `groups` alone.

    Args:
        command: `calibrate` of tfquant.calibrate.
        argv: with the program's name.
        values: where the flags were defined.
        description: what --help begins with.
        groups: title to names of flags.

    Returns:
        The arguments that are no flags.
    """
    if any(argument in ("--help", "-h", "-help", "--helpshort", "--helpfull") for argument in argv[1:]):
        print(description)
        for title, names in groups.items():
            print(f"{title}:")
            for name in names:
                flag = values[name]
                text = (flag.help or "").partition(";\n")[0]  # absl adds a line to flags that may be repeated
                print(f"  --{name}: {text} (default: {flag.default_as_str})")
        raise SystemExit(0)
    try:
        return list(values(list(argv)))
    except flags.Error as error:
        raise SystemExit(refuse(command, " ".join(str(error).split()))) from error


def run(command: str, argv: Sequence[str], work: Callable[[], int | None]) -> int:
    """Does the work of a command; returns its exit code.

    Args:
        command: as in `parse`.
        argv: what `parse` returned.
        work: raises `TfquantError` for what is to be refused; may return an exit code of its own, where all went well.
    """
    try:
        if len(argv) > 1:
            raise ConfigError(f"Every argument is a --flag. Received: {argv[1]}")
        return work() or 0
    except TfquantError as error:
        return refuse(command, " ".join(str(error).split()))
    except OSError as error:  # a name too long, a working folder that is gone
        return refuse(command, f"A path cannot be used. Received: {error}")
    except KeyboardInterrupt:
        return refuse(command, "Interrupted: nothing was written.")


def start(command: str, parse_flags: Callable[[Sequence[str]], list[str]], main: Callable[[Sequence[str]], int]) -> NoReturn:
    """The program: parses the flags here, works in a supervised child process, and exits.

    Args:
        command: as in `parse`.
        parse_flags: from sys.argv to the arguments that are no flags.
        main: takes these; returns the exit code.
    """
    open_streams()
    arguments = parse_flags(sys.argv)

    def work() -> int:
        quiet_libraries()
        return main(arguments)

    sys.exit(supervise(work, command))


def refuse(command: str, message: str) -> int:
    """Says why not; returns the exit code."""
    print(f"tfquant.{command}: {message}", file=sys.stderr)
    return REFUSED


def numbers(flag: str, words: Sequence[str]) -> list[int]:
    """The value of a flag that takes whole numbers with commas between.

    Raises:
        ConfigError: it holds something else.
    """
    try:
        return [int(word) for word in words if word.strip()]
    except ValueError as error:
        raise ConfigError(f"--{flag} takes numbers with commas between. Received: {','.join(words)}") from error


def check_file(flag: str, path: pathlib.Path) -> None:
    """Raises `OutputError` where a file could not be written, before minutes are spent on what it shall hold."""
    if not path.absolute().parent.is_dir():
        raise OutputError(f"--{flag} names a file in a folder that does not exist. Received: {path}")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise OutputError(f"--{flag} names a file that cannot be written. Received: {path}")


def write_json(flag: str, path: pathlib.Path, content: Any) -> None:
    """Writes what a flag names a file for, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_file(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"--{flag} cannot be written: {error}") from error
