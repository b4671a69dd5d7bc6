"""Predictions for several GPUs from a plan for one.

A rank is a process with its own GPU. Perturbation parallelism distributes the forward passes of one
batch over ranks, data parallelism gives each rank a batch. Both exchange losses only, some hundred
bytes per step. With sliced uploads the ranks of a host share one copy of the weights: each uploads
its slice of a unit, and they gather the rest from each other.

Source: DistZO2, arXiv:2507.03211.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zo2ext._format import aligned, gib, seconds_text, three
from zo2ext.planning.plan import Plan


@dataclass(frozen=True)
class RankPlan:
    """Predicted step of several ranks, in bytes and seconds."""

    perturb: int  # ranks that share the forward passes of a batch
    data: int  # groups of ranks with a batch of their own
    sliced: bool  # ranks share one host copy, upload slices and gather them
    uploaded: float  # by one rank, per step
    offloaded: float  # by one rank, per step
    gathered: float  # received by one rank from others, per step
    floor_seconds: float  # lower bound of the time of a step
    tokens: int  # of all ranks, per step
    host: int  # stored weights of all ranks of the host together

    @property
    def ranks(self) -> int:
        return self.perturb * self.data

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.floor_seconds


def plan_rank(plan: Plan, *, perturb: int, data: int, link: float | None) -> RankPlan:
    """Predict one arrangement of ``perturb * data`` ranks.

    Args:
        plan: Plan for one GPU.
        perturb: Ranks that share a batch; a divisor of the forward passes of a step.
        data: Groups of ranks with a batch of their own.
        link: Bytes per second between GPUs, each way. None: ranks do not slice uploads.
    """
    ranks = perturb * data
    slices = ranks if link is not None else 1
    step = plan.step
    uploaded, offloaded = step.uploaded / slices, step.offloaded / slices
    gathered = step.uploaded * (slices - 1) / slices
    floor = max(
        step.transfers / slices,
        gathered / link if link is not None else 0.0,
        step.forward / perturb + step.weights,
    )
    host = plan.host * (1 if link is not None else ranks)
    tokens = plan.tokens * data
    sliced = link is not None and ranks > 1
    return RankPlan(perturb, data, sliced, uploaded, offloaded, gathered, floor, tokens, host)


def rank_plans(plan: Plan, *, most: int, link: float | None) -> Iterator[RankPlan]:
    """Yield every arrangement of 1, 2, 4, ... up to `most` ranks, with and without slices."""
    forwards = plan.config.forwards
    ranks = 1
    while ranks <= most:
        for perturb in range(1, min(ranks, forwards) + 1):
            if ranks % perturb == forwards % perturb == 0:
                for way in (None, link) if link is not None and ranks > 1 else (None,):
                    yield plan_rank(plan, perturb=perturb, data=ranks // perturb, link=way)
        ranks *= 2


def rank_table(plans: list[RankPlan]) -> str:
    """Return the plans as text, one per line; speeds are relative to the first."""
    one = plans[0].tokens_per_second
    headings = ("ranks", "perturb x data", "uploads", "up per rank", "gathered", "host")
    rows: list[tuple[str, ...]] = [(*headings, "floor", "at most", "x one GPU")]
    rows += [
        (
            str(p.ranks),
            f"{p.perturb} x {p.data}",
            "sliced" if p.sliced else "all",
            *(gib(round(nbytes)) for nbytes in (p.uploaded, p.gathered, p.host)),
            seconds_text(p.floor_seconds),
            f"{three(p.tokens_per_second)} tok/s",
            f"{p.tokens_per_second / one:.2f}",
        )
        for p in plans
    ]
    return aligned(rows)


def assumptions(link: float | None) -> str:
    """Return the assumptions behind the predictions as text; `link` is as for `plan_rank`."""
    rate = "nothing" if link is None else f"{link / 1e9:g} GB/s"
    return f"""\
- ranks are GPUs of one host with the rates above
- every GPU has its own link to host memory, which serves all of them at full rate
- the link between GPUs carries {rate} each way for each; it was not measured: --link
- transfers, gathers and computation overlap completely: each time is a lower bound
- losses cost no time: some hundred bytes per step"""
