"""Messages between the ranks of one run, and values that they exchange between steps.

Every message begins with a byte that marks it as content or as a failure, so a
rank that fails can leave the reason wherever the others wait for it. No rank waits without limit.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from zo2ext.errors import RankFailure
from zo2ext.parallel.mailbox import Mailbox, Unreachable
from zo2ext.parallel.mesh import Mesh

_ANSWER_SHARE = 0.5  # of the deadline: how long the store may take to answer
_CONTENT, _FAILURE = b"+", b"-"  # first bytes of messages

T = TypeVar("T")


class Exchange:
    """The messages of one run, as one rank sends and reads them.

    Every method raises `RankFailure` if the store cannot be reached.

    Args:
        store, deadline, startup, tolerant, connect: As in `Parallel`.
        run: Prefix of this run's keys in the store.

    Attributes:
        away: Ranks that nobody waits for, with the step since which they are away.
        failure: Why this rank cannot continue; None while it can.
        unreachable: Whether the store no longer answers.
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
        self._mailbox = Mailbox(store, run, patience=_ANSWER_SHARE * deadline, connect=connect)
        self.rank, self.mesh, self.is_coordinator = rank, mesh, rank == 0
        self.deadline, self.startup, self.tolerant = deadline, startup, tolerant
        self.away: dict[int, int] = {}
        self.failure: str | None = None
        self.unreachable = False
        self._broadcasts = 0

    @property
    def sent(self) -> int:
        """Bytes sent, without the keys."""
        return self._mailbox.sent

    # -- single messages

    def put(self, key: str, content: bytes = b"") -> None:
        self._reach(partial(self._mailbox.put, key, _CONTENT + content))

    def put_failure(self, key: str, text: str) -> None:
        self._reach(partial(self._mailbox.put, key, _FAILURE + text.encode()))

    def drop(self, key: str) -> None:
        self._reach(partial(self._mailbox.drop, key))

    def get(self, key: str, seconds: float, late: str) -> bytes:
        """Wait for a message and return its content.

        Raises:
            RankFailure: It is a failure, or does not arrive, which `late` describes.
        """
        content = self.get_or_none(key, seconds)
        if content is None:
            self.end(f"{late} within {seconds:g} s")
        return content

    def get_or_none(self, key: str, seconds: float) -> bytes | None:
        """Wait for a message; return None if it does not arrive."""
        message = self._reach(partial(self._mailbox.get, key, seconds))
        return None if message is None else self._content(message)

    def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """Return the contents of messages that are there already, or [] unless all of them are."""
        return [self._content(m) for m in self._reach(partial(self._mailbox.get_all, keys))]

    def collect(self, key: str, seconds: float) -> tuple[dict[int, bytes], dict[int, str]]:
        """Wait for a message from every other rank that is not away; `key` is a format of its rank.

        Returns:
            Contents and failures by rank; ranks whose messages did not arrive are in neither.
        """
        end = time.monotonic() + seconds
        contents: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        for rank in range(1, self.mesh.ranks):
            if rank in self.away:
                continue
            left = end - time.monotonic()
            message = self._reach(partial(self._mailbox.get, key.format(rank), left))
            if message is not None and message[:1] == _FAILURE:
                failures[rank] = message[1:].decode()
            elif message is not None:
                contents[rank] = message[1:]
        return contents, failures

    def missing(self, *found: Iterable[int]) -> set[int]:
        """Return the other ranks that are neither in `found` nor away."""
        return set(range(1, self.mesh.ranks)).difference(*found, self.away)

    # -- values between steps

    @property
    def broadcast_key(self) -> str:
        """Key of the next broadcast."""
        return f"shared/{self._broadcasts}"

    @property
    def gather_key(self) -> str:
        """Format of the keys of the next gather."""
        return f"gathered/{self._broadcasts}/{{}}"

    def broadcast(self, data: bytes) -> bytes:
        """Return rank 0's `data` on all ranks, which must call this at the same point."""
        key = self.broadcast_key
        self._broadcasts += 1
        if not self.is_coordinator:
            late = f"rank 0, which coordinates, did not broadcast to rank {self.rank}"
            return self.get(key, self.startup + self.deadline, late)
        self.put(key, data)
        return data

    def gather(self, value: float) -> list[float]:
        """Return every rank's `value`, by rank; all must call this at the same point."""
        key = self.gather_key
        if not self.is_coordinator:
            self.put(key.format(self.rank), struct.pack("<d", value))
            return list(struct.unpack(f"<{self.mesh.ranks}d", self.broadcast(b"")))
        contents, failures = self.collect(key, self.deadline)
        for rank in sorted(set(range(1, self.mesh.ranks)).difference(contents, failures)):
            failures[rank] = f"rank {rank} did not come within {self.deadline:g} s"
        if failures:
            self.publish_failure(self.broadcast_key, failures)
        for rank in contents:
            self.drop(key.format(rank))
        values = [value, *(struct.unpack("<d", contents[r])[0] for r in sorted(contents))]
        self.broadcast(struct.pack(f"<{len(values)}d", *values))
        return values

    # -- failures

    def publish_failure(self, key: str, failures: dict[int, str]) -> NoReturn:
        """Leave the reasons in `failures` at `key` for the others, and raise `RankFailure`."""
        # If one rank fails, the messages of others may repeat its reason.
        text = "; ".join(dict.fromkeys(failures[rank] for rank in sorted(failures)))
        self.put_failure(key, text)
        self.end(text)

    def end(self, text: str) -> NoReturn:
        """Raise `RankFailure`, and remember that the run has ended on this rank."""
        self.failure = text
        raise RankFailure(text)

    def _content(self, message: bytes) -> bytes:
        if message[:1] == _FAILURE:
            self.end(message[1:].decode())
        return message[1:]

    def _reach(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Unreachable as error:
            self.unreachable = True
            self.end(f"the store of rank 0 cannot be reached: {error}")
