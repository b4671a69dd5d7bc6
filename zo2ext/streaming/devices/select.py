"""Make the device that a name stands for."""

from __future__ import annotations

import torch

from zo2ext.errors import UserError
from zo2ext.ops.build import why_not_on_gpu
from zo2ext.streaming.devices.cpu import CpuDevice
from zo2ext.streaming.devices.cuda import CudaDevice
from zo2ext.streaming.devices.device import Device


def make_device(name: str | torch.device | None) -> Device:
    """Return the device called `name`; None selects CUDA if torch finds a GPU, else the CPU.

    Raises:
        ValueError: The name is unknown, or the machine or this build does not support it. A GPU
            that this build cannot use is an error too if `name` is None: nothing trains on the CPU
            of such a machine unless it is asked to.
    """
    from zo2ext.streaming.devices.simulated import SimulatedDevice

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
    if (reason := why_not_on_gpu(device)) is not None:
        raise UserError(f"device is {name!r}, but {reason}")
    return CudaDevice(device)
