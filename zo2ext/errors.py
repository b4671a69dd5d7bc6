"""Every exception that zo2ext raises on purpose, all of them importable from ``zo2ext`` as well.

Each also derives from the built-in exception that fits, so that ``except ValueError`` works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zo2ext.model.units import Unit

__all__ = [
    "ExtensionError",
    "FileError",
    "HostRankError",
    "JournalError",
    "LateRead",
    "LaunchError",
    "OutOfDeviceMemory",
    "RankFailure",
    "UnsupportedModel",
    "UserError",
    "ZO2Error",
    "needs_traceback",
]


class ZO2Error(Exception):
    """Base class of the exceptions below."""


class ExtensionError(ZO2Error, ImportError):
    """The compiled extension is missing or cannot be loaded; the message names the remedy."""


class UserError(ZO2Error, ValueError):
    """An argument, setting or file is invalid; the message names it."""


class FileError(ZO2Error, OSError):
    """A file cannot be read or written; the message names it."""


class UnsupportedModel(ZO2Error, TypeError):
    """The model has a parameter or a format that zo2ext cannot train or save."""


class OutOfDeviceMemory(ZO2Error, RuntimeError):
    """The device's memory is too small for the run; the message lists what needs how much."""


class JournalError(ZO2Error, ValueError):
    """A file is not a journal, is damaged, or belongs to another run. It was not changed."""


class LaunchError(ZO2Error, RuntimeError):
    """The environment lacks what a launcher such as ``torchrun`` sets."""


class RankFailure(ZO2Error, RuntimeError):
    """The ranks cannot continue together; the message names the rank and the cause.

    Nothing is lost: all finished steps are in the journal.
    """


class HostRankError(ZO2Error, RuntimeError):
    """A rank that shares the host's weights is gone, late, or doing something else."""


class LateRead(ZO2Error):
    """A forward pass used a parameter whose unit was not loaded at the time.

    The unit is kept loaded from then on. The engine catches this during a step, which runs again.
    """

    def __init__(self, unit: Unit) -> None:
        super().__init__(
            f"weights of {unit.name} were looked up before other modules ran and used after them; "
            "they stay loaded from now on: call the model again"
        )
        self.unit = unit


class ReadAroundStandIn(ZO2Error):
    """A forward pass used a parameter itself, where its stand-in is to be read.

    The engine turns it into `UnsupportedModel`, which torch's operators would hide: it is a
    TypeError.
    """


def needs_traceback(error: BaseException) -> bool:
    """Return whether only a traceback explains `error`.

    The message is enough for zo2ext's own exceptions and for system errors that name a file.
    """
    return not isinstance(error, ZO2Error) and not (
        isinstance(error, OSError) and error.filename is not None
    )
