"""Make the device that a name stands for."""

from __future__ import annotations

import torch

from zo2ext import ops
from zo2ext.errors import UserError
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.cuda import CudaDevice
from zo2ext.streaming.devices.device import Device


def make_device(name: str | torch.device | None) -> Device:
    """Return the device called `name`; None selects CUDA if it is available, else the CPU.

    Raises:
        ValueError: The name is unknown, or the machine or this build does not support it.
    """
    from zo2ext.streaming.devices.simulated import SimulatedDevice

    if name is None:
        name = "cuda" if torch.cuda.is_available() and ops.cuda_built() else "cpu"
    if name == "simulated":
        return SimulatedDevice()
    unknown = f"device must be 'cuda', 'cpu' or 'simulated', got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(unknown) from error
    if device.type == "cpu":
        return CpuDevice()
    if device.type != "cuda":
        raise UserError(unknown)
    if not torch.cuda.is_available():
        raise UserError(f"device is {name!r}, but torch finds no CUDA GPU; use device='cpu'")
    if not ops.cuda_built():
        raise UserError(
            f"device is {name!r}, but zo2ext was built without CUDA; "
            "reinstall it with ZO2EXT_CUDA=1 and the CUDA toolkit, or use device='cpu'"
        )
    return CudaDevice(device)
