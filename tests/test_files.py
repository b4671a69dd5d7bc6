"""Files and folders appear whole or not at all, whatever stops the writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zo2ext import _files as files
from zo2ext._files import check_new_folder, remove_halves, replace_folder, write_atomically


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"new and longer", b""):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "file", b"old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_leftovers_of_a_killed_writer_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"a long leftover")
    write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert names(tmp_path) == {"file"}


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "final") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"1")
        assert not (tmp_path / "final").exists()
    assert names(tmp_path) == {"final"}
    assert (tmp_path / "final" / "inner" / "weights").read_bytes() == b"1"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_failed_folder_never_appears(error: type[BaseException], tmp_path: Path) -> None:
    def write_and_fail() -> None:
        with replace_folder(tmp_path / "final") as folder:
            (folder / "weights").write_bytes(b"1")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert names(tmp_path) == set()


def test_a_folder_that_cannot_be_synced_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError("I/O error")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match="I/O error"),
        replace_folder(tmp_path / "final") as folder,
    ):
        (folder / "weights").write_bytes(b"1")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_gives_way_to_a_whole_one_alone(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()

    def write_and_fail() -> None:
        with replace_folder(final) as folder:
            (folder / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_fail()
    assert names(final) == {"old"}
    with replace_folder(final) as folder:
        (folder / "new").touch()
        assert names(final) == {"old"}
    assert names(final) == {"new"}
    assert names(tmp_path) == {"final"}


def test_halves_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "final.partial" / "deep").mkdir(parents=True)
    (tmp_path / "loss.csv.partial").touch()
    (tmp_path / "loss.csv").touch()
    remove_halves(tmp_path)
    assert names(tmp_path) == {"loss.csv"}


KILLED = """
import os, sys
from pathlib import Path
from zo2ext._files import replace_folder
with replace_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"1")
    os._exit(9)
"""


def test_a_killed_writer_leaves_no_folder_and_does_not_disturb_the_next(tmp_path: Path) -> None:
    final = tmp_path / "final"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(final)], timeout=60, check=False)
    assert killed.returncode == 9
    assert names(tmp_path) == {"final.partial"}
    with replace_folder(final) as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == {"final"}
    assert names(final) == {"whole"}


def test_checking_a_new_folder_leaves_nothing(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "a" / "b", "out")
    assert names(tmp_path) == set()
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty", "out")
    assert names(tmp_path) == {"empty"}


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(ValueError, match=r"^out is '.*', which is not empty; name a new folder$"):
        check_new_folder(tmp_path, "out")
    assert names(tmp_path) == {"old"}


@pytest.mark.parametrize("below", ["file", "file/a/b", "link"])
def test_a_folder_that_cannot_be_made_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^out is '.*', which cannot be written to: "):
        check_new_folder(tmp_path / below, "out")
    assert names(tmp_path) == {"file", "link"}
    assert (tmp_path / "file").read_text() == "kept"
