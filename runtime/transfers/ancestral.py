"""Plaid's sampler (arXiv 2305.18619): vectors lose their noise step by step, and become tokens at the end (VDM, 2107.00630)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestral(Transfer):
    """Every row of every step drawn from its distribution given the estimate of the clean vectors; all tokens at the end.

    Times fall evenly from 1 to 0 in the steps, and a step goes back by 1 / steps, as published: the two differ a little.
    """

    score_temperature: float = option(
        0.9, "what the estimated noise is divided by: below 1 the estimate of the clean vectors is overshot"
    )
    name: ClassVar[str] = "ancestral"
    keeps_schedule: ClassVar[bool] = True
    continuous: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.score_temperature < math.inf:
            raise UsageError(f"--score-temperature is {self.score_temperature}, expected a number above 0")

    @property
    def extra_steps(self) -> int:
        """The one after the last."""
        return 1

    def choose(self, state: TransferState) -> Choice:
        """All rows: it is asked at the end alone."""
        return Choice(np.arange(len(state.rows)))

    def time(self, step: int, steps: int) -> float:
        """The time of a step, 1 in the first and 0 in the last; the step after the last looks again at the last's."""
        return 1.0 - (min(step, steps) - 1) / (steps - 1)

    def sharpen(
        self, latent: NDArray[np.float64], estimate: NDArray[np.float64], gamma: float
    ) -> NDArray[np.float64]:  # two of [B, T, w] -> [B, T, w]
        """The estimate of the clean vectors whose noise is 1 / score_temperature times the noise of the model's estimate."""
        alpha, sigma = scales(gamma)
        noise = (latent - alpha * estimate) / sigma / self.score_temperature
        sharpened: NDArray[np.float64] = (latent - sigma * noise) / alpha
        return sharpened


def draw_before(
    latent: NDArray[np.float64],
    clean: NDArray[np.float64],
    gamma: float,
    before: float,
    noise: NDArray[np.float64],
) -> NDArray[np.float64]:  # three of [B, T, w] -> [B, T, w]
    """Vectors at the lower noise level `before`, given those at `gamma` and the clean ones; `noise` is standard normal.

    The mean is (1 - c) alpha_s / alpha_t latent + c alpha_s clean, the variance c sigma_s^2, c = 1 - e^(gamma_s - gamma_t).
    """
    (alpha_t, _), (alpha_s, sigma_s) = scales(gamma), scales(before)
    reach = -math.expm1(before - gamma)
    drawn: NDArray[np.float64] = (
        (1.0 - reach) * alpha_s / alpha_t * latent + reach * alpha_s * clean + math.sqrt(reach) * sigma_s * noise
    )
    return drawn


def scales(gamma: float) -> tuple[float, float]:
    """(alpha, sigma) of a noise level: shares of the clean vectors and of noise, whose squares add up to 1."""
    return (1.0 + math.exp(gamma)) ** -0.5, (1.0 + math.exp(-gamma)) ** -0.5
