"""A run's steps as bytes: a header, then a record of 64 bytes per direction per step.

Journals contain them, and ranks send them to each other. A record's checksum covers the one before
it, so that none can be changed, lost or moved unnoticed. See docs/contracts.md, "Journal".
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zo2ext.errors import JournalError
from zo2ext.ops import Update

FORMAT = 2
_MAGIC = b"zo2ext-j"
_PREAMBLE = struct.Struct("<8sIII")  # magic, format, bytes of the header, its CRC-32
_RECORD = struct.Struct("<IBBHQQddffdQ")
_CHECKSUM = struct.Struct("<I")
RECORD_NBYTES = _RECORD.size
_DIRECTION, _WRITE_BACK = 1, 2  # kinds of record
_SKIPPED, _ONE_SIDED, _CLIPPED = 1, 2, 4  # flags
_ADDED = {"estimator", "clip"}  # settings whose flags format 1 lacks
_MAX_HEADER_NBYTES = 64 << 20  # a header lists the model's tensors, at some 150 bytes each


@dataclass(frozen=True)
class StepResult:
    """The decision about a step, as the journal records it.

    Attributes:
        step: Number of the step, from 0.
        keys: Noise keys, one per direction.
        losses_plus, losses_minus: Losses at +eps and -eps, one per direction; none at -eps if the
            estimator has one side.
        updates: Updates, one per direction; empty if the step was skipped.
        lr: Learning rate.
        data_rank_mask: Data ranks whose losses are included: bit r stands for data rank r.
        clipped: Whether the update is shortened, because the slopes were unusually large.
        written_back: Whether an extra write-back came before the step. Only set in what ranks send
            each other; journals list those steps separately.
    """

    step: int
    keys: tuple[int, ...]
    losses_plus: tuple[float, ...]
    losses_minus: tuple[float, ...]
    updates: tuple[Update, ...]
    lr: float
    data_rank_mask: int = 1
    clipped: bool = False
    written_back: bool = False

    @property
    def skipped(self) -> bool:
        return not self.updates


@dataclass
class Content:
    """Contents of a journal.

    Attributes:
        header: Description of the run.
        steps: Steps in order, without gaps, from `header["start"]` on.
        write_backs: Steps before which there was an extra write-back.
        checksums: Checksum of the last record up to each step.
        nbytes: Length of the undamaged beginning of the file.
        damage: Description of the damage after it; None if there is none.
        torn: Whether the damage is no more than what a crash leaves: a write that was cut short.
    """

    header: dict[str, Any]
    steps: list[StepResult] = field(default_factory=list)
    write_backs: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    nbytes: int = 0
    checksum: int = 0
    damage: str | None = None
    torn: bool = False

    @property
    def start(self) -> int:
        """The first step that the starting weights do not include."""
        return int(self.header["start"])

    @property
    def next_step(self) -> int:
        return self.start + len(self.steps)

    @property
    def write_back(self) -> int | str:
        """The run's write-back period."""
        period: int | str = self.header["config"]["write_back"]
        return period

    def after(self, done: int, checksum: int | None, path: Path) -> list[StepResult]:
        """Return the steps from `done` on, for weights that include `done` steps.

        Args:
            checksum: The journal's checksum after them; None if the weights are the starting ones.
            path: Where this was read, for error messages.
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


class Ledger:
    """The steps of a run, encoded one after the other; in memory, or in a file (`Journal`).

    Args:
        content: The steps so far.

    Attributes:
        recorded: Those steps.
        checksum: Checksum of the last record; equal if the same steps of the same run are recorded.
        next_step: The step that comes next.
    """

    def __init__(self, content: Content) -> None:
        self.recorded = content
        self.checksum = content.checksum
        self.next_step = content.next_step
        self._step_checksum = content.checksum  # without an extra write-back after it
        self._write_back = b""  # record of an extra write-back since the last step

    def append(self, result: StepResult) -> bytes:
        """Record the next step; return its records, with that of an extra write-back before it."""
        if result.step != self.next_step:
            raise JournalError(f"step {self.next_step} is expected, got step {result.step}")
        records, checksum = b"", self.checksum
        flags = result.skipped * _SKIPPED + result.clipped * _CLIPPED
        flags += 0 if result.losses_minus else _ONE_SIDED
        losses_minus = result.losses_minus or [math.nan] * len(result.keys)
        for k, key in enumerate(result.keys):
            update = Update(key, 0.0) if result.skipped else result.updates[k]
            record = _RECORD.pack(
                *(0, _DIRECTION, flags, k, result.step, key),
                *(result.losses_plus[k], losses_minus[k]),
                *(update.coefficient, update.decay, result.lr, result.data_rank_mask),
            )
            record, checksum = _chained(record, checksum)
            records += record
        self._write(records)
        records = self._write_back + records
        self._step_recorded(checksum)
        return records

    def append_write_back(self, step: int) -> None:
        """Record an extra write-back before `step`, the next one."""
        if step != self.next_step:
            raise JournalError(
                f"weights cannot be written back before step {step}, since step "
                f"{self.next_step} is the next to be recorded"
            )
        record = _RECORD.pack(0, _WRITE_BACK, 0, 0, step, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
        record, checksum = _chained(record, self.checksum)
        self._write(record)
        self._write_back, self.checksum = record, checksum

    def append_records(self, records: bytes) -> StepResult:
        """Record the next step, given what another ledger's `append` returned.

        Raises:
            JournalError: They are damaged, or do not follow from what is here.
        """
        result = decode(records, self._step_checksum, self.next_step)
        if not records.startswith(self._write_back):
            raise JournalError(
                f"the weights were written back before step {result.step} here, but not there"
            )
        # That of the last record, where `_chained` put it.
        (checksum,) = _CHECKSUM.unpack_from(records, len(records) - RECORD_NBYTES)
        self._step_recorded(checksum)
        return result

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Undo what is recorded in this block if it raises."""
        before = vars(self).copy()
        try:
            yield
        except BaseException:
            vars(self).update(before)
            self._drop_excess()
            raise

    def _step_recorded(self, checksum: int) -> None:
        self._write_back = b""
        self.checksum = self._step_checksum = checksum
        self.next_step += 1

    def _write(self, records: bytes) -> None:
        """Write records; a ledger in memory has nowhere to."""

    def _drop_excess(self) -> None:
        """Remove what was written after the last record."""


