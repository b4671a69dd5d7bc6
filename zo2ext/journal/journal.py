"""The journal of a run: what, with the starting weights, gives the weights after any step.

One file, whose bytes `records` describes. See docs/contracts.md, "Journal".
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zo2ext._files import sync
from zo2ext.errors import JournalError
from zo2ext.journal.records import Content, Ledger, StepResult, opening, parse

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.zo2"  # in the folder of a run


def read_journal(path: Path) -> Content:
    """Read a journal, as far as it is whole.

    Raises:
        JournalError: It is no journal, its header is damaged, or a newer zo2ext wrote it.
        OSError: It cannot be read.
    """
    return parse(path.read_bytes(), path)


def repair_journal(path: Path) -> Content:
    """Cut a damaged journal where it stops being whole; the file as it was stays beside it.

    Returns:
        What is left. The copy has ``.damaged`` behind its name.

    Raises:
        JournalError: As `read_journal`; or another process holds the journal.
    """
    with path.open("r+b") as file:
        _lock(file.fileno(), path)
        content = parse(file.read(), path)
        if content.damage is not None:
            shutil.copyfile(path, path.with_name(path.name + ".damaged"))
            os.ftruncate(file.fileno(), content.nbytes)
            os.fsync(file.fileno())
    return parse(path.read_bytes(), path)


class Journal(Ledger):
    """A run's journal, open for the steps to come. One process at a time has it.

    Args:
        path: The file. Made, with its folder, where it is not there.
        header: Of this run; JSON values. ``start`` is the step of the starting weights.
        from_start: Whether the weights are those before step ``start``. False: they are a
            checkpoint's, and of a journal that is there ``start`` and ``fingerprint`` may differ.
        sync_every: Steps between waits for the disk. 1: no finished step is lost even if the
            machine loses its power; the process may be killed at any moment in any case.

    Raises:
        JournalError: Another process has it, it is damaged, or it is of another run (with what
            differs).
        OSError: It cannot be written.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        *,
        from_start: bool = True,
        sync_every: int = 1,
    ) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1, got {sync_every}")
        self.path, self._sync_every = path, sync_every
        expected: dict[str, Any] = json.loads(json.dumps(dict(header)))
        if not path.exists():
            _create(path, opening(expected))
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(self._file, path)
            super().__init__(self._begin(expected, from_start))
        except BaseException:
            os.close(self._file)
            raise
        self._step_checksum = (self.recorded.checksums or [self.checksum])[-1]
        self._size, self._unsynced = self.recorded.nbytes, 0

    def checksum_after(self, steps: int) -> int:
        """Of the first `steps` steps, all or some of those that were there when it was opened.

        The same for all runs that made these very steps, and for no other.
        """
        done = steps - self.recorded.start
        recorded = self.recorded.checksums
        return recorded[done - 1] if 0 < done <= len(recorded) else self._step_checksum

    def append(self, step: StepResult) -> bytes:
        """Write a step, all of it or nothing; returns its records, as `Ledger.append`.

        Raises:
            JournalError: It is not the next step.
            OSError: It cannot be written, as on a full disk: the journal is as it was.
        """
        records, checksum = self.encode(step)
        self._write(records)
        records = self._stepped(records, checksum)
        self._step_checksum = checksum
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self.sync()
        return records

    def append_write_back(self, step: int) -> None:
        """Write that all weights are rounded to storage before `step`, the next one."""
        record, checksum = self.encode_write_back(step)
        self._write(record)
        self._written_back(record, checksum)
        self.sync()

    def sync(self) -> None:
        """Wait until everything so far is on the disk."""
        os.fdatasync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        """Let other processes have it."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    # --

    def _begin(self, header: dict[str, Any], from_start: bool) -> Content:
        content = parse(_read_all(self._file), self.path)
        if not from_start:
            header |= {name: content.header[name] for name in ("start", "fingerprint")}
        _check_same_run(content.header, header, self.path)
        if content.damage is None:
            return content
        if not content.torn:
            raise JournalError(
                f"{self.path} is damaged: {content.damage}. Its first {content.next_step} steps "
                f"are whole. Nothing was changed; zo2ext verify {self.path.parent} --repair keeps "
                "them, and the file as it is beside them, so that the run can go on from there"
            )
        logger.info("%s: dropping what a crash left: %s", self.path, content.damage)
        os.ftruncate(self._file, content.nbytes)
        return content

    def _write(self, records: bytes) -> None:
        try:
            written = os.pwrite(self._file, records, self._size)
            while written < len(records):
                written += os.pwrite(self._file, records[written:], self._size + written)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                error.errno,
                f"cannot write step {self.next_step} to the journal "
                f"({os.strerror(error.errno or 0)}); all steps before it are safe, and the run can "
                "be continued",
                str(self.path),
            ) from error
        self._size += len(records)


def _create(path: Path, opening: bytes) -> None:
    """Make a journal of no steps. It appears whole; one that appeared meanwhile stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~_umask())
            file.write(opening)
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(partial, path)
    finally:
        os.unlink(partial)
    sync(path.parent)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _check_same_run(found: Any, expected: Any, path: Path) -> None:
    problems = list(differences(found, expected))
    if problems:
        raise JournalError(
            f"{path} is the journal of another run: {'; '.join(problems[:4])}"
            + (f" ({len(problems)} differences)" if len(problems) > 4 else "")
            + ". Use the settings it was begun with, or a new folder"
        )


def differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """In words, how two headers differ, or parts of them."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected} - {"zo2ext"}):
            inner = f"{name}.{key}" if name else key
            yield from differences(found.get(key), expected.get(key), inner)
    elif found != expected:
        yield f"{name} was {_short(found)} and is {_short(expected)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise JournalError(f"{path} is in use: another process is on this run") from None


def _read_all(file: int) -> bytes:
    size = os.fstat(file).st_size
    data = b""
    while len(data) < size and (piece := os.pread(file, size - len(data), len(data))):
        data += piece
    return data
