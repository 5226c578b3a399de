"""From head statistics to proposed tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllm_export.graphs.families import Remasking
from dllm_export.runtime.head import Candidates, bucket
from dllm_export.runtime.sampler import propose, rank


def candidates(logits: NDArray[np.float64]) -> Candidates:
    """What the head returns for one sequence with these logits [Q, V]."""
    order = np.argsort(-logits, axis=1, kind="stable")
    total = np.log(np.exp(logits).sum(1))
    ordered = np.take_along_axis(logits, order, 1)
    entropy = total - (np.exp(logits - total[:, None]) * logits).sum(1)
    arrays = (ordered[None], (total - ordered[:, 0])[None], entropy[None])
    return Candidates(order[None].astype(np.int32), *(array.astype(np.float32) for array in arrays))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


LOGITS = rng(1).normal(size=(6, 9)) * 2


@given(st.integers(0, 500), st.integers(1, 256), st.booleans())
def test_a_bucket_holds_its_candidates_and_few_rows_more(count: int, largest: int, few: bool) -> None:
    size = bucket(min(count, largest), largest, few=few)
    assert min(count, largest) <= size <= largest
    assert size == largest or (size & (size - 1) == 0 if few or size <= 8 else size % 8 == 0)
    assert size < 2 * max(count, 1)
    assert few or size < count + 8


@pytest.mark.parametrize(("few", "sizes"), [(False, 35), (True, 9)])
def test_few_sizes_serve_all_counts(few: bool, sizes: int) -> None:
    assert len({bucket(count, 256, few=few) for count in range(1, 257)}) == sizes


def test_at_temperature_zero_the_best_token_is_proposed_with_its_probability() -> None:
    proposal = propose(candidates(LOGITS), 0, 6, temperature=0.0, rng=rng())
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    assert proposal.tokens.tolist() == LOGITS.argmax(1).tolist()
    np.testing.assert_allclose(proposal.confidence, probability.max(1), rtol=1e-6)


def test_confidence_of_the_likeliest_token_ranks_as_its_nll_does() -> None:
    """Graph `commit` has no other number: rows that it tells apart differ here too, whatever their logits are."""
    found = candidates(np.array([[31.0, 0.0], [0.1, 0.0], [17.3, 0.0]], np.float64))
    nll = np.array([[1e-7, np.nextafter(np.float32(1e-7), np.float32(1)), 0.0]], np.float32)
    confidence = propose(replace(found, nll=nll), 0, 3, temperature=0.0, rng=rng()).confidence
    assert confidence.tolist() == np.exp(-nll[0].astype(np.float64)).tolist()
    assert confidence[2] > confidence[0] > confidence[1]


def test_rows_beyond_the_count_are_padding() -> None:
    assert len(propose(candidates(LOGITS), 0, 2, temperature=0.0, rng=rng()).tokens) == 2
    assert len(propose(candidates(LOGITS), 0, 0, temperature=0.7, rng=rng()).tokens) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_draws_from_the_softmax_of_the_divided_logits(temperature: float) -> None:
    draws, row = 20_000, LOGITS[0]
    found = propose(candidates(np.tile(row, (draws, 1))), 0, draws, temperature=temperature, rng=rng()).tokens
    expected = np.exp(row / temperature) / np.exp(row / temperature).sum()
    shares = np.bincount(found, minlength=len(row)) / draws
    np.testing.assert_allclose(shares, expected, atol=5 * (0.25 / draws) ** 0.5)


def test_the_noise_does_not_reach_the_confidence() -> None:
    proposal = propose(candidates(LOGITS), 0, 6, temperature=3.0, rng=rng(4))
    probability = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    assert proposal.tokens.tolist() != LOGITS.argmax(1).tolist()
    np.testing.assert_allclose(proposal.confidence, probability[np.arange(6), proposal.tokens], rtol=1e-6)


def test_the_generator_alone_decides_a_draw() -> None:
    draw = [propose(candidates(LOGITS), 0, 6, temperature=2.0, rng=rng(seed)).tokens.tolist() for seed in (5, 5, 6)]
    assert draw[0] == draw[1] != draw[2]


def test_a_draw_of_zero_noise_is_finite() -> None:
    class Zeros(np.random.Generator):
        def random(self, *_: object, **__: object) -> NDArray[np.float64]:  # type: ignore[override]
            return np.zeros((6, 9))

    proposal = propose(candidates(LOGITS), 0, 6, temperature=1.0, rng=Zeros(np.random.PCG64(0)))
    assert proposal.tokens.tolist() == LOGITS.argmax(1).tolist()


def test_tokens_that_are_ranked_last_get_no_confidence_and_others_are_normalised_without_them() -> None:
    last = int(LOGITS[0].argmax())
    rest = np.delete(np.exp(LOGITS), last, axis=1).sum(1)
    proposal = propose(
        candidates(LOGITS),
        0,
        6,
        temperature=0.0,
        rng=rng(),
        ranking_logsumexp=np.log(rest)[None],
        ranked_last=frozenset({last}),
    )
    assert proposal.tokens.tolist() == LOGITS.argmax(1).tolist(), "the option ranks, it does not forbid"
    expected = np.where(proposal.tokens == last, 0.0, np.exp(LOGITS).max(1) / rest)
    np.testing.assert_allclose(proposal.confidence, expected, rtol=1e-6)


@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 1.3]))
def test_gap_and_entropy_rank_by_the_noise_free_distribution(count: int, seed: int, temperature: float) -> None:
    logits = rng(seed).normal(size=(6, 9)) * 2
    found = candidates(logits)
    proposal = propose(found, 0, count, temperature=temperature, rng=rng(seed))
    last = frozenset({int(proposal.tokens[0])})
    gaps, entropies = [], []
    for row in logits[:count]:
        share = np.exp(row) / np.exp(row).sum()
        best, second = sorted(share, reverse=True)[:2]
        gaps.append(best - second)
        entropies.append(-sum(p * np.log(p) for p in share))
    orders: dict[Remasking, list[float]] = {"margin": gaps, "entropy": [-entropy for entropy in entropies]}
    for remasking, values in orders.items():
        ranking = rank(remasking, found, 0, proposal)
        np.testing.assert_allclose(ranking, values, rtol=0, atol=2e-6)  # the head's statistics are float32
        expected = [-np.inf if token in last else value for token, value in zip(proposal.tokens, values, strict=True)]
        ranking = rank(remasking, found, 0, proposal, ranked_last=last)
        np.testing.assert_allclose(ranking, expected, rtol=0, atol=2e-6)
