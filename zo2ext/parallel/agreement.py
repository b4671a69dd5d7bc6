"""How ranks agree on a step: each reports its losses, one decides, all take up what it recorded.

Rank 0 coordinates. A report is some dozen bytes; the verdict is the step's records, those that the
journal gets. Both travel through torch's key-value store (TCPStore), which knows whose report is
missing; no rank ever waits without end. Verdicts stay in the store, so that a rank that was away
reads what it missed. See docs/contracts.md, "Ranks".
"""

from __future__ import annotations

import json
import logging
import math
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from zo2ext._random_state import RandomState
from zo2ext.errors import JournalError, RankFailure
from zo2ext.journal.records import Content, Ledger, StepResult, parse
from zo2ext.parallel.mailbox import Mailbox, Unreachable
from zo2ext.parallel.mesh import Mesh, RankLosses
from zo2ext.parallel.rank_report import Report

logger = logging.getLogger(__name__)

_GRACE = 3.0  # seconds for the others to read why the run ends
_PATIENCE = 0.5  # deadlines that the store may take to answer
_MOST_AT_ONCE = 4096  # verdicts
_SAME_LR = 1e-9  # relative; a schedule's cosine may be rounded otherwise on another host
_STEP = struct.Struct("<Q")
_GOOD, _BAD = b"+", b"-"  # what a message begins with: content, or why there is none
_WHERE = Path("the coordinator's journal")  # for messages

T = TypeVar("T")
Decide = Callable[[dict[int, RankLosses], list[int]], tuple[StepResult, bytes]]
"""From a step's losses, by rank, and the data ranks that count, to what is recorded of the step,
and its records."""


