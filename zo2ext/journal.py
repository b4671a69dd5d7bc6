"""The journal of a run: what, with the starting weights, gives the weights after any step.

One file: a header (what run this is), then a record of 64 bytes for each direction of each step,
and for each write-back out of turn. A record's checksum covers the one before, so that none can be
changed, lost or moved unseen. See docs/contracts.md, "Journal".
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zo2ext.files import sync
from zo2ext.ops import Update

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.zo2"  # in the folder of a run
FORMAT = 1
_MAGIC = b"zo2ext-j"
_PREAMBLE = struct.Struct("<8sIII")  # magic, format, bytes of the header, its CRC-32
_RECORD = struct.Struct("<IBBHQQddffdQ")
_CHECKSUM = struct.Struct("<I")
RECORD_NBYTES = _RECORD.size
_DIRECTION, _WRITE_BACK = 1, 2  # kinds of record
_SKIPPED = 1  # flag


class JournalError(ValueError):
    """A file that is no journal, a damaged one, or one of another run. Nothing was changed."""


@dataclass(frozen=True)
class Recorded:
    """A finished step, as the journal has it.

    Attributes:
        step: Its number, from 0.
        losses_plus, losses_minus: Losses at +eps and -eps, one a direction.
        updates: One a direction; empty where the step was skipped.
        lr: Its learning rate.
        keys: Of its directions.
    """

    step: int
    keys: tuple[int, ...]
    losses_plus: tuple[float, ...]
    losses_minus: tuple[float, ...]
    updates: tuple[Update, ...]
    lr: float

    @property
    def skipped(self) -> bool:
        return not self.updates


@dataclass
class Content:
    """What a journal holds.

    Attributes:
        header: What run it is of.
        steps: In order, without gaps, from `header["start"]` on.
        write_backs: Steps before which all weights were rounded to storage, out of turn.
        checksums: After each step, that of the last record up to there.
        nbytes: How far the file is whole.
        damage: What is wrong from there on; None where nothing is.
        torn: Whether that is no more than what a crash leaves: less than was being written.
    """

    header: dict[str, Any]
    steps: list[Recorded] = field(default_factory=list)
    write_backs: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    nbytes: int = 0
    checksum: int = 0
    damage: str | None = None
    torn: bool = False

    @property
    def start(self) -> int:
        """The step that the starting weights come before."""
        return int(self.header["start"])

    @property
    def next_step(self) -> int:
        return self.start + len(self.steps)

    @property
    def write_back(self) -> int | str:
        """The period that the run was begun with."""
        period: int | str = self.header["config"]["write_back"]
        return period

    def after(self, done: int, checksum: int | None, path: Path) -> list[Recorded]:
        """The steps from `done` on, for weights after `done` steps.

        Args:
            done: Of the weights.
            checksum: What the journal's was then; None if the weights are its starting ones.
            path: Where this was read, for messages.

        Raises:
            JournalError: The weights are not of this run, or of steps it does not reach.
        """
        if not self.start <= done <= self.next_step:
            raise JournalError(
                f"{path} holds steps {self.start} to {self.next_step - 1}, but the weights are "
                f"those after {done} steps"
            )
        before = done - self.start
        if checksum is not None and before and self.checksums[before - 1] != checksum:
            raise JournalError(
                f"{path} is another run's than the weights': its first {done} steps differ"
            )
        return self.steps[before:]


def read_journal(path: Path) -> Content:
    """Read a journal, as far as it is whole.

    Raises:
        JournalError: It is no journal, its header is damaged, or a newer zo2ext wrote it.
        OSError: It cannot be read.
    """
    return _parse(path.read_bytes(), path)


def repair_journal(path: Path) -> Content:
    """Cut a damaged journal where it stops being whole; the file as it was stays beside it.

    Returns:
        What is left. The copy has ``.damaged`` behind its name.

    Raises:
        JournalError: As `read_journal`; or another process holds the journal.
    """
    with path.open("r+b") as file:
        _lock(file.fileno(), path)
        content = _parse(file.read(), path)
        if content.damage is not None:
            shutil.copyfile(path, path.with_name(path.name + ".damaged"))
            os.ftruncate(file.fileno(), content.nbytes)
            os.fsync(file.fileno())
    return _parse(path.read_bytes(), path)


class Journal:
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
            _create(path, _opening(expected))
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(self._file, path)
            self.recorded = self._begin(expected, from_start)
        except BaseException:
            os.close(self._file)
            raise
        self._next, self._checksum = self.recorded.next_step, self.recorded.checksum
        self._step_checksum = (self.recorded.checksums or [self._checksum])[-1]
        self._size, self._unsynced = self.recorded.nbytes, 0

    def checksum_after(self, steps: int) -> int:
        """Of the first `steps` steps, all or some of those that were there when it was opened.

        The same for all runs that made these very steps, and for no other.
        """
        done = steps - self.recorded.start
        recorded = self.recorded.checksums
        return recorded[done - 1] if 0 < done <= len(recorded) else self._step_checksum

    def append(self, step: Recorded) -> None:
        """Write a step, all of it or nothing.

        Raises:
            JournalError: It is not the next step.
            OSError: It cannot be written, as on a full disk: the journal is as it was.
        """
        if step.step != self._next:
            raise JournalError(f"{self.path} expects step {self._next}, got step {step.step}")
        records, checksum = b"", self._checksum
        for k, key in enumerate(step.keys):
            update = Update(key, 0.0) if step.skipped else step.updates[k]
            record = _RECORD.pack(
                *(0, _DIRECTION, _SKIPPED if step.skipped else 0, k, step.step, key),
                *(step.losses_plus[k], step.losses_minus[k]),
                *(update.coefficient, update.decay, step.lr, 1),
            )
            record, checksum = _chained(record, checksum)
            records += record
        self._write(records, checksum)
        self._step_checksum = checksum
        self._next += 1
        self._unsynced += 1
        if self._unsynced >= self._sync_every:
            self.sync()

    def append_write_back(self, step: int) -> None:
        """Write that all weights are rounded to storage before `step`, the next one."""
        record = _RECORD.pack(0, _WRITE_BACK, 0, 0, step, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
        self._write(*_chained(record, self._checksum))
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
        content = _parse(_read_all(self._file), self.path)
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

    def _write(self, records: bytes, checksum: int) -> None:
        try:
            written = os.pwrite(self._file, records, self._size)
            while written < len(records):
                written += os.pwrite(self._file, records[written:], self._size + written)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                error.errno,
                f"cannot write step {self._next} to the journal ({os.strerror(error.errno or 0)}); "
                "all steps before it are safe, and the run can be continued",
                str(self.path),
            ) from error
        self._size += len(records)
        self._checksum = checksum


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


def _opening(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    packed = zlib.compress(text, 9)
    return _PREAMBLE.pack(_MAGIC, FORMAT, len(packed), zlib.crc32(packed)) + packed


def _chained(record: bytes, before: int) -> tuple[bytes, int]:
    """`record` with its checksum, which covers the checksum of the record `before`."""
    checksum = zlib.crc32(record[_CHECKSUM.size :], before)
    return _CHECKSUM.pack(checksum) + record[_CHECKSUM.size :], checksum


def _parse(data: bytes, path: Path) -> Content:
    if len(data) < _PREAMBLE.size or not data.startswith(_MAGIC):
        raise JournalError(f"{path} is no journal of zo2ext")
    _, version, length, checksum = _PREAMBLE.unpack_from(data)
    if version != FORMAT:
        raise JournalError(
            f"{path} has format {version}, this zo2ext reads format {FORMAT}: a newer one wrote it"
        )
    packed = data[_PREAMBLE.size : _PREAMBLE.size + length]
    if len(packed) < length or zlib.crc32(packed) != checksum:
        raise JournalError(f"the header of {path} is damaged; without it the steps mean nothing")
    header = json.loads(zlib.decompress(packed))
    content = Content(header, nbytes=_PREAMBLE.size + length, checksum=checksum)
    _parse_records(data, content)
    return content


def _parse_records(data: bytes, content: Content) -> None:
    """Add the steps that are whole to `content`, and say what ends them."""
    directions = int(content.header["config"]["directions"])
    at, checksum = content.nbytes, content.checksum
    open_step: list[tuple[Any, ...]] = []  # records of a step whose last one is still to come
    while at < len(data):
        record = data[at : at + RECORD_NBYTES]
        problem = _problem(record, checksum, content, len(open_step))
        if problem is not None:
            content.damage = f"at byte {at}, {problem}"
            break
        fields = _RECORD.unpack(record)
        checksum, at = fields[0], at + RECORD_NBYTES
        if fields[1] == _WRITE_BACK:
            content.write_backs.append(fields[4])
        else:
            open_step.append(fields)
            if len(open_step) < directions:
                continue
            content.steps.append(_recorded(open_step))
            content.checksums.append(checksum)
            open_step.clear()
        content.nbytes, content.checksum = at, checksum
    if open_step and content.damage is None:
        content.damage = f"step {content.next_step} has {len(open_step)} of {directions} records"
    # What one append may leave when the power fails: its bytes, or a part of them, not all right.
    # The step is made again, and comes to the same.
    left = len(data) - content.nbytes
    content.torn = content.damage is not None and left <= directions * RECORD_NBYTES


def _problem(record: bytes, checksum: int, content: Content, ready: int) -> str | None:
    if len(record) < RECORD_NBYTES:
        return f"a record has {len(record)} of {RECORD_NBYTES} bytes"
    found, kind, _, direction, step, *_ = _RECORD.unpack(record)
    if zlib.crc32(record[_CHECKSUM.size :], checksum) != found:
        return "a record's checksum does not follow from those before it"
    expected = (_DIRECTION, ready, content.next_step)
    if kind == _WRITE_BACK and ready == 0 and step == content.next_step:
        return None
    if (kind, direction, step) != expected:
        return f"a record of step {step}, direction {direction}, is not the next one"
    return None


def _recorded(records: list[tuple[Any, ...]]) -> Recorded:
    flags, step, lr = records[0][2], records[0][4], records[0][10]
    return Recorded(
        step=step,
        keys=tuple(r[5] for r in records),
        losses_plus=tuple(r[6] for r in records),
        losses_minus=tuple(r[7] for r in records),
        updates=() if flags & _SKIPPED else tuple(Update(r[5], r[8], r[9]) for r in records),
        lr=lr,
    )


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
