"""zo2ext: zeroth-order fine-tuning of language models that do not fit the GPU.

with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6)) as zo:
    for batch in batches:
        loss = zo.step(lambda: model(**batch).loss)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo2ext import ops as ops
    from zo2ext.chunked_loss import chunk_loss
    from zo2ext.compiled import compile_blocks
    from zo2ext.config import Granularity, Store, ZOConfig
    from zo2ext.coordination import RankFailure
    from zo2ext.distributed import Parallel
    from zo2ext.engine import ZOEngine, offload
    from zo2ext.loading import load
    from zo2ext.memory import OutOfDeviceMemory
    from zo2ext.ops import Distribution, Rounding, direction_key
    from zo2ext.sft import ZOSFTConfig as ZOSFTConfig
    from zo2ext.sft import ZOSFTTrainer as ZOSFTTrainer
    from zo2ext.trainer import ZOTrainer as ZOTrainer
    from zo2ext.trainer import ZOTrainerMixin as ZOTrainerMixin
    from zo2ext.trainer_arguments import ZOTrainingArguments as ZOTrainingArguments
    from zo2ext.update_rule import StepRecord

__version__ = "0.1.0"

__all__ = [
    "Distribution",
    "Granularity",
    "OutOfDeviceMemory",
    "Parallel",
    "RankFailure",
    "Rounding",
    "StepRecord",
    "Store",
    "ZOConfig",
    "ZOEngine",
    "__version__",
    "chunk_loss",
    "compile_blocks",
    "direction_key",
    "load",
    "offload",
]

# Where names are, which are imported when they are first asked for: torch takes seconds, and so do
# accelerate and TRL, which trainers need.
_MODULES = {
    "Distribution": "ops",
    "Granularity": "config",
    "OutOfDeviceMemory": "memory",
    "Parallel": "distributed",
    "RankFailure": "coordination",
    "Rounding": "ops",
    "StepRecord": "update_rule",
    "Store": "config",
    "ZOConfig": "config",
    "ZOEngine": "engine",
    "ZOSFTConfig": "sft",
    "ZOSFTTrainer": "sft",
    "ZOTrainer": "trainer",
    "ZOTrainerMixin": "trainer",
    "ZOTrainingArguments": "trainer_arguments",
    "chunk_loss": "chunked_loss",
    "compile_blocks": "compiled",
    "direction_key": "ops",
    "load": "loading",
    "offload": "engine",
}
_PUBLIC_MODULES = ("config", "ops")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC_MODULES:
        return import_module(f"zo2ext.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"zo2ext.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_PUBLIC_MODULES})
