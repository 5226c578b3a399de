"""Cache policies as plans: which steps, which graphs, how many rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.runtime.plugins import find_policy
from dllm_export.runtime.policies import POLICIES, CachePolicy, DllmCache, NoCache, StepPlan, StepState

STATE = StepState.first(layers=6, prompt_rows=40, response_rows=24)
SETTINGS = st.builds(
    DllmCache,
    prompt_interval=st.integers(1, 12),
    response_interval=st.integers(1, 12),
    update_ratio=st.floats(0.0, 1.0),
    first_layer_rule=st.booleans(),
)


@st.composite
def states(draw: st.DrawFn) -> StepState:
    first = StepState.first(
        layers=draw(st.integers(1, 8)), prompt_rows=draw(st.integers(0, 64)), response_rows=draw(st.integers(1, 64))
    )
    return replace(first, step=draw(st.integers(1, 60)))


def plans(policy: CachePolicy, steps: int, state: StepState = STATE) -> list[StepPlan]:
    return [policy.plan(replace(state, step=step)) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("intervals", "counts"),
    [
        # (Kp, Kr) and the steps of 256 that refresh both, the response, the prompt, neither: arXiv 2506.06295's schedule
        ((25, 5), (11, 41, 0, 204)),
        ((25, 2), (6, 122, 5, 123)),
        ((50, 7), (1, 36, 5, 214)),
        ((100, 6), (1, 42, 2, 211)),
        ((100, 8), (2, 30, 1, 223)),
    ],
)
def test_the_published_settings_give_the_published_numbers_of_steps(
    intervals: tuple[int, int], counts: tuple[int, ...]
) -> None:
    policy = DllmCache(prompt_interval=intervals[0], response_interval=intervals[1])
    kinds = Counter(plan.kind for plan in plans(policy, 256))
    assert tuple(kinds[kind] for kind in ("full", "refresh_response", "refresh_prompt", "partial")) == counts


def test_refreshes_come_at_one_plus_multiples_of_their_interval() -> None:
    kinds = [plan.kind for plan in plans(DllmCache(prompt_interval=4, response_interval=3), 13)]
    full = {1, 13}
    for step, kind in enumerate(kinds, 1):
        prompt, response = step in {1, 5, 9, 13}, step in {1, 4, 7, 10, 13}
        names = {(True, False): "refresh_prompt", (False, True): "refresh_response", (False, False): "partial"}
        assert kind == ("full" if step in full else names[prompt, response])


def test_without_a_cache_every_step_computes_everything_and_keeps_nothing() -> None:
    for plan in plans(NoCache(), 5):
        assert {layer.graph for layer in plan.layers} == {"layer_full"}
        assert (plan.alive, plan.keep_delta, len(plan.layers)) == ("sequence", False, 6)


@given(SETTINGS, states())
def test_a_plan_depends_on_nothing_but_settings_and_state(policy: DllmCache, state: StepState) -> None:
    plan = policy.plan(state)
    policy.plan(replace(state, step=state.step + 1))
    again = replace(policy).plan(replace(state))
    assert plan == again
    assert hash(plan) == hash(again), "equal plans share one prepared program"


@given(SETTINGS, states())
def test_every_layer_gets_a_graph_and_a_budget_that_fits_its_rows(policy: DllmCache, state: StepState) -> None:
    plan = policy.plan(state)
    assert len(plan.layers) == state.layers
    alive = state.response_rows + (state.prompt_rows if plan.alive == "sequence" else 0)
    for layer in plan.layers:
        assert 0 <= layer.budget <= alive
        assert (layer.budget > 0) == (layer.graph == "layer_adaptive")
        if layer.graph == "layer_full":
            assert plan.alive == "sequence"
    rows = int(policy.update_ratio * state.response_rows)
    budgets = {layer.budget for layer in plan.layers if layer.graph == "layer_adaptive"}
    assert budgets <= {rows, state.prompt_rows + rows}


@given(SETTINGS, states())
def test_the_first_layer_is_computed_whole_on_every_step_where_the_rule_is_on(
    policy: DllmCache, state: StepState
) -> None:
    first, *rest = policy.plan(state).layers
    if policy.first_layer_rule:
        assert first.graph in ("layer_full", "layer_partial")
    else:
        assert all(layer == first for layer in rest)


@given(SETTINGS, states())
def test_the_first_step_computes_everything(policy: DllmCache, state: StepState) -> None:
    plan = policy.plan(replace(state, step=1))
    assert (plan.kind, plan.keep_delta) == ("full", True)
    assert {layer.graph for layer in plan.layers} == {"layer_full"}


@given(SETTINGS, states())
def test_only_a_step_that_refreshes_the_prompt_alone_forces_its_rows(policy: DllmCache, state: StepState) -> None:
    plan = policy.plan(state)
    assert (plan.forced is not None) == (plan.kind == "refresh_prompt")
    assert plan.write_response_values or policy.update_ratio == 0


@pytest.mark.parametrize("ratio", [0.0, 0.01])
def test_a_ratio_too_small_for_one_row_skips_the_layers_after_the_first(ratio: float) -> None:
    plan = DllmCache(update_ratio=ratio).plan(replace(STATE, step=2))
    assert [layer.graph for layer in plan.layers] == ["layer_partial", *["layer_skip"] * 5]


def test_the_budget_is_the_rounded_down_share_of_the_response() -> None:
    plan = DllmCache(update_ratio=0.3).plan(replace(STATE, step=2))
    assert plan.layers[-1].budget == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt_interval", 0), ("response_interval", -1), ("update_ratio", 1.01), ("update_ratio", -0.1)],
)
def test_a_setting_out_of_range_is_refused_by_the_name_of_its_flag(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--{field.replace('_', '-')} is {value}")):
        replace(DllmCache(), **{field: value})


def test_every_policy_is_found_by_its_name_and_every_field_has_a_help_text() -> None:
    for name, policy in POLICIES.items():
        assert find_policy(name) is policy
        assert policy().name == name
        assert all(field.metadata["help"] for field in fields(policy))


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean dllm-cache"):
        find_policy("dllm_cache")
    with pytest.raises(UsageError, match="there are: none, dllm-cache"):
        find_policy("x")
