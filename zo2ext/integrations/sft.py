"""TRL's SFTTrainer with zeroth-order steps; needs ``pip install zo2ext[trl]``.

trainer = ZOSFTTrainer(model=model, args=ZOSFTConfig("out"), train_dataset=texts)
"""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from zo2ext.integrations.arguments import ZOArguments
from zo2ext.integrations.trainer import ZOTrainerMixin


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):  # type: ignore[misc]
    """``SFTConfig`` for `ZOSFTTrainer`."""


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with zeroth-order steps. Its ``args`` are a `ZOSFTConfig`."""

    arguments_class = ZOSFTConfig
