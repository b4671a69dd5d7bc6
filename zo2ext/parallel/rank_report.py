"""A rank's report of a step to rank 0, and its bytes; see docs/contracts.md, "Ranks"."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from zo2ext.parallel.mesh import RankLosses

# Step, checksum, random state, lr, micro-batches, forward passes, kind.
_HEAD = struct.Struct("<QIIdHHB")
_SUMMED, _WEIGHTED, _TOTAL = range(3)  # kinds


@dataclass(frozen=True)
class Report:
    """The report of one rank.

    Attributes:
        step: Number of the step.
        checksum: Checksum of the rank's last record.
        random_state: Random state that the step drew from; see `RandomState.used_since`.
        lr: The step's learning rate, on this rank.
        losses: Losses that the rank computed.
    """

    step: int
    checksum: int
    random_state: int
    lr: float
    losses: RankLosses

    def encode(self) -> bytes:
        rows, weights = self.losses.values, self.losses.weights
        values = [*(loss for row in rows for loss in row), *(weights or ())]
        width = len(rows[0]) if rows else 0
        kind = _WEIGHTED if weights is not None else _TOTAL if self.losses.total else _SUMMED
        head = (self.step, self.checksum, self.random_state, self.lr)
        return _HEAD.pack(*head, len(rows), width, kind) + struct.pack(f"<{len(values)}d", *values)

    @classmethod
    def decode(cls, data: bytes) -> Report:
        step, checksum, random_state, lr, count, width, kind = _HEAD.unpack_from(data)
        weighted = kind == _WEIGHTED
        values = struct.unpack_from(f"<{count * (width + weighted)}d", data, _HEAD.size)
        rows = tuple(values[i * width : (i + 1) * width] for i in range(count))
        weights = tuple(values[count * width :]) if weighted else None
        return cls(step, checksum, random_state, lr, RankLosses(rows, weights, kind == _TOTAL))
