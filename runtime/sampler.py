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

ENTROPY_EPS = 1e-10
"""Added to probabilities before their logarithm, as published (arXiv 2508.15487)."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A token and its confidence for every candidate row of one sequence."""

    tokens: NDArray[np.int32]  # [n]
    confidence: NDArray[np.float64]  # [n]
    choice: NDArray[np.int64]  # [n] place of the token among the most likely ones; 0 where the head drew it


def temper(
    candidates: Candidates, sequence: int, count: int, *, temperature: float, top_p: float, top_k: int | None
) -> NDArray[np.float64]:
    """Log-probabilities [n, K] of the distribution that tokens are drawn from; -inf for those that are left out.

    Softmax of logits / temperature (as they are at 0), of which the likeliest tokens stay up to the first that brings their sum
    above `top_p`, and of these the `top_k` likeliest. Only the K tokens that the head returned are known: at temperatures 0
    and 1 their probabilities are exact, at others they are normalised over these K (docs/policies.md).
    """
    logits = candidates.top_logits[sequence, :count].astype(np.float64)
    scaled = logits / temperature if temperature > 0 else logits
    total = candidates.logsumexp[sequence, :count, None]
    if temperature not in (0.0, 1.0):
        total = np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    kept = np.ones(scaled.shape, np.bool_)
    if top_p < 1:
        kept[:, 1:] = np.cumsum(np.exp(scaled - total), axis=1)[:, :-1] <= top_p
    if top_k is not None and top_k < scaled.shape[1]:
        kept &= scaled >= scaled[:, top_k - 1 : top_k]
    left = np.where(kept, scaled, -np.inf)
    if top_p < 1 or top_k is not None:
        total = np.logaddexp.reduce(left, axis=1, keepdims=True)
    return left - total


def propose(
    candidates: Candidates,
    sequence: int,
    count: int,
    *,
    temperature: float,
    rng: np.random.Generator,
    tempered: NDArray[np.float64] | None = None,
    ranking_logsumexp: NDArray[np.float64] | None = None,
    ranked_last: frozenset[int] = frozenset(),
) -> Proposal:
    """Token choice and softmax confidence of the first `count` candidates of a sequence.

    Temperature T > 0 takes argmax(logit - T log(-log u)) in float64, which samples from softmax(logit / T) over the
    tokens the head returned, or over those of them that `tempered` [n, K] leaves.
    `ranking_logsumexp` [B, Q] normalises the confidence instead of the head's own, and `ranked_last` tokens get
    confidence 0: the end-of-text option.
    """
    if temperature > 0 and candidates.drawn is not None:
        return _propose_drawn(candidates, sequence, count)
    tokens, logits = candidates.top_tokens[sequence, :count], candidates.top_logits[sequence, :count]
    if temperature > 0:
        noise = rng.random(logits.shape)
        scores = logits.astype(np.float64)
        scores = scores if tempered is None else np.where(np.isfinite(tempered), scores, -np.inf)
        choice = np.argmax(scores - temperature * np.log(-np.log(np.maximum(noise, np.finfo(np.float64).tiny))), axis=1)
        rows = np.arange(count)
        chosen, logit = tokens[rows, choice], logits[rows, choice]
    else:
        choice = np.zeros(count, np.int64)
        chosen, logit = tokens[:, 0], logits[:, 0]
    if ranking_logsumexp is None:
        # In the head's own type, so that graph `commit` ranks by the same number: of the likeliest token it is -nll.
        logarithm = (logit - logits[:, 0] - candidates.nll[sequence, :count]).astype(np.float64)
    else:
        logarithm = logit - ranking_logsumexp[sequence, :count]
    confidence = np.exp(logarithm)
    if ranked_last:
        confidence[np.isin(chosen, list(ranked_last))] = 0.0
    return Proposal(chosen, confidence, choice)


def _propose_drawn(candidates: Candidates, sequence: int, count: int) -> Proposal:
    """The tokens that the head drew."""
    assert candidates.drawn is not None
    assert candidates.drawn_logit is not None
    logits = candidates.drawn_logit[sequence, :count].astype(np.float64)
    confidence = np.exp(logits - candidates.logsumexp[sequence, :count])
    return Proposal(candidates.drawn[sequence, :count], confidence, np.zeros(count, np.int64))


def rank(
    remasking: Remasking,
    candidates: Candidates,
    sequence: int,
    proposal: Proposal,
    *,
    order: NDArray[np.float64] | None = None,
    tempered: NDArray[np.float64] | None = None,
    ranked_last: frozenset[int] = frozenset(),
) -> NDArray[np.float64]:
    """What `--remasking` ranks the rows of a proposal by [n], larger first; `order` [n] is the random one, if drawn.

    Gap (p_1 - p_2) and entropy are Dream's orders `topk_margin` and `entropy` (arXiv 2508.15487), both of the noise-free
    distribution of `candidates`, or of `tempered` [n, K]; rows that propose a `ranked_last` token come after all others.
    """
    count = len(proposal.tokens)
    if order is not None:
        return order
    if tempered is not None:
        return _rank_tempered(remasking, tempered, proposal)
    if remasking == "low_confidence":
        return proposal.confidence
    if remasking == "margin":
        ranking = share(candidates, sequence, count, 0) - share(candidates, sequence, count, 1)
    else:
        ranking = -candidates.entropy[sequence, :count].astype(np.float64)
    ranking[np.isin(proposal.tokens, list(ranked_last))] = -np.inf
    return ranking


def _rank_tempered(remasking: Remasking, tempered: NDArray[np.float64], proposal: Proposal) -> NDArray[np.float64]:
    probability = np.exp(tempered)
    if remasking == "low_confidence":
        chosen: NDArray[np.float64] = probability[np.arange(len(probability)), proposal.choice]
        return chosen
    if remasking == "margin":
        gap: NDArray[np.float64] = probability[:, 0] - probability[:, 1]
        return gap
    certainty: NDArray[np.float64] = np.sum(probability * np.log(probability + ENTROPY_EPS), axis=1)
    return certainty


def share(candidates: Candidates, sequence: int, count: int, place: int) -> NDArray[np.float64]:
    """Probability of the token at this place of the order, 0 the likeliest, of the first `count` candidates [n]."""
    logits = candidates.top_logits[sequence, :count].astype(np.float64)
    probability: NDArray[np.float64] = np.exp(logits[:, place] - logits[:, 0] - candidates.nll[sequence, :count])
    return probability
