"""Policies that recompute chosen rows, as plans: pure, within their bounds, and equal to one another where they must be."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.graphs import TOP_TOKENS
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.plugins import find_policy
from dllm_export.runtime.policies import (
    CachePolicy,
    DkvDecode,
    DkvGreedy,
    DualCache,
    FreeCache,
    NoCache,
    PrefixCache,
    Rows,
    SparseCache,
    StepPlan,
    StepState,
    WindowCache,
)
from dllm_export.runtime.policies.contract import find_fault
from dllm_export.runtime.policies.dkv_greedy import find_nearest
from dllm_export.runtime.transfers import Quota, Threshold, Transfer

OpenModel = Callable[[str], DiffusionLM]
SMALL = st.integers(0, 9)

POLICIES: dict[str, st.SearchStrategy[Any]] = {
    "prefix": st.just(PrefixCache()),
    "dual": st.just(DualCache()),
    "freecache": st.just(FreeCache()),
    "window": st.builds(WindowCache, before=SMALL, after=SMALL, refresh_interval=SMALL),
    "sparse": st.builds(SparseCache, keep_ratio=st.floats(0.0, 1.0)),
    "dkv-decode": st.builds(DkvDecode, refresh_interval=SMALL, bucket=st.integers(1, 9)),
    "dkv-greedy": st.builds(DkvGreedy, refresh_interval=SMALL, nearest=SMALL, bucket=st.integers(1, 9)),
}


SMALL_SETTINGS: dict[str, CachePolicy] = {"window": WindowCache(before=2, after=1)}
"""Where the default settings would recompute everything in a short sequence."""


def most_rows(policy: Any, state: StepState) -> int:
    """The rows that a policy declares for a step that is not full (docs/policies.md)."""
    block, recent = state.span[1] - state.span[0], state.masked_before & ~state.masked
    open_rows = state.masked_before | state.masked
    declared = {
        "prefix": state.length - state.span[0],
        "dual": block,
        "sparse": block,
        "freecache": state.length - state.span[0],
        "window": min(state.length, block + getattr(policy, "before", 0) + getattr(policy, "after", 0)),
        "dkv-decode": in_buckets(policy, state, (open_rows | state.predicting(open_rows)).sum(1).max()),
        "dkv-greedy": in_buckets(
            policy, state, (state.candidates | state.needed | recent).sum(1).max() + getattr(policy, "nearest", 0)
        ),
    }
    return declared[policy.name]


def in_buckets(policy: Any, state: StepState, rows: int) -> int:
    """The next multiple of the policy's bucket, but no more than the response."""
    bucket = getattr(policy, "bucket", 1)
    return min(state.response_rows, -(-max(rows, 1) // bucket) * bucket)


@st.composite
def states(draw: st.DrawFn) -> StepState:
    """A state that can come up: blocks before the current one are decided, and nothing decided was masked later.

    With a shift a row of the prompt may lead the response, which is then one longer.
    """
    batch, block, blocks = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    prompt, rows, number = draw(st.integers(0, 12)), block * blocks, draw(st.integers(0, blocks - 1))
    shift = draw(st.booleans())
    lead = int(shift and prompt > 0)
    shape = RequestShape(batch=batch, prompt_rows=prompt, response_rows=rows, shift=shift).led
    first = StepState.first(
        layers=draw(st.integers(1, 4)), prompt_rows=shape.prompt_rows, response_rows=shape.response_rows, batch=batch
    )

    def led(array: Any) -> Any:
        return np.pad(array, ((0, 0), (lead, 0)))

    before = np.array(draw(st.lists(st.booleans(), min_size=batch * rows, max_size=batch * rows))).reshape(batch, rows)
    before[:, : number * block] = False
    decided = np.array(draw(st.lists(st.booleans(), min_size=batch * rows, max_size=batch * rows)))
    decided = decided.reshape(batch, rows)
    decided[:, (number + 1) * block :] = False
    upcoming = np.array(draw(st.lists(st.booleans(), min_size=batch * rows, max_size=batch * rows)))
    upcoming = upcoming.reshape(batch, rows) & before & ~decided
    upcoming[:, (number + 1) * block :] = False
    inner = draw(st.integers(1, 9))
    return replace(
        first,
        step=inner + (draw(st.integers(number, 30)) if number else 0),
        block_step=inner,
        block=(prompt + number * block, prompt + (number + 1) * block),
        shift=shift,
        masked=led(before & ~decided),
        masked_before=led(before),
        upcoming=led(upcoming),
        padding=tuple(draw(st.lists(st.integers(0, prompt), min_size=batch, max_size=batch))),
    )


every_policy = pytest.mark.parametrize("name", POLICIES)


@every_policy
@given(data=st.data(), state=states())
def test_a_plan_depends_on_nothing_but_settings_and_state(name: str, data: st.DataObject, state: StepState) -> None:
    policy = data.draw(POLICIES[name])
    plan = policy.plan(state)
    policy.plan(replace(state, step=state.step + 1, block_step=state.block_step + 1))
    again = replace(policy).plan(replace(state, masked=state.masked.copy(), masked_before=state.masked_before.copy()))
    assert (plan, hash(plan)) == (again, hash(again))


@every_policy
@given(data=st.data(), state=states())
def test_every_plan_keeps_to_the_contract_and_to_the_declared_rows(
    name: str, data: st.DataObject, state: StepState
) -> None:
    policy = data.draw(POLICIES[name])
    if not getattr(policy, "needs_upcoming", False):
        state = replace(state, upcoming=None)
    second = policy.plan(replace(state, block_step=2)).compaction
    plan = policy.plan(replace(state, compacted=second))
    state = replace(state, compacted=second)
    assert find_fault(plan, state) is None
    if plan.rows is not None:
        assert plan.rows.count <= most_rows(policy, state)
    if state.step == 1:
        assert plan == StepPlan.refresh(state, keep_delta=False)


@every_policy
def test_a_generation_recomputes_no_more_rows_than_declared(name: str, open_model: OpenModel) -> None:
    lm, policy = open_model("onnxruntime"), SMALL_SETTINGS.get(name, find_policy(name)())
    in_order = getattr(policy, "needs_upcoming", False)
    transfers: list[Transfer] = [Quota()] if in_order else [Quota(), Threshold(threshold=0.3)]
    for transfer in transfers:
        options = GenerationOptions(gen_length=16, block_length=8, remasking="random" if in_order else "low_confidence")
        request = lm.continuation([[3, 1, 4, 1, 5], [9, 2, 6]], options)
        first = StepState.first(layers=5, prompt_rows=5, response_rows=16, batch=2)
        masked = before = first.masked
        for frame in lm.stream(request, options, policy, transfer, watch=True):
            assert frame.recomputed is not None
            start = 5 + 8 * frame.block
            upcoming = frame.committed if in_order else None
            state = replace(first, block=(start, start + 8), masked=masked, masked_before=before, upcoming=upcoming)
            most = 16 if frame.kind == "full" else most_rows(policy, state)
            assert (frame.recomputed.sum(1) <= most).all()
            masked, before = frame.tokens == 96, masked


# -- equalities
SHAPE = replace(StepState.first(layers=2, prompt_rows=9, response_rows=24), step=2, block_step=2)


@given(st.integers(0, 3), SMALL, SMALL)
def test_a_window_has_its_rows_at_the_ends_of_the_sequence_too(block: int, before: int, after: int) -> None:
    state = replace(SHAPE, block=(9 + 6 * block, 15 + 6 * block))
    plan = WindowCache(before=before, after=after).plan(state)
    assert plan.rows is not None
    (rows,) = plan.rows.positions
    assert len(rows) == min(33, 6 + before + after)
    assert set(range(*state.block)) <= set(rows)
    assert list(rows) == list(range(rows[0], rows[0] + len(rows)))
    if state.block[0] >= before and state.block[1] + after <= 33:
        assert (rows[0], rows[-1] + 1) == (state.block[0] - before, state.block[1] + after)


@given(states())
def test_policies_that_must_be_equal_are(state: StepState) -> None:
    assert WindowCache(before=0, after=0).plan(state) == DualCache().plan(state)
    if state.block[1] == state.length:
        assert PrefixCache().plan(state) == DualCache().plan(state)
    if state.step == state.block_step:
        assert FreeCache().plan(state) == PrefixCache().plan(state)
    for policy in (WindowCache, DkvDecode, DkvGreedy):
        assert policy(refresh_interval=1).plan(state) == NoCache().plan(state)
    assert DkvDecode().plan(replace(state, block_step=2)) == NoCache().plan(state)


REFRESHED: dict[str, tuple[CachePolicy, dict[str, Any]]] = {
    "prefix, a block a token": (PrefixCache(), {"block_length": 1}),
    "dual, a block a token": (DualCache(), {"block_length": 1}),
    "window over everything": (WindowCache(before=99, after=99), {"block_length": 4}),
    "window, full passes": (WindowCache(before=0, after=0, refresh_interval=1), {"block_length": 4}),
    "sparse, a block two tokens": (SparseCache(keep_ratio=0.1), {"block_length": 2}),
    "dkv-decode, full passes": (DkvDecode(refresh_interval=1), {"block_length": 6}),
    "dkv-greedy, full passes": (DkvGreedy(refresh_interval=1), {"block_length": 6, "remasking": "random"}),
}


@pytest.mark.parametrize("case", REFRESHED)
@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_told_to_refresh_everything_a_policy_equals_no_cache(case: str, guidance: float, open_model: OpenModel) -> None:
    lm, (policy, keywords) = open_model("float64"), REFRESHED[case]
    options = GenerationOptions(gen_length=12, cfg_scale=guidance, **keywords)
    request = lm.continuation([[3, 1, 4, 1, 5, 9], [2, 6, 5]], options)
    found, expected = (lm.run(request, options, each) for each in (policy, NoCache()))
    assert [result.tokens for result in found] == [result.tokens for result in expected]


@given(st.floats(0.0, 1.0), states())
def test_a_compaction_keeps_the_share_of_the_rows_that_a_sequence_has(ratio: float, state: StepState) -> None:
    made = SparseCache(keep_ratio=ratio).plan(replace(state, block_step=2))
    used = SparseCache(keep_ratio=ratio).plan(replace(state, block_step=7))
    assert made.compaction == used.compaction
    assert made.compaction is not None
    assert made.compaction.kept == tuple(
        int((max(0, state.span[0] - pad) + state.length - state.span[1]) * ratio) for pad in state.padding
    )
    assert made.compaction.count <= state.length
    assert (made.alive, made.kind, used.rows) == ("sequence", "full", made.compaction.rows)


def test_freecache_equals_no_cache_where_nothing_is_given(open_model: OpenModel) -> None:
    lm, text, options = open_model("float64"), [96] * 9, GenerationOptions()
    found, expected = (lm.run(lm.infilling([text], options), options, each)[0] for each in (FreeCache(), NoCache()))
    assert found.tokens == expected.tokens


# -- a shift
@given(states())
def test_what_predicts_a_row_is_the_row_before_it(state: StepState) -> None:
    rows = {(sequence, state.prompt_rows + int(place)) for sequence, place in np.argwhere(state.candidates)}
    before = {
        (sequence, max(row - 1, state.padding[sequence], state.prompt_rows) if state.shift else row)
        for sequence, row in rows
    }
    assert {(sequence, state.prompt_rows + int(place)) for sequence, place in np.argwhere(state.needed)} == before


@given(states(), st.data())
def test_with_a_shift_a_row_that_predicts_a_candidate_may_not_be_left_out(
    state: StepState, data: st.DataObject
) -> None:
    needed = np.argwhere(state.needed)
    if not len(needed) or state.length == 1:
        return
    _, place = needed[data.draw(st.integers(0, len(needed) - 1))]
    position = state.prompt_rows + int(place)
    others = [tuple(row for row in range(state.length) if row != position)] * state.batch
    fault = find_fault(StepPlan.recompute(state, Rows(tuple(others))), state)
    what = "predicts what may be decided" if state.shift else "may be decided"
    assert fault is not None
    assert fault.endswith(f"{what} in this step, but is not among its rows")


# -- rows that differ from sequence to sequence
MASKS = st.integers(1, 24).flatmap(
    lambda count: st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=1, max_size=3)
)


@given(MASKS.map(np.array), SMALL, st.integers(1, 9))
def test_padded_rows_are_the_chosen_ones_and_repeats_of_them(chosen: np.ndarray, first: int, bucket: int) -> None:
    found = Rows.padded(chosen, first, bucket)
    most = max(1, int(chosen.sum(1).max()))
    assert found.count == min(chosen.shape[1], -(-most // bucket) * bucket)
    assert found.count >= most
    for row, positions in zip(chosen, found.positions, strict=True):
        assert set(positions) == ({first + place for place in np.flatnonzero(row)} or {first})


@given(MASKS.map(lambda rows: np.array(rows[0])), st.data(), st.integers(0, 30))
def test_the_nearest_rows_are_found(among: np.ndarray, data: st.DataObject, count: int) -> None:
    anchors = np.array(data.draw(st.lists(st.booleans(), min_size=len(among), max_size=len(among))))
    expected = []
    for distance in range(len(among)):
        for place in np.flatnonzero(among):
            if anchors.any() and min(abs(place - other) for other in np.flatnonzero(anchors)) == distance:
                expected.append(place)
    assert find_nearest(anchors, among, count).tolist() == expected[:count]


# -- an order that is known before the step
STEPS = {"gen_length": 12, "block_length": 6, "steps": 8, "remasking": "random", "seed": 5}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", [NoCache(), DkvGreedy(nearest=2, bucket=1)], ids=str)
def test_the_order_of_a_step_is_drawn_before_its_tokens(
    policy: CachePolicy, temperature: float, open_model: OpenModel
) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(temperature=temperature, **STEPS)
    frames = list(lm.stream(lm.continuation([[1, 2, 3], [4, 5]], options), options, policy))
    for sequence in range(2):
        draw, masked = np.random.default_rng(5 + sequence), np.ones(12, np.bool_)
        for frame, quota in zip(frames, [2, 2, 1, 1] * 2, strict=True):
            places = np.flatnonzero(masked[: 6 * (frame.block + 1)])
            order = draw.random(len(places))
            if temperature:
                draw.random((len(places), TOP_TOKENS))
            decided = places[np.argsort(-order)[:quota]]
            assert np.flatnonzero(frame.committed[sequence]).tolist() == sorted(decided)
            masked[decided] = False


@pytest.mark.parametrize(
    ("keywords", "transfer", "given"),
    [({}, Quota(), "low_confidence and quota"), ({}, Threshold(), "low_confidence and threshold")],
)
def test_a_policy_that_needs_the_order_is_refused_without_one(
    keywords: dict[str, Any], transfer: Transfer, given: str, open_model: OpenModel
) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=8, **keywords)
    sentence = (
        "--policy dkv-greedy must know which rows a step decides before the step runs, which takes --remasking random and "
        f"--transfer quota, or --transfer ddpm, ddpm-cache, first-hitting or origin; these are {given}"
    )
    with pytest.raises(UsageError, match=re.escape(sentence)) as caught:
        lm.run(lm.continuation([[1, 2]], options), options, DkvGreedy(), transfer)
    assert caught.value.exit_code == 2


# -- settings
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: WindowCache(before=-1), "--before is -1, expected at least 0"),
        (lambda: WindowCache(after=-2), "--after is -2, expected at least 0"),
        (lambda: WindowCache(refresh_interval=-1), "--refresh-interval is -1, expected at least 0"),
        (lambda: SparseCache(keep_ratio=1.1), "--keep-ratio is 1.1, expected a share from 0 to 1"),
        (lambda: SparseCache(keep_ratio=float("nan")), "--keep-ratio is nan, expected a share from 0 to 1"),
        (lambda: DkvDecode(refresh_interval=-1), "--refresh-interval is -1, expected at least 0"),
        (lambda: DkvDecode(bucket=0), "--bucket is 0, expected at least 1"),
        (lambda: DkvGreedy(refresh_interval=-3), "--refresh-interval is -3, expected at least 0"),
        (lambda: DkvGreedy(nearest=-1), "--nearest is -1, expected at least 0"),
        (lambda: DkvGreedy(bucket=-1), "--bucket is -1, expected at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_the_name_of_its_flag(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        make()
