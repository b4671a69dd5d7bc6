"""A network between ranks that is slow, breaks, or swallows everything: a proxy on loopback."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress


class Proxy:
    """Passes connections on to a port, badly.

    Args:
        to: The port.
        delay: Seconds that everything takes, each way.
        breaks: Mean seconds after which a connection is cut; None: never.
        seed: Of when that is.

    Attributes:
        port: Its own.
        swallowing: Whether nothing passes any more, on connections that stay open.
        cut: Connections that were.
    """

    def __init__(
        self, to: int, *, delay: float = 0.0, breaks: float | None = None, seed: int = 0
    ) -> None:
        self._to, self._delay, self._breaks = to, delay, breaks
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.swallowing = False
        self._loses: bool | None = None
        self.cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, *, answers: bool) -> None:
        """The next bytes towards the port, or from it, are lost, and their connection is cut."""
        self._loses = answers

    def close(self) -> None:
        self._listener.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    continue
                for a, b, answers in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pass, args=(a, b, answers), daemon=True).start()
                if self._breaks is not None:
                    after = self._random.expovariate(1 / self._breaks)
                    threading.Timer(after, self._break, (near, far)).start()

    def _pass(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(self._delay)
                if self._loses is answers:
                    self._loses = None
                    self.cut += 1
                    break
                if not self.swallowing:
                    sink.sendall(data)
        self._end(source, sink)

    def _break(self, *connection: socket.socket) -> None:
        self.cut += 1
        self._end(*connection)

    def _end(self, *connection: socket.socket) -> None:
        for end in connection:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
