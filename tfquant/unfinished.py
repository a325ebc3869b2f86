"""Outputs in the making: hidden folders and files beside the output, whose names tell whose they are."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import tempfile


def prefix(output: pathlib.Path) -> str:
    """How the name of this process's folder begins; random characters follow."""
    return f".{output.name}.{_host()}-{os.getpid()}."


def remove_stale(output: pathlib.Path) -> None:
    """Removes what processes of this machine left beside `output` when they were killed."""
    pattern = re.compile(rf"\.{re.escape(output.name)}\.{re.escape(_host())}-(\d+)\.[a-z0-9_]{{8}}")
    with contextlib.suppress(OSError):
        for name in os.listdir(output.parent):
            found = pattern.fullmatch(name)
            if found and not _is_running(int(found[1])):
                remove(output.with_name(name))


def remove(path: pathlib.Path) -> None:
    """Removes a folder, a file, or a link where an output was one."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file that is there as it was or as it shall be, never in part.

    Raises:
        OSError: it cannot be written.
    """
    remove_stale(path)
    number, name = tempfile.mkstemp(prefix=prefix(path), dir=path.parent)
    try:
        with open(number, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
