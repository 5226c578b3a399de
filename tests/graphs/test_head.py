"""The head's statistics and the guidance residual against their formulas, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape

Array = NDArray[Any]
Feeds = dict[str, Array]
DrawFeeds = Callable[..., Feeds]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

PLAIN = ModelShape(
    layers=1,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=48,
    vocab=50,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)
SHAPES = [PLAIN, replace(PLAIN, tied_head=True), replace(PLAIN, logits_scale=0.3)]
EXACT = 1e-12


def normalize(shape: ModelShape, x: Array, weight: Array) -> Array:
    root: Array = np.sqrt((x**2).mean(-1, keepdims=True) + shape.norm_eps)
    return x / root * weight


def logits_of(shape: ModelShape, feeds: Feeds, hidden: Array) -> Array:
    """Logits of the candidate rows without the bias."""
    chosen = np.take_along_axis(hidden, feeds["index"][:, :, None].astype(np.int64), axis=1)
    head = feeds["embedding"].T if shape.tied_head else feeds["head"]
    logits: Array = normalize(shape, chosen, feeds["norm"]) @ head * shape.logits_scale
    return logits


def probabilities(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    share: Array = weights / weights.sum(-1, keepdims=True)
    return share


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied", "scaled"])
def test_the_head_returns_the_statistics_of_the_softmax(
    shape: ModelShape, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(shape, "head")
    feeds["bias"], feeds["cfg_scale"] = np.zeros(shape.vocab), np.zeros(1)
    found, logits = run_graph("float64", shape, "head", feeds), logits_of(shape, feeds, feeds["hidden"])
    share = probabilities(logits)
    best, second = np.sort(share, axis=-1)[..., -1], np.sort(share, axis=-1)[..., -2]
    order = np.argsort(-logits, axis=-1, kind="stable")
    assert found["token"].tolist() == order[..., 0].tolist()
    assert found["top_tokens"].tolist() == order.tolist()
    np.testing.assert_allclose(found["top_logits"], np.take_along_axis(logits, order, -1), rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["confidence"], best, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["margin"], best - second, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["entropy"], -(share * np.log(share)).sum(-1), rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["nll"], -np.log(best), rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["logsumexp"], np.log(np.exp(logits).sum(-1)), rtol=0, atol=EXACT)


def test_rows_that_are_nearly_sure_are_told_apart(draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    """In float32, by `nll`; logsumexp of these logits is the same number in both rows."""
    feeds, width = draw_feeds(PLAIN, "head"), PLAIN.hidden
    feeds["hidden"] = np.tile(np.eye(feeds["hidden"].shape[1], width), (len(feeds["hidden"]), 1, 1))
    feeds["index"] = np.tile(np.array([0, 1], np.int32), (len(feeds["index"]), 1))
    feeds["norm"] = np.ones(width)
    feeds["bias"], feeds["cfg_scale"] = np.zeros(PLAIN.vocab), np.zeros(1)
    feeds["given"] = np.zeros_like(feeds["index"])
    feeds["head"] = np.zeros((width, PLAIN.vocab))
    feeds["head"][:2, :2] = np.array([[40.0, 25.0], [40.0, 26.0]]) / np.sqrt(width)  # the norm multiplies by the root
    found = run_graph("onnxruntime", PLAIN, "head", feeds)
    assert found["logsumexp"][0, 0] == found["logsumexp"][0, 1]
    # A sum of 1 and 3e-7 in float32 is off by up to half of 1.2e-7.
    np.testing.assert_allclose(found["nll"][0], np.log1p(np.exp([-15.0, -14.0])), rtol=0.2)


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
def test_a_banned_token_is_never_proposed_and_counts_for_nothing(
    reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(PLAIN, "head")
    feeds["bias"], feeds["cfg_scale"] = np.zeros(PLAIN.vocab), np.zeros(1)
    free = run_graph(reading, PLAIN, "head", feeds)
    banned = int(free["token"][0, 0])
    feeds["bias"][banned] = -1e30
    found = run_graph(reading, PLAIN, "head", feeds)
    logits = np.delete(logits_of(PLAIN, feeds, feeds["hidden"]), banned, axis=-1)
    assert (found["token"] != banned).all()
    assert (found["top_tokens"][..., -1] == banned).all()
    tolerance = EXACT if reading == "float64" else 1e-5
    np.testing.assert_allclose(found["confidence"], probabilities(logits).max(-1), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found["logsumexp"], np.log(np.exp(logits).sum(-1)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied", "scaled"])
def test_the_guidance_residual_gives_the_logits_of_classifier_free_guidance(
    scale: float, shape: ModelShape, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    """uncond + (scale + 1)(cond - uncond), from numbers of the width of the model instead of the vocabulary."""
    feeds = {**draw_feeds(shape, "head"), "cfg_scale": np.array([scale]), "bias": np.zeros(shape.vocab)}
    other = np.random.default_rng(9).normal(size=feeds["hidden"].shape)
    residual = {"hidden": feeds["hidden"], "unconditional": other, "norm": feeds["norm"]}
    feeds["guidance"] = run_graph("float64", shape, "guidance", residual)["guidance_out"]
    found = run_graph("float64", shape, "head", feeds)
    conditional, unconditional = (logits_of(shape, feeds, hidden) for hidden in (feeds["hidden"], other))
    guided = unconditional + (scale + 1) * (conditional - unconditional)
    for tokens, logits, expected in zip(found["top_tokens"][0], found["top_logits"][0], guided[0], strict=True):
        np.testing.assert_allclose(logits, expected[tokens], rtol=0, atol=EXACT)
    np.testing.assert_allclose(found["logsumexp"], np.log(np.exp(guided).sum(-1)), rtol=0, atol=EXACT)
    if scale == 0:
        np.testing.assert_allclose(found["logsumexp"], np.log(np.exp(conditional).sum(-1)), rtol=0, atol=EXACT)


STATISTICS = ("token", "confidence", "margin", "entropy", "top_tokens", "top_logits", "logsumexp", "nll")


def biased_logits(shape: ModelShape, feeds: Feeds) -> Array:
    """Logits of the candidate rows with guidance and bias."""
    chosen = feeds["index"][:, :, None].astype(np.int64)
    rows = normalize(shape, np.take_along_axis(feeds["hidden"], chosen, axis=1), feeds["norm"])
    rows = rows + feeds["cfg_scale"] * np.take_along_axis(feeds["guidance"], chosen, axis=1)
    head = feeds["embedding"].T if shape.tied_head else feeds["head"]
    logits: Array = rows @ head * shape.logits_scale + feeds["bias"]
    return logits


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied", "scaled"])
def test_a_tracked_head_measures_how_far_a_row_moved(
    shape: ModelShape, reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    """Two steps, the second against what the first returned; a banned token is banned in both."""
    tolerance = EXACT if reading == "float64" else 2e-5
    feeds = draw_feeds(shape, "head_tracked")
    assert (feeds["bias"] < 0).any()
    first = run_graph(reading, shape, "head_tracked", feeds)
    before = probabilities(biased_logits(shape, feeds))
    later = feeds | {"hidden": draw_feeds(shape, "head_tracked", seed=1)["hidden"]}
    later["distribution"] = first["distribution_out"]
    second = run_graph(reading, shape, "head_tracked", later)
    now = probabilities(biased_logits(shape, later))
    some = now > 0
    logs = np.log(np.where(some, now, 1.0)) - np.log(np.where(some, before, 1.0))
    cosine = (now * before).sum(-1) / np.linalg.norm(now, axis=-1) / np.linalg.norm(before, axis=-1)
    np.testing.assert_allclose(np.exp(first["distribution_out"]), before, rtol=0, atol=tolerance)
    np.testing.assert_allclose(second["divergence"], (now * logs).sum(-1), rtol=0, atol=tolerance)
    np.testing.assert_allclose(second["similarity"], cosine, rtol=0, atol=tolerance)
    still = run_graph(reading, shape, "head_tracked", feeds | {"distribution": first["distribution_out"]})
    np.testing.assert_allclose(still["divergence"], 0, rtol=0, atol=tolerance)
    np.testing.assert_allclose(still["similarity"], 1, rtol=0, atol=tolerance)


def test_probabilities_too_small_for_float32_still_compare(draw_feeds: DrawFeeds, run_graph: RunGraph) -> None:
    feeds = draw_feeds(PLAIN, "head_tracked")
    feeds["head"] = feeds["head"] * 60
    logits = biased_logits(PLAIN, feeds)
    assert (probabilities(logits - feeds["bias"]).min(-1) < 1e-60).all(), "nothing is too small here"
    feeds["distribution"] = np.log(probabilities(logits[:, ::-1]) + 1e-300)
    found = run_graph("onnxruntime", PLAIN, "head_tracked", feeds)
    assert np.isfinite(found["divergence"]).all()
    assert (found["divergence"] > 1).any()


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied", "scaled"])
def test_a_credited_head_gives_the_statistics_of_the_fused_logits(
    shape: ModelShape, reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    tolerance = EXACT if reading == "float64" else 5e-5
    feeds = draw_feeds(shape, "head_credited")
    found = run_graph(reading, shape, "head_credited", feeds)
    logits = biased_logits(shape, feeds)
    share, credit = probabilities(logits), feeds["credit"] * 0.8
    for place in np.ndindex(share.shape[:2]):
        credit[(*place, share[place].argmax())] += share[place].max() ** 0.2
    fused = logits + 0.7 * np.log(1 + credit)
    expected = probabilities(fused)
    np.testing.assert_allclose(found["credit_out"], credit, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found["confidence"], expected.max(-1), rtol=0, atol=tolerance)
    assert found["token"].tolist() == expected.argmax(-1).tolist()
    top = np.sort(fused, axis=-1)[..., ::-1]
    np.testing.assert_allclose(found["top_logits"][..., :-1], top[..., :-1], rtol=0, atol=tolerance * 10)


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "tied", "scaled"])
def test_a_given_token_has_its_probability_also_where_it_is_unlikely_or_banned(
    shape: ModelShape, reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(shape, "head", Q=6) | {"cfg_scale": np.zeros(1)}
    feeds["given"][0] = [3, 0, shape.vocab - 1, 7, 7, 20]
    share = probabilities(logits_of(shape, feeds, feeds["hidden"]) + feeds["bias"])
    expected = np.take_along_axis(share, feeds["given"][:, :, None].astype(np.int64), axis=2)[:, :, 0]
    found = run_graph(reading, shape, "head", feeds)["probability"]
    # float32: an error of the logits of a few 1e-6 is one of the probability's own size.
    np.testing.assert_allclose(found, expected, rtol=0 if reading == "float64" else 1e-4, atol=EXACT)
    assert feeds["bias"][3] < 0
    assert found[0, 0] == 0


@pytest.mark.parametrize("graph", ["head_tracked", "head_credited"])
def test_a_head_with_a_state_has_the_statistics_of_the_plain_one(
    graph: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(PLAIN, graph) | {"credit_weight": np.zeros(1)}
    feeds["given"] = np.zeros(feeds["index"].shape, np.int32)
    found, expected = (run_graph("float64", PLAIN, name, feeds) for name in (graph, "head"))
    for name in STATISTICS:
        np.testing.assert_array_equal(found[name], expected[name])
