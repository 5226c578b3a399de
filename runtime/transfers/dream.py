"""Dream's loop (arXiv 2508.15487): a share of all masks that follows a falling time, the best-ranked or drawn by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.schedule import reveal_share
from dllm_export.runtime.transfers.ddpm import EPS, check_eps
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class Dream(Transfer):
    """Commit floor(m (1 - t_(i+1) / t_i)) rows, m the mean number of masks in a sequence of the batch; in the last step all.

    A step whose number is 0 runs no pass. Ranked are the distributions that tokens are drawn from: after temperature, top-p
    and top-k. With `alg_temp` rows are drawn without replacement from softmax(ranking / alg_temp).
    """

    eps: float = option(1e-3, EPS)
    alg_temp: float = option(
        0.0, "above 0: draw the rows by their ranking at this temperature; 0 takes the best-ranked"
    )
    name: ClassVar[str] = "dream"
    keeps_schedule: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    tempered: ClassVar[bool] = True
    idles: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if not 0.0 <= self.alg_temp < float("inf"):
            raise UsageError(f"--alg-temp is {self.alg_temp}, expected a number from 0 up")

    @property
    def draws(self) -> bool:
        """Whether rows are drawn."""
        return self.alg_temp > 0

    def quotas(self, begun: NDArray[np.int64], masked: NDArray[np.int64], step: int, steps: int) -> NDArray[np.int64]:
        """The same number for all sequences of a batch, but no more than a sequence has."""
        if step == steps:
            return masked
        share = reveal_share(step, steps, self.eps)
        return np.minimum(masked, int(np.float32(masked.mean()) * share))

    def choose(self, state: TransferState) -> Choice:
        ranking = state.ranking
        if self.draws:
            assert state.draw is not None, "promised to a rule that draws"
            # The largest n of ranking / T + Gumbel noise are a draw of n without replacement from the softmax.
            noise = -np.log(-np.log(np.maximum(state.draw, np.finfo(np.float64).tiny)))
            ranking = ranking / self.alg_temp + noise
        return Choice(best_first(ranking)[: state.quota])
