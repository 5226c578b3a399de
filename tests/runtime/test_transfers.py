"""Decoding rules: against their formulas on random rows, and whole generations against a plain loop in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_export.errors import UsageError
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache
from dllm_export.runtime.transfers import (
    TRANSFERS,
    Dynamic,
    EntropyBound,
    Factor,
    FirstHitting,
    Hierarchy,
    Quota,
    SubBlocks,
    Threshold,
    TokenEditing,
    Transfer,
    TransferState,
)
from dllm_export.tools.eager import EagerModel

OpenModel = Callable[[str], DiffusionLM]
MASK = 96
PROMPTS = [[3, 14, 15, 92, 6], [5, 35, 89, 79]]

# Coarse values, so that ties and exact borders come up often.
PROBABILITY = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def states(draw: st.DrawFn) -> TransferState:
    count = draw(st.integers(1, 24))

    def some(values: st.SearchStrategy[float]) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=count, max_size=count)))

    rows = np.cumsum(np.array(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))))
    confidence = some(PROBABILITY)
    return TransferState(
        quota=draw(st.integers(0, 30)),
        block=(0, int(rows[-1]) + 1),
        block_step=1,
        block_masks=count,
        rows=rows,
        ranking=some(PROBABILITY),
        confidence=confidence,
        second=np.minimum(confidence, 1 - confidence),
        entropy=some(st.integers(0, 8).map(lambda n: n / 16)),
        decided=np.zeros(0, np.int64),
        decided_confidence=np.zeros(0),
        rival=np.zeros(0),
        divergence=np.full(count, np.nan),
        similarity=np.full(count, np.nan),
    )


def by_value(values: np.ndarray) -> list[int]:
    """Places by falling value, leftmost first among equals."""
    return sorted(range(len(values)), key=lambda place: (-values[place], place))


# -- formulas, written with plain loops
@given(states())
def test_quota_takes_the_best_ranked_rows(state: TransferState) -> None:
    assert Quota().choose(state).commit.tolist() == by_value(state.ranking)[: state.quota]


@given(states(), PROBABILITY)
def test_threshold_takes_every_sure_row_and_always_the_surest(state: TransferState, tau: float) -> None:
    order = by_value(state.confidence)
    expected = {place for place in order if state.confidence[place] >= tau} | {order[0]}
    chosen = Threshold(threshold=tau).choose(state).commit.tolist()
    assert (set(chosen), len(chosen)) == (expected, len(expected))


@given(states(), PROBABILITY)
def test_dynamic_takes_every_sure_row_or_as_many_as_are_due(state: TransferState, tau: float) -> None:
    order = by_value(state.confidence)
    above = [place for place in order if state.confidence[place] > tau]
    expected = above if len(above) >= state.quota else order[: state.quota]
    assert Dynamic(threshold=tau).choose(state).commit.tolist() == expected


@given(states(), PROBABILITY, st.integers(1, 9), st.integers(1, 2))
def test_sub_blocks_go_from_left_to_right_behind_a_first_row(
    state: TransferState, tau: float, size: int, step: int
) -> None:
    state = replace(state, block_step=step, block=(int(state.rows[0]) - (step == 2), state.block[1]))
    rule = SubBlocks(threshold=tau, sub_block=size)
    kept = rule.narrow(state.rows, state.block, step)
    seen = replace(state, rows=state.rows[kept], confidence=state.confidence[kept])
    chosen = kept[rule.choose(seen).commit].tolist()
    if step == 1:
        assert chosen == [0]
        return
    start = state.block[0]
    left = [place for place in range(len(state.rows)) if (state.rows[place] - start) // size == 1 // size]
    order = [place for place in by_value(state.confidence) if place in left]
    expected = {place for place in order if state.confidence[place] > tau} | {order[0]}
    assert (set(chosen), len(chosen)) == (expected, len(expected))


@given(states(), PROBABILITY, PROBABILITY, st.integers(0, 3), st.integers(0, 3), st.data())
def test_token_editing_replaces_what_is_surely_another_token_and_ends_with_a_review(
    state: TransferState, tau: float, edit_above: float, most: int, reviews: int, data: st.DataObject
) -> None:
    rivals = data.draw(st.lists(st.one_of(PROBABILITY, st.just(float("nan"))), max_size=6))
    if data.draw(st.booleans()):  # a review
        nothing = np.zeros(0)
        state = replace(state, rows=nothing.astype(np.int64), confidence=nothing)
    state = replace(state, block_step=5, memory=reviews, rival=np.array(rivals))
    choice = TokenEditing(threshold=tau, editing_threshold=edit_above, max_post_steps=most).choose(state)
    order = by_value(state.confidence)
    above = [place for place in order if state.confidence[place] > tau]
    assert choice.commit.tolist() == (above or order[:1])
    edited = [place for place, rival in enumerate(rivals) if rival > edit_above]
    assert choice.edit.tolist() == edited
    if len(state.rows):
        assert (choice.memory, choice.goes_on) == (reviews, most > reviews)
    else:
        assert (choice.memory, choice.goes_on) == (reviews + 1, bool(edited) and most > reviews + 1)


@given(states(), st.integers(0, 2**32))
def test_first_hitting_takes_the_row_whose_number_is_largest(state: TransferState, seed: int) -> None:
    draw = np.random.default_rng(seed).random(len(state.rows))
    assert FirstHitting().choose(replace(state, draw=draw)).commit.tolist() == [
        max(range(len(draw)), key=draw.__getitem__)
    ]


@given(states(), st.sampled_from([0.01, 0.3, 1.0, 2.5]))
def test_factor_takes_the_largest_count_whose_doubt_is_below_f(state: TransferState, factor: float) -> None:
    order = by_value(state.confidence)
    count = 1
    for n in range(1, len(order) + 1):
        if (n + 1) * (1 - state.confidence[order[n - 1]]) < factor:
            count = max(count, n)
    assert Factor(factor=factor).choose(state).commit.tolist() == order[:count]


@given(states(), st.sampled_from([0.0, 0.1, 0.5, 100.0]))
def test_entropy_bound_takes_the_longest_prefix_within_gamma(state: TransferState, gamma: float) -> None:
    order = by_value(state.ranking)
    count = 1
    for n in range(1, len(order) + 1):
        prefix = [state.entropy[place] for place in order[:n]]
        if sum(prefix) - max(prefix) <= gamma:
            count = max(count, n)
    assert EntropyBound(gamma=gamma).choose(state).commit.tolist() == order[:count]


@given(states(), PROBABILITY, PROBABILITY)
def test_hierarchy_takes_the_best_of_every_run(state: TransferState, one: float, other: float) -> None:
    low, high = sorted((one, other))
    expected = {by_value(state.confidence)[0]}
    run: list[int] = []
    for place in [*range(len(state.rows)), None]:
        if run and (place is None or state.rows[place] != state.rows[run[-1]] + 1):
            best = min(run, key=lambda at: (-state.confidence[at], at))
            expected |= {best} if state.confidence[best] > low else set()
            run = []
        if place is not None:
            expected |= {place} if state.confidence[place] > high else set()
            run.append(place)
    chosen = Hierarchy(low=low, high=high).choose(state).commit.tolist()
    assert (set(chosen), len(chosen)) == (expected, len(expected))


@given(states(), st.sampled_from(sorted(TRANSFERS)))
def test_every_rule_is_pure_and_commits_at_least_one_and_each_row_once(state: TransferState, name: str) -> None:
    rule: Transfer = TRANSFERS[name]()
    state = replace(state, draw=state.confidence, logsumexp=np.log(state.entropy + 1))
    chosen = rule.choose(state).commit
    assert np.array_equal(rule.choose(state).commit, chosen)
    # A rule that draws or moves tokens may commit nothing, except in the steps whose quota says so.
    assert len(chosen) >= (min(state.quota, 1) if rule.keeps_schedule else 1) or rule.draws or rule.moves
    assert len(set(chosen.tolist())) == len(chosen) <= len(state.rows)
    assert set(chosen.tolist()) <= set(range(len(state.rows)))


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: Threshold(threshold=1.5), "--threshold is 1.5"),
        (lambda: Dynamic(threshold=2), "--threshold is 2"),
        (lambda: SubBlocks(threshold=-1), "--threshold is -1"),
        (lambda: SubBlocks(sub_block=0), "--sub-block is 0"),
        (lambda: TokenEditing(threshold=-1), "--threshold is -1"),
        (lambda: TokenEditing(editing_threshold=2), "--editing-threshold is 2"),
        (lambda: TokenEditing(max_post_steps=-1), "--max-post-steps is -1"),
        (lambda: Factor(factor=0), "--factor is 0"),
        (lambda: EntropyBound(gamma=-1), "--gamma is -1"),
        (lambda: EntropyBound(gamma=float("nan")), "--gamma is nan"),
        (lambda: Hierarchy(low=0.9, high=0.5), "--low is 0.9 and --high 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Transfer], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        make()


# -- whole generations
RULES: dict[str, Transfer] = {
    "threshold": Threshold(threshold=0.2),
    "factor": Factor(factor=2.8),
    "entropy": EntropyBound(gamma=6.0),
    "hierarchy": Hierarchy(low=0.1, high=0.3),
}


def slow_generation(
    model: EagerModel, prompt: list[int], length: int, block: int, rule: Transfer
) -> tuple[list[int], int]:
    """One sequence, every logit of every row, nothing cached: (response, steps)."""
    canvas = torch.tensor([[*prompt, *[MASK] * length]])
    context, steps = model.context([0], canvas.shape[1]), 0
    for start in range(len(prompt), canvas.shape[1], block):
        while (canvas[0, start : start + block] == MASK).any():
            steps += 1
            logits = model.forward(canvas, context)[0]
            logits[:, MASK] = -torch.inf
            places = [row for row in range(start, start + block) if canvas[0, row] == MASK]
            probability = logits[places].softmax(-1)
            confidence, tokens = probability.max(-1)
            entropy = -(probability * probability.clamp(min=1e-300).log()).sum(-1)
            state = TransferState(
                quota=1,
                block=(start - len(prompt), start - len(prompt) + block),
                block_step=steps,
                block_masks=block,
                rows=np.array(places) - len(prompt),
                ranking=confidence.numpy(),
                confidence=confidence.numpy(),
                second=probability.topk(2).values[:, 1].numpy(),
                entropy=entropy.numpy(),
                decided=np.zeros(0, np.int64),
                decided_confidence=np.zeros(0),
            )
            for chosen in rule.choose(state).commit.tolist():
                canvas[0, places[chosen]] = tokens[chosen]
    return canvas[0, len(prompt) :].tolist(), steps


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("block", [8, 24])
def test_a_batch_gives_the_tokens_of_a_plain_loop(
    name: str, block: int, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    lm, rule = open_model("float64"), RULES[name]
    options = GenerationOptions(gen_length=24, block_length=block)
    request = lm.continuation(PROMPTS, options)
    found = [list(result.tokens) for result in lm.run(request, options, NoCache(), rule)]
    expected = [slow_generation(tiny_eager["plain"], prompt, 24, block, rule) for prompt in PROMPTS]
    assert found == [tokens for tokens, _ in expected]
    # A block lasts as long as its slowest sequence, so that a batch takes no fewer steps than any of its sequences alone.
    passes = lm.run(request, options, NoCache(), rule)[0].passes
    assert max(steps for _, steps in expected) <= passes < 24


@pytest.mark.parametrize("provider", ["onnxruntime", "float64"])
@pytest.mark.parametrize("rule", [Threshold(threshold=1.0), Factor(factor=1e-9), EntropyBound(gamma=0.0)], ids=str)
def test_a_rule_that_trusts_nothing_decodes_one_token_a_step(
    provider: str, rule: Transfer, open_model: OpenModel
) -> None:
    lm = open_model(provider)
    options = GenerationOptions(gen_length=12, block_length=6)
    request = lm.continuation(PROMPTS[:1], options)
    one = lm.run(request, GenerationOptions(gen_length=12, block_length=6, steps=12))[0]
    found = lm.run(request, options, NoCache(), rule)[0]
    assert (found.tokens, found.passes) == (one.tokens, 12)


def test_a_rule_that_trusts_everything_decodes_a_block_a_step(open_model: OpenModel) -> None:
    lm = open_model("onnxruntime")
    options = GenerationOptions(gen_length=24, block_length=6)
    request = lm.continuation(PROMPTS, options)
    frames = list(lm.stream(request, options, NoCache(), Threshold(threshold=0.0)))
    assert [frame.block for frame in frames] == [0, 1, 2, 3]
    assert [int(frame.committed.sum()) for frame in frames] == [12] * 4
    assert frames[-1].steps == 24, "the most there can be"


@pytest.mark.parametrize("name", RULES)
def test_rules_go_with_caches(name: str, open_model: OpenModel) -> None:
    """Refreshing everything in every step equals no cache; a real interval still finishes with nothing masked."""
    lm, options = open_model("float64"), GenerationOptions(gen_length=24, block_length=12)
    request = lm.continuation(PROMPTS, options)

    def run(policy: CachePolicy) -> list[tuple[int, ...]]:
        return [result.tokens for result in lm.run(request, options, policy, RULES[name])]

    assert run(DllmCache(prompt_interval=1, response_interval=1)) == run(NoCache())
    assert all(MASK not in tokens for tokens in run(DllmCache(prompt_interval=6, response_interval=3)))


def test_committed_tokens_never_change(open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=24)
    before = np.full((2, 24), MASK)
    for frame in lm.stream(lm.continuation(PROMPTS, options), options, NoCache(), Threshold(threshold=0.1)):
        assert np.array_equal(frame.tokens[~frame.committed], before[~frame.committed])
        assert (before[frame.committed] == MASK).all()
        before = frame.tokens
