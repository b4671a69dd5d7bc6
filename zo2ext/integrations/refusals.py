"""Trainers and losses that forward passes alone cannot train with; each is refused by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from zo2ext.errors import UserError

_CONSTANT = ("GRPO", "RLOO")  # in the name of a Trainer whose loss has a constant value
_PATCHING = {"MatryoshkaLoss", "Matryoshka2dLoss", "AdaptiveLayerLoss"}  # sentence-transformers


def check_trainer(trainer: type, mixin: type) -> None:
    """Check that a Trainer's class can get zeroth-order steps from `mixin`.

    Raises:
        UserError: Its loss has a constant value, or the mixin would replace a step of its own.
    """
    others = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    for other in others:
        if any(word in other.__name__ for word in _CONSTANT):
            raise UserError(
                f"{other.__name__} cannot be used: the value of its loss is constant, and only its "
                "gradient depends on the rewards; minimize minus the reward itself, which needs no "
                "gradient: loss = zo.step(lambda: -reward(...))"
            )
    owner = next((o for o in others if "training_step" in vars(o)), None)
    if owner is None or owner.__module__ == "transformers.trainer":
        return
    step = vars(owner)["training_step"]
    if "maybe_activation_offload_context" not in step.__code__.co_names:  # TRL's does no more
        raise UserError(
            f"{owner.__name__} has a training_step of its own, which ZOTrainerMixin would replace; "
            "define it in the class that derives from both, where it can call super()"
        )


def check_loss(loss: Any, model: nn.Module) -> None:
    """Check that a loss that is a module has no part that would not be trained.

    Args:
        loss: The ``loss`` of sentence-transformers' trainer: a module, or several by name; others
            are not looked at.
        model: Model that is trained.

    Raises:
        UserError: It has parameters of its own, or changes the model while a forward pass runs.
    """
    ours = {id(parameter) for parameter in model.parameters()}
    for part in loss.values() if isinstance(loss, dict) else [loss]:
        if not isinstance(part, nn.Module):
            continue
        for module in part.modules():
            if type(module).__name__ in _PATCHING:
                raise UserError(
                    f"{type(module).__name__} cannot be used: it replaces the model's forward "
                    "while it runs, and the forward passes of a step run side by side"
                )
        own = [n for n, p in part.named_parameters() if p.requires_grad and id(p) not in ours]
        if own:
            raise UserError(
                f"{type(part).__name__} has parameters of its own ({', '.join(own[:3])}), which "
                "would not be trained; freeze them with requires_grad_(False), or make them a part "
                "of the model"
            )