def decode(records: bytes, checksum: int, step: int) -> StepResult:
    """Return step `step` from its records, perhaps after that of an extra write-back.

    Raises:
        JournalError: They are damaged, or do not follow from the record with `checksum`.
    """
    directions = len(records) // RECORD_NBYTES
    written_back = directions > 0 and records[_CHECKSUM.size] == _WRITE_BACK
    directions -= written_back
    content = Content({"start": step, "config": {"directions": directions}}, checksum=checksum)
    _parse_records(records, content)
    if content.damage is not None or len(content.steps) != 1:
        raise JournalError(f"the records of step {step} cannot be used: {content.damage}")
    return replace(content.steps[0], written_back=written_back)


def opening(header: Mapping[str, Any]) -> bytes:
    """Return the bytes that a run with this header begins with."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    packed = zlib.compress(text, 9)
    config = header.get("config")
    version = FORMAT if isinstance(config, dict) and _ADDED & config.keys() else 1
    return _PREAMBLE.pack(_MAGIC, version, len(packed), zlib.crc32(packed)) + packed


def _chained(record: bytes, before: int) -> tuple[bytes, int]:
    """Return `record` with its checksum, which covers the checksum of the record `before`."""
    checksum = zlib.crc32(record[_CHECKSUM.size :], before)
    return _CHECKSUM.pack(checksum) + record[_CHECKSUM.size :], checksum


def parse(data: bytes, path: Path) -> Content:
    """Read a run from its bytes, up to the first damage; `path` is for error messages.

    Raises:
        JournalError: They are not a journal, its header is damaged, or a newer zo2ext wrote it.
    """
    if len(data) < _PREAMBLE.size or not data.startswith(_MAGIC):
        raise JournalError(f"{path} is not a journal of zo2ext")
    _, version, length, checksum = _PREAMBLE.unpack_from(data)
    if not 1 <= version <= FORMAT:
        raise JournalError(
            f"{path} has format {version}, this zo2ext reads formats 1 to {FORMAT}: a newer one "
            "wrote it"
        )
    packed = data[_PREAMBLE.size : _PREAMBLE.size + length]
    if len(packed) < length or zlib.crc32(packed) != checksum:
        raise JournalError(f"the header of {path} is damaged; without it the steps are useless")
    header = _header(packed, path)
    content = Content(header, nbytes=_PREAMBLE.size + length, checksum=checksum)
    _parse_records(data, content)
    return content


def _header(packed: bytes, path: Path) -> dict[str, Any]:
    """Expand a header, in bounded memory: journals are files that people send each other."""
    expanding = zlib.decompressobj()
    header: Any
    try:
        text = expanding.decompress(packed, _MAX_HEADER_NBYTES)
        header = json.loads(text) if expanding.eof else None
    except (zlib.error, ValueError, RecursionError) as error:
        raise JournalError(f"the header of {path} is damaged: {error}") from error
    config = header.get("config") if isinstance(header, dict) else None
    numbers = (config.get("directions"), header.get("start")) if isinstance(config, dict) else ()
    if not numbers or not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or not numbers[0]:
        raise JournalError(f"the header of {path} is damaged: it is not that of a run")
    return dict(header)


def _parse_records(data: bytes, content: Content) -> None:
    """Add the undamaged steps to `content`, and what is wrong after them."""
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
            content.steps.append(_result(open_step))
            content.checksums.append(checksum)
            open_step.clear()
        content.nbytes, content.checksum = at, checksum
    if open_step and content.damage is None:
        content.damage = f"step {content.next_step} has {len(open_step)} of {directions} records"
    # A power failure may leave some or all bytes of one append, not all of them correct. The step
    # is then computed again, with the same result.
    left = len(data) - content.nbytes
    content.torn = content.damage is not None and left <= directions * RECORD_NBYTES


def _problem(record: bytes, checksum: int, content: Content, ready: int) -> str | None:
    """Return why `record` cannot come next, after `ready` records of its step; None if it can."""
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


def _result(records: list[tuple[Any, ...]]) -> StepResult:
    flags, step, lr = records[0][2], records[0][4], records[0][10]
    return StepResult(
        step=step,
        keys=tuple(r[5] for r in records),
        losses_plus=tuple(r[6] for r in records),
        losses_minus=() if flags & _ONE_SIDED else tuple(r[7] for r in records),
        updates=() if flags & _SKIPPED else tuple(Update(r[5], r[8], r[9]) for r in records),
        lr=lr,
        data_rank_mask=records[0][11],
        clipped=bool(flags & _CLIPPED),
    )
