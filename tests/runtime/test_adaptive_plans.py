"""dynamic-dllm and spa as plans: windows, budgets and refreshes of any state."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.runtime.policies import CachePolicy, DynamicDllm, SpaCache, StepState
from dllm_export.runtime.policies.contract import find_fault, make_plan
from dllm_export.runtime.policies.policy import PICKING_GRAPHS

DYNAMIC = st.builds(
    DynamicDllm,
    layer_budget=st.integers(1, 40),
    window=st.integers(0, 40),
    bucket=st.integers(1, 9),
    variant=st.sampled_from(["published", "released"]),
    prompt_interval=st.integers(0, 7),
    first_layer_rule=st.booleans(),
)


@st.composite
def spas(draw: st.DrawFn) -> SpaCache:
    shares = st.floats(0.001, 1.0)
    peak = draw(shares)
    return SpaCache(
        prompt_interval=draw(st.integers(1, 9)),
        response_interval=draw(st.integers(1, 9)),
        peak_depth=draw(st.floats(0.0, 1.0)),
        peak_ratio=peak,
        start_ratio=peak * draw(shares),
        end_ratio=peak * draw(shares),
        min_ratio=draw(st.floats(0.0, 1.0)),
    )


@st.composite
def states(draw: st.DrawFn) -> StepState:
    batch, layers, rows = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 48))
    first = StepState.first(layers=layers, prompt_rows=draw(st.integers(0, 20)), response_rows=rows, batch=batch)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    before = rng.random((batch, rows)) < 0.7
    after = before & (rng.random((batch, rows)) < draw(st.sampled_from([0.2, 0.9, 1.0])))
    drift = rng.random((batch, layers)) * (rng.random((batch, layers)) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    known = {"drift": draw(st.sampled_from([None, drift])), "masked": after, "masked_before": before}
    return replace(first, step=draw(st.integers(1, 60)), indicator_rank=4, **known)


@given(st.one_of(DYNAMIC, spas()), states())
def test_every_plan_can_be_run_and_depends_on_nothing_but_settings_and_state(
    policy: CachePolicy, state: StepState
) -> None:
    plan = make_plan(policy, state)
    policy.plan(replace(state, step=state.step + 1))
    assert plan == replace(policy).plan(replace(state))  # type: ignore[type-var]
    assert find_fault(plan, state) is None
    assert policy.plan(replace(state, step=1)).kind == "full"


# -- dynamic-dllm
@given(DYNAMIC, states())
def test_the_window_has_its_rows_around_the_last_decided_one(policy: DynamicDllm, state: StepState) -> None:
    plan = policy.plan(replace(state, step=policy.prompt_interval + 2 if policy.prompt_interval != 1 else 2))
    if plan.forced is None:
        assert plan.kind == "full"
        return
    start, rows = state.prompt_rows, state.response_rows
    for positions, before, after in zip(plan.forced.positions, state.masked_before, state.masked, strict=True):
        assert len(positions) == min(policy.window + 1, rows)
        assert list(positions) == list(range(positions[0], positions[-1] + 1))
        assert start <= positions[0]
        assert positions[-1] < start + rows
        decided = [row + start for row in range(rows) if before[row] and not after[row]]
        assert (max(decided) if decided else start) in positions
        if decided and positions[0] > start and positions[-1] < start + rows - 1:
            assert max(decided) - positions[0] == policy.window // 2


@given(DYNAMIC, states())
def test_budgets_follow_the_drift_and_keep_to_their_sum(policy: DynamicDllm, state: StepState) -> None:
    policy, state = replace(policy, variant="published", first_layer_rule=False), replace(state, step=3)
    plan, exact = (each.plan(state) for each in (policy, replace(policy, bucket=1)))
    if plan.forced is None:
        return
    window, rows = plan.forced.count, state.response_rows
    drifts = np.ones((1, state.layers)) if state.drift is None else state.drift
    expected = np.zeros(state.layers)
    for drift in drifts:
        share = drift / drift.sum() if drift.any() else np.full(state.layers, 1 / state.layers)
        expected = np.maximum(expected, policy.layer_budget * state.layers * share)
    budgets = np.array([layer.budget - window for layer in exact.layers])
    # One row of doubt, where the exact number is a whole one and the last bit decides which way it is rounded.
    assert (budgets <= np.minimum(expected, rows - window) + 1e-9).all()
    assert (budgets >= np.minimum(np.floor(expected - 1e-9), rows - window)).all()
    if state.batch == 1 or state.drift is None:
        assert budgets.sum() <= policy.layer_budget * state.layers
    for layer, least in zip(plan.layers, exact.layers, strict=True):
        rounded = layer.budget - window
        assert least.budget <= layer.budget <= rows
        assert rounded % policy.bucket == 0 or layer.budget == rows


def test_the_released_defaults_recompute_65_rows_in_every_layer_but_the_first() -> None:
    state = StepState.first(layers=32, prompt_rows=100, response_rows=256)
    policy = DynamicDllm(variant="released")
    for step in (2, 3, 5000):
        first, *rest = policy.plan(replace(state, step=step)).layers
        assert (first.graph, first.budget) == ("layer_adaptive", 256)
        assert {(layer.graph, layer.budget) for layer in rest} == {("layer_adaptive", 65)}


def test_the_prompt_is_computed_once_or_every_interval() -> None:
    state = StepState.first(layers=2, prompt_rows=4, response_rows=8)

    def full(policy: DynamicDllm) -> list[int]:
        return [step for step in range(1, 20) if policy.plan(replace(state, step=step)).kind == "full"]

    assert full(DynamicDllm()) == [1]
    assert full(DynamicDllm(prompt_interval=6)) == [1, 7, 13, 19]


# -- spa
def test_spa_gives_llada_the_published_rows_per_layer() -> None:
    published = """8 9 10 12 14 16 19 22 24 27 31 34 37 40 44 47 50 53 56 58 60 61 63 63 64 63 61 58 54 49 44 38"""
    assert SpaCache().budgets(32, 256) == tuple(map(int, published.split()))
    mean = np.mean([SpaCache().ratio(layer / 32) for layer in range(32)])
    assert mean == pytest.approx(0.159, abs=5e-4)
    dream = SpaCache(peak_depth=0.5, peak_ratio=0.3, start_ratio=0.05, end_ratio=0.25)
    assert np.mean([dream.ratio(layer / 28) for layer in range(28)]) == pytest.approx(0.231, abs=5e-4)


@given(spas(), st.floats(0.0, 1.0))
def test_the_curve_runs_through_its_three_points_and_never_leaves_its_bounds(policy: SpaCache, depth: float) -> None:
    if 0 < policy.peak_depth < 1:
        assert policy.ratio(0.0) == pytest.approx(max(policy.start_ratio, policy.min_ratio))
        assert policy.ratio(1.0) == pytest.approx(policy.end_ratio)
    assert policy.ratio(policy.peak_depth) == policy.peak_ratio
    least = min(policy.start_ratio, policy.end_ratio)
    assert least * (1 - 1e-9) <= policy.ratio(depth) <= max(policy.peak_ratio, policy.min_ratio)


@given(spas(), states())
def test_spa_refreshes_at_its_intervals_and_the_first_layer_always(policy: SpaCache, state: StepState) -> None:
    plan = policy.plan(state)
    passed = state.step - 1
    full, response = passed % policy.prompt_interval == 0, passed % policy.response_interval == 0
    assert plan.kind == ("full" if full else "refresh_response" if response else "partial")
    assert plan.layers[0].graph == ("layer_full" if full else "layer_partial")
    assert plan.reference == ("indicator" if full or response else None)
    if plan.kind == "partial":
        budgets = policy.budgets(state.layers, state.response_rows)
        assert [layer.budget for layer in plan.layers[1:]] == list(budgets[1:])
        assert {layer.graph for layer in plan.layers[1:] if layer.budget} <= {"layer_indicated"}
        assert all(layer.graph in (*PICKING_GRAPHS, "layer_skip") for layer in plan.layers[1:])


# -- settings
@pytest.mark.parametrize(
    ("policy", "field", "value", "expected"),
    [
        (DynamicDllm(), "layer_budget", 0, "expected at least 1"),
        (DynamicDllm(), "window", -1, "expected at least 0"),
        (DynamicDllm(), "bucket", 0, "expected at least 1"),
        (DynamicDllm(), "prompt_interval", -1, "expected at least 0"),
        (DynamicDllm(), "variant", "printed", "expected one of: published, released"),
        (SpaCache(), "prompt_interval", 0, "expected at least 1"),
        (SpaCache(), "response_interval", 0, "expected at least 1"),
        (SpaCache(), "peak_depth", 1.5, "expected a number from 0 to 1"),
        (SpaCache(), "min_ratio", -0.1, "expected a number from 0 to 1"),
        (SpaCache(), "min_ratio", float("nan"), "expected a number from 0 to 1"),
        (SpaCache(), "peak_ratio", 0.0, "expected a share above 0 and up to 1"),
        (SpaCache(), "start_ratio", 0.3, "expected a share above 0 and up to --peak-ratio, which is 0.25"),
        (SpaCache(), "end_ratio", 0.0, "expected a share above 0 and up to --peak-ratio, which is 0.25"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_the_name_of_its_flag(
    policy: Any, field: str, value: Any, expected: str
) -> None:
    named = f"--{field.replace('_', '-')} is {value!r}, {expected}"
    with pytest.raises(UsageError, match=re.escape(named)):
        replace(policy, **{field: value})
