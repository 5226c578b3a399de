"""BD3-LM's sampler (arXiv 2503.09573, section 4): a step is the moment at which the next mask falls, and any may be it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import HeadGraph
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstHitting(Transfer):
    """Commit one row, each with the same chance, its token drawn from the whole vocabulary.

    When a mask falls does not matter to a model that does not see the time, so that steps in which none does are left out
    (the first-hitting sampler of arXiv 2409.02908).
    """

    name: ClassVar[str] = "first-hitting"
    head: ClassVar[HeadGraph] = "head_drawn"
    reveals: ClassVar[bool] = True

    @property
    def draws(self) -> bool:
        """Always."""
        return True

    def reveal(self, draw: NDArray[np.float64], step: int, steps: int) -> NDArray[np.int64]:
        """The candidate with the largest number [n]."""
        return np.argsort(-draw, kind="stable")[:1]

    def choose(self, state: TransferState) -> Choice:
        assert state.draw is not None, "promised to a rule that draws"
        return Choice(self.reveal(state.draw, state.block_step, state.steps))
