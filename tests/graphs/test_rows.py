"""Which rows a layer graph recomputes, and what happens to the others; in float64 and on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dllm_export.exporter.proxy import make_proxy
from dllm_export.graphs import ModelShape

Array = NDArray[Any]
Feeds = dict[str, Array]
DrawFeeds = Callable[..., Feeds]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

SHAPE = ModelShape(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=12,
    mlp=48,
    vocab=71,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=True,
    qk_norm=True,
    indicator_rank=6,
)
BATCH, LENGTH, ALIVE = 2, 12, 7
READINGS = ["float64", "onnxruntime"]
every_reading = pytest.mark.parametrize("reading", READINGS)


def close(reading: str, found: Array, expected: Array) -> None:
    rtol, atol = (0.0, 1e-12) if reading == "float64" else (1e-3, 1e-5)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def rows(array: Array, index: Array) -> Array:
    """array [B, N, D], index [B, Q] -> [B, Q, D]."""
    return np.take_along_axis(array, index[:, :, None].astype(np.int64), axis=1)


def as_seen(reading: str, array: Array) -> Array:
    """A cache as the graph gets it."""
    return array if reading == "float64" else array.astype(np.float32)


def place_rows(feeds: Feeds, index: Array) -> Feeds:
    """The same inputs with these rows as the alive ones."""
    slot, fresh = np.zeros((BATCH, LENGTH), np.int32), np.zeros((BATCH, LENGTH), np.bool_)
    for row, places in enumerate(index):
        slot[row, places], fresh[row, places] = np.arange(len(places)), True
    return {**feeds, "index": index.astype(np.int32), "slot": slot, "fresh": fresh}


# -- layer_partial
@every_reading
@pytest.mark.parametrize("content", [0.0, 1e3, np.nan, np.inf])
def test_a_partial_layer_over_all_rows_equals_the_full_layer_whatever_the_cache_holds(
    content: float, reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    full = draw_feeds(SHAPE, "layer_full")
    cache = np.full((BATCH, LENGTH, SHAPE.key_width), content)
    feeds = place_rows({**full, "key": cache, "value": cache}, np.tile(np.arange(LENGTH), (BATCH, 1)))
    expected, found = run_graph(reading, SHAPE, "layer_full", full), run_graph(reading, SHAPE, "layer_partial", feeds)
    for name, value in expected.items():
        close(reading, found[name], value)


@every_reading
def test_the_order_of_the_rows_does_not_matter(reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(SHAPE, "layer_partial", Q=5)
    order = np.array([3, 0, 4, 1, 2])
    shuffled = place_rows({**feeds, "hidden": feeds["hidden"][:, order]}, feeds["index"][:, order])
    before, after = (run_graph(reading, SHAPE, "layer_partial", each) for each in (feeds, shuffled))
    for name in ("hidden_out", "delta_out"):
        close(reading, after[name], before[name][:, order])
    for name in ("key_out", "value_out"):
        close(reading, after[name], before[name])


@every_reading
def test_rows_that_are_not_recomputed_keep_their_cache_to_the_last_bit(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_partial")
    found = run_graph(reading, SHAPE, "layer_partial", feeds)
    for name in ("key", "value"):
        old, new = as_seen(reading, feeds[name]), found[f"{name}_out"]
        np.testing.assert_array_equal(new[~feeds["fresh"]], old[~feeds["fresh"]])
        assert (new[feeds["fresh"]] != old[feeds["fresh"]]).all()


@every_reading
def test_keys_that_the_mask_hides_have_no_influence(reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = place_rows(draw_feeds(SHAPE, "layer_partial"), np.tile(np.arange(8, 12), (BATCH, 1)))
    changed = {name: np.where(feeds["mask"][:, :, None], feeds[name], 50.0) for name in ("key", "value")}
    assert any((changed[name] != feeds[name]).any() for name in changed)
    before, after = (run_graph(reading, SHAPE, "layer_partial", each) for each in (feeds, {**feeds, **changed}))
    np.testing.assert_array_equal(after["hidden_out"], before["hidden_out"])
    visible = {name: feeds[name] + 1.0 for name in ("key", "value")}
    assert (
        run_graph(reading, SHAPE, "layer_partial", {**feeds, **visible})["hidden_out"] != before["hidden_out"]
    ).any()


# -- layer_adaptive
@every_reading
def test_an_adaptive_layer_with_a_budget_for_all_rows_equals_the_partial_layer(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = {**draw_feeds(SHAPE, "layer_adaptive"), "budget": np.array([ALIVE])}
    partial = {name: array for name, array in feeds.items() if name not in ("delta", "budget", "forced")}
    found, expected = (
        run_graph(reading, SHAPE, graph, each)
        for graph, each in (("layer_adaptive", feeds), ("layer_partial", partial))
    )
    for name, value in expected.items():
        close(reading, found[name], value)
    assert np.sort(found["index_out"]).tolist() == [list(range(LENGTH - ALIVE, LENGTH))] * BATCH


@every_reading
def test_an_adaptive_layer_picks_forced_rows_and_then_those_that_drifted_most(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_adaptive")
    feeds["forced"] = np.zeros((BATCH, ALIVE), np.bool_)
    feeds["forced"][0, 4] = True
    found = run_graph(reading, SHAPE, "layer_adaptive", feeds)
    score = np.where(feeds["forced"], np.inf, found["drift"])
    expected = np.argsort(-score, axis=1, kind="stable")[:, :3] + LENGTH - ALIVE
    assert found["index_out"].tolist() == expected.tolist()
    new, old = found["value_out"][:, LENGTH - ALIVE :], as_seen(reading, feeds["value"])[:, LENGTH - ALIVE :]
    cosine = (new * old).sum(-1) / (np.linalg.norm(new, axis=-1) * np.linalg.norm(old, axis=-1))
    np.testing.assert_allclose(found["drift"], 1 - 1e-6 - cosine, atol=1e-5)


@every_reading
def test_rows_that_are_not_picked_advance_by_their_cached_delta_and_keep_their_key(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_adaptive")
    found = run_graph(reading, SHAPE, "layer_adaptive", feeds)
    old = {name: as_seen(reading, feeds[name]) for name in ("hidden", "delta", "key", "value")}
    picked = np.zeros((BATCH, LENGTH), np.bool_)
    np.put_along_axis(picked, found["index_out"].astype(np.int64), True, axis=1)
    alive = picked[:, LENGTH - ALIVE :]
    np.testing.assert_array_equal(found["delta_out"][~alive], old["delta"][~alive])
    np.testing.assert_array_equal(found["hidden_out"][~alive], (old["hidden"] + old["delta"])[~alive])
    np.testing.assert_array_equal(found["key_out"][~picked], old["key"][~picked])
    assert (found["key_out"][picked] != old["key"][picked]).all()
    assert (found["delta_out"][alive] != old["delta"][alive]).all()
    assert (found["value_out"][feeds["fresh"]] != old["value"][feeds["fresh"]]).all(), "values are stored for all rows"


@every_reading
def test_a_row_that_is_alive_but_not_fresh_keeps_its_cached_value(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_adaptive")
    feeds["fresh"][:, 8:] = False
    found = run_graph(reading, SHAPE, "layer_adaptive", feeds)
    for name in ("key", "value"):
        np.testing.assert_array_equal(found[f"{name}_out"][:, 8:], as_seen(reading, feeds[name])[:, 8:])
    assert (found["value_out"][:, 5:8] != as_seen(reading, feeds["value"])[:, 5:8]).all()


@every_reading
def test_rows_that_did_not_change_tie_and_the_leftmost_is_picked(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    """A row changes here by rounding alone: the cached values are those of the other precision."""
    feeds = {**draw_feeds(SHAPE, "layer_adaptive"), "forced": np.zeros((BATCH, ALIVE), np.bool_)}
    other = run_graph("float32", SHAPE, "layer_adaptive", feeds)
    feeds["value"] = other["value_out"].astype(np.float64)
    found = run_graph(reading, SHAPE, "layer_adaptive", feeds)
    assert found["drift"].tolist() == [[0.0] * ALIVE] * BATCH
    assert found["index_out"].tolist() == [[5, 6, 7]] * BATCH
    feeds["value"][1, 9] *= -1
    assert run_graph(reading, SHAPE, "layer_adaptive", feeds)["index_out"].tolist() == [[5, 6, 7], [9, 5, 6]]


@every_reading
def test_a_row_of_zeros_counts_as_changed(reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(SHAPE, "layer_adaptive")
    feeds["value"][:, 9] = 0.0
    found = run_graph(reading, SHAPE, "layer_adaptive", feeds)
    np.testing.assert_allclose(found["drift"][:, 4], 1 - 1e-6, rtol=1e-6)


# -- layer_compact
def relevance_of(shape: ModelShape, feeds: Feeds, sequence: int) -> Array:
    """Mean over the block's visible rows and over heads of the product of query and key, row by row [S]."""
    half, total = shape.head_dim // 2, np.zeros(LENGTH)
    block = [row for row in feeds["index"][sequence] if feeds["mask"][sequence, row]]
    for row in block:
        x = feeds["hidden"][sequence, row]
        inner = x / np.sqrt((x * x).mean() + shape.norm_eps) * feeds["norm1"]
        queries = (inner @ feeds["qk"] + feeds["qk_bias"])[: shape.query_width].reshape(shape.heads, shape.head_dim)
        cos, sin = feeds["cos"][sequence, row], feeds["sin"][sequence, row]
        for head, query in enumerate(queries):
            query = query / np.sqrt((query * query).mean() + shape.norm_eps) * feeds["q_norm"]
            low, high = query[:half], query[half:]
            turned = np.concatenate((low * cos - high * sin, high * cos + low * sin))
            group = head // (shape.heads // shape.kv_heads)
            keys = feeds["key"][sequence, :, group * shape.head_dim : (group + 1) * shape.head_dim]
            total += keys @ turned / (len(block) * shape.heads)
    return total


