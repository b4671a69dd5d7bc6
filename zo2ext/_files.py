"""Writes files and folders atomically."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zo2ext.errors import UserError

_PARTIAL = ".partial"

_libc = ctypes.CDLL(None, use_errno=True)


def check_new_folder(path: Path, argument: str) -> None:
    """Raise an error unless `path` is an empty folder or can be created; change nothing.

    Args:
        path: The folder.
        argument: Its name in error messages.

    Raises:
        UserError: It is not empty, or cannot be created or written to.
    """
    missing = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        filled = next(path.iterdir(), None) is not None
    except OSError as error:
        raise UserError(
            f"{argument} is {str(path)!r}, which cannot be written to: {error.strerror}"
        ) from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
    if filled:
        raise UserError(f"{argument} is {str(path)!r}, which is not empty; name a new folder")


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` under a temporary name, sync it, and rename it to `path`.

    Raises:
        OSError: It cannot be written; a former file at `path` is still there.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` unless the block raises.

    An existing folder is exchanged for it atomically. (On a file system that cannot exchange two
    names, it is renamed to ``.previous`` for a moment.)

    Raises:
        OSError: It cannot be written; a former folder at `path` is still there.
    """
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        for entry in (*partial.rglob("*"), partial):
            sync(entry)
        if not os.path.lexists(path):
            partial.rename(path)
        elif not _exchange(partial, path):
            previous = path.with_name(path.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            path.rename(previous)
            partial.rename(path)
            shutil.rmtree(previous)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # incomplete, or the former one


def remove_halves(folder: Path) -> None:
    """Remove what killed processes had begun to write in `folder`."""
    for partial in folder.glob("*" + _PARTIAL):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders atomically; return False if that is not supported."""
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    done: bool = _libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
    error = ctypes.get_errno()
    if not done and error not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise OSError(error, os.strerror(error), str(b))
    return done


def _partial(path: Path) -> Path:
    return path.with_name(path.name + _PARTIAL)


def sync(path: Path) -> None:
    """Wait until the file or folder `path` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
