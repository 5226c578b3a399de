"""The layer of a block's shadow: what a model would write in its rows if it did not see them (WINO, arXiv 2507.18578)."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.layers import finish_rows, hand_over, normalize, project_query_key, project_value
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.shape import ModelShape


def project_shadow(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """First stage of `layer_shadow`: queries, keys and values of the shadow rows, at the positions that they stand for."""
    inner = normalize(ops, shape, t["hidden"], t, "norm1")
    cos, sin = ops.take_rows(t["cos"], t["index"]), ops.take_rows(t["sin"], t["index"])
    query, key = project_query_key(ops, shape, inner, cos, sin, t)
    return {"query_out": query, "own_key_out": key, "own_value_out": project_value(ops, inner, t)}


def finish_shadow(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Second stage of `layer_shadow`: attention over the cached rows and the shadow, and MLP."""
    key, value = (ops.join_rows(t[name], t[f"own_{name}"]) for name in ("key", "value"))
    visible = ops.join_rows(t["mask"], t["shown"])
    # The shadow's columns come after those of the cache, so that no index is one of them.
    others = ops.differs(ops.unsqueeze(t["index"], 2), ops.positions(key))
    mask = ops.both(ops.unsqueeze(visible, 1), others)
    return {"hidden_out": ops.add(t["hidden"], finish_rows(ops, shape, t["hidden"], t["query"], key, value, mask, t))}


def layer_shadow(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Q rows that are stored nowhere, each in the place of a cached row that it does not see.

    `index` [B, Q] holds the columns of those rows: a shadow is rotated as its row is and attends to all visible columns but
    this one, and to the shadow rows that are `shown` [B, Q]. No cached row sees a shadow, so that keys and values are those
    that the step has just written, and running after it is the same as running within it.
    """
    return finish_shadow(ops, shape, hand_over(t, project_shadow(ops, shape, t)))
