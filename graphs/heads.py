"""The head graphs: alive rows to sampling statistics of candidate rows; names, dims and types stand in graphs/catalog.py.

Logits [B, Q, V] never leave a graph. What needs the whole distribution of the step before gets it as a state in the provider's
memory, which comes in and goes out as the caches of a layer do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

from dllm_export.graphs.drawing import draw_token
from dllm_export.graphs.layers import normalize
from dllm_export.graphs.long_rows import sum_row
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Softmax(Generic[T]):
    """The softmax of logits at temperature 1 before its division, in float32: probability = weights / total."""

    shifted: T  # [B, Q, V] logits less their maximum
    weights: T  # [B, Q, V] exp of it
    total: T  # [B, Q]
    log_total: T  # [B, Q]


@dataclass(frozen=True, slots=True)
class Likeliest(Generic[T]):
    """The K likeliest tokens of each row, the likeliest first."""

    logits: T  # [B, Q, K]
    tokens: T  # [B, Q, K]
    logit: T  # [B, Q] of the first


def head(ops: Ops[T], shape: ModelShape, t: Mapping[str, T], *, top: int) -> dict[str, T]:
    """Candidate rows to sampling statistics.

    `index` names the candidates among the alive rows; `bias` [V] is added to the logits (-1e30 bans a token);
    `guidance` times `cfg_scale` is the guidance residual, 0 without guidance. Confidence, entropy (nats) and logsumexp are of
    the softmax at temperature 1; margin is the probability gap of the two best tokens, `probability` that of the `given` token.
    `nll` is the negative log-likelihood of the likeliest token (nats), logsumexp less its logit; of nearly sure rows the
    difference of those two has lost it.
    """
    product = _classify(ops, shape, t)
    with ops.scope("statistics"):
        logits = _logits(ops, shape, product, t)
        likeliest = _likeliest(ops, logits, top)
        statistics = _statistics(ops, shape, likeliest, _softmax(ops, shape, logits, likeliest.logit))
        given = _logit_of(ops, logits, t["given"])
        return {**statistics, "probability": _probability(ops, given, likeliest.logit, statistics["nll"])}


def head_tracked(ops: Ops[T], shape: ModelShape, t: Mapping[str, T], *, top: int) -> dict[str, T]:
    """`head`, and how far each row moved since the step before.

    `distribution` holds log p of the last step, so that probabilities too small for float32 still compare. Divergence is
    KL(p || former p) in nats (KLASS, arXiv 2511.05664), similarity their cosine (Dynamic-dLLM, arXiv 2606.26120).
    """
    product = _classify(ops, shape, t)
    with ops.scope("statistics"):
        logits = _logits(ops, shape, product, t)
        likeliest = _likeliest(ops, logits, top)
        softmax = _softmax(ops, shape, logits, likeliest.logit)
        log_share = ops.sub(softmax.shifted, ops.unsqueeze(softmax.log_total, 2))
        # The cosine does not ask for the weights' total.
        weights, former = softmax.weights, ops.exp(t["distribution"])
        squares = (sum_row(ops, ops.mul(p, p), shape.vocab) for p in (weights, former))
        dot = sum_row(ops, ops.mul(weights, former), shape.vocab)
        # A banned token has p = 0 and a log p of -1e30 in both steps: it adds 0 * 0 and no nan.
        moved = sum_row(ops, ops.mul(weights, ops.sub(log_share, t["distribution"])), shape.vocab)
        return {
            **_statistics(ops, shape, likeliest, softmax),
            "distribution_out": log_share,
            "divergence": ops.div(moved, softmax.total),
            "similarity": ops.mul(dot, ops.rsqrt(ops.mul(*squares), 0.0)),
        }


def head_credited(ops: Ops[T], shape: ModelShape, t: Mapping[str, T], *, top: int) -> dict[str, T]:
    """`head` of logits to which the credit of past steps was added (CreditDecoding in dInfer, arXiv 2510.08666).

    credit <- decay credit, plus max(p)^power at each row's best token; fused logits = logits + weight log(1 + credit).
    """
    product = _classify(ops, shape, t)
    with ops.scope("statistics"):
        logits = _logits(ops, shape, product, t)
        best = _likeliest(ops, logits, 1)
        tokens = ops.positions(ops.unsqueeze(t["bias"], 0))
        # The best token's weight is 1, so that log max(p) is -log total.
        log_total = _softmax(ops, shape, logits, best.logit).log_total
        earned = ops.exp(ops.mul(ops.scale(log_total, -1.0), t["credit_power"]))
        nothing = ops.fill(earned, 0.0)
        earned = ops.where(ops.matches(best.tokens, tokens), ops.unsqueeze(earned, 2), nothing)
        credit = ops.add(ops.mul(t["credit"], t["credit_decay"]), earned)
        trust = ops.log(ops.add(credit, ops.fill(credit, 1.0)))
        fused = ops.add(logits, ops.mul(trust, t["credit_weight"]))
        likeliest = _likeliest(ops, fused, top)
        softmax = _softmax(ops, shape, fused, likeliest.logit)
        return {**_statistics(ops, shape, likeliest, softmax), "credit_out": credit}


def head_drawn(ops: Ops[T], shape: ModelShape, t: Mapping[str, T], *, top: int) -> dict[str, T]:
    """`head`, and a token drawn from the whole distribution of each row.

    `sharpness` is 1 / temperature; `uniform` [B, Q, 2] are the numbers that decide (graphs/drawing.py).
    """
    product = _classify(ops, shape, t)
    with ops.scope("statistics"):
        logits = _logits(ops, shape, product, t)
        likeliest = _likeliest(ops, logits, top)
        softmax = _softmax(ops, shape, logits, likeliest.logit)
        weights = ops.exp(ops.mul(softmax.shifted, t["sharpness"]))
        drawn = draw_token(ops, weights, shape.vocab, t["uniform"])
        found = {"drawn": drawn, "drawn_logit": _logit_of(ops, logits, drawn)}
        return {**_statistics(ops, shape, likeliest, softmax), **found}


def head_moved(ops: Ops[T], shape: ModelShape, t: Mapping[str, T], *, top: int) -> dict[str, T]:
    """The next token of rows whose tokens are noise in part, drawn by ratios s(y) = p(y) / p(`present` token).

    The model's numbers are log s, that of the present token counting as 0. With the `moves` a, b, c and d another token has
    weight a s(y) - b sum(s) and the present one c - d sum(s), nothing where that is negative (SEDD, arXiv 2310.16834: both
    of its samplers have this form). `uniform` decides as in `head_drawn`; statistics are of the softmax of log s.
    """
    product = _classify(ops, shape, t)
    with ops.scope("statistics"):
        logits = _logits(ops, shape, product, t)
        present = ops.matches(ops.unsqueeze(t["present"], 2), ops.positions(ops.unsqueeze(t["bias"], 0)))
        nothing = ops.fill(logits, 0.0)
        logits = ops.where(present, nothing, logits)
        likeliest = _likeliest(ops, logits, top)
        softmax = _softmax(ops, shape, logits, likeliest.logit)
        # All weights in units of the largest ratio, so that none is too large for float32.
        one = ops.exp(ops.sub(nothing, ops.unsqueeze(likeliest.logit, 2)))
        total = ops.unsqueeze(softmax.total, 2)
        other, others, stay, stays = (ops.piece(t["moves"], place, place + 1) for place in range(4))
        moving = ops.sub(ops.mul(softmax.weights, other), ops.mul(total, others))
        staying = ops.sub(ops.mul(one, stay), ops.mul(total, stays))
        weights = ops.relu(ops.where(present, staying, moving))
        drawn = draw_token(ops, weights, shape.vocab, t["uniform"])
        drawn_logit = ops.column(ops.take_last(logits, ops.unsqueeze(drawn, 2)), 0)
        return {**_statistics(ops, shape, likeliest, softmax), "drawn": drawn, "drawn_logit": drawn_logit}


def _classify(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> T:
    """Candidate rows after the last norm, with the guidance residual where there is one, times the head [B, Q, V]."""
    rows = normalize(ops, shape, ops.take_rows(t["hidden"], t["index"]), t, "norm")
    if "guidance" in t:
        rows = ops.add(rows, ops.mul(ops.take_rows(t["guidance"], t["index"]), t["cfg_scale"]))
    return ops.matmul_transposed(rows, t["embedding"]) if shape.tied_head else ops.matmul(rows, t["head"])


def _logits(ops: Ops[T], shape: ModelShape, product: T, t: Mapping[str, T]) -> T:
    """The head's product as float32 logits, scaled and biased."""
    logits = ops.widen(product)
    if shape.head_bias:
        logits = ops.add(logits, ops.widen(t["head_bias"]))
    if shape.logits_scale != 1.0:
        logits = ops.scale(logits, shape.logits_scale)
    return ops.add(logits, t["bias"])


