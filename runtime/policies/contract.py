"""A plan against the state that it was made for: what a policy, perhaps somebody else's, must keep to."""

from __future__ import annotations

import numpy as np

from dllm_export.errors import StrategyError
from dllm_export.runtime.policies.policy import CachePolicy, Rows, StepPlan, StepState


def make_plan(policy: CachePolicy, state: StepState) -> StepPlan:
    """The policy's plan for this state, checked; StrategyError names the policy that failed and how."""
    try:
        plan = policy.plan(state)
    except Exception as error:
        raise StrategyError(
            f"the cache policy '{policy.name}' failed in step {state.step} with {type(error).__name__}: {error}; "
            f"use another --policy, or report it to the policy's author"
        ) from error
    fault = find_fault(plan, state)
    if fault:
        raise StrategyError(f"the cache policy '{policy.name}' gave a wrong plan for step {state.step}: {fault}")
    return plan


def find_fault(plan: StepPlan, state: StepState) -> str | None:
    """What is wrong with a plan, or None."""
    if len(plan.layers) != state.layers:
        return f"it has {len(plan.layers)} layers, expected {state.layers}"
    if (plan.rows is not None) != (plan.alive == "rows"):
        return f"its alive rows are '{plan.alive}', and rows are {'given' if plan.rows else 'missing'}"
    for what, rows in (("rows", plan.rows), ("forced rows", plan.forced)):
        fault = None if rows is None else _find_row_fault(what, rows, state)
        if fault:
            return fault
    if plan.rows is not None:
        return _find_reach_fault(plan, plan.rows, state)
    most = state.length if plan.alive == "sequence" else state.response_rows
    for number, layer in enumerate(plan.layers):
        if layer.graph == "layer_adaptive" and not 1 <= layer.budget <= most:
            return f"layer {number} may pick {layer.budget} rows, expected 1 to {most}"
        if layer.graph == "layer_full" and plan.alive != "sequence":
            return f"layer {number} runs layer_full, which needs all rows of the sequence alive"
        if layer.graph == "layer_skip" and plan.alive != "response":
            return f"layer {number} runs layer_skip, which needs the response alive: only its deltas are cached"
    return None


def _find_row_fault(what: str, rows: Rows, state: StepState) -> str | None:
    counts = {len(positions) for positions in rows.positions}
    if len(rows.positions) != state.batch:
        return f"its {what} are for {len(rows.positions)} sequences, expected {state.batch}"
    if len(counts) != 1 or counts == {0}:
        return f"its {what} number {sorted(counts)} in the sequences of the batch, expected equally many and at least 1"
    lowest, highest = min(map(min, rows.positions)), max(map(max, rows.positions))
    if lowest < 0 or highest >= state.length:
        return f"its {what} reach from {lowest} to {highest}, expected positions from 0 to {state.length - 1}"
    return None


def _find_reach_fault(plan: StepPlan, rows: Rows, state: StepState) -> str | None:
    """Alive rows that a provider cannot run, or that leave out a row which this step may decide."""
    for number, layer in enumerate(plan.layers):
        if layer.graph != "layer_partial":
            return f"layer {number} runs {layer.graph}, but chosen rows can only run layer_partial"
    candidates = state.masked.copy()
    candidates[:, state.block[1] - state.prompt_rows :] = False
    alive = np.zeros((state.batch, state.length), np.bool_)
    np.put_along_axis(alive, rows.array().astype(np.int64), True, axis=1)
    missing = np.argwhere(candidates & ~alive[:, state.prompt_rows :])
    if len(missing):
        sequence, row = missing[0]
        position = state.prompt_rows + row
        return f"position {position} of sequence {sequence} may be decided in this step, but is not among its rows"
    return None
