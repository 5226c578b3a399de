"""SEDD's samplers (arXiv 2310.16834): a model's ratios say how likely a mask is revealed, or any token moves, and as what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.graphs import HeadGraph
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.ddpm import EPS, check_eps
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState

Predictor = Literal["euler", "analytic"]
NOISE_EPS = 1e-3
"""What the log-linear schedule leaves unmasked at time 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sedd(Transfer):
    """Reveal every mask with probability min(1, a sum of its ratios), its token drawn from the ratios; at the end all.

    Both samplers draw one state of weights a * ratio(y) for tokens y and 1 - a * sum for the mask: `a` is step size times
    noise rate (euler), or e^(sigma(t) - sigma(t - step)) - 1 (analytic).
    """

    predictor: Predictor = option(
        "euler", "how far a step goes: along the rate, or by the exact posterior", choices=get_args(Predictor)
    )
    eps: float = option(1e-5, EPS)
    name: ClassVar[str] = "sedd"
    keeps_schedule: ClassVar[bool] = True
    sees_noise: ClassVar[bool] = True
    head: ClassVar[HeadGraph] = "head_drawn"

    def __post_init__(self) -> None:
        check_eps(self.eps)
        if self.predictor not in get_args(Predictor):
            raise UsageError(f"--predictor is {self.predictor!r}, expected one of: {', '.join(get_args(Predictor))}")

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

    def noise_level(self, step: int, steps: int) -> float:
        """sigma(t) of the log-linear schedule."""
        return noise(self._time(step, steps))

    def choose(self, state: TransferState) -> Choice:
        assert state.draw is not None
        assert state.logsumexp is not None
        step, steps = state.block_step, state.steps
        if step > steps:
            return Choice(np.arange(len(state.rows)))
        # The model's ratios are scaled by e^sigma - 1, the other states' number is in its logits.
        log_sum = state.logsumexp - math.log(math.expm1(self.noise_level(step, steps)))
        return Choice(np.flatnonzero(state.draw < np.exp(self._log_reach(step, steps) + log_sum)))

    def _time(self, step: int, steps: int) -> float:
        return 1.0 - (step - 1) * (1.0 - self.eps) / steps

    def _log_reach(self, step: int, steps: int) -> float:
        """log a."""
        if self.predictor == "analytic":
            return math.log(math.expm1(self._fall(step, steps)))
        return math.log(self._reach(step, steps))

    def _reach(self, step: int, steps: int) -> float:
        """Size of a step times the noise rate at its start."""
        now = self._time(step, steps)
        return (now - self._time(step + 1, steps)) * (1.0 - NOISE_EPS) / (1.0 - (1.0 - NOISE_EPS) * now)

    def _fall(self, step: int, steps: int) -> float:
        """Noise that a step takes away; the step after the last takes all."""
        now = self.noise_level(step, steps)
        return now if step > steps else now - self.noise_level(step + 1, steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeddUniform(Sedd):
    """The same samplers where noise turns a token into any of the n tokens: all rows move in every step, the step after the
    last takes the rest of the noise away, and decides all.

    Euler: a row moves to y with probability k s(y) / n, k the step size times the noise rate. Analytic, with D the noise that
    a step takes away and q = 1 - e^-D: the weight of y is (s(y) - q sum(s) / n) times q / n, for the present token times
    e^-D + q / n (Tweedie's formula over the uniform graph). Weights below 0 count as nothing, as they never win the published
    draw.
    """

    name: ClassVar[str] = "sedd-uniform"
    head: ClassVar[HeadGraph] = "head_moved"
    moves: ClassVar[bool] = True

    @property
    def draws(self) -> bool:
        """No row waits for a number of its own: whether it moves is drawn with where it moves to."""
        return False

    def choose(self, state: TransferState) -> Choice:
        return Choice(np.arange(len(state.rows) if state.block_step > state.steps else 0))

    def move_weights(self, step: int, steps: int, states: int) -> tuple[float, float, float, float]:
        if self.predictor == "euler" and step <= steps:
            reach = self._reach(step, steps) / states
            return reach, 0.0, 1.0 + reach, reach
        lost = -math.expm1(-self._fall(step, steps)) / states
        stays = 1.0 - lost * (states - 1)
        return lost, lost * lost, stays, stays * lost


def noise(time: float) -> float:
    """Total noise of the log-linear schedule at a time."""
    return -math.log1p(-(1.0 - NOISE_EPS) * time)
