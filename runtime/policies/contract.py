"""A plan against the state that it was made for: what a policy, perhaps somebody else's, must keep to."""

from __future__ import annotations

from typing import get_args

import numpy as np

from dllm_export.errors import StrategyError, UsageError
from dllm_export.runtime.policies.policy import (
    PICKING_GRAPHS,
    Alive,
    CachePolicy,
    Compaction,
    LayerGraph,
    Reference,
    Rows,
    StepPlan,
    StepState,
)

LAYER_GRAPHS, ALIVE, REFERENCES = get_args(LayerGraph), get_args(Alive), get_args(Reference)


def make_plan(policy: CachePolicy, state: StepState) -> StepPlan:
    """The policy's plan for this state, checked; StrategyError names the policy that failed and how.

    UsageError where the bundle has no indicator and the plan needs one.
    """
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
    indicated = plan.reference == "indicator" or any(layer.graph == "layer_indicated" for layer in plan.layers)
    if indicated and not state.indicator_rank:
        raise UsageError(
            f"--policy {policy.name} picks rows by an indicator, which this bundle was exported without: export again "
            f"with --indicator-rank 128"
        )
    return plan


def suits(policy: CachePolicy | type[CachePolicy], *, by_blocks: bool) -> bool:
    """Whether a policy counts on the attention that a model has: by blocks, or of all rows to all."""
    return getattr(policy, "attention", "any") in ("any", "blocks" if by_blocks else "full")


def find_fault(plan: object, state: StepState) -> str | None:
    """What is wrong with a plan, or None."""
    if not isinstance(plan, StepPlan):
        return f"it is a {type(plan).__name__}, expected a StepPlan"
    if len(plan.layers) != state.layers:
        return f"it has {len(plan.layers)} layers, expected {state.layers}"
    for number, layer in enumerate(plan.layers):
        if layer.graph not in LAYER_GRAPHS:
            return f"layer {number} runs {layer.graph!r}, expected one of: {', '.join(LAYER_GRAPHS)}"
    if plan.alive not in ALIVE:
        return f"its alive rows are {plan.alive!r}, expected one of: {', '.join(ALIVE)}"
    if (plan.rows is not None) != (plan.alive == "rows"):
        return f"its alive rows are '{plan.alive}', and rows are {'given' if plan.rows else 'missing'}"
    for what, rows in (("rows", plan.rows), ("forced rows", plan.forced)):
        fault = None if rows is None else _find_row_fault(what, rows, state)
        if fault:
            return fault
    fault = _find_prefix_fault(plan, state)
    if plan.compaction is not None:
        fault = fault or _find_compaction_fault(plan, plan.compaction, state)
    if fault:
        return fault
    if plan.rows is not None:
        return _find_reach_fault(plan, plan.rows, state)
    return _find_segment_fault(plan, state) or _find_reference_fault(plan)


def _find_compaction_fault(plan: StepPlan, compaction: Compaction, state: StepState) -> str | None:
    fault = _find_row_fault("rows to compact for", compaction.rows, state)
    if fault:
        return fault
    if any(list(row) != sorted(set(row)) for row in compaction.rows.positions):
        return "its rows to compact for are not each once and by rising position"
    padding, rows = np.array(state.padding), compaction.rows.array()
    most = state.length - padding - (rows >= padding[:, None]).sum(1)
    kept = np.array(compaction.kept)
    if kept.shape != most.shape or (kept < 0).any() or (kept > most).any():
        return f"it keeps {kept.tolist()} rows of the sequences, expected from 0 to {most.tolist()}"
    if plan.alive != "rows" and {layer.graph for layer in plan.layers} != {"layer_full"}:
        return "it compacts a cache, which takes layer_full in every layer"
    if plan.alive == "rows" and (plan.rows != compaction.rows or compaction != state.compacted):
        return "it runs against a compacted cache of other rows than its own, or one that was not made"
    return None


