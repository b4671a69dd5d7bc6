"""TRL's SFTTrainer with zeroth-order steps; needs ``pip install zo2ext[trl]``.

trainer = ZOSFTTrainer(model=model, args=ZOSFTConfig("out"), train_dataset=texts)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from zo2ext.integrations.arguments import ZOArguments
from zo2ext.integrations.trainer import ZOTrainerMixin


@dataclass
class ZOSFTConfig(ZOArguments, SFTConfig):  # type: ignore[misc]
    """``SFTConfig`` for `ZOSFTTrainer`."""


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with zeroth-order steps. Its ``args`` are a `ZOSFTConfig`."""

    _total_train_tokens: int

    def _set_mode(self, model: nn.Module) -> None:
        super()._set_mode(model)
        model.training = True  # of the root module only: SFTTrainer reads it to log under train

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # compute_loss adds its tokens at each call, and is called twice per direction.
        before = self._total_train_tokens
        loss: Tensor = super().training_step(*args, **kwargs)
        added = self._total_train_tokens - before
        if added:
            self._total_train_tokens = before + added // (2 * self.args.directions)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss
