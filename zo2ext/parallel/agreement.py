"""How ranks agree on a step: each reports its losses, rank 0 decides, all apply what it recorded.

A report has some dozen bytes; the answer is the step's records, as the journal has them. Both
travel through torch's key-value store (TCPStore), which shows whose report is missing. Records stay
in the store, so that a rank that was away can read what it missed. See docs/contracts.md, "Ranks".
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from zo2ext._random_state import RandomState
from zo2ext.errors import JournalError, RankFailure
from zo2ext.journal.records import Content, Ledger, StepResult
from zo2ext.parallel import joining
from zo2ext.parallel.exchange import Exchange
from zo2ext.parallel.mesh import Mesh, RankLosses
from zo2ext.parallel.rank_report import Report

logger = logging.getLogger(__name__)

_GRACE = 3.0  # seconds for the others to read why the run ends
_MOST_AT_ONCE = 4096  # steps fetched with one request
_LR_TOLERANCE = 1e-9  # relative: another host may round a schedule's cosine differently
_STEP = struct.Struct("<Q")


@dataclass(frozen=True)
class StepReports:
    """The reports of one step, by rank, and the data ranks whose losses form the step's."""

    losses: Mapping[int, RankLosses]
    data_ranks: Sequence[int]


class Alone:
    """The team of a single process, which has nobody to wait for or to inform."""

    mesh, rank, is_coordinator, joined, sent = Mesh(), 0, True, True, 0

    def missed_steps(self, step: int) -> list[StepResult]:
        return []

    def begin_step(self, step: int, device: torch.device) -> None: ...

    def report(
        self, step: int, losses: RankLosses, *, random_state: RandomState, lr: float
    ) -> StepReports | None:
        return StepReports({0: losses}, [0])

    def publish(self, result: StepResult, records: bytes) -> None: ...

    def receive(self, step: int) -> StepResult:
        raise AssertionError("a single process decides its steps itself")

    def broadcast(self, data: bytes) -> bytes:
        return data

    def gather(self, value: float) -> list[float]:
        return [value]

    def fail(self, step: int, error: BaseException) -> None: ...

    def leave(self) -> None: ...


