"""The graphs. Each is a pure function of named tensors; names, dims and types stand in graphs/catalog.py.

`t` holds inputs and weights by name; the result holds outputs by name. Caches come in and go out as tensors, so that a
runtime may keep them in device memory and alternate between two copies.
"""

from __future__ import annotations

from collections.abc import Mapping

from dllm_export.graphs.layers import (
    find_visible,
    finish_rows,
    hand_over,
    normalize,
    project,
    project_query_key,
    project_value,
)
from dllm_export.graphs.ops import Ops, T
from dllm_export.graphs.picking import list_picked, measure_drift, pick_layer, pick_rows, put_picked, rotary_rows
from dllm_export.graphs.shape import ModelShape

TIME_WIDTH = 256
"""Numbers that describe a noise level: half cosines, half sines."""


def condition_time(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """The table of each sequence's noise level -> what it conditions all norms and gates by."""
    x = ops.narrow(t["time"], t["time1"])
    for name in ("time1", "time2"):
        x = ops.silu(project(ops, x, t, name))
    return {"condition_out": x}


def embed(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """tokens -> hidden."""
    hidden = ops.lookup(t["embedding"], t["tokens"])
    return {"hidden_out": hidden if shape.embedding_scale == 1.0 else ops.scale(hidden, shape.embedding_scale)}


def layer_full(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Every row of the sequence recomputed: keys, values and deltas of all S rows."""
    hidden = t["hidden"]
    inner = normalize(ops, shape, hidden, t, "norm1")
    query, key = project_query_key(ops, shape, inner, t["cos"], t["sin"], t)
    value = project_value(ops, inner, t)
    delta = finish_rows(ops, shape, hidden, query, key, value, find_visible(ops, t, all_rows=True), t)
    return {"hidden_out": ops.add(hidden, delta), "key_out": key, "value_out": value, "delta_out": delta}


def project_partial(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """First stage of `layer_partial`: the rows' queries, and the caches with their keys and values."""
    inner = normalize(ops, shape, t["hidden"], t, "norm1")
    cos, sin = ops.take_rows(t["cos"], t["index"]), ops.take_rows(t["sin"], t["index"])
    query, key = project_query_key(ops, shape, inner, cos, sin, t)
    key = ops.put_rows(key, t["index"], t["slot"], t["fresh"], t["key"])
    value = ops.put_rows(project_value(ops, inner, t), t["index"], t["slot"], t["fresh"], t["value"])
    return {"query_out": query, "key_out": key, "value_out": value}


def finish_partial(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Second stage of `layer_partial`: attention and MLP of the rows."""
    visible = find_visible(ops, t)
    delta = finish_rows(ops, shape, t["hidden"], t["query"], t["key"], t["value"], visible, t)
    return {"hidden_out": ops.add(t["hidden"], delta), "delta_out": delta}


def layer_partial(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Q rows chosen by the host recomputed against the cached keys and values of the others.

    `index` holds their positions; `slot` and `fresh` are its inverse: position j is fresh row slot[j] where fresh[j].
    """
    first = project_partial(ops, shape, t)
    return first | finish_partial(ops, shape, hand_over(t, first))


def project_adaptive(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """First stage of `layer_adaptive`: which rows are picked, their queries, and the caches with the new keys and values."""
    inner = normalize(ops, shape, t["hidden"], t, "norm1")
    new_value = project_value(ops, inner, t)
    drift = measure_drift(ops, new_value, ops.take_rows(t["value"], t["index"]))
    value = ops.put_rows(new_value, t["index"], t["slot"], t["fresh"], t["value"])
    picked = pick_rows(ops, drift, t)
    query, new_key = project_query_key(ops, shape, ops.take_rows(inner, picked.row), *rotary_rows(ops, picked, t), t)
    key = put_picked(ops, picked, new_key, t, t["key"])
    return list_picked(picked, query, key, value) | {"drift": drift}


def layer_adaptive(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """The layer itself picks `budget` of its X alive rows: the forced ones, then those whose value drifted most.

    dLLM-Cache's V-verify (arXiv 2506.06295, section 3): values of all alive rows are projected and stored; queries, keys,
    attention and MLP run for the picked rows only; the other rows advance by their cached delta. `index`, `slot`, `fresh`
    place the alive rows in the sequence as in `layer_partial`; a row that is alive but not fresh keeps its cached value.
    """
    return pick_layer(project_adaptive, ops, shape, t)


def project_tracking(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """First stage of `layer_tracking`: as of `layer_adaptive`, with keys and values of the picked rows alone."""
    drift = measure_drift(ops, t["hidden"], t["seen"])
    picked = pick_rows(ops, drift, t)
    inner = normalize(ops, shape, ops.take_rows(t["hidden"], picked.row), t, "norm1")
    query, new_key = project_query_key(ops, shape, inner, *rotary_rows(ops, picked, t), t)
    key = put_picked(ops, picked, new_key, t, t["key"])
    value = put_picked(ops, picked, project_value(ops, inner, t), t, t["value"])
    return list_picked(picked, query, key, value) | {"drift": drift}


def layer_tracking(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """As `layer_adaptive`, but rows are picked by the drift of the layer's input since the last step, `seen`.

    Dynamic-dLLM (arXiv 2606.26120): the input's drift foretells that of everything computed from it, so that keys and
    values too are projected and stored for the picked rows alone.
    """
    return pick_layer(project_tracking, ops, shape, t)


def project_indicated(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """First stage of `layer_indicated`: as of `layer_adaptive`, with keys, values and indicators of all alive rows."""
    inner = normalize(ops, shape, t["hidden"], t, "norm1")
    indicator = ops.matmul(inner, t["proxy"])
    drift = measure_drift(ops, indicator, t["indicator"])
    cos, sin = (ops.take_rows(t[name], t["index"]) for name in ("cos", "sin"))
    query, new_key = project_query_key(ops, shape, inner, cos, sin, t)
    key = ops.put_rows(new_key, t["index"], t["slot"], t["fresh"], t["key"])
    value = ops.put_rows(project_value(ops, inner, t), t["index"], t["slot"], t["fresh"], t["value"])
    picked = pick_rows(ops, drift, t)
    listed = list_picked(picked, ops.take_rows(query, picked.row), key, value)
    return listed | {"indicator_out": indicator, "drift": drift}


def layer_indicated(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """As `layer_adaptive`, but rows are picked by the drift of a narrow `indicator` of their value.

    SPA-Cache (arXiv 2602.02544): keys, values and indicators of all alive rows are projected and stored; attention and MLP
    run for the picked rows only. Queries share a product with the keys, and those of the other rows are thrown away:
    cutting their half out of the fused weight at every call would cost more.
    """
    return pick_layer(project_indicated, ops, shape, t)


def layer_indicator(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Indicators of rows entering a layer: what `layer_indicated` compares with after a step that ran another graph."""
    inner = normalize(ops, shape, ops.take_rows(t["hidden"], t["index"]), t, "norm1")
    return {"indicator_out": ops.matmul(inner, t["proxy"])}


def layer_skip(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """No row recomputed: every alive row advances by its cached delta (update ratio 0)."""
    return {"hidden_out": ops.add(t["hidden"], t["delta"])}


def gather(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Rows of `hidden` by position: moves rows between the whole sequence and the response."""
    return {"hidden_out": ops.take_rows(t["hidden"], t["index"])}


def copy_features(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Cached keys and values of rows of any sequence, in another layout: between a shared prefix and a request's caches.

    `index` [C, Q] counts the source's rows through all its sequences, so that one sequence can become many and many one.
    """
    return {f"{name}_out": ops.take_flat(t[name], t["index"]) for name in ("key", "value")}


def copy_rows(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """The same for rows of the residual stream."""
    return {"hidden_out": ops.take_flat(t["hidden"], t["index"])}


def join_rows(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Alive rows back into the whole sequence: position j is row slot[j] of `hidden` where fresh[j], else that of `rest`."""
    placed = ops.take_rows(t["hidden"], t["slot"])
    return {"hidden_out": ops.where(ops.unsqueeze(t["fresh"], 2), placed, t["rest"])}


def guidance(ops: Ops[T], shape: ModelShape, t: Mapping[str, T]) -> dict[str, T]:
    """Classifier-free guidance residual before the head: norm(conditional) - norm(unconditional).

    The head is linear, so w * (logits_cond - logits_uncond) = (w * residual) @ head: D numbers a row instead of V.
    """
    conditional = normalize(ops, shape, t["hidden"], t, "norm")
    return {"guidance_out": ops.sub(conditional, normalize(ops, shape, t["unconditional"], t, "norm"))}
