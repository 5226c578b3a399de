"""SlowFast (arXiv 2506.10848): explore until it is clear how far the model is sure, then decode that span quickly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True)
class Cycle:
    """Where a sequence is between two spans: it explores from `start` while `end` is None, then decodes up to `end`."""

    start: int
    estimates: tuple[int, ...] = ()
    """Where the span would end, by the exploring steps so far."""
    end: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowFast(Transfer):
    """In every step commit the rows with c >= threshold if they are two or more, else the surest; while decoding, of the span.

    A step that explores estimates the span's end behind the farthest row with c >= span_confidence, or one row on. Two
    estimates in a row with a standard deviation below 1 end the exploration, and so do `explore_steps`. When the span has no
    mask left, the next exploration begins behind it.
    """

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    span_confidence: float = option(0.3, "least confidence of a row that the span reaches to")
    explore_steps: int = option(6, "most steps of an exploration")
    name: ClassVar[str] = "slow-fast"

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")
        if not 0.0 <= self.span_confidence <= 1.0:
            raise UsageError(f"--span-confidence is {self.span_confidence}, expected a probability from 0 to 1")
        if self.explore_steps < 1:
            raise UsageError(f"--explore-steps is {self.explore_steps}, expected at least 1")

    def choose(self, state: TransferState) -> Choice:
        cycle = Cycle(state.block[0]) if state.block_step == 1 else state.memory
        if cycle.end is not None and not (state.rows < cycle.end).any():
            cycle = Cycle(cycle.end)
        if cycle.end is None:
            cycle, reach = self._explore(cycle, state), state.block[1]
        else:
            reach = cycle.end
        order = best_first(np.where(state.rows < reach, state.confidence, -1.0))
        sure = int(np.count_nonzero((state.confidence >= self.threshold) & (state.rows < reach)))
        return Choice(order[: sure if sure > 1 else 1], memory=cycle)

    def _explore(self, cycle: Cycle, state: TransferState) -> Cycle:
        """The cycle after this step's estimate."""
        likely = state.rows[state.confidence >= self.span_confidence]
        estimate = int(likely[-1] if len(likely) else cycle.start) + 1
        estimates = (*cycle.estimates, estimate)
        stable = len(estimates) > 1 and np.std(estimates[-2:]) < 1.0
        return Cycle(cycle.start, estimates, estimate if stable or len(estimates) == self.explore_steps else None)
