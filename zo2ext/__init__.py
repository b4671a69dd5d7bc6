"""zo2ext: zeroth-order fine-tuning of language models that do not fit the GPU.

with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6)) as zo:
    for batch in batches:
        loss = zo.step(lambda: model(**batch).loss)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zo2ext.chunked_loss import chunk_loss
from zo2ext.config import Granularity, Store, ZOConfig
from zo2ext.coordination import RankFailure
from zo2ext.distributed import Parallel
from zo2ext.engine import StepRecord, ZOEngine, offload
from zo2ext.load import load
from zo2ext.memory import OutOfDeviceMemory
from zo2ext.ops import Distribution, Rounding, direction_key

if TYPE_CHECKING:
    from zo2ext.sft import ZOSFTConfig as ZOSFTConfig
    from zo2ext.sft import ZOSFTTrainer as ZOSFTTrainer
    from zo2ext.trainer import ZOTrainer as ZOTrainer
    from zo2ext.trainer import ZOTrainerMixin as ZOTrainerMixin
    from zo2ext.trainer_arguments import ZOTrainingArguments as ZOTrainingArguments

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
    "direction_key",
    "load",
    "offload",
]

_LATER = {  # imported when first asked for: they need accelerate, or TRL, and take seconds
    "ZOSFTConfig": "zo2ext.sft",
    "ZOSFTTrainer": "zo2ext.sft",
    "ZOTrainer": "zo2ext.trainer",
    "ZOTrainerMixin": "zo2ext.trainer",
    "ZOTrainingArguments": "zo2ext.trainer_arguments",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
