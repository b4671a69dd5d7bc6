"""Host memory that several processes map: a memory file without a name.

It disappears with the last process that has it open, and a container's limit of /dev/shm does not
apply to it. The other processes open it through the first one's entry in /proc.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zo2ext._format import gib
from zo2ext.ops.tables import align
from zo2ext.streaming.stores.host_group import HostRanks

PAGE = mmap.PAGESIZE


class _Offer(NamedTuple):
    """The path and the inode of rank 0's file, or the reason for not having one."""

    path: str
    inode: int
    problem: str


class SharedMemory:
    """Zeroed memory that all `ranks` share and construct together.

    Args:
        nbytes: Bytes to share.
        ranks: Ranks of this host.
        room: Bytes of memory that the host can provide.

    Attributes:
        memory: The shared memory: uint8, shape (nbytes,).

    Raises:
        MemoryError: It is larger than `room`.
        OSError: The ranks cannot open each other's files.
    """

    def __init__(self, nbytes: int, ranks: HostRanks, room: int) -> None:
        self._handles: list[int] = []
        # Also runs if the run fails before it can be closed.
        self.close = weakref.finalize(self, _close, self._handles)
        own = self._offer(nbytes, room) if ranks.rank == 0 else None
        offer = _Offer(*ranks.meet("share memory", own)[0])
        if offer.problem:
            raise MemoryError(offer.problem)
        opened = ranks.meet("open the shared memory", self._open(offer))
        problems = [problem for problem in opened if problem]
        if problems:
            raise OSError(problems[0])
        shared = mmap.mmap(self._handles[0], max(nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            shared.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(shared, dtype=torch.uint8)

    def _offer(self, nbytes: int, room: int) -> _Offer:
        if nbytes > room:
            return _Offer(
                *("", 0),
                f"the weights take {gib(nbytes)} of host memory, and {gib(room)} can be had: use "
                "store='disk', a smaller storage dtype, or free memory on this host",
            )
        handle = os.memfd_create("zo2ext weights", os.MFD_CLOEXEC)
        self._handles.append(handle)
        os.ftruncate(handle, max(nbytes, 1))
        return _Offer(f"/proc/{os.getpid()}/fd/{handle}", os.fstat(handle).st_ino, "")

    def _open(self, offer: _Offer) -> str:
        """Open the file of `offer`; return the problem, or ""."""
        try:
            self._handles.append(os.open(offer.path, os.O_RDWR | os.O_CLOEXEC))
            if os.fstat(self._handles[-1]).st_ino == offer.inode:
                return ""
            found = "it is another file"
        except OSError as error:
            found = str(error)
        return (
            f"process {os.getpid()} cannot open the weights at {offer.path} ({found}): ranks that "
            "share weights have to be processes of one user on one host, in one container"
        )

    def allocate(self, begin: int, nbytes: int) -> None:
        """Allocate memory for a range that is about to be written.

        Raises:
            MemoryError: There is none. Writing would kill the process instead.
        """
        try:
            os.posix_fallocate(self._handles[0], begin, nbytes)
        except OSError as error:
            raise MemoryError(
                f"the host has no memory left for weights ({error}): use store='disk' or a "
                "smaller storage dtype"
            ) from error

    def private(self, begin: int, dtype: torch.dtype, numel: int) -> Tensor:
        """Return `numel` > 0 elements from byte `begin` on, in a tensor with its own storage.

        The mapping is copy-on-write: pages that are written become private to this process, and
        the others show the shared memory.
        """
        first = begin // PAGE * PAGE
        pages = _map_private(self._handles[0], first, begin - first + numel * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype, count=numel, offset=begin - first)


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _map_private(handle: int, begin: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Return a private mapping, which is unmapped when it is garbage collected.

    Python's own mmap would keep one file descriptor open per mapping.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, nbytes, access, mmap.MAP_PRIVATE, handle, begin)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "could not map weights")
    pages = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(pages, libc.munmap, address, nbytes).atexit = False
    return pages


def room_for(held: int) -> int:
    """Return the bytes of host memory that are available once `held` more bytes are freed.

    Source:
        proc_meminfo(5), "MemAvailable"; the kernel's cgroup-v2.rst, "memory.max".
    """
    fields = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in fields if line.startswith("MemAvailable:"))
    limit = Path("/sys/fs/cgroup/memory.max")  # "max" where there is none
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(free + held, int(text)) if text.isdecimal() else free + held


def page_range(begin: int, end: int) -> slice:
    """Return the range of pages that contain the bytes from `begin` to `end`."""
    return slice(begin // PAGE * PAGE, align(end, PAGE))
