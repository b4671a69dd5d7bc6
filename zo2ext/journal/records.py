"""A run's steps as bytes: a header, then a record of 64 bytes for each direction of each step.

What journals hold and what ranks send each other. A record's checksum covers the one before, so
that none can be changed, lost or moved unseen. See docs/contracts.md, "Journal".
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zo2ext.errors import JournalError
from zo2ext.ops import Update

FORMAT = 1
_MAGIC = b"zo2ext-j"
_PREAMBLE = struct.Struct("<8sIII")  # magic, format, bytes of the header, its CRC-32
_RECORD = struct.Struct("<IBBHQQddffdQ")
_CHECKSUM = struct.Struct("<I")
RECORD_NBYTES = _RECORD.size
_DIRECTION, _WRITE_BACK = 1, 2  # kinds of record
_SKIPPED = 1  # flag


@dataclass(frozen=True)
class StepResult:
    """A finished step, as the journal has it.

    Attributes:
        step: Its number, from 0.
        losses_plus, losses_minus: Losses at +eps and -eps, one a direction.
        updates: One a direction; empty where the step was skipped.
        lr: Its learning rate.
        keys: Of its directions.
        data_rank_mask: Whose losses are in these: bit r is of data rank r.
        written_back: Whether all weights were rounded to storage out of turn before it; told only
            between ranks, journals list these steps apart.
    """

    step: int
    keys: tuple[int, ...]
    losses_plus: tuple[float, ...]
    losses_minus: tuple[float, ...]
    updates: tuple[Update, ...]
    lr: float
    data_rank_mask: int = 1
    written_back: bool = False

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
    steps: list[StepResult] = field(default_factory=list)
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

    def after(self, done: int, checksum: int | None, path: Path) -> list[StepResult]:
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


class Ledger:
    """The steps of a run, encoded one after the other; in memory, or in a file (`Journal`).

    Args:
        content: What there is already.

    Attributes:
        checksum: Of the last record; the same for all that hold the same steps of the same run.
    """

    def __init__(self, content: Content) -> None:
        self.recorded = content
        self.checksum = content.checksum
        self.next_step = content.next_step
        self._settled = content.checksum  # without write-backs since
        self._write_back = b""  # the record of one since the last step

    def encode(self, step: StepResult) -> tuple[bytes, int]:
        """The records of the next step, and the checksum after them.

        Raises:
            JournalError: It is not the next step.
        """
        if step.step != self.next_step:
            raise JournalError(f"step {self.next_step} is expected, got step {step.step}")
        records, checksum = b"", self.checksum
        for k, key in enumerate(step.keys):
            update = Update(key, 0.0) if step.skipped else step.updates[k]
            record = _RECORD.pack(
                *(0, _DIRECTION, _SKIPPED if step.skipped else 0, k, step.step, key),
                *(step.losses_plus[k], step.losses_minus[k]),
                *(update.coefficient, update.decay, step.lr, step.data_rank_mask),
            )
            record, checksum = _chained(record, checksum)
            records += record
        return records, checksum

    def encode_write_back(self, step: int) -> tuple[bytes, int]:
        """That all weights are rounded to storage before `step`, the next one.

        Raises:
            JournalError: It is not the next one.
        """
        if step != self.next_step:
            raise JournalError(
                f"weights cannot be written back before step {step}, since step "
                f"{self.next_step} is the next to be recorded"
            )
        record = _RECORD.pack(0, _WRITE_BACK, 0, 0, step, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)
        return _chained(record, self.checksum)

    def append(self, step: StepResult) -> bytes:
        """Take up the next step; returns its records, after that of a write-back before it."""
        records, checksum = self.encode(step)
        return self._stepped(records, checksum)

    def append_write_back(self, step: int) -> None:
        """Take up a write-back out of turn before `step`, the next one.

        Raises:
            JournalError: It is not the next one.
        """
        self._written_back(*self.encode_write_back(step))

    def take(self, records: bytes) -> StepResult:
        """Take up the next step from what another ledger's `append` returned.

        Raises:
            JournalError: They are not whole, or do not follow from what is here.
        """
        made = decode(records, self._settled, self.next_step)
        if not records.startswith(self._write_back):
            raise JournalError(
                f"the weights were written back before step {made.step} here, but not there"
            )
        # Of the last record, as `_chained` made it.
        (checksum,) = _CHECKSUM.unpack_from(records, len(records) - RECORD_NBYTES)
        self._stepped(b"", checksum)
        return made

    def _stepped(self, records: bytes, checksum: int) -> bytes:
        records, self._write_back = self._write_back + records, b""
        self.checksum = self._settled = checksum
        self.next_step += 1
        return records

    def _written_back(self, record: bytes, checksum: int) -> None:
        self._write_back, self.checksum = record, checksum


def decode(records: bytes, checksum: int, step: int) -> StepResult:
    """The step that `records` are of: all of its directions, and a write-back before it perhaps.

    Args:
        checksum: That they must follow.
        step: That it must be.

    Raises:
        JournalError: They are not whole, or another step's, or of another history.
    """
    directions = len(records) // RECORD_NBYTES
    written_back = directions > 0 and records[_CHECKSUM.size] == _WRITE_BACK
    directions -= written_back
    content = Content({"start": step, "config": {"directions": directions}}, checksum=checksum)
    _parse_records(records, content)
    if content.damage is not None or len(content.steps) != 1:
        raise JournalError(f"the records of step {step} cannot be taken up: {content.damage}")
    return replace(content.steps[0], written_back=written_back)


def opening(header: Mapping[str, Any]) -> bytes:
    """What a run's bytes begin with."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    packed = zlib.compress(text, 9)
    return _PREAMBLE.pack(_MAGIC, FORMAT, len(packed), zlib.crc32(packed)) + packed


def _chained(record: bytes, before: int) -> tuple[bytes, int]:
    """`record` with its checksum, which covers the checksum of the record `before`."""
    checksum = zlib.crc32(record[_CHECKSUM.size :], before)
    return _CHECKSUM.pack(checksum) + record[_CHECKSUM.size :], checksum


def parse(data: bytes, path: Path) -> Content:
    """A run from its bytes, as far as they are whole.

    Args:
        path: Where they are from, for messages.

    Raises:
        JournalError: They are no run's, the header is damaged, or a newer zo2ext wrote them.
    """
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


def _recorded(records: list[tuple[Any, ...]]) -> StepResult:
    flags, step, lr = records[0][2], records[0][4], records[0][10]
    return StepResult(
        step=step,
        keys=tuple(r[5] for r in records),
        losses_plus=tuple(r[6] for r in records),
        losses_minus=tuple(r[7] for r in records),
        updates=() if flags & _SKIPPED else tuple(Update(r[5], r[8], r[9]) for r in records),
        lr=lr,
        data_rank_mask=records[0][11],
    )