@every_reading
@pytest.mark.parametrize("seed", range(4))
def test_a_compacted_cache_holds_the_most_relevant_rows_by_position_and_the_block_last(
    seed: int, reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_compact", seed=seed)
    found = run_graph(reading, SHAPE, "layer_compact", feeds)
    for sequence in range(BATCH):
        relevance = relevance_of(SHAPE, feeds, sequence)
        close(reading, found["relevance"][sequence], relevance)
        block, visible = set(feeds["index"][sequence].tolist()), feeds["mask"][sequence]
        others = [row for row in range(LENGTH) if visible[row] and row not in block]
        pooled = {row: max(relevance[near] for near in (row - 1, row, row + 1) if near in others) for row in others}
        count = int(feeds["kept"][sequence].sum()) - len(block)
        best = sorted(others, key=lambda row: (-pooled[row], row))[:count]
        index = found["index_out"][sequence].tolist()
        assert index[-count - len(block) :] == [*sorted(best), *sorted(block)]
        assert len(set(index)) == len(index), "columns before those hold rows that nobody sees"
    for name in ("key", "value"):
        np.testing.assert_array_equal(found[f"{name}_out"], rows(as_seen(reading, feeds[name]), found["index_out"]))


@every_reading
def test_padding_is_never_kept(reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    """Not even where its keys agree with the block more than any other's, nor through its neighbours."""
    feeds = draw_feeds(SHAPE, "layer_compact")
    feeds["index"][:] = [4, 5, 6]
    feeds["fresh"] = np.tile((np.arange(LENGTH) >= 4) & (np.arange(LENGTH) < 7), (BATCH, 1))
    before = run_graph(reading, SHAPE, "layer_compact", feeds)
    direction = np.sign(before["relevance"][1, :2, None])
    feeds["key"][1, :2] *= 1e4 * direction
    after = run_graph(reading, SHAPE, "layer_compact", feeds)
    assert (after["relevance"][1, :2] > 1e2).all(), "more relevant than all others"
    shown = int(feeds["kept"][1].sum())
    assert after["index_out"][1, -shown:].tolist() == before["index_out"][1, -shown:].tolist()
    assert min(after["index_out"][1, -shown:]) >= 2


# -- layer_tracking, layer_indicated
def pick_by(drift: Array, feeds: Feeds) -> Array:
    """The rows that a budget of 3 takes."""
    score = np.where(feeds["forced"], np.inf, drift)
    return np.argsort(-score, axis=1, kind="stable")[:, :3]


def cosine_drift(new: Array, old: Array) -> Array:
    cosine = (new * old).sum(-1) / (np.linalg.norm(new, axis=-1) * np.linalg.norm(old, axis=-1))
    return np.maximum(1 - 1e-6 - cosine, 0)


def normed(feeds: Feeds) -> Array:
    hidden = feeds["hidden"]
    return hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + SHAPE.norm_eps) * feeds["norm1"]


def check_updated(reading: str, found: Feeds, feeds: Feeds, stored_whole: tuple[str, ...]) -> None:
    """Picked rows are those of a partial layer over the alive rows with the new cache; the others as they were."""
    chosen = found["index_out"] - (LENGTH - ALIVE)
    picked = np.zeros((BATCH, ALIVE), np.bool_)
    np.put_along_axis(picked, chosen.astype(np.int64), True, axis=1)
    old = {name: as_seen(reading, feeds[name]) for name in ("hidden", "delta", "key", "value")}
    np.testing.assert_array_equal(found["delta_out"][~picked], old["delta"][~picked])
    np.testing.assert_array_equal(found["hidden_out"][~picked], (old["hidden"] + old["delta"])[~picked])
    for name in ("key", "value"):
        kept, new = ~feeds["fresh"], found[f"{name}_out"]
        kept[:, LENGTH - ALIVE :] |= ~picked & (name not in stored_whole)
        np.testing.assert_array_equal(new[kept], old[name][kept])
        assert (new[~kept] != old[name][~kept]).any(-1).all()


@every_reading
def test_a_tracking_layer_picks_by_its_input_and_stores_the_picked_rows_alone(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_tracking")
    found = run_graph(reading, SHAPE, "layer_tracking", feeds)
    drift = cosine_drift(feeds["hidden"], feeds["seen"])
    np.testing.assert_allclose(found["drift"], drift, atol=1e-5)
    assert (found["index_out"] - (LENGTH - ALIVE)).tolist() == pick_by(drift, feeds).tolist()
    check_updated(reading, found, feeds, ())
    partial = place_rows({**feeds, "hidden": rows(feeds["hidden"], pick_by(drift, feeds))}, found["index_out"])
    names = [tensor for tensor in partial if tensor not in ("delta", "budget", "forced", "seen")]
    expected = run_graph(reading, SHAPE, "layer_partial", {name: partial[name] for name in names})
    close(reading, rows(found["delta_out"], pick_by(drift, feeds)), expected["delta_out"])
    for name in ("key_out", "value_out"):
        close(reading, found[name], expected[name])


@every_reading
def test_an_indicated_layer_picks_by_its_indicator_and_stores_keys_and_values_of_all_rows(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_indicated")
    found = run_graph(reading, SHAPE, "layer_indicated", feeds)
    indicator = normed(feeds) @ feeds["proxy"]
    close(reading, found["indicator_out"], indicator)
    drift = cosine_drift(indicator, feeds["indicator"])
    np.testing.assert_allclose(found["drift"], drift, atol=1e-5)
    assert (found["index_out"] - (LENGTH - ALIVE)).tolist() == pick_by(drift, feeds).tolist()
    check_updated(reading, found, feeds, ("key", "value"))
    partial = {name: feeds[name] for name in feeds if name not in ("delta", "budget", "forced", "indicator", "proxy")}
    expected = run_graph(reading, SHAPE, "layer_partial", partial)
    close(reading, *(rows(each["delta_out"], pick_by(drift, feeds)) for each in (found, expected)))
    for name in ("key_out", "value_out"):
        close(reading, found[name], expected[name])


@every_reading
def test_an_indicator_of_full_rank_ranks_rows_as_their_values_do(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    """SPA-Cache's claim: with all directions and no bias, cosines of indicators are those of values."""
    shape = replace(SHAPE, indicator_rank=SHAPE.key_width, qkv_bias=False)
    feeds = draw_feeds(shape, "layer_indicated")
    feeds["proxy"] = make_proxy(torch.from_numpy(feeds["v"].T), shape.indicator_rank).double().numpy()
    before = np.random.default_rng(1).normal(size=feeds["hidden"].shape)
    feeds["indicator"], old = before @ feeds["proxy"], before @ feeds["v"]
    value = feeds["value"].copy()
    value[:, LENGTH - ALIVE :] = old
    adaptive = {name: feeds[name] for name in feeds if name not in ("indicator", "proxy")} | {"value": value}
    found, expected = (
        run_graph(reading, shape, graph, each)
        for graph, each in (("layer_indicated", feeds), ("layer_adaptive", adaptive))
    )
    np.testing.assert_allclose(found["drift"], expected["drift"], atol=2e-6)  # the proxy is stored in float32
    assert found["index_out"].tolist() == expected["index_out"].tolist()
    close(reading, found["value_out"], expected["value_out"])


@every_reading
def test_the_indicator_graph_gives_what_the_layer_gives(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "layer_indicated")
    index = np.array([[6, 0, 3], [2, 2, 5]], np.int32)
    small = {"hidden": feeds["hidden"], "index": index, "norm1": feeds["norm1"], "proxy": feeds["proxy"]}
    found = run_graph(reading, SHAPE, "layer_indicator", small)["indicator_out"]
    close(reading, found, rows(run_graph(reading, SHAPE, "layer_indicated", feeds)["indicator_out"], index))


# -- layer_skip, gather, head
@every_reading
def test_a_skipped_layer_adds_the_cached_delta(reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(SHAPE, "layer_skip")
    found = run_graph(reading, SHAPE, "layer_skip", feeds)["hidden_out"]
    np.testing.assert_array_equal(found, as_seen(reading, feeds["hidden"]) + as_seen(reading, feeds["delta"]))


@every_reading
def test_gather_takes_rows_of_each_sequence_repeated_ones_too(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "gather", Q=3)
    feeds["index"] = np.array([[4, 0, 4], [8, 7, 1]], np.int32)
    found = run_graph(reading, SHAPE, "gather", feeds)["hidden_out"]
    np.testing.assert_array_equal(found, rows(as_seen(reading, feeds["hidden"]), feeds["index"]))


# -- copies of a shared prefix
@every_reading
def test_copies_take_rows_of_any_sequence_to_any(reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(SHAPE, "copy_features", Q=2)
    feeds["index"] = np.array([[0, 10], [17, 8], [9, 9]], np.int32)
    found = run_graph(reading, SHAPE, "copy_features", feeds)
    for name in ("key", "value"):
        source = as_seen(reading, feeds[name])
        expected = [[source[0, 0], source[1, 1]], [source[1, 8], source[0, 8]], [source[1, 0], source[1, 0]]]
        np.testing.assert_array_equal(found[f"{name}_out"], np.array(expected))
    feeds = {**draw_feeds(SHAPE, "copy_rows"), "index": np.array([[9, 0, 4]], np.int32)}
    source = as_seen(reading, feeds["hidden"])
    found = run_graph(reading, SHAPE, "copy_rows", feeds)
    np.testing.assert_array_equal(found["hidden_out"], [[source[1, 0], source[0, 0], source[0, 4]]])


@every_reading
def test_joined_rows_lie_where_they_are_placed_among_the_rest(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(SHAPE, "join_rows")
    found = run_graph(reading, SHAPE, "join_rows", feeds)["hidden_out"]
    expected = as_seen(reading, feeds["rest"]).copy()
    for row, (slot, fresh) in enumerate(zip(feeds["slot"], feeds["fresh"], strict=True)):
        expected[row, fresh] = as_seen(reading, feeds["hidden"])[row, slot[fresh]]
    np.testing.assert_array_equal(found, expected)
    assert 0 < feeds["fresh"].sum() < feeds["fresh"].size
