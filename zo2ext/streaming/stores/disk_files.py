"""The files of a disk store, read without the page cache."""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from dataclasses import dataclass

from zo2ext.ops.tables import align
from zo2ext.streaming.stores.sources import Extent

BLOCK = 4096  # bytes; O_DIRECT requires offsets and lengths to be multiples of it

logger = logging.getLogger(__name__)


SCRATCH = ""  # path of the scratch file in extents


@dataclass(frozen=True)
class Piece:
    """Bytes to copy from a request's buffer to the target."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Read:
    """One request: aligned bytes of a file, and the pieces to copy from them."""

    path: str
    begin: int
    nbytes: int
    pieces: tuple[Piece, ...]

    @property
    def needed(self) -> int:
        return max(piece.source + piece.nbytes for piece in self.pieces)


class Files:
    """Open files: the ones that weights are read from, and the scratch file."""

    def __init__(self) -> None:
        self._handles: dict[str, int] = {}
        self._scratch: int | None = None  # a handle to write with
        self._end = 0  # of the allocated range
        self._open: list[int] = []
        # Also runs if the run fails before it can be closed.
        self.close = weakref.finalize(self, _close, self._open)

    def handle(self, path: str) -> int:
        """Return a handle to read `path` with."""
        if path not in self._handles:
            self._handles[path] = self._opened(_open_direct(path))
        return self._handles[path]

    def allocate(self, nbytes: int) -> Extent:
        """Allocate `nbytes` in the scratch file.

        Raises:
            OSError: The disk is full.
        """
        if self._scratch is None:
            with tempfile.TemporaryFile(prefix="zo2ext-") as file:
                self._scratch = self._opened(os.dup(file.fileno()))
            readable = _open_direct(f"/proc/self/fd/{self._scratch}")
            self._handles[SCRATCH] = self._opened(readable)
        extent = Extent(SCRATCH, self._end, nbytes)
        os.posix_fallocate(self._scratch, self._end, align(nbytes, BLOCK))
        self._end += align(nbytes, BLOCK)
        return extent

    def write(self, begin: int, content: memoryview) -> None:
        """Write to an allocated range of the scratch file."""
        assert self._scratch is not None
        done = 0
        while done < len(content):
            done += os.pwrite(self._scratch, content[done:], begin + done)

    def _opened(self, handle: int) -> int:
        self._open.append(handle)
        return handle


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _open_direct(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:  # a file system in memory, for instance
        logger.info("%s is read through the page cache: %s", path, error)
        return os.open(path, os.O_RDONLY)