class Alone:
    """The team of a single process."""

    mesh, rank, is_coordinator, opened, sent = Mesh(), 0, True, True, 0

    def missed(self, step: int) -> list[StepResult]:
        return []

    def ready(self, step: int, device: torch.device) -> None:
        """Nobody else has to be told."""

    def settle(
        self, step: int, measured: RankLosses, *, random_state: int, lr: float, decide: Decide
    ) -> StepResult:
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
        store: A `torch.distributed.Store`, the same for all ranks.
        run: A name for this run's keys in it.
        deadline: Seconds that ranks wait for each other in a step, once they are done themselves.
        startup: Seconds that they wait for each other to begin.
        tolerant: Whether a step is made without the data ranks that are late, dead or have losses
            that are not finite; else any of that ends the run on all ranks.
        connect: Makes the store's connection anew, where a rank may come and go.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        mesh: Mesh,
        *,
        run: str,
        deadline: float,
        startup: float,
        tolerant: bool,
        connect: Callable[[], Any] | None = None,
    ) -> None:
        self._mail = Mailbox(store, run, patience=_PATIENCE * deadline, connect=connect)
        self.rank, self.mesh = rank, mesh
        self.is_coordinator = rank == 0
        self._deadline, self._startup, self._tolerant = deadline, startup, tolerant
        self._ledger: Ledger | None = None
        self._away: dict[int, int] = {}  # ranks that are not waited for: since which step
        self._other_lr: set[int] = set()  # ranks that were warned of
        self._in_step = False  # whether the last step counted this rank's batch
        self._failed: str | None = None
        self._cut_off = False  # from the store
        self._told = False  # whether the others know that this rank ends
        self._shared = 0  # messages that rank 0 has shared, out of step

    @property
    def opened(self) -> bool:
        """Whether the ranks have met."""
        return self._ledger is not None

    @property
    def sent(self) -> int:
        """Bytes, keys not counted."""
        return self._mail.sent

    # -- the beginning

    def roll_call(self) -> None:
        """Wait for all ranks to come here: before they wait for each other in other ways, which
        would not learn of one that failed.

        Raises:
            RankFailure: One did, or does not come in time.
        """
        self._set(f"here/{self.rank}", _GOOD)
        for rank in range(self.mesh.ranks):
            self._get(f"here/{rank}", self._startup, f"rank {rank} did not come")

    def begin(self, ledger: Ledger, history: bytes, build: str) -> None:
        """Meet the other ranks, as the coordinator.

        Args:
            ledger: Of the run so far.
            history: The same as bytes: `records.opening` and all records.
            build: What this rank's kernels are; all ranks' have to be.

        Raises:
            RankFailure: A rank did not come in time, or is of another run, model or build.
        """
        self._set("start", _GOOD + json.dumps(self._terms(build)).encode() + b"\n" + history)
        self._meet(ledger.next_step)
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
        terms, history = start.split(b"\n", 1)
        content = parse(history, _WHERE)
        theirs, mine = json.loads(terms), self._terms(build)
        found = [f"{n} was {theirs[n]} and is {mine[n]}" for n in mine if mine[n] != theirs[n]]
        text = "; ".join([*found, *problems(content)][:4])
        if text:
            text = f"rank {self.rank} differs from rank 0: {text}"
        self._set(f"hello/{self.rank}", (_BAD if text else _GOOD) + text.encode())
        if not (text and self._tolerant):  # else nobody is going to answer
            late = f"rank 0 did not greet rank {self.rank}"
            self._get("go", self._startup + self._deadline, late)
        if text:
            self._end(text)
        ledger = self._ledger = Ledger(content)
        while ledger.next_step < steps:  # those that its weights have seen, as it comes back
            if not self._mail.get_all([f"verdict/{ledger.next_step}"]):
                self._end(f"rank {self.rank} has made {steps} steps, more than rank 0 knows of")
            self._verdict(ledger.next_step)
        return ledger

    def _terms(self, build: str) -> dict[str, Any]:
        """What all ranks must have alike, besides the run."""
        return {"build": build, "mesh": asdict(self.mesh), "tolerant": self._tolerant}

    def _meet(self, step: int) -> None:
        found = self._collect("hello/{}", self._startup)
        causes = {r: m[1:].decode() for r, m in found.items() if m[:1] == _BAD}
        for rank in self._missing(found):
            causes[rank] = f"rank {rank} did not come within {self._startup:g} s"
        if causes and not self._tolerant:
            # Of a rank that failed, the others' hellos say the same.
            self._publish_failure("go", "; ".join(dict.fromkeys(causes[r] for r in sorted(causes))))
        for rank in sorted(causes):
            logger.warning("the run begins without rank %d: %s", rank, causes[rank])
            self._away[rank] = step - 1
        self._set("go", _GOOD)

    # -- a step

    def missed(self, step: int) -> list[StepResult]:
        """What the others made of `step` and those after it, while this rank was away."""
        assert self._ledger is not None
        if self.is_coordinator or self._in_step or not self._tolerant:
            return []
        assert step == self._ledger.next_step
        return self._fetch()

    def ready(self, step: int, device: torch.device) -> None:
        """Begin on `step`, unless others have made it.

        After a step that did not count this rank's batch, rank 0 is told that it is back, and ranks
        that share a batch take up the random state of their first one, so that dropout masks on
        `device` agree.

        Raises:
            RankFailure: That first rank does not come.
        """
        if self._in_step:
            return
        if self._tolerant and not self.is_coordinator:
            self._set(f"back/{self.rank}", _GOOD + _STEP.pack(step))
        first, *others = self.mesh.sharing(self.mesh.data_rank(self.rank))
        if not others:
            return
        key = f"random/{first}/{step}"
        mine = RandomState.current(device)
        if self.rank == first:
            self._set(key, _GOOD + mine.encode())
            return
        seconds = self._deadline if self._tolerant else self._startup
        late = f"rank {first}, which shares a batch with rank {self.rank}, did not come"
        state = self._get(key, seconds, late) if not self._tolerant else self._look(key, seconds)
        if state is not None:
            mine.taken_over(state).restore()

    def settle(
        self, step: int, measured: RankLosses, *, random_state: int, lr: float, decide: Decide
    ) -> StepResult:
        """Report what this rank measured; returns what becomes of the step, the same everywhere.

        Args:
            random_state: What `RandomState.used_since` says of the step.
            lr: Its learning rate, as this rank has it. Rank 0's counts.

        Raises:
            RankFailure: Naming the rank and the cause.
        """
        assert self._ledger is not None
        report = Report(step, self._ledger.checksum, random_state, lr, measured)
        if self.is_coordinator:
            return self._decide(report, decide)
        key = f"report/{step}/{self.rank}"
        self._set(key, _GOOD + report.encode())
        made = self._verdict(step)
        if not self._in_step:  # nobody may have read it
            self._do(lambda: self._mail.drop(key))
        return made

    def _decide(self, own: Report, decide: Decide) -> StepResult:
        self._away = {r: since for r, since in self._away.items() if not self._is_back(r, since)}
        reports, causes = self._reports(own)
        counted = self._counted(reports, own.step, causes)
        try:
            made, records = decide({rank: r.measured for rank, r in reports.items()}, counted)
        except BaseException as error:
            self.fail(own.step, error)
            raise
        self._set(f"verdict/{own.step}", _GOOD + records)
        self._in_step = bool(made.data_rank_mask & 1)
        return made

    def _counted(self, reports: dict[int, Report], step: int, causes: dict[int, str]) -> list[int]:
        """The data ranks whose losses are the step's. `causes`: why ranks are missing."""
        texts = "; ".join(causes[rank] for rank in sorted(causes))
        if causes and not self._tolerant:
            self._publish_failure(f"verdict/{step}", texts)
        ranks = {d: self.mesh.sharing(d) for d in range(self.mesh.data)}
        whole = [d for d in ranks if all(rank in reports for rank in ranks[d])]
        if not self._tolerant:
            return whole
        for rank in sorted(causes):
            logger.warning("step %d goes on without rank %d: %s", step, rank, causes[rank])
        if not any(reports[ranks[d][0]].measured.losses for d in whole):
            away = f"away: {', '.join(f'rank {rank}' for rank in sorted(self._away)) or 'none'}"
            self._publish_failure(
                f"verdict/{step}", f"step {step} has no batch whose ranks are all there ({away})"
            )
        finite = [d for d in whole if all(reports[r].measured.finite for r in ranks[d])]
        for d in sorted({*whole} - {*finite}):
            logger.warning("step %d: data rank %d has a loss that is not finite", step, d)
        # Where all are not finite, the step is one that is skipped, as a single process would.
        return finite if any(not reports[ranks[d][0]].measured.empty for d in finite) else whole

    # -- between steps

    def share(self, data: bytes) -> bytes:
        """What rank 0 calls this with, at the same place of the run; others' `data` is ignored.

        Raises:
            RankFailure: Rank 0 failed, or does not come here.
        """
        key = f"shared/{self._shared}"
        self._shared += 1
        if not self.is_coordinator:
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
        if not self.is_coordinator:
            self._set(key.format(self.rank), _GOOD + struct.pack("<d", value))
            return list(struct.unpack(f"<{self.mesh.ranks}d", self.share(b"")))
        messages = self._collect(key, self._deadline)
        causes = [message[1:].decode() for message in messages.values() if message[:1] == _BAD]
        for rank in sorted(set(range(1, self.mesh.ranks)) - set(messages)):
            causes.append(f"rank {rank} did not come within {self._deadline:g} s")
        if causes:
            self._publish_failure(f"shared/{self._shared}", "; ".join(causes))
        for rank in messages:
            self._do(partial(self._mail.drop, key.format(rank)))
        values = [value, *(struct.unpack("<d", messages[r][1:])[0] for r in sorted(messages))]
        self.share(struct.pack(f"<{len(values)}d", *values))
        return values

    def fail(self, step: int, error: BaseException) -> None:
        """Tell the others, wherever they wait for this rank, that it raised `error`."""
        self._told = True
        if self._failed is not None or isinstance(error, RankFailure):  # they know
            return
        message = _BAD + f"rank {self.rank} failed: {type(error).__name__}: {error}".encode()
        if self.opened and self.is_coordinator:
            waits = [f"verdict/{step}", f"shared/{self._shared}"]
        elif self.opened:
            waits = [f"report/{step}/{self.rank}", f"gathered/{self._shared}/{self.rank}"]
        elif self._tolerant:  # the others begin without this one, unless it is rank 0
            waits = ["start" if self.is_coordinator else f"hello/{self.rank}"]
        else:
            # Ranks wait for one after the other, here and for a hello, or for rank 0. Who comes yet
            # may put its own message there instead: those of this rank stay.
            places = ("here/{}", "hello/{}")
            waits = ["start", *(p.format(r) for p in places for r in range(self.mesh.ranks))]
        with suppress(RankFailure):  # nobody is there any more
            for key in waits:
                self._set(key, message)

    def leave(self) -> None:
        """Be done; rank 0, which may have the store, waits for the others to have read it all."""
        ended = self._told or self._failed is not None
        if self._cut_off or not (self.opened or ended):
            return
        with suppress(RankFailure):  # they are gone already
            if self.is_coordinator:
                self._collect("bye/{}", min(_GRACE, self._deadline) if ended else self._deadline)
            else:
                self._set(f"bye/{self.rank}", _GOOD)

    def _reports(self, own: Report) -> tuple[dict[int, Report], dict[int, str]]:
        """The reports of a step that can be used, by rank; and why others cannot."""
        key = f"report/{own.step}/{{}}"
        messages = self._collect(key, self._deadline)
        reports, causes = {0: own}, {}
        for rank, message in messages.items():
            if message[:1] == _BAD:
                causes[rank] = message[1:].decode()
            else:
                reports[rank] = Report.decode(message[1:])
            self._do(partial(self._mail.drop, key.format(rank)))
        for rank in self._missing(messages):
            causes[rank] = f"rank {rank} did not report step {own.step} within {self._deadline:g} s"
        if self._tolerant:
            self._away |= dict.fromkeys(causes, own.step)
        for rank, report in list(reports.items()):
            problem = self._problem(rank, report, own, reports)
            if problem is not None:
                causes[rank] = problem
                del reports[rank]
        return reports, causes

    def _problem(
        self, rank: int, report: Report, own: Report, reports: dict[int, Report]
    ) -> str | None:
        if report.checksum != own.checksum:
            return f"rank {rank} is at other weights than rank 0: its steps before differ"
        first = reports.get(self.mesh.sharing(self.mesh.data_rank(rank))[0])
        if first is not None and report.random_state != first.random_state:
            return (
                f"rank {rank} has another random state than the rank that it shares a batch with; "
                "seed torch alike on both (torch.manual_seed), or use no dropout"
            )
        if not math.isclose(report.lr, own.lr, rel_tol=_SAME_LR):
            other = f"rank {rank} has lr {report.lr!r} in step {own.step}, rank 0 {own.lr!r}"
            if not self._tolerant:
                return f"{other}; give all the same schedule"
            # Its losses are as good: they do not depend on it.
            if rank not in self._other_lr:
                logger.warning("%s, which is used", other)
            self._other_lr.add(rank)
        return None

    def _is_back(self, rank: int, since: int) -> bool:
        """Whether a rank that has been away since step `since` began on a later one."""
        for message in self._do(lambda: self._mail.get_all([f"back/{rank}"])):
            (step,) = _STEP.unpack(message[1:])
            if step > since:
                logger.warning("rank %d is back", rank)
                return True
        return False

    def _fetch(self) -> list[StepResult]:
        """The steps that others have made since; several at once, for what is far away."""
        assert self._ledger is not None
        found: list[StepResult] = []
        size = 1
        while True:
            steps = range(self._ledger.next_step, self._ledger.next_step + size)
            messages = self._do(lambda: self._mail.get_all([f"verdict/{step}" for step in steps]))
            found += [self._take(self._content(message)) for message in messages]
            if not messages and size == 1:
                return found
            size = min(2 * size, _MOST_AT_ONCE) if messages else 1

    def _verdict(self, step: int) -> StepResult:
        late = f"rank 0, which coordinates, did not decide step {step}"
        return self._take(self._get(f"verdict/{step}", 2 * self._deadline, late))

    def _take(self, records: bytes) -> StepResult:
        assert self._ledger is not None
        try:
            made = self._ledger.take(records)
        except JournalError as error:
            self._end(f"rank {self.rank} is at other weights than rank 0: {error}")
        self._in_step = bool(made.data_rank_mask >> self.mesh.data_rank(self.rank) & 1)
        return made

    # -- the store

    def _missing(self, found: Iterable[int]) -> set[int]:
        return set(range(1, self.mesh.ranks)) - set(found) - set(self._away)

    def _collect(self, key: str, seconds: float) -> dict[int, bytes]:
        """The messages of all other ranks that are not away, as far as they come in time."""
        end, found = time.monotonic() + seconds, {}
        for rank in range(1, self.mesh.ranks):
            if rank not in self._away:
                left = end - time.monotonic()
                message = self._do(lambda: self._mail.get(key.format(rank), left))
                if message is not None:
                    found[rank] = message
        return found

    def _get(self, key: str, seconds: float, late: str) -> bytes:
        """What `key` has; `RankFailure` if it is bad news, or does not come."""
        content = self._look(key, seconds)
        if content is None:
            self._end(f"{late} within {seconds:g} s")
        return content

    def _look(self, key: str, seconds: float) -> bytes | None:
        """The same; None if it does not come."""
        message = self._do(lambda: self._mail.get(key, seconds))
        return None if message is None else self._content(message)

    def _content(self, message: bytes) -> bytes:
        if message[:1] == _BAD:
            self._end(message[1:].decode())
        return message[1:]

    def _set(self, key: str, message: bytes) -> None:
        self._do(lambda: self._mail.put(key, message))

    def _do(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Unreachable as error:
            self._cut_off = True
            self._end(f"the store of rank 0 cannot be reached: {error}")

    def _publish_failure(self, key: str, text: str) -> None:
        self._set(key, _BAD + text.encode())
        self._end(text)

    def _end(self, text: str) -> NoReturn:
        self._failed = text
        raise RankFailure(text)
