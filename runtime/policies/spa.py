"""SPA-Cache (arXiv 2602.02544): rows are picked by a narrow indicator of their value, in numbers that follow the depth."""

from __future__ import annotations

from dataclasses import dataclass
from math import pow
from typing import ClassVar

from dllm_export.errors import UsageError
from dllm_export.runtime.options import flag, option, require_at_least
from dllm_export.runtime.policies.policy import LayerPlan, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaCache:
    """Everything every Kp steps, all response rows every Kr; between, floor(R rho(l / L)) rows of layer l.

    rho is a bell of two halves: `peak_ratio` at `peak_depth`, `start_ratio` at depth 0, `end_ratio` at depth 1; up to its
    peak at least `min_ratio`. The first layer is recomputed whole on every step. Defaults are those of LLaDA-8B-Instruct.
    """

    prompt_interval: int = option(50, "Kp: steps between refreshes of everything")
    response_interval: int = option(7, "Kr: steps between refreshes of all response rows")
    peak_depth: float = option(0.75, "mu: depth, from 0 to 1, at which most rows are recomputed")
    peak_ratio: float = option(0.25, "share of response rows recomputed there")
    start_ratio: float = option(0.03, "share at the first layer's end of the curve")
    end_ratio: float = option(0.13, "share at the last layer's end of the curve")
    min_ratio: float = option(1 / 32, "least share of the layers before the peak")
    name: ClassVar[str] = "spa"
    foreseeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_at_least(self, 1, "prompt_interval", "response_interval")
        for field in ("peak_depth", "min_ratio"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise UsageError(f"{flag(field)} is {getattr(self, field)}, expected a number from 0 to 1")
        if not 0.0 < self.peak_ratio <= 1.0:
            raise UsageError(f"--peak-ratio is {self.peak_ratio}, expected a share above 0 and up to 1")
        for field in ("start_ratio", "end_ratio"):
            if not 0.0 < getattr(self, field) <= self.peak_ratio:
                raise UsageError(
                    f"{flag(field)} is {getattr(self, field)}, expected a share above 0 and up to --peak-ratio, which is "
                    f"{self.peak_ratio}"
                )

    def plan(self, state: StepState) -> StepPlan:
        if (state.step - 1) % self.prompt_interval == 0:
            return StepPlan.refresh(state, reference="indicator")
        if (state.step - 1) % self.response_interval == 0:
            return StepPlan.refresh_response(state, reference="indicator")
        # A layer without rows to pick is skipped: what it would store, its next refresh stores before anyone reads it.
        picking = (
            LayerPlan("layer_indicated", rows) if rows else LayerPlan("layer_skip")
            for rows in self.budgets(state.layers, state.response_rows)[1:]
        )
        return StepPlan(kind="partial", alive="response", layers=(LayerPlan("layer_partial"), *picking))

    def budgets(self, layers: int, rows: int) -> tuple[int, ...]:
        """Rows that each layer recomputes; the first one's number stands for the curve only."""
        return tuple(int(rows * self.ratio(layer / layers)) for layer in range(layers))

    def ratio(self, depth: float) -> float:
        """rho at a depth from 0 to 1: each half of the bell runs through its end's ratio."""
        if depth < self.peak_depth:
            fall = self.start_ratio / self.peak_ratio
            return max(self.min_ratio, self.peak_ratio * pow(fall, (1 - depth / self.peak_depth) ** 2))
        if depth == self.peak_depth:
            return self.peak_ratio
        fall = self.end_ratio / self.peak_ratio
        return self.peak_ratio * pow(fall, ((depth - self.peak_depth) / (1 - self.peak_depth)) ** 2)
