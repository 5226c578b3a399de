"""dKV-Cache-Greedy (arXiv 2505.15781): the rows of this decision, those of the last one, and a few beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.policies.policy import BUCKET, REFRESH_INTERVAL, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class DkvGreedy:
    """Few rows a step, because it is known beforehand which rows the step decides: an order drawn at random.

    Recomputed are these rows, those that the last step decided, and the masked rows nearest to the former.
    """

    refresh_interval: int = option(2, REFRESH_INTERVAL)
    nearest: int = option(6, "w: masked rows recomputed beside those that the step decides, the nearest of them")
    bucket: int = option(8, BUCKET)
    name: ClassVar[str] = "dkv-greedy"
    needs_upcoming: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_at_least(self, 0, "refresh_interval", "nearest")
        require_at_least(self, 1, "bucket")

    def plan(self, state: StepState) -> StepPlan:
        if state.is_refresh(self.refresh_interval):
            return StepPlan.refresh(state, keep_delta=False)
        upcoming = state.upcoming
        assert upcoming is not None, "promised to a policy that needs it"
        chosen = upcoming | state.predicting(upcoming) | (state.masked_before & ~state.masked)
        for row, decides, masked in zip(chosen, upcoming, state.masked, strict=True):
            row[find_nearest(decides, masked & ~decides, self.nearest)] = True
        return StepPlan.recompute(state, Rows.padded(chosen, state.prompt_rows, self.bucket))


def find_nearest(anchors: NDArray[np.bool_], among: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Places of the `count` true elements of `among` [R] nearest to an anchor, the left one of two as near; without
    anchors none."""
    places, marks = np.flatnonzero(among), np.flatnonzero(anchors)
    if not len(marks):
        return marks
    distance = np.abs(places[:, None] - marks[None, :]).min(1)
    return places[np.argsort(distance, kind="stable")[:count]]
