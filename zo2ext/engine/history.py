"""The steps of one run, wherever they come from: made here, recorded before, or by other ranks.

What is recorded ahead of the weights is taken up instead of being made again; so a run that was
stopped, a rank that was away and a replay go one way.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zo2ext.errors import JournalError
from zo2ext.journal.journal import Journal, differences, read_journal
from zo2ext.journal.records import Content, Ledger, StepResult, opening, parse
from zo2ext.parallel.agreement import Alone, Coordination
from zo2ext.parallel.parallel import build
from zo2ext.streaming.pending import PendingUpdates


class History:
    """What one process knows of its run's steps.

    Args:
        team: This process and the other ranks.
        pending: Of the weights: how many steps they have seen.
        header: Of a journal, from what else makes the run what it is.
        adopt: Told of a run that is recorded, before it is compared with this one's header.

    Attributes:
        journal: Where steps are recorded; None where they are not, or by another rank.
        ledger: The same, or in memory where ranks agree without a journal.
    """

    def __init__(
        self,
        team: Alone | Coordination,
        pending: PendingUpdates,
        header: Callable[[Mapping[str, Any]], dict[str, Any]],
        adopt: Callable[[Content], None],
    ) -> None:
        self.journal: Journal | None = None
        self.ledger: Ledger | None = None
        self._team, self._pending, self._header, self._adopt = team, pending, header, adopt
        self._ahead: deque[StepResult] = deque()  # steps that are recorded and the weights lack

    # -- before and between steps

    def keep(
        self, path: Path, run: Mapping[str, Any], *, checksum: int | None, sync_every: int
    ) -> int:
        """Record every step from here on, and take up those that are; see `ZOEngine.keep_journal`.

        Returns:
            Steps that are recorded ahead now.
        """
        if self.ledger is not None:
            raise RuntimeError("this engine keeps a journal already, or has made steps with others")
        steps, from_start = self._pending.step, checksum is None
        journal: Journal | None = None
        try:
            if self._team.is_coordinator:
                if path.is_file():
                    self._adopt(read_journal(path))
                journal = Journal(
                    path, self._header(run), from_start=from_start, sync_every=sync_every
                )
                recorded = journal.recorded.after(steps, checksum, journal.path)
                self.ledger = journal
            self.meet(journal, run, from_start=from_start)
        except BaseException as error:
            if journal is not None:
                journal.close()
            self._team.fail(steps, error)
            raise
        self.journal = journal
        if journal is not None:
            self.take_up(recorded, journal.recorded.write_backs)
        return len(self._ahead)

    def meet(
        self,
        journal: Journal | None = None,
        run: Mapping[str, Any] | None = None,
        *,
        from_start: bool = True,
    ) -> None:
        """Meet the other ranks, if there are any, once; take up what rank 0 has recorded.

        Raises:
            RankFailure: One does not come, or is of another run.
        """
        if isinstance(self._team, Alone) or self._team.opened:
            return
        if self._team.is_coordinator:
            if journal is not None:
                history = journal.path.read_bytes()
            else:
                history = opening(json.loads(json.dumps(self._header(run or {}))))
                self.ledger = Ledger(parse(history, Path("memory")))
            assert self.ledger is not None
            self._team.begin(self.ledger, history, build())
            return

        def problems(content: Content) -> list[str]:
            self._adopt(content)
            mine = self._header(run or {})
            if not from_start or mine["start"] != content.start:
                mine |= {name: content.header[name] for name in ("start", "fingerprint")}
            return list(differences(content.header, mine))

        steps = self._pending.step
        self.ledger = self._team.join(problems, steps, build())
        content = self.ledger.recorded
        # One that comes back with the weights of a checkpoint may be ahead of what there was as
        # rank 0 began.
        if steps <= content.next_step:
            recorded = content.after(steps, None, Path("the journal of rank 0"))
            self.take_up(recorded, content.write_backs)

    def take_up(self, recorded: Sequence[StepResult], write_backs: Sequence[int]) -> None:
        """Steps from here on are those that are `recorded`, as long as there are any."""
        for step in write_backs:
            if step > self._pending.step:
                self._pending.add_write_back(step)
        self._ahead.extend(recorded)

    def replay(self, content: Content, until: int) -> None:
        """Take up the steps of a journal up to step `until`, recording nothing.

        Raises:
            JournalError: It does not reach from here to there.
        """
        steps = self._pending.step
        recorded = content.after(steps, None, Path("the journal"))
        if not steps <= until <= content.next_step:
            raise JournalError(f"until must be {steps} to {content.next_step}, got {until}")
        write_backs = [step for step in content.write_backs if step <= until]
        self.take_up(recorded[: until - steps], write_backs)

    # -- a step

    def next_recorded(self) -> StepResult | None:
        """The next step, if it is recorded; None: it is to be made."""
        self.meet()
        self._ahead.extend(self._team.missed(self._pending.step + len(self._ahead)))
        return self._ahead.popleft() if self._ahead else None

    def all_recorded(self) -> Iterator[StepResult]:
        """The steps that are recorded, one after the other."""
        while self._ahead:
            yield self._ahead.popleft()

    def record(self, made: StepResult) -> bytes:
        """Record a step, before its update can reach any weight; returns its records."""
        return b"" if self.ledger is None else self.ledger.append(made)

    def record_write_back(self) -> None:
        """Record that all weights are rounded to storage now, out of turn."""
        if self.ledger is not None:
            self.ledger.append_write_back(self._pending.step)

    # -- the end

    def checksum(self) -> int | None:
        """The journal's after the steps that the weights have seen; None without one."""
        return None if self.journal is None else self.journal.checksum_after(self._pending.step)

    def close(self) -> None:
        """Let other processes have the journal."""
        if self.journal is not None:
            self.journal.close()
