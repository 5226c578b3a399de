"""A layer's cache cut down to the rows that a block attends to most (Sparse-dLLM, arXiv 2508.02558)."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.layers import normalize, project_query_key
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape

HIDDEN, FORCED = -1e30, 1e30
"""Scores in float32 of a row that must not be kept and of one that must; relevance lies far between."""

FAR = 2.0**20
"""More than any position, and still exact in float32 when added to one."""

POOL = 3
"""Neighbours, itself among them, whose largest relevance a row gets."""


def layer_compact(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Keys and values of `budget` rows out of S: the block's, and those that its queries agree with most.

    `index` [B, X] holds the block's rows, `fresh` [B, S] is true there. By falling score the block's rows have the first X
    ranks; `kept` [B, Q] says of every rank whether it counts, since shorter sequences keep fewer rows. The result has rows
    that do not count first, then the kept ones by position, then the block's by position, so that what a later step
    attends to does not depend on how near-equal scores were ordered.
    """
    relevance = measure_relevance(ops, shape, t)
    with ops.scope("compaction"):
        hidden, forced = ops.fill(relevance, HIDDEN), ops.fill(relevance, FORCED)
        others = ops.where(t["fresh"], hidden, ops.where(t["mask"], relevance, hidden))
        pooled = ops.where(t["mask"], ops.max_pool(others, POOL), hidden)
        _, ranked = ops.top(ops.where(t["fresh"], forced, pooled), t["budget"])  # [B, Q] positions

        place, far = ops.narrow(ranked, relevance), ops.fill(relevance, FAR)
        place = ops.where(ops.take_rows(t["fresh"], ranked), ops.add(place, far), place)
        place = ops.where(t["kept"], place, ops.sub(place, far))
        _, order = ops.top(ops.scale(place, -1.0), t["budget"])
        index = ops.take_rows(ranked, order)
    return {
        "key_out": ops.take_rows(t["key"], index),
        "value_out": ops.take_rows(t["value"], index),
        "index_out": index,
        "relevance": relevance,
    }


def measure_relevance(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> T:  # [B, S] float32
    """Product of every key with the mean query of the block's visible rows, averaged over heads."""
    rows, cos, sin = (ops.take_rows(t[name], t["index"]) for name in ("hidden", "cos", "sin"))
    inner = normalize(ops, shape, rows, t, "norm1")
    query, _ = project_query_key(ops, shape, inner, cos, sin, t)
    with ops.scope("relevance"):
        query, key = ops.widen(ops.merge_heads(query)), ops.widen(t["key"])
        visible = ops.take_rows(t["mask"], t["index"])
        counted = ops.where(visible, ops.fill(query, 1.0), ops.fill(query, 0.0))  # [B, X]
        share = ops.div(counted, ops.sum(counted, keep=True))
        mean = ops.matmul(ops.unsqueeze(share, 1), query)  # [B, 1, H*d]
        return ops.scale(ops.sum(ops.mul(key, add_groups(ops, shape, mean)), keep=False), 1.0 / shape.heads)


def add_groups(ops: Ops[T], shape: ModelShape, query: T) -> T:  # [B, N, H*d] -> [B, N, G*d]
    """Sum of the query heads that share a key head."""
    size = shape.heads // shape.kv_heads
    if size == 1:
        return query
    heads = ops.split(query, (shape.head_dim,) * shape.heads)
    groups = []
    for first in range(0, shape.heads, size):
        total = heads[first]
        for other in heads[first + 1 : first + size]:
            total = ops.add(total, other)
        groups.append(total)
    return ops.concat(tuple(groups))
