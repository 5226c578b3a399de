"""Dynamic-dLLM's cache updates (arXiv 2606.26120): layers whose rows moved more in the last step recompute more rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import ClassVar, Literal, get_args

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.policies.policy import BUCKET, LayerPlan, Rows, StepPlan, StepState

Variant = Literal["published", "released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicDllm:
    """After a full step every layer recomputes a window around the newest token and its rows of largest drift.

    A layer of mean drift s(l) in the last step gets floor(k L s(l) / sum of s) rows beside the window; without a last
    drift, or where nothing drifted, k. Drift is that of the layer's input.
    """

    layer_budget: int = option(32, "k: rows that a layer recomputes beside the window, on average over the layers")
    window: int = option(32, "w: the w + 1 rows around the last decided position are always recomputed")
    bucket: int = option(8, BUCKET)
    variant: Variant = option(
        "published",
        "published: budgets follow the drift of layer inputs; released: equal budgets, drift of values, as its code does",
        choices=get_args(Variant),
    )
    prompt_interval: int = option(0, "Kp: steps between refreshes of everything; 0 computes the prompt once")
    first_layer_rule: bool = option(True, "recompute the first layer fully on every step, as the released code does")
    name: ClassVar[str] = "dynamic-dllm"

    def __post_init__(self) -> None:
        require_at_least(self, 1, "layer_budget", "bucket")
        require_at_least(self, 0, "window", "prompt_interval")
        if self.variant not in get_args(Variant):
            raise UsageError(f"--variant is {self.variant!r}, expected one of: {', '.join(get_args(Variant))}")

    def plan(self, state: StepState) -> StepPlan:
        published = self.variant == "published"
        reference: Literal["input"] | None = "input" if published else None
        due = self.prompt_interval > 0 and (state.step - 1) % self.prompt_interval == 0
        if state.step == 1 or due:
            return StepPlan.refresh(state, reference=reference)
        forced = self._window(state)
        counts = [min(forced.count + rows, state.response_rows) for rows in self._budgets(state)]
        if self.first_layer_rule:
            counts[0] = state.response_rows
        graph: Literal["layer_tracking", "layer_adaptive"] = "layer_tracking" if published else "layer_adaptive"
        return StepPlan(
            kind="partial",
            alive="response",
            layers=tuple(LayerPlan(graph, count) for count in counts),
            reference=reference,
            measure_drift=published,
            forced=forced,
        )

    def _window(self, state: StepState) -> Rows:
        """Around the rightmost position that the last step decided, moved inwards at the edges; at the left without one."""
        count, positions = min(self.window + 1, state.response_rows), []
        for decided in state.masked_before & ~state.masked:
            centre = int(np.flatnonzero(decided)[-1]) if decided.any() else 0
            start = min(max(centre - self.window // 2, 0), state.response_rows - count) + state.prompt_rows
            positions.append(tuple(range(start, start + count)))
        return Rows(tuple(positions))

    def _budgets(self, state: StepState) -> list[int]:
        """Rows of every layer beside the window, for the sequence that needs the most."""
        budgets = [0] * state.layers
        drifts = np.ones((1, state.layers)) if self.variant == "released" or state.drift is None else state.drift
        for drift in drifts:
            scores = drift if drift.any() else np.ones(state.layers)
            share = self.layer_budget * state.layers / float(scores.sum())
            budgets = [max(rows, floor(share * float(score))) for rows, score in zip(budgets, scores, strict=True)]
        return [-(-rows // self.bucket) * self.bucket for rows in budgets]
