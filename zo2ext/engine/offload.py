"""Offload a model that is in memory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from zo2ext.config import ZOConfig
from zo2ext.engine.engine import ZOEngine
from zo2ext.parallel.parallel import Parallel, SingleProcess
from zo2ext.planning.directions import with_directions_of
from zo2ext.streaming.devices.select import make_device


def offload(
    model: nn.Module,
    config: ZOConfig | None = None,
    *,
    train: bool = True,
    journal: str | Path | None = None,
    parallel: Parallel | None = None,
) -> ZOEngine:
    """Move `model`'s weights to a host store, to train it by forward passes alone.

    Args:
        model: Any ``nn.Module``; its forward runs unmodified. Parameters with
            ``requires_grad=False`` are uploaded but never perturbed, updated or written back.
        config: Settings of the run; the defaults if None.
        train: Whether the model must have trainable parameters. Pass False to only evaluate it, or
            ``generate`` with it.
        journal: File to record the run in. If it exists, the run continues where the file ends;
            `ZOEngine.steps` is then the number of steps so far. See `ZOEngine.keep_journal`.
        parallel: This process among several that train the model together.

    Returns:
        The engine, a context manager that closes itself. Weights move to the store one tensor at a
        time; `ZOEngine.close` makes the model an ordinary one again.

    Raises:
        TypeError: `model` is not a module, or has trainable weights that cannot be perturbed.
        ValueError: It has no trainable parameter, has meta tensors, or is offloaded already.
        OutOfDeviceMemory: The slots do not fit the device.
        JournalError: The journal is damaged, belongs to another run, or is in use.
        RankFailure: Another rank did not join, or has another run, model or build.

    Example:
        >>> config = zo2ext.ZOConfig(lr=1e-6, device="cuda")
        >>> with zo2ext.offload(model, config, journal="run/journal.zo2") as zo:
        ...     for batch in batches[zo.steps :]:
        ...         loss = zo.step(lambda: model(**batch).loss)
    """
    config, process = config or ZOConfig(), parallel or SingleProcess()
    with process.reporting_errors():
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        device = make_device(process.device(config.device))
        if journal is not None:
            config = with_directions_of(config, Path(journal))
        engine = ZOEngine(model, config, device, train=train, parallel=parallel)
    if journal is not None:
        try:
            engine.keep_journal(journal)
        except BaseException:
            engine.close()
            raise
    return engine
