"""Decide what loading a unit involves, before any of it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from zo2ext.model.layout import UnitLayout
from zo2ext.streaming.pending import NOTHING_MISSING, MissingUpdates, PendingUpdates


class Perturbation(NamedTuple):
    """Weights that one forward pass reads: ``weights + eps * z``.

    Attributes:
        key: Key of the direction z.
        eps: Perturbation scale, of either sign.
        direction: Index of the direction within the step.
    """

    key: int
    eps: float
    direction: int = 0


@dataclass(frozen=True)
class Visit:
    """All that loading a unit involves.

    Attributes:
        overdue: Write-back step that the unit missed and has to be rounded for before anything
            else; None if there is none.
        low: Whether the unit's low planes are needed.
        missing: Updates that the kernel applies.
        write_back: Whether the updated weights are rounded and replace the stored ones.
        copies: Whether copies of the weights are made, in the compute dtype; if not, the forward
            pass reads the weights in the slab.
        one_at_a_time: Whether there is room for one copy only, which each pass overwrites.
        holds_slot: Whether the slab is still needed once the copies are made.
    """

    overdue: int | None
    low: bool
    missing: MissingUpdates
    write_back: bool
    copies: bool
    one_at_a_time: bool
    holds_slot: bool


def decide(
    layout: UnitLayout,
    perturbations: Sequence[Perturbation],
    pending: PendingUpdates,
    version: int,
    room: int,
) -> Visit:
    """Decide what to do to load a unit.

    Args:
        layout: Layout of the unit.
        perturbations: One per copy; none to load the weights as they are.
        pending: Updates that units may be missing.
        version: Write-back step at which the unit was stored.
        room: Number of copies that a compute buffer has room for.
    """
    due = pending.is_write_back(pending.step)
    # Between write-back steps, training reads top planes only: docs/contracts.md, "Split".
    low = not layout.low_nbytes or not perturbations or due
    # Those have to be the top planes of the weights as rounded at the last write-back step. What
    # factors add to are the weights of that step, too.
    overdue = None if low and (due or not layout.factored) else pending.last_write_back()
    if overdue is not None and version >= overdue:
        overdue = None
    if not layout.parts:
        overdue, missing = None, NOTHING_MISSING
    else:
        missing = pending.missing(version if overdue is None else overdue)
    # A unit without missing updates was rounded before.
    write_back = due and missing.updates is not None
    # The stored weights are what the forward pass needs if they are current and of its dtype.
    as_stored = not layout.packed and (missing.updates is None or write_back)
    copies = bool(layout.parts) and bool(perturbations or not as_stored)
    one_at_a_time = copies and room < len(perturbations)
    # Frozen weights and what factors add to are read from the slab; later copies are made from it.
    holds_slot = not copies or bool(layout.frozen) or one_at_a_time or layout.factored
    return Visit(overdue, low, missing, write_back, copies, one_at_a_time, holds_slot)
