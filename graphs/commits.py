"""What a step commits, decided where its statistics are: the next step then starts before the host has read them."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape

LAST = -3e38
"""The score of a row that only pads: below any logarithm of a probability."""


def commit(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """The next step's tokens: `tokens` [B, X], with those of the best-ranked candidates in their places.

    Committed are of each sequence the `quota` rows whose likeliest token has the largest probability, the first of equal ones
    (LLaDA's sampling loop, arXiv 2502.09992), and all rows where its logarithm is at least `sure` (Fast-dLLM's threshold, arXiv
    2505.22618). The logarithm is -`nll` in float32, as on the host, so that both commit the same rows to the bit.
    `candidate` [B, Q] is false where rows only pad; alive row x takes the token of candidate `slot[x]` if that one is committed
    and `fresh[x]`.
    """
    with ops.scope("statistics"):
        score = ops.scale(t["nll"], -1.0)  # [B, Q]
        score = ops.where(t["candidate"], score, ops.fill(score, LAST))
        place = ops.narrow(ops.positions(score), score)  # [Q]
        mine, other = ops.unsqueeze(score, 2), ops.unsqueeze(score, 1)
        earlier = ops.exceeds(ops.unsqueeze(place, 1), ops.unsqueeze(place, 0))  # [Q, Q] the other comes before
        one, nothing = ops.fill(score, 1.0), ops.fill(score, 0.0)
        tied = ops.where(ops.both(earlier, ops.at_most(mine, other)), one, nothing)
        rank = ops.sum(ops.where(ops.exceeds(other, mine), one, tied), keep=False)  # [B, Q] those that come before
        rank = ops.where(ops.at_most(t["sure"], score), ops.fill(score, -1.0), rank)
        committed = ops.both(t["candidate"], ops.exceeds(ops.unsqueeze(t["quota"], 1), rank))
    decided = ops.both(t["fresh"], ops.take_rows(committed, t["slot"]))
    return {"tokens_out": ops.where(decided, ops.take_rows(t["token"], t["slot"]), t["tokens"])}
