"""Folders appear whole or not at all, and replace others in one step."""

import errno
import os
import subprocess
import sys

import pytest

from tfquant.errors import OutputError
from tfquant.graph import saving
from tfquant.graph.saving import atomic_folder
from tfquant.unfinished import prefix


def fill(folder, text):
    (folder / "file").write_text(text)


def test_a_new_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out", overwrite=False) as folder:
        fill(folder, "new")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_an_old_folder_is_replaced(tmp_path, monkeypatch, can_swap):
    if not can_swap:

        class Libc:
            def renameat2(self, *_):
                saving.ctypes.set_errno(errno.EINVAL)
                return -1

        monkeypatch.setattr(saving.ctypes, "CDLL", lambda *_, **__: Libc())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, "new")
        assert (tmp_path / "out" / "old").read_text() == "old"
    assert os.listdir(tmp_path / "out") == ["file"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_leaves_all_as_it_was(tmp_path, exists):
    if exists:
        (tmp_path / "out").mkdir()
        fill(tmp_path / "out", "old")

    def break_off(folder):
        fill(folder, "half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", overwrite=True) as folder:
        break_off(folder)
    assert os.listdir(tmp_path) == (["out"] if exists else [])
    assert not exists or (tmp_path / "out" / "file").read_text() == "old"


def test_what_exists_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="exists already"), atomic_folder(tmp_path / "out", overwrite=False) as folder:
        fill(folder, "new")
    assert (tmp_path / "out" / "file").read_text() == "old"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"), atomic_folder(tmp_path / "file", overwrite=True):
        pass


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path):
    """But not the folder of a process that runs, nor one of another machine, nor what is merely called alike."""
    other = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    gone, mine = int(other.stdout), prefix(tmp_path / "int8")
    host = mine.removeprefix(".int8.").rpartition("-")[0]
    stale = f".int8.{host}-{gone}.abcdefgh"
    kept = [f"{mine}abcdefgh", f".int8.{host}x-{gone}.abcdefgh", f"{stale}.old", f".int80.{host}-{gone}.abcdefgh"]
    for name in (stale, *kept):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, "old")
    with atomic_folder(tmp_path / "int8", overwrite=False) as folder:
        (folder / "file").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"int8", *kept}
