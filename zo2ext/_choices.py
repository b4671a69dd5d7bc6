"""Enumerations that settings and kernels share, importable without torch."""

from __future__ import annotations

from enum import StrEnum


class Distribution(StrEnum):
    """Distribution of the direction z.

    Attributes:
        GAUSSIAN: Standard normal, ``|z| <= 5.77``.
        RADEMACHER: +1 or -1, one random bit per element.
    """

    GAUSSIAN = "gaussian"
    RADEMACHER = "rademacher"


class Domain(StrEnum):
    """Domain of random words. Words of one key are independent between domains.

    Attributes:
        DIRECTION: Words of a dense direction z.
        LEFT: Words of the left factor U of a direction U V^T.
        RIGHT: Words of the right factor V.
    """

    DIRECTION = "direction"
    LEFT = "left"
    RIGHT = "right"


class Estimator(StrEnum):
    """Estimator of the slopes of the loss along a step's directions.

    Attributes:
        TWO_SIDED: Two forward passes per direction, at +eps and at -eps, as in MeZO.
        CENTERED: One forward pass per direction, at +eps; slopes are relative to the mean of all.
    """

    TWO_SIDED = "two_sided"
    CENTERED = "centered"

    @property
    def sides(self) -> int:
        """Number of forward passes per direction."""
        return 2 if self is Estimator.TWO_SIDED else 1


class Rounding(StrEnum):
    """Rounding of float32 to a storage dtype. float32 storage is never rounded.

    Attributes:
        NEAREST: To the nearest value, ties to even.
        STOCHASTIC: Up or down, with probabilities in proportion to the distances, so that updates
            smaller than the spacing survive on average.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
