"""How ranks agree on a step: each reports its losses, one decides, all take up what it recorded.

Rank 0 coordinates. A report is some dozen bytes; the verdict is the step's records, those that the
journal gets. Both travel through torch's key-value store (TCPStore), which knows whose report is
missing; no rank ever waits without end. Verdicts stay in the store, so that a rank that was away
reads what it missed.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from zo2ext.ranks import Measured, Mesh
from zo2ext.records import Content, Ledger, Recorded, decode, parse

logger = logging.getLogger(__name__)

_REPORT = struct.Struct("<QIIHHB")  # step, checksum, random state, micro-batches, forwards, kind
_BUILD_NBYTES = 64
_GRACE = 3.0  # seconds for the others to read why the run ends
_TICK = timedelta(milliseconds=1)
_SUMMED, _WEIGHTED, _TOTAL = range(3)  # kinds of report
_GOOD, _BAD = b"+", b"-"  # what a message begins with: content, or why there is none
_WHERE = Path("the coordinator's journal")  # for messages

Decide = Callable[[dict[int, Measured], list[int]], tuple[Recorded, bytes]]
"""From a step's losses, by rank, and the data ranks that count, to what is recorded of the step,
and its records."""


class RankFailure(RuntimeError):
    """Ranks cannot go on together; the message names the rank and the cause. Nothing is lost: all
    finished steps are in the journal."""


@dataclass(frozen=True)
class _Report:
    step: int
    checksum: int
    random_state: int
    measured: Measured

    def encode(self) -> bytes:
        losses, weights = self.measured.losses, self.measured.weights
        values = [*(loss for row in losses for loss in row), *(weights or ())]
        each = len(losses[0]) if losses else 0
        kind = _WEIGHTED if weights is not None else _TOTAL if self.measured.total else _SUMMED
        head = (self.step, self.checksum, self.random_state, len(losses), each, kind)
        return _REPORT.pack(*head) + struct.pack(f"<{len(values)}d", *values)

    @classmethod
    def decode(cls, data: bytes) -> _Report:
        step, checksum, random_state, count, each, kind = _REPORT.unpack_from(data)
        weighted = kind == _WEIGHTED
        values = struct.unpack_from(f"<{count * (each + weighted)}d", data, _REPORT.size)
        rows = tuple(values[i * each : (i + 1) * each] for i in range(count))
        weights = tuple(values[count * each :]) if weighted else None
        return cls(step, checksum, random_state, Measured(rows, weights, kind == _TOTAL))


class Alone:
    """The team of a single process."""

    mesh, rank, coordinates, opened, sent = Mesh(), 0, True, True, 0

    def missed(self, step: int) -> list[Recorded]:
        return []

    def settle(self, step: int, measured: Measured, random_state: int, decide: Decide) -> Recorded:
        made, _ = decide({0: measured}, [0])
        return made

    def share(self, data: bytes) -> bytes:
        return data

    def gather(self, value: float) -> list[float]:
        return [value]

    def fail(self, step: int, error: BaseException) -> None:
        """Nobody else has to be told."""

    def leave(self) -> None:
        """Nobody else has to be waited for."""


class Coordination:
    """One rank of several.

    Args:
        store: A `torch.distributed.Store`, the same for all ranks; keys are this run's own.
        deadline: Seconds that ranks wait for each other in a step, once they are done themselves.
        startup: Seconds that they wait for each other to begin.
        tolerant: Whether a step is made without the data ranks that are late, dead or have losses
            that are not finite; else any of that ends the run on all ranks.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        mesh: Mesh,
        *,
        deadline: float,
        startup: float,
        tolerant: bool,
    ) -> None:
        self._store, self.rank, self.mesh = store, rank, mesh
        self.coordinates = rank == 0
        self._deadline, self._startup, self._tolerant = deadline, startup, tolerant
        self._ledger: Ledger | None = None
        self._away: set[int] = set()  # ranks that are not waited for
        self._failed: str | None = None
        self._told = False  # whether the others know that this rank ends
        self._shared = 0  # messages that rank 0 has shared, out of step
        self.sent = 0  # bytes, keys not counted

    @property
    def opened(self) -> bool:
        """Whether the ranks have met."""
        return self._ledger is not None

    # -- the beginning

    def begin(self, ledger: Ledger, history: bytes, build: str) -> None:
        """Meet the other ranks, as the coordinator.

        Args:
            ledger: Of the run so far.
            history: The same as bytes: `records.opening` and all records.
            build: What this rank's kernels are; all ranks' have to be.

        Raises:
            RankFailure: A rank did not come in time, or is of another run, model or build.
        """
        self._set("start", _GOOD + build.encode().ljust(_BUILD_NBYTES) + history)
        self._meet()
        self._share_random_state()
        self._ledger = ledger

    def join(self, problems: Callable[[Content], list[str]], steps: int, build: str) -> Ledger:
        """Meet the other ranks, as one that does not coordinate; returns the run so far.

        Args:
            problems: Why this rank is not of the run that the coordinator tells of.
            steps: That this rank's weights have seen.

        Raises:
            RankFailure: This rank or another did not come in time, or is of another run, model or
                build.
        """
        start = self._get("start", self._startup, "rank 0 did not start")
        content = parse(start[_BUILD_NBYTES:], _WHERE)
        found = problems(content)
        theirs = start[:_BUILD_NBYTES].decode().strip()
        if theirs != build:
            found = [f"build was {theirs} and is {build}", *found]
        self._set(f"hello/{self.rank}", (_BAD if found else _GOOD) + "; ".join(found[:4]).encode())
        if found and self._tolerant:
            self._end(f"rank {self.rank} differs from rank 0: {'; '.join(found[:4])}")
        self._get("go", self._startup + self._deadline, f"rank 0 did not greet rank {self.rank}")
        self._share_random_state()
        ledger = self._ledger = Ledger(content)
        while ledger.next_step < steps and self._store.check([f"verdict/{ledger.next_step}"]):
            self._verdict(ledger.next_step, self._deadline)  # of steps that its weights have seen
        return ledger

    def _share_random_state(self) -> None:
        """Ranks that share a batch begin with one random state, so that dropout masks agree."""
        sharing = self.mesh.sharing(self.mesh.data_rank(self.rank))
        if len(sharing) == 1:
            return
        key = f"random/{sharing[0]}"
        if self.rank == sharing[0]:
            self._set(key, _GOOD + torch.get_rng_state().numpy().tobytes())
        else:
            late = f"rank {sharing[0]}, which shares a batch with rank {self.rank}, did not come"
            state = bytearray(self._get(key, self._startup, late))
            torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))

    def _meet(self) -> None:
        found = self._collect("hello/{}", self._startup)
        failures = [
            f"rank {rank} differs from rank 0: {message[1:].decode()}"
            for rank, message in sorted(found.items())
            if message[:1] == _BAD
        ]
        missing = self._missing(found)
        if missing and not self._tolerant:
            failures += [f"rank {rank} did not come within {self._startup:g} s" for rank in missing]
        if failures and not self._tolerant:
            self._publish_failure("go", "; ".join(failures))
        self._away |= missing | {r for r, message in found.items() if message[:1] == _BAD}
        for rank in sorted(self._away):
            logger.warning("rank %d is away", rank)
        self._set("go", _GOOD)

    # -- a step

    def missed(self, step: int) -> list[Recorded]:
        """What the others made of `step` and those after it, while this rank was away."""
        found: list[Recorded] = []
        if not self.coordinates and self._tolerant:
            while self._store.check([f"verdict/{step + len(found)}"]):
                found.append(self._verdict(step + len(found), self._deadline))
        return found

    def settle(self, step: int, measured: Measured, random_state: int, decide: Decide) -> Recorded:
        """Report what this rank measured; returns what becomes of the step, the same everywhere.

        Raises:
            RankFailure: Naming the rank and the cause.
        """
        assert self._ledger is not None
        report = _Report(step, self._ledger.checksum, random_state, measured)
        if not self.coordinates:
            self._set(f"report/{step}/{self.rank}", _GOOD + report.encode())
            if self._tolerant:
                self._set(f"back/{self.rank}", _GOOD + struct.pack("<Q", step))
            return self._verdict(step, 2 * self._deadline)
        if self._tolerant:
            self._away -= {rank for rank in self._away if self._is_back(rank, step)}
        reports, causes = self._reports(report)
        counted = [
            d for d in range(self.mesh.data) if all(r in reports for r in self.mesh.sharing(d))
        ]
        if self._tolerant:
            for rank in sorted(causes):
                logger.warning("step %d goes on without rank %d: %s", step, rank, causes[rank])
        elif causes:
            self._publish_failure(f"verdict/{step}", "; ".join(causes[r] for r in sorted(causes)))
        made, records = decide({rank: r.measured for rank, r in reports.items()}, counted)
        self._set(f"verdict/{step}", _GOOD + records)
        return made

    # -- between steps

    def share(self, data: bytes) -> bytes:
        """What rank 0 calls this with, at the same place of the run; others' `data` is ignored.

        Raises:
            RankFailure: Rank 0 failed, or does not come here.
        """
        key = f"shared/{self._shared}"
        self._shared += 1
        if not self.coordinates:
            late = f"rank 0, which coordinates, did not say how rank {self.rank} goes on"
            return self._get(key, self._startup + self._deadline, late)
        self._set(key, _GOOD + data)
        return data

    def gather(self, value: float) -> list[float]:
        """What each rank calls this with, at the same place of the run; by rank.

        Raises:
            RankFailure: A rank failed, or does not come here in time.
        """
        key = f"gathered/{self._shared}/{{}}"
        if not self.coordinates:
            self._set(key.format(self.rank), _GOOD + struct.pack("<d", value))
            return list(struct.unpack(f"<{self.mesh.ranks}d", self.share(b"")))
        messages = self._collect(key, self._deadline)
        causes = [message[1:].decode() for message in messages.values() if message[:1] == _BAD]
        for rank in sorted(set(range(1, self.mesh.ranks)) - set(messages)):
            causes.append(f"rank {rank} did not come within {self._deadline:g} s")
        if causes:
            self._publish_failure(f"shared/{self._shared}", "; ".join(causes))
        for rank in messages:
            self._store.delete_key(key.format(rank))
        values = [value, *(struct.unpack("<d", messages[r][1:])[0] for r in sorted(messages))]
        self.share(struct.pack(f"<{len(values)}d", *values))
        return values

    def fail(self, step: int, error: BaseException) -> None:
        """Tell the others, wherever they wait for this rank, that it raised `error`."""
        self._told = True
        if self._failed is not None:
            return
        message = _BAD + f"rank {self.rank} failed: {type(error).__name__}: {error}".encode()
        if self.coordinates:
            waits = [f"verdict/{step}", f"shared/{self._shared}"] if self.opened else ["start"]
        elif self.opened:
            waits = [f"report/{step}/{self.rank}", f"gathered/{self._shared}/{self.rank}"]
        else:
            waits = [f"hello/{self.rank}"]
        for key in waits:
            with suppress(RankFailure):  # nobody is there any more
                self._set(key, message)

    def leave(self) -> None:
        """Be done; rank 0, which may have the store, waits for the others to have read it all."""
        ended = self._told or self._failed is not None
        if not self.opened and not ended:
            return
        with suppress(RankFailure):  # they are gone already
            if self.coordinates:
                self._collect("bye/{}", min(_GRACE, self._deadline) if ended else self._deadline)
            else:
                self._set(f"bye/{self.rank}", _GOOD)

    def _reports(self, own: _Report) -> tuple[dict[int, _Report], dict[int, str]]:
        """The reports of a step that can be used, by rank; and why others cannot."""
        key = f"report/{own.step}/{{}}"
        messages = self._collect(key, self._deadline)
        reports, causes = {0: own}, {}
        for rank, message in messages.items():
            if message[:1] == _BAD:
                causes[rank] = message[1:].decode()
            else:
                reports[rank] = _Report.decode(message[1:])
            self._store.delete_key(key.format(rank))
        for rank in self._missing(messages):
            causes[rank] = f"rank {rank} did not report step {own.step} within {self._deadline:g} s"
        for rank, report in list(reports.items()):
            problem = self._problem(rank, report, own, reports)
            if problem is not None:
                causes[rank] = problem
                del reports[rank]
        self._away |= set(causes) if self._tolerant else set()
        return reports, causes

    def _problem(
        self, rank: int, report: _Report, own: _Report, reports: dict[int, _Report]
    ) -> str | None:
        if report.checksum != own.checksum:
            return f"rank {rank} is at other weights than rank 0: its steps before differ"
        first = reports.get(self.mesh.sharing(self.mesh.data_rank(rank))[0])
        if first is not None and report.random_state != first.random_state:
            return (
                f"rank {rank} has another random state than the rank that it shares a batch with; "
                "seed torch alike on both (torch.manual_seed), or use no dropout"
            )
        if self._tolerant and not report.measured.finite:
            return f"rank {rank} has a loss that is not finite"
        return None

    def _is_back(self, rank: int, step: int) -> bool:
        """Whether a rank that was away has caught up to the step before or later."""
        if not self._store.check([f"back/{rank}"]):
            return False
        (at,) = struct.unpack("<Q", self._store.get(f"back/{rank}")[1:])
        return bool(at + 1 >= step)

    def _verdict(self, step: int, seconds: float) -> Recorded:
        assert self._ledger is not None
        records = self._get(
            f"verdict/{step}", seconds, f"rank 0, which coordinates, did not decide step {step}"
        )
        made = decode(records, self._ledger.checksum, step)
        self._ledger.append(made)
        return made

    # -- the store

    def _missing(self, found: Iterable[int]) -> set[int]:
        return set(range(1, self.mesh.ranks)) - set(found) - self._away

    def _collect(self, key: str, seconds: float) -> dict[int, bytes]:
        """The messages of all other ranks that are not away, as far as they come in time."""
        end, found = time.monotonic() + seconds, {}
        for rank in range(1, self.mesh.ranks):
            if rank not in self._away:
                message = self._wait(key.format(rank), end - time.monotonic())
                if message is not None:
                    found[rank] = message
        return found

    def _get(self, key: str, seconds: float, late: str) -> bytes:
        """What `key` has; `RankFailure` if it is bad news, or does not come."""
        message = self._wait(key, seconds)
        if message is None:
            self._end(f"{late} within {seconds:g} s")
        if message[:1] == _BAD:
            self._end(message[1:].decode())
        return message[1:]

    def _wait(self, key: str, seconds: float) -> bytes | None:
        from torch.distributed import DistNetworkError, DistStoreError

        try:
            self._store.wait([key], max(timedelta(seconds=seconds), _TICK))
            return bytes(self._store.get(key))
        except DistNetworkError as error:
            self._end(f"the store of rank 0 cannot be reached: {error}")
        except DistStoreError:
            return None

    def _set(self, key: str, message: bytes) -> None:
        from torch.distributed import DistNetworkError

        try:
            self._store.set(key, message)
        except DistNetworkError as error:
            self._end(f"the store of rank 0 cannot be reached: {error}")
        self.sent += len(message)

    def _publish_failure(self, key: str, text: str) -> None:
        self._set(key, _BAD + text.encode())
        self._end(text)

    def _end(self, text: str) -> NoReturn:
        self._failed = text
        raise RankFailure(text)