def _likeliest(ops: Ops[T], logits: T, top: int) -> Likeliest[T]:
    top_logits, top_tokens = ops.top(logits, top)
    return Likeliest(top_logits, top_tokens, ops.column(top_logits, 0))


def _logit_of(ops: Ops[T], logits: T, token: T) -> T:  # [B, Q, V], [B, Q] -> [B, Q]
    return ops.column(ops.take_last(logits, ops.unsqueeze(token, 2)), 0)


def _softmax(ops: Ops[T], shape: ModelShape, logits: T, largest: T) -> Softmax[T]:
    """`largest` [B, Q] are the rows' largest logits."""
    shifted = ops.sub(logits, ops.unsqueeze(largest, 2))
    weights = ops.exp(shifted)
    total = sum_row(ops, weights, shape.vocab)
    return Softmax(shifted, weights, total, ops.log(total))


def _probability(ops: Ops[T], logit: T, best: T, nll: T) -> T:
    """Of a token with this logit, where the likeliest has the logit `best`."""
    return ops.exp(ops.sub(ops.sub(logit, best), nll))


def _statistics(ops: Ops[T], shape: ModelShape, likeliest: Likeliest[T], softmax: Softmax[T]) -> dict[str, T]:
    """The outputs that all heads share."""
    top_logits, top_tokens, best = likeliest.logits, likeliest.tokens, likeliest.logit
    nll = softmax.log_total
    confidence = ops.exp(ops.scale(nll, -1.0))
    second = _probability(ops, ops.column(top_logits, 1), best, nll)
    mean = ops.div(sum_row(ops, ops.mul(softmax.weights, softmax.shifted), shape.vocab), softmax.total)
    return {
        "token": ops.column(top_tokens, 0),
        "confidence": confidence,
        "margin": ops.sub(confidence, second),
        "entropy": ops.sub(nll, mean),
        "top_tokens": top_tokens,
        "top_logits": top_logits,
        "logsumexp": ops.add(best, nll),
        "nll": nll,
    }
