"""The steps of one run, whether computed here, recorded earlier, or made by other ranks.

Steps that are recorded but missing in the weights are applied instead of computed again. A run that
was stopped, a rank that was away and a replay all work this way.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo2ext.errors import JournalError
from zo2ext.journal.journal import Journal, differences, read_journal
from zo2ext.journal.records import Content, Ledger, StepResult, opening, parse
from zo2ext.parallel.agreement import Alone, Team
from zo2ext.parallel.parallel import build
from zo2ext.streaming.pending import PendingUpdates


class History:
    """The steps of a run as one process knows them.

    Args:
        header: Returns a journal's header, given the ``run`` that `open` gets.
        adopt: Called with a recorded run's write-back period before its header is compared.

    Attributes:
        journal: The journal; None if there is none, or another rank keeps it.
        ledger: The same, or one in memory if ranks agree without a journal.
    """

    def __init__(
        self,
        team: Team | Alone,
        pending: PendingUpdates,
        header: Callable[[Mapping[str, Any]], dict[str, Any]],
        adopt: Callable[[int | str], None],
    ) -> None:
        self.journal: Journal | None = None
        self.ledger: Ledger | None = None
        self._team, self._pending, self._header, self._adopt = team, pending, header, adopt
        self._ahead: deque[StepResult] = deque()  # recorded steps that the weights lack

    # -- before and between steps

    def open(
        self, path: Path, run: Mapping[str, Any], *, checksum: int | None, sync_every: int
    ) -> int:
        """Open a journal and queue the steps that the weights lack; see `ZOEngine.keep_journal`."""
        if self.ledger is not None:
            raise RuntimeError("this engine keeps a journal already, or has made steps with others")
        steps, from_start = self._pending.step, checksum is None
        journal: Journal | None = None
        try:
            if self._team.is_coordinator:
                if path.is_file():
                    self._adopt(read_journal(path).write_back)
                journal = Journal(
                    path, self._header(run), from_start=from_start, sync_every=sync_every
                )
                recorded = journal.recorded.after(steps, checksum, journal.path)
                self.ledger = journal
            self.join_ranks(journal, run, from_start=from_start)
        except BaseException as error:
            if journal is not None:
                journal.close()
            self._team.fail(steps, error)
            raise
        self.journal = journal
        if journal is not None:
            self._queue(recorded, journal.recorded.write_backs)
        return len(self._ahead)

    def join_ranks(
        self,
        journal: Journal | None = None,
        run: Mapping[str, Any] | None = None,
        *,
        from_start: bool = True,
    ) -> None:
        """Meet the other ranks, once, and queue the steps that rank 0 has recorded."""
        if isinstance(self._team, Alone) or self._team.joined:
            return
        if self._team.is_coordinator:
            if journal is not None:
                history = journal.path.read_bytes()
            else:
                history = opening(json.loads(json.dumps(self._header(run or {}))))
                self.ledger = Ledger(parse(history, Path("memory")))
            assert self.ledger is not None
            self._team.publish_run(self.ledger, history, build())
            return
        content, problems = self._team.receive_run(build())
        self._adopt(content.write_back)
        mine = self._header(run or {})
        if not from_start or mine["start"] != content.start:
            mine |= {name: content.header[name] for name in ("start", "fingerprint")}
        steps = self._pending.step
        self.ledger = self._team.join(
            content, [*problems, *differences(content.header, mine)], steps
        )
        # A rank that comes back with a checkpoint may be ahead of the run as rank 0 started it.
        if steps <= content.next_step:
            recorded = content.after(steps, None, Path("the journal of rank 0"))
            self._queue(recorded, content.write_backs)

    def replay(self, content: Content, until: int) -> None:
        """Queue the steps of a journal up to step `until`, without recording them."""
        steps = self._pending.step
        recorded = content.after(steps, None, Path("the journal"))
        if not steps <= until <= content.next_step:
            raise JournalError(f"until must be {steps} to {content.next_step}, got {until}")
        write_backs = [step for step in content.write_backs if step <= until]
        self._queue(recorded[: until - steps], write_backs)

    def _queue(self, recorded: Sequence[StepResult], write_backs: Sequence[int]) -> None:
        for step in write_backs:
            if step > self._pending.step:
                self._pending.add_write_back(step)
        self._ahead.extend(recorded)

    # -- a step

    def next_recorded(self) -> StepResult | None:
        """Return the next step if it is recorded; None if it has to be computed."""
        self.join_ranks()
        while self._ahead and self._ahead[0].step < self._pending.step:
            self._ahead.popleft()
        self._ahead.extend(self._team.missed_steps(self._pending.step + len(self._ahead)))
        return self._ahead[0] if self._ahead else None

    def all_recorded(self) -> Iterator[StepResult]:
        while self._ahead:
            yield self._ahead[0]
            self._ahead.popleft()

    @contextmanager
    def recorded(self, result: StepResult) -> Iterator[bytes]:
        """Record a step; yield its records to a block that publishes and applies them.

        If the block raises before the weights have the update, a single process drops the records
        again. With other ranks they stay, since those may have applied them.
        """
        if self.ledger is None:
            yield b""
            return
        published: BaseException | None = None
        with self.ledger.undone_on_error():
            records = self.ledger.append(result)
            if self._team.mesh.ranks > 1:
                self.settle()  # the others keep the step even if this machine fails
            try:
                yield records
            except BaseException as error:
                if self._team.mesh.ranks == 1 and self._pending.step == result.step:
                    raise
                published = error
        if published is not None:
            raise published

    def record_write_back(self) -> None:
        if self.ledger is not None:
            self.ledger.append_write_back(self._pending.step)

    # -- the end

    def settle(self) -> None:
        """Wait until the disk has the journal's steps, as far as it is to be synced."""
        if self.journal is not None:
            self.journal.settle()

    def checksum(self) -> int | None:
        """Return the journal's checksum after the steps in the weights; None without a journal."""
        return None if self.journal is None else self.journal.checksum_after(self._pending.step)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
