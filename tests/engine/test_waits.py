"""The tool with which GPU tests count waits, with a stand-in for torch.cuda."""

from __future__ import annotations

import warnings

import pytest
import torch
from waits import waits

NOTICE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing "
    "operations (Triggered internally at torch/csrc/cuda/Module.cpp:1)"
)
WAIT = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:1)"


def test_only_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's notice when the mode is first set speaks of synchronizing operations, too."""
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn(NOTICE, UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert waits(lambda: None) == []
    assert waits(lambda: warnings.warn(WAIT, UserWarning, stacklevel=1)) == [WAIT]
    assert modes == ["warn", "default"] * 2
