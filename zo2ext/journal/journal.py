"""The journal of a run: with the starting weights, it gives the weights after any step.

It is one file; `records` describes its bytes. See docs/contracts.md, "Journal".
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from zo2ext._files import sync
from zo2ext.errors import JournalError, UserError
from zo2ext.journal.records import Content, Ledger, StepResult, opening, parse

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.zo2"  # in a run's folder
# Parts of a header that older journals lack, and continued runs.
_ADDED = ("run.functions", "run.rows", "run.lr_search")


def read_journal(path: Path) -> Content:
    """Read a journal up to the first damage.

    Raises:
        JournalError: It is not a journal, its header is damaged, or a newer zo2ext wrote it.
        OSError: It cannot be read.
    """
    return parse(path.read_bytes(), path)


def repair_journal(path: Path) -> Content:
    """Cut a damaged journal at the first damage, and keep a copy named ``.damaged`` beside it.

    Returns:
        Content of the journal that remains.

    Raises:
        JournalError: As `read_journal`, or another process uses the journal.
    """
    with path.open("r+b") as file:
        _lock(file.fileno(), path)
        content = parse(file.read(), path)
        if content.damage is not None:
            shutil.copyfile(path, path.with_name(path.name + ".damaged"))
            os.ftruncate(file.fileno(), content.nbytes)
            os.fsync(file.fileno())
    return parse(path.read_bytes(), path)


def set_aside(path: Path) -> Path | None:
    """Rename a journal and the checkpoints beside it, so that another run can begin there.

    Returns:
        Its new name: the first of ``.before-1``, ``.before-2``, ... that is free; checkpoints are
        called ``before-1.checkpoint-...``. None if there is no journal.

    Raises:
        JournalError: Another process uses it.
    """
    if not path.is_file():
        return None
    with path.open("r+b") as file:
        _lock(file.fileno(), path)
        number = 1
        while (kept := path.with_name(f"{path.name}.before-{number}")).exists():
            number += 1
        path.rename(kept)
        for checkpoint in path.parent.glob("checkpoint-*"):  # the new run would continue from them
            checkpoint.rename(checkpoint.with_name(f"before-{number}.{checkpoint.name}"))
    sync(path.parent)
    return kept


class Journal(Ledger):
    """A run's journal file, opened to record more steps. One process at a time can open it.

    Args:
        path: The file. It is created, with its folder, if it does not exist.
        header: Description of this run, as JSON values. ``start`` is the number of steps that the
            starting weights include.
        from_start: Whether the weights are those after ``start`` steps. If False, they are from a
            checkpoint, and ``start`` and ``fingerprint`` of an existing journal may differ.
        sync_every: Steps between syncs with the disk. They go on beside the next step; `settle`
            waits for them. Killing the process loses no finished step.

    Raises:
        JournalError: Another process uses it, it is damaged, or it belongs to another run.
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
            raise UserError(f"sync_every must be at least 1, got {sync_every}")
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
        self._last_checksum = (self.recorded.checksums or [self.checksum])[-1]
        self._size, self._unsynced = self.recorded.nbytes, 0
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="zo2ext-journal")
        self._syncing: Future[None] | None = None

    def checksum_after(self, steps: int) -> int:
        """Return the checksum of the first `steps` steps, at least those it had when opened.

        It is the same for all runs that made these very steps, and for no other. Waits until the
        disk has these steps, so that no checkpoint is ahead of the journal.
        """
        if self._unsynced:
            self.sync()
        self.settle()
        done = steps - self.recorded.start
        recorded = self.recorded.checksums
        return recorded[done - 1] if 0 < done <= len(recorded) else self._last_checksum

    def append(self, result: StepResult) -> bytes:
        """Write a step, all of it or nothing; return its records, as `Ledger.append`.

        Raises:
            OSError: It cannot be written, for example to a full disk; the journal is unchanged. Or
                the disk did not take the steps before; no step is accepted after that.
        """
        self.settle()
        with self.undone_on_error():
            records = super().append(result)
            self._last_checksum = self.checksum
            self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self._unsynced = 0
            self._syncing = self._disk.submit(os.fdatasync, self._file)
        return records

    def append_write_back(self, step: int) -> None:
        with self.undone_on_error():
            super().append_write_back(step)
            self.sync()

    def settle(self) -> None:
        """Wait for the sync of earlier steps that is under way.

        Raises:
            OSError: It failed. The journal then stays as it is, and settles no more.
        """
        if self._syncing is not None:
            self._syncing.result()

    def sync(self) -> None:
        self.settle()
        os.fdatasync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        if self._file >= 0:
            try:
                self.sync()
            finally:
                self._disk.shutdown()
                os.close(self._file)
                self._file = -1

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
                f"are undamaged. Nothing was changed; zo2ext verify {self.path.parent} --repair "
                "keeps them, and a copy of the file as it is, so that the run can continue"
            )
        logger.info("%s: dropping what a crash left: %s", self.path, content.damage)
        os.ftruncate(self._file, content.nbytes)
        return content

    def _write(self, records: bytes) -> None:
        done = 0
        try:
            while done < len(records):
                done += os.pwrite(self._file, records[done:], self._size + done)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot write step {self.next_step} to the journal "
                f"({os.strerror(error.errno or 0)}); all steps before it are safe, and the run can "
                "be continued",
                str(self.path),
            ) from error
        self._size += done

    def _drop_excess(self) -> None:
        os.ftruncate(self._file, self._size)


def _create(path: Path, opening: bytes) -> None:
    """Create a journal without steps, unless another process creates one at the same time."""
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
    """Return the process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _check_same_run(found: Any, expected: Any, path: Path) -> None:
    problems = list(differences(found, expected))
    if problems:
        raise JournalError(
            f"{path} is the journal of another run: {'; '.join(problems[:4])}"
            + (f" ({len(problems)} differences)" if len(problems) > 4 else "")
            + ". Use the settings it was started with, or a new folder"
        )


def differences(found: Any, expected: Any, name: str = "") -> Iterator[str]:
    """Describe how two headers, or values in them, differ.

    What older journals lack is compared only if both have it.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted({*found, *expected} - {"zo2ext"}):
            inner = f"{name}.{key}" if name else key
            if inner in _ADDED and not (key in found and key in expected):
                continue
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
