"""From head statistics to proposed tokens, on the host with seeded generators.

Source: the LLaDA sampling loop (arXiv 2502.09992): propose a token per candidate row and say how sure it is. Which rows are
then committed is the decoding rule's choice (runtime/transfers), and so is which of them are masked again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs.families import Remasking
from dllm_export.runtime.head import Candidates


@dataclass(frozen=True, slots=True)
class Proposal:
    """A token and its confidence for every candidate row of one sequence."""

    tokens: NDArray[np.int32]  # [n]
    confidence: NDArray[np.float64]  # [n]


def propose(
    candidates: Candidates,
    sequence: int,
    count: int,
    *,
    temperature: float,
    rng: np.random.Generator,
    ranking_logsumexp: NDArray[np.float32] | None = None,
    ranked_last: frozenset[int] = frozenset(),
) -> Proposal:
    """Token choice and softmax confidence of the first `count` candidates of a sequence.

    Temperature T > 0 takes argmax(logit - T log(-log u)) in float64, which samples from softmax(logit / T) over the
    tokens the head returned. `ranking_logsumexp` [B, Q] normalises the confidence instead of the head's own, and
    `ranked_last` tokens get confidence 0: the end-of-text option.
    """
    tokens = candidates.top_tokens[sequence, :count]
    logits = candidates.top_logits[sequence, :count].astype(np.float64)
    if temperature > 0 and candidates.drawn is not None:
        return _propose_drawn(candidates, sequence, count)
    if temperature > 0:
        noise = rng.random(logits.shape)
        choice = np.argmax(logits - temperature * np.log(-np.log(np.maximum(noise, np.finfo(np.float64).tiny))), axis=1)
    else:
        choice = np.zeros(count, np.int64)
    rows = np.arange(count)
    total = (candidates.logsumexp if ranking_logsumexp is None else ranking_logsumexp)[sequence, :count]
    chosen = tokens[rows, choice]
    confidence = np.exp(logits[rows, choice] - total.astype(np.float64))
    if ranked_last:
        confidence[np.isin(chosen, list(ranked_last))] = 0.0
    return Proposal(chosen, confidence)


def _propose_drawn(candidates: Candidates, sequence: int, count: int) -> Proposal:
    """The tokens that the head drew."""
    assert candidates.drawn is not None
    assert candidates.drawn_logit is not None
    logits = candidates.drawn_logit[sequence, :count].astype(np.float64)
    confidence = np.exp(logits - candidates.logsumexp[sequence, :count].astype(np.float64))
    return Proposal(candidates.drawn[sequence, :count], confidence)


def rank(
    remasking: Remasking,
    candidates: Candidates,
    sequence: int,
    proposal: Proposal,
    *,
    order: NDArray[np.float64] | None = None,
    ranked_last: frozenset[int] = frozenset(),
) -> NDArray[np.float64]:
    """What `--remasking` ranks the rows of a proposal by [n], larger first; `order` [n] is the random one, if drawn.

    Gap (p_1 - p_2) and entropy are Dream's orders `topk_margin` and `entropy` (arXiv 2508.15487), both of the noise-free
    distribution of `candidates`; rows that propose a `ranked_last` token come after all others.
    """
    count = len(proposal.tokens)
    if order is not None:
        return order
    if remasking == "low_confidence":
        return proposal.confidence
    if remasking == "margin":
        ranking = share(candidates, sequence, count, 0) - share(candidates, sequence, count, 1)
    else:
        ranking = -candidates.entropy[sequence, :count].astype(np.float64)
    ranking[np.isin(proposal.tokens, list(ranked_last))] = -np.inf
    return ranking


def share(candidates: Candidates, sequence: int, count: int, place: int) -> NDArray[np.float64]:
    """Probability of the token at this place of the order, 0 the likeliest, of the first `count` candidates [n]."""
    logits = candidates.top_logits[sequence, :count, place].astype(np.float64)
    probability: NDArray[np.float64] = np.exp(logits - candidates.logsumexp[sequence, :count].astype(np.float64))
    return probability
