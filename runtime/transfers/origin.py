"""Dream's order `origin` (arXiv 2508.15487): every mask has the same chance, whatever the model says about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.runtime.options import option
from dllm_export.runtime.schedule import reveal_share
from dllm_export.runtime.transfers.ddpm import EPS, check_eps
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin(Transfer):
    """Commit every row with probability 1 - t_(i+1) / t_i; in the last step all. A step that commits none runs no pass."""

    eps: float = option(1e-3, EPS)
    name: ClassVar[str] = "origin"
    keeps_schedule: ClassVar[bool] = True
    reveals: ClassVar[bool] = True
    idles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_eps(self.eps)

    @property
    def draws(self) -> bool:
        """Always."""
        return True

    def quotas(self, begun: NDArray[np.int64], masked: NDArray[np.int64], step: int, steps: int) -> NDArray[np.int64]:
        """Nothing is due before the last step."""
        return masked if step == steps else np.zeros_like(masked)

    def reveal(self, draw: NDArray[np.float64], step: int, steps: int) -> NDArray[np.int64]:
        """The candidates that a step commits: those whose number [n], from 0 to 1, lies below the chance of all."""
        return np.flatnonzero(draw < (1.0 if step == steps else reveal_share(step, steps, self.eps)))

    def choose(self, state: TransferState) -> Choice:
        assert state.draw is not None, "promised to a rule that draws"
        return Choice(self.reveal(state.draw, state.block_step, state.steps))
