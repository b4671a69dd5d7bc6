"""zo2ext: zeroth-order fine-tuning of language models that do not fit the GPU.

with zo2ext.offload(model, zo2ext.ZOConfig(lr=1e-6)) as zo:
    for batch in batches:
        loss = zo.step(lambda: model(**batch).loss)
"""

from zo2ext.config import Granularity, ZOConfig
from zo2ext.engine import StepRecord, ZOEngine, offload
from zo2ext.memory import OutOfDeviceMemory
from zo2ext.ops import Distribution, Rounding, direction_key

__version__ = "0.1.0"

__all__ = [
    "Distribution",
    "Granularity",
    "OutOfDeviceMemory",
    "Rounding",
    "StepRecord",
    "ZOConfig",
    "ZOEngine",
    "__version__",
    "direction_key",
    "offload",
]
