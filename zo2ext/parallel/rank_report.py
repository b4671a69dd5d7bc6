"""What a rank reports of a step to rank 0, and as which bytes; docs/contracts.md, "Ranks"."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from zo2ext.parallel.mesh import RankLosses

# Step, checksum, random state, lr, micro-batches, forwards, kind.
_HEAD = struct.Struct("<QIIdHHB")
_SUMMED, _WEIGHTED, _TOTAL = range(3)  # kinds


@dataclass(frozen=True)
class Report:
    """Of one rank.

    Attributes:
        step: Its number.
        checksum: Of the rank's last record.
        random_state: What the step drew from; see `RandomState.used_since`.
        lr: The step's learning rate, as the rank has it.
        measured: Its losses.
    """

    step: int
    checksum: int
    random_state: int
    lr: float
    measured: RankLosses

    def encode(self) -> bytes:
        """As bytes."""
        losses, weights = self.measured.losses, self.measured.weights
        values = [*(loss for row in losses for loss in row), *(weights or ())]
        each = len(losses[0]) if losses else 0
        kind = _WEIGHTED if weights is not None else _TOTAL if self.measured.total else _SUMMED
        head = (self.step, self.checksum, self.random_state, self.lr)
        return _HEAD.pack(*head, len(losses), each, kind) + struct.pack(f"<{len(values)}d", *values)

    @classmethod
    def decode(cls, data: bytes) -> Report:
        """What `encode` made."""
        step, checksum, random_state, lr, count, each, kind = _HEAD.unpack_from(data)
        weighted = kind == _WEIGHTED
        values = struct.unpack_from(f"<{count * (each + weighted)}d", data, _HEAD.size)
        rows = tuple(values[i * each : (i + 1) * each] for i in range(count))
        weights = tuple(values[count * each :]) if weighted else None
        return cls(step, checksum, random_state, lr, RankLosses(rows, weights, kind == _TOTAL))
