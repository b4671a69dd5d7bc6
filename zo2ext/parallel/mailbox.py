"""Messages between processes through torch's key-value store (`torch.distributed.Store`).

A store that is stopped or behind a dead network never answers, and torch would wait without limit.
Here every call has a time limit, and a broken connection is replaced where that is possible.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

_SLICES = 10  # that a wait is divided into
_TICK = timedelta(milliseconds=1)
_PAUSE = 0.05  # seconds between attempts to connect


class Unreachable(RuntimeError):
    """The store does not answer, or there is none."""


class Mailbox:
    """Messages by key. Every method raises `Unreachable` if the store is gone.

    Args:
        store: A `torch.distributed.Store`.
        prefix: Prefix of all keys.
        patience: Seconds that the store may take to answer, besides the wait for a message.
        connect: Makes a new connection to the store; None if a broken one cannot be replaced.

    Attributes:
        sent: Bytes sent so far, without keys.
    """

    def __init__(
        self,
        store: Any,
        prefix: str,
        *,
        patience: float,
        connect: Callable[[], Any] | None = None,
    ) -> None:
        self._prefix, self._patience, self._connect = prefix, patience, connect
        self._store = self._prefixed(store)
        self.sent = 0

    def put(self, key: str, message: bytes) -> None:
        """Store a message; return when the store has it.

        A broken connection loses what is in transit, so the message is sent again over the next
        one. It may then reappear after its reader has dropped it: do not read a dropped key again.
        """

        def leave(store: Any) -> None:
            store.set(key, message)  # returns before anything has arrived
            store.check([key])  # answered after what was sent before

        self._ask(leave)
        self.sent += len(message)

    def get(self, key: str, seconds: float) -> bytes | None:
        """Wait for a message; return None if it does not arrive in time."""
        from torch.distributed import DistStoreError

        end = time.monotonic() + seconds

        def wait(store: Any) -> bytes | None:
            try:
                store.wait([key], max(timedelta(seconds=end - time.monotonic()), _TICK))
            except DistStoreError:
                if not store.check([key]):  # this process may have been stopped until now
                    return None
            return bytes(store.get(key))

        return self._ask(wait, max(seconds, 0.0))

    def get_all(self, keys: Sequence[str]) -> list[bytes]:
        """Return messages that are there already, or [] unless all of them are."""
        keys = list(keys)

        def read(store: Any) -> list[bytes]:
            return [bytes(m) for m in store.multi_get(keys)] if store.check(keys) else []

        return self._ask(read)

    def drop(self, key: str) -> None:
        self._ask(lambda store: store.delete_key(key))

    def _ask(self, call: Callable[[Any], T], seconds: float = 0.0) -> T:
        """Return what `call` returns for the store; it may wait `seconds` for a message."""
        from torch.distributed import DistNetworkError

        end, attempts = time.monotonic() + seconds + self._patience, 0
        while True:
            attempts += 1
            try:
                return _within(seconds + self._patience, partial(call, self._store))
            except (DistNetworkError, TimeoutError) as error:
                if self._connect is None or (attempts > 1 and time.monotonic() > end):
                    raise Unreachable(_first_line(error)) from None
            self._renew()

    def _renew(self) -> None:
        from torch.distributed import DistNetworkError

        assert self._connect is not None
        end = time.monotonic() + self._patience
        while True:
            try:
                store = self._prefixed(_within(self._patience, self._connect))
            except (DistNetworkError, TimeoutError) as error:
                if time.monotonic() > end:
                    raise Unreachable(_first_line(error)) from None
                time.sleep(_PAUSE)
            else:
                self._store = store
                return

    def _prefixed(self, store: Any) -> Any:
        import torch.distributed

        dist: Any = torch.distributed
        return dist.PrefixStore(self._prefix, store)


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns, or raise TimeoutError.

    Time that this process itself was stopped does not count.
    """
    done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    left, duration = _SLICES, seconds / _SLICES
    while left:
        began = time.monotonic()
        try:
            value, error = done.get(timeout=duration)
        except queue.Empty:
            left -= time.monotonic() - began < 2 * duration
            continue
        if error is not None:
            raise error
        return value  # type: ignore[return-value]
    raise TimeoutError(f"no answer within {seconds:g} s")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