def _find_segment_fault(plan: StepPlan, state: StepState) -> str | None:
    """Layers that a provider cannot run on all rows of the sequence or of the response."""
    first = 0 if plan.alive == "sequence" else state.prompt_rows
    forced = None if plan.forced is None else plan.forced.mask(state.length)
    least, most = 1 if forced is None else max(1, int(forced.sum(1).max())), state.length - first
    spared = state.prompt_rows > first and (forced is None or not forced[:, first : state.prompt_rows].all())
    for number, layer in enumerate(plan.layers):
        if layer.graph in PICKING_GRAPHS and not least <= layer.budget <= most:
            return f"layer {number} may pick {layer.budget} rows, expected {least} (those that are forced) to {most}"
        if layer.graph in PICKING_GRAPHS and spared:
            return f"layer {number} may leave out prompt rows, which have no cached delta: force all of them"
        if layer.graph == "layer_full" and plan.alive != "sequence":
            return f"layer {number} runs layer_full, which needs all rows of the sequence alive"
        if layer.graph == "layer_skip" and plan.alive != "response":
            return f"layer {number} runs layer_skip, which needs the response alive: only its deltas are cached"
    if forced is not None and forced[:, :first].any():
        return f"it forces rows before position {first}, which are not alive"
    return None


def _find_reference_fault(plan: StepPlan) -> str | None:
    """A layer that measures drift from what nobody keeps, or a measurement that no layer makes."""
    if plan.reference not in (None, *REFERENCES):
        return f"its reference is {plan.reference!r}, expected None or one of: {', '.join(REFERENCES)}"
    for number, layer in enumerate(plan.layers):
        if layer.graph in ("layer_tracking", "layer_indicated") and plan.alive != "response":
            return f"layer {number} runs {layer.graph}, which needs the response alive: drift is known of its rows only"
        if layer.graph == "layer_tracking" and plan.reference != "input":
            return f"layer {number} runs layer_tracking, but inputs are not kept: its plan needs reference 'input'"
        if layer.graph == "layer_skip" and plan.reference is not None:
            return f"layer {number} runs layer_skip, which keeps no {plan.reference} for the next step"
        if layer.graph not in PICKING_GRAPHS and plan.measure_drift:
            return f"layer {number} runs {layer.graph}, which measures no drift, but its plan reads the drift of all layers"
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


def _find_prefix_fault(plan: StepPlan, state: StepState) -> str | None:
    """A prefix to store or to join that there is not, at another depth than the request's, or among other rows."""
    prefix = state.prefix
    for what, depth in (("stores", plan.share), ("joins", plan.join)):
        if depth is not None and (prefix is None or depth != prefix.depth or depth == 0):
            shared = "and the request shares none" if prefix is None else f"expected {prefix.depth} (and at least 1)"
            return f"it {what} a prefix at layer {depth}, {shared}"
    if plan.share is not None and not plan.whole:
        return "it stores the prefix, which takes layer_full in every layer"
    if plan.join is None or prefix is None:
        return None
    if not prefix.stored:
        return "it joins a prefix that is not stored"
    if (
        plan.rows is None
        or (plan.rows.mask(state.length) != Rows.outside(prefix, state.length).mask(state.length)).any()
    ):
        return "it joins the prefix to rows that are not exactly all the others"
    return None


def _find_reach_fault(plan: StepPlan, rows: Rows, state: StepState) -> str | None:
    """Alive rows that a provider cannot run, or that leave out a row which this step decides or whose delta it keeps."""
    join = len(plan.layers) if plan.join is None else plan.join
    for number, layer in enumerate(plan.layers):
        if number < join and layer.graph != "layer_partial":
            return f"layer {number} runs {layer.graph}, but chosen rows can only run layer_partial"
        if number >= join and layer.graph != "layer_full":
            return f"layer {number} runs {layer.graph}, expected layer_full from the layer on where the prefix joins"
    if plan.reference is not None or plan.measure_drift:
        return "chosen rows keep no reference and measure no drift: that takes the whole response alive"
    decides = "predicts what may be decided" if state.shift else "may be decided"
    needed, what = (np.ones_like(state.needed), "keeps its delta") if plan.keep_delta else (state.needed, decides)
    missing = np.argwhere(needed & ~rows.mask(state.length)[:, state.prompt_rows :])
    if len(missing):
        sequence, row = missing[0]
        position = state.prompt_rows + row
        return f"position {position} of sequence {sequence} {what} in this step, but is not among its rows"
    return None