class Team:
    """This rank among the others of its run.

    Between joining and leaving, each step goes `begin_step`, `report`, and then `publish` on rank
    0 and `receive` on the others. Each raises `RankFailure` if the ranks cannot continue.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.rank, self.mesh = exchange.rank, exchange.mesh
        self.is_coordinator = exchange.is_coordinator
        self.broadcast, self.gather = exchange.broadcast, exchange.gather
        self._ledger: Ledger | None = None
        self._warned_of_lr = set[int]()
        self._in_last_step = False  # whether the last step has the losses of this rank's batch
        self._failed = False  # whether the others know that this rank ends

    @property
    def joined(self) -> bool:
        return self._ledger is not None

    @property
    def sent(self) -> int:
        return self._exchange.sent

    # -- joining and leaving

    def publish_run(self, ledger: Ledger, history: bytes, build: str) -> None:
        """Meet the other ranks, as rank 0; see `joining.publish_run`."""
        joining.publish_run(self._exchange, history, ledger.next_step, build)
        self._ledger = ledger

    def receive_run(self, build: str) -> tuple[Content, list[str]]:
        """Read the run that rank 0 published; see `joining.receive_run`."""
        return joining.receive_run(self._exchange, build)

    def join(self, content: Content, problems: Sequence[str], steps: int) -> Ledger:
        """Join the run that `receive_run` returned, and return its ledger.

        Args:
            problems: Why this rank cannot join; empty if it can.
            steps: Number of steps that this rank's weights include.
        """
        joining.answer(self._exchange, problems)
        ledger = self._ledger = Ledger(content)
        while ledger.next_step < steps:  # a rank that comes back may be ahead of the content
            if not self._exchange.get_all([_result_key(ledger.next_step)]):
                self._exchange.end(
                    f"rank {self.rank} has made {steps} steps, more than rank 0 knows of"
                )
            self._receive(ledger.next_step)
        return ledger

    def fail(self, step: int, error: BaseException) -> None:
        """Report `error` to the other ranks, wherever they wait for this one."""
        self._failed = True
        if self._exchange.failure is not None or isinstance(error, RankFailure):  # they know
            return
        exchange, rank = self._exchange, self.rank
        if self.joined and self.is_coordinator:
            keys = [_result_key(step), exchange.broadcast_key]
        elif self.joined:
            keys = [f"report/{step}/{rank}", exchange.gather_key.format(rank)]
        elif exchange.tolerant:  # the others begin without this one, unless it is rank 0
            keys = ["start" if self.is_coordinator else f"hello/{rank}"]
        else:
            # Ranks wait for one after the other, in the roll call and for answers, or for rank 0.
            # A rank may still replace this message with its own; the one at this rank's key stays.
            places = ("here/{}", "hello/{}")
            keys = ["start", *(p.format(r) for p in places for r in range(self.mesh.ranks))]
        with suppress(RankFailure):  # nobody is there any more
            for key in keys:
                exchange.put_failure(key, f"rank {rank} failed: {type(error).__name__}: {error}")

    def leave(self) -> None:
        """Leave the run. Rank 0, which may host the store, waits until the others have left."""
        exchange = self._exchange
        failed = self._failed or exchange.failure is not None
        if exchange.unreachable or not (self.joined or failed):
            return
        with suppress(RankFailure):  # they are gone already
            if self.is_coordinator:
                seconds = min(_GRACE, exchange.deadline) if failed else exchange.deadline
                exchange.collect("bye/{}", seconds)
            else:
                exchange.put(f"bye/{self.rank}")

    # -- a step

    def missed_steps(self, step: int) -> list[StepResult]:
        """Return `step` and those after it, as far as the others made them without this rank."""
        assert self._ledger is not None
        if self.is_coordinator or self._in_last_step or not self._exchange.tolerant:
            return []
        assert step == self._ledger.next_step
        missed: list[StepResult] = []
        count = 1
        while True:  # several with one request: the store may be far away
            first = self._ledger.next_step
            keys = [_result_key(step) for step in range(first, first + count)]
            found = self._exchange.get_all(keys)
            missed += map(self._apply, found)
            if not found and count == 1:
                return missed
            count = min(2 * count, _MOST_AT_ONCE) if found else 1

    def begin_step(self, step: int, device: torch.device) -> None:
        """Announce that this rank is ready for `step`, if the last step did not include it.

        Ranks that share a batch then copy the random state of the first of them, so that dropout
        masks on `device` agree.
        """
        if self._in_last_step:
            return
        exchange = self._exchange
        if exchange.tolerant and not self.is_coordinator:
            exchange.put(f"back/{self.rank}", _STEP.pack(step))
        first, *others = self.mesh.sharing(self.mesh.data_rank(self.rank))
        if not others:
            return
        key = f"random/{first}/{step}"
        mine = RandomState.current(device, host=True)
        if self.rank == first:
            exchange.put(key, mine.encode())
        elif exchange.tolerant:
            state = exchange.get_or_none(key, exchange.deadline)
            if state is not None:
                mine.adopt(state).restore()
        else:
            late = f"rank {first}, which shares a batch with rank {self.rank}, did not come"
            mine.adopt(exchange.get(key, exchange.startup, late)).restore()

    def report(
        self, step: int, losses: RankLosses, *, random_state: RandomState, lr: float
    ) -> StepReports | None:
        """Report this rank's losses; on rank 0, wait for the others' and return all of them.

        Args:
            random_state: Random state before the forward passes.
            lr: The step's learning rate on this rank; rank 0's is used.

        Returns:
            The reports on rank 0, which decides the step and calls `publish`. None on the other
            ranks, which call `receive`.
        """
        assert self._ledger is not None
        own = Report(step, self._ledger.checksum, random_state.used_since(), lr, losses)
        if not self.is_coordinator:
            self._exchange.put(f"report/{step}/{self.rank}", own.encode())
            return None
        reports, causes = self._collect_reports(own)
        data_ranks = self._included(reports, step, causes)
        return StepReports({rank: report.losses for rank, report in reports.items()}, data_ranks)

    def publish(self, result: StepResult, records: bytes) -> None:
        self._exchange.put(_result_key(result.step), records)
        self._in_last_step = bool(result.data_rank_mask & 1)

    def receive(self, step: int) -> StepResult:
        """Wait for what rank 0 decided about `step`, and return it."""
        result = self._receive(step)
        if not self._in_last_step:  # nobody may have read it
            self._exchange.drop(f"report/{step}/{self.rank}")
        return result

    def _receive(self, step: int) -> StepResult:
        late = f"rank 0, which coordinates, did not decide step {step}"
        return self._apply(self._exchange.get(_result_key(step), 2 * self._exchange.deadline, late))

    def _apply(self, records: bytes) -> StepResult:
        assert self._ledger is not None
        try:
            result = self._ledger.append_records(records)
        except JournalError as error:
            self._exchange.end(f"rank {self.rank} is at other weights than rank 0: {error}")
        self._in_last_step = bool(result.data_rank_mask >> self.mesh.data_rank(self.rank) & 1)
        return result

    def _collect_reports(self, own: Report) -> tuple[dict[int, Report], dict[int, str]]:
        """Return the usable reports by rank, and why those of other ranks are not."""
        exchange, key = self._exchange, f"report/{own.step}/{{}}"
        exchange.away = {r: since for r, since in exchange.away.items() if not self._back(r, since)}
        contents, causes = exchange.collect(key, exchange.deadline)
        for rank in (*contents, *causes):
            exchange.drop(key.format(rank))
        for rank in exchange.missing(contents, causes):
            causes[rank] = (
                f"rank {rank} did not report step {own.step} within {exchange.deadline:g} s"
            )
        if exchange.tolerant:
            exchange.away |= dict.fromkeys(causes, own.step)
        reports = {0: own} | {rank: Report.decode(data) for rank, data in contents.items()}
        for rank, report in list(reports.items()):
            problem = self._problem(rank, report, own, reports)
            if problem is not None:
                causes[rank] = problem
                del reports[rank]
        return reports, causes

    def _problem(
        self, rank: int, report: Report, own: Report, reports: dict[int, Report]
    ) -> str | None:
        """Return why `report` cannot be used, if it cannot."""
        if report.checksum != own.checksum:
            return f"rank {rank} is at other weights than rank 0: its steps before differ"
        first = reports.get(self.mesh.sharing(self.mesh.data_rank(rank))[0])
        if first is not None and report.random_state != first.random_state:
            return (
                f"rank {rank} has another random state than the rank that it shares a batch with; "
                "seed both alike (transformers.set_seed), or use no dropout"
            )
        if not math.isclose(report.lr, own.lr, rel_tol=_LR_TOLERANCE):
            differing = f"rank {rank} has lr {report.lr!r} in step {own.step}, rank 0 {own.lr!r}"
            if not self._exchange.tolerant:
                return f"{differing}; give all the same schedule"
            if rank not in self._warned_of_lr:  # its losses do not depend on lr: they can be used
                logger.warning("%s, which is used", differing)
            self._warned_of_lr.add(rank)
        return None

    def _back(self, rank: int, since: int) -> bool:
        """Return whether a rank that is away since step `since` announced a later one."""
        for content in self._exchange.get_all([f"back/{rank}"]):
            if _STEP.unpack(content)[0] > since:
                logger.warning("rank %d is back", rank)
                return True
        return False

    def _included(self, reports: dict[int, Report], step: int, causes: dict[int, str]) -> list[int]:
        """Return the data ranks whose losses form the step's; `causes`: why ranks are missing."""
        exchange = self._exchange
        if causes and not exchange.tolerant:
            exchange.publish_failure(_result_key(step), causes)
        ranks = {d: self.mesh.sharing(d) for d in range(self.mesh.data)}
        complete = [d for d in ranks if all(rank in reports for rank in ranks[d])]
        if not exchange.tolerant:
            return complete
        for rank in sorted(causes):
            logger.warning("step %d goes on without rank %d: %s", step, rank, causes[rank])
        if not any(reports[ranks[d][0]].losses.values for d in complete):
            away = ", ".join(f"rank {rank}" for rank in sorted(exchange.away)) or "none"
            text = f"step {step} has no batch whose ranks are all there (away: {away})"
            exchange.publish_failure(_result_key(step), {0: text})
        finite = [d for d in complete if all(reports[r].losses.finite for r in ranks[d])]
        for d in sorted({*complete} - {*finite}):
            logger.warning("step %d: data rank %d has a loss that is not finite", step, d)
        # If none is finite the step is skipped, as it is in a single process.
        return finite if any(not reports[ranks[d][0]].losses.empty for d in finite) else complete


def _result_key(step: int) -> str:
    return f"verdict/{step}"
