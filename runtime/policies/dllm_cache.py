"""dLLM-Cache (arXiv 2506.06295) on the reduced state: post-RoPE keys, values and one delta per response row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dllm_export.errors import UsageError
from dllm_export.runtime.options import flag, option
from dllm_export.runtime.policies.policy import LayerPlan, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class DllmCache:
    """Refresh the prompt every Kp steps and the response every Kr; in between recompute the rows that drift most.

    The drift is one minus the cosine of a row's new and cached value vector, per sequence and layer (V-verify).
    """

    prompt_interval: int = option(25, "Kp: steps between refreshes of the prompt's features")
    response_interval: int = option(5, "Kr: steps between refreshes of all response rows")
    update_ratio: float = option(0.25, "share of response rows recomputed between refreshes, by value drift")
    first_layer_rule: bool = option(True, "recompute the first layer fully on every step, as the released code does")
    name: ClassVar[str] = "dllm-cache"
    foreseeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("prompt_interval", "response_interval"):
            if getattr(self, field) < 1:
                raise UsageError(
                    f"{flag(field)} is {getattr(self, field)}, expected at least 1 (1 refreshes every step)"
                )
        if not 0.0 <= self.update_ratio <= 1.0:
            raise UsageError(f"--update-ratio is {self.update_ratio}, expected a share from 0 to 1")

    def plan(self, state: StepState) -> StepPlan:
        prompt = (state.step - 1) % self.prompt_interval == 0 and state.prompt_rows > 0
        response = (state.step - 1) % self.response_interval == 0
        rows = int(state.response_rows * self.update_ratio)
        if state.step == 1 or (prompt and response):
            return StepPlan.refresh(state)
        if response:
            return StepPlan.refresh_response(state)
        if prompt:
            first, rest = LayerPlan("layer_full"), LayerPlan("layer_adaptive", state.prompt_rows + rows)
            return StepPlan(
                kind="refresh_prompt",
                alive="sequence",
                layers=self._stack(first, rest, state.layers),
                forced=Rows.span(0, state.prompt_rows, state.batch),
                write_response_values=self.update_ratio > 0,
            )
        # With no row to pick a layer only adds its cached delta. Values written on such a step would be written again
        # before anyone reads them, so skipping them is exact.
        rest = LayerPlan("layer_adaptive", rows) if rows else LayerPlan("layer_skip")
        return StepPlan(
            kind="partial", alive="response", layers=self._stack(LayerPlan("layer_partial"), rest, state.layers)
        )

    def _stack(self, first: LayerPlan, rest: LayerPlan, layers: int) -> tuple[LayerPlan, ...]:
        return ((first if self.first_layer_rule else rest), *(rest,) * (layers - 1))
