"""MDLM's sampler (arXiv 2406.07524): time falls from 1, and every mask is revealed with the chance that the time gives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.graphs import HeadGraph
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState

EPS = "the time at the last step, which falls there from 1; above 0 and below 1"


def check_eps(eps: float) -> None:
    """Refuse a last time that the schedule cannot end at."""
    if not 0.0 < eps < 1.0:
        raise UsageError(f"--eps is {eps}, expected a number above 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ddpm(Transfer):
    """Commit every row with probability (t_i - t_(i+1)) / t_i, its token drawn from the whole vocabulary; at the end take the
    likeliest token of what is left, in one step more.

    Both of MDLM's move chances, t and (1 - 1e-3) t, give this probability: what it drew from jointly is drawn here in turn.
    """

    eps: float = option(1e-5, EPS)
    name: ClassVar[str] = "ddpm"
    keeps_schedule: ClassVar[bool] = True
    reveals: ClassVar[bool] = True
    head: ClassVar[HeadGraph] = "head_drawn"

    def __post_init__(self) -> None:
        check_eps(self.eps)

    @property
    def draws(self) -> bool:
        """Always."""
        return True

    @property
    def extra_steps(self) -> int:
        """The one after the last."""
        return 1

    def quotas(self, begun: NDArray[np.int64], masked: NDArray[np.int64], step: int, steps: int) -> NDArray[np.int64]:
        """Nothing is due before the step after the last."""
        return masked if step > steps else np.zeros_like(masked)

    def reveal(self, draw: NDArray[np.float64], step: int, steps: int) -> NDArray[np.int64]:
        """The candidates that a step commits: those whose number [n], from 0 to 1, lies below the chance of all."""
        fall = (1.0 - self.eps) / steps
        chance = 1.0 if step > steps else fall / (1.0 - (step - 1) * fall)
        return np.flatnonzero(draw < chance)

    def is_greedy(self, step: int, steps: int) -> bool:
        return step > steps

    def choose(self, state: TransferState) -> Choice:
        assert state.draw is not None, "promised to a rule that draws"
        return Choice(self.reveal(state.draw, state.block_step, state.steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class DdpmCache(Ddpm):
    """As `ddpm`, with the same random numbers, but a step that reveals nothing runs no pass: the next one would find the
    canvas unchanged."""

    name: ClassVar[str] = "ddpm-cache"
    idles: ClassVar[bool] = True
