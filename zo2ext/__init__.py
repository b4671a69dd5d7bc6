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
    from zo2ext.config import Granularity, Store, ZOConfig
    from zo2ext.engine.engine import ZOEngine, offload
    from zo2ext.engine.load import load
    from zo2ext.engine.update_rule import StepRecord
    from zo2ext.errors import (
        ExtensionError,
        HostRankError,
        JournalError,
        LateRead,
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

__all__ = [
    "Distribution",
    "ExtensionError",
    "Granularity",
    "HostRankError",
    "JournalError",
    "LateRead",
    "OutOfDeviceMemory",
    "Parallel",
    "RankFailure",
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
    "load",
    "offload",
]

_ERRORS = (
    *("ExtensionError", "HostRankError", "JournalError", "LateRead", "OutOfDeviceMemory"),
    *("RankFailure", "UnsupportedModel", "UserError", "ZO2Error"),
)

# Where names are, which are imported when they are first asked for: torch takes seconds, and so do
# accelerate and TRL, which trainers need.
_MODULES = {
    **dict.fromkeys(_ERRORS, "errors"),
    "Distribution": "ops",
    "Granularity": "config",
    "Parallel": "parallel.parallel",
    "Rounding": "ops",
    "StepRecord": "engine.update_rule",
    "Store": "config",
    "ZOConfig": "config",
    "ZOEngine": "engine.engine",
    "ZOSFTConfig": "integrations.sft",
    "ZOSFTTrainer": "integrations.sft",
    "ZOTrainer": "integrations.trainer",
    "ZOTrainerMixin": "integrations.trainer",
    "ZOTrainingArguments": "integrations.arguments",
    "chunk_loss": "model.chunked_loss",
    "compile_blocks": "model.compile",
    "direction_key": "ops",
    "load": "engine.load",
    "offload": "engine.engine",
}
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
