"""zo2ext: zeroth-order fine-tuning of language models that do not fit the GPU.

with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6)) as zo:
    for batch in batches:
        loss = zo.step(lambda: model(**batch).loss)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zo2ext._version import __version__ as __version__

if TYPE_CHECKING:
    from zo2ext import errors as errors
    from zo2ext import ops as ops
    from zo2ext.config import PRESETS, Granularity, Store, ZOConfig
    from zo2ext.engine.engine import ZOEngine
    from zo2ext.engine.load import load
    from zo2ext.engine.offload import offload
    from zo2ext.engine.update_rule import StepRecord
    from zo2ext.errors import (
        ExtensionError,
        FileError,
        HostRankError,
        JournalError,
        LateRead,
        LaunchError,
        OutOfDeviceMemory,
        RankFailure,
        UnsupportedModel,
        UserError,
        ZO2Error,
    )
    from zo2ext.integrations.arguments import ZOTrainingArguments as ZOTrainingArguments
    from zo2ext.integrations.sft import ZOSFTConfig as ZOSFTConfig
    from zo2ext.integrations.sft import ZOSFTTrainer as ZOSFTTrainer
    from zo2ext.integrations.trainer import ZOTrainer as ZOTrainer
    from zo2ext.integrations.trainer import ZOTrainerMixin as ZOTrainerMixin
    from zo2ext.model.chunked_loss import chunk_loss
    from zo2ext.model.compile import compile_blocks
    from zo2ext.ops import Distribution, Rounding, direction_key
    from zo2ext.parallel.parallel import Parallel
    from zo2ext.runs.find_lr import RateCurve, find_lr

__all__ = [
    "PRESETS",
    "Distribution",
    "ExtensionError",
    "FileError",
    "Granularity",
    "HostRankError",
    "JournalError",
    "LateRead",
    "LaunchError",
    "OutOfDeviceMemory",
    "Parallel",
    "RankFailure",
    "RateCurve",
    "Rounding",
    "StepRecord",
    "Store",
    "UnsupportedModel",
    "UserError",
    "ZO2Error",
    "ZOConfig",
    "ZOEngine",
    "__version__",
    "chunk_loss",
    "compile_blocks",
    "direction_key",
    "find_lr",
    "load",
    "offload",
]

# Names by module, imported on first use: torch needs seconds, and so do accelerate and TRL, which
# trainers need.
_NAMES = {
    "config": ("PRESETS", "Granularity", "Store", "ZOConfig"),
    "engine.engine": ("ZOEngine",),
    "engine.load": ("load",),
    "engine.offload": ("offload",),
    "engine.update_rule": ("StepRecord",),
    "errors": (
        *("ExtensionError", "FileError", "HostRankError", "JournalError", "LateRead"),
        *("LaunchError", "OutOfDeviceMemory", "RankFailure", "UnsupportedModel", "UserError"),
        "ZO2Error",
    ),
    "integrations.arguments": ("ZOTrainingArguments",),
    "integrations.sft": ("ZOSFTConfig", "ZOSFTTrainer"),
    "integrations.trainer": ("ZOTrainer", "ZOTrainerMixin"),
    "model.chunked_loss": ("chunk_loss",),
    "model.compile": ("compile_blocks",),
    "_choices": ("Distribution", "Rounding"),
    "ops": ("direction_key",),
    "parallel.parallel": ("Parallel",),
    "runs.find_lr": ("RateCurve", "find_lr"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
_PUBLIC_MODULES = ("config", "errors", "ops")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_MODULES:
        return import_module(f"zo2ext.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"zo2ext.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_PUBLIC_MODULES})
