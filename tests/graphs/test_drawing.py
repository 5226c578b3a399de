"""Tokens drawn inside a graph: equal to a plain search in running sums, and distributed as the weights say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape
from dllm_export.graphs.drawing import draw_token, group_width
from dllm_export.graphs.torch_ops import TorchOps

Array = NDArray[Any]
Feeds = dict[str, Array]
DrawFeeds = Callable[..., Feeds]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

SHAPE = ModelShape(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=48,
    vocab=71,
    max_length=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)
VOCABULARIES = (2, 3, 4, 5, 16, 17, 71, 300)
LAST = 1 - 2**-23
"""The largest number that a runtime hands in."""


def draw(weights: Array, uniform: Array) -> Array:
    """Tokens [B, Q] of weights [B, Q, V]."""
    tensors = torch.from_numpy(weights), torch.from_numpy(uniform.astype(weights.dtype))
    found: Array = draw_token(TorchOps(), tensors[0], weights.shape[-1], tensors[1]).numpy()
    return found


def search(weights: Array, first: float, second: float) -> int:
    """The same token by plain sums: a group of neighbours, then one of them."""
    width = group_width(len(weights))
    totals = [weights[start : start + width].sum() for start in range(0, len(weights), width)]
    group = pick(totals, first)
    return group * width + pick(list(weights[group * width : (group + 1) * width]), second)


def pick(weights: list[float], uniform: float) -> int:
    reached, target = 0.0, uniform * sum(weights)
    for place, weight in enumerate(weights):
        reached += weight
        if weight > 0 and reached > target:
            return place
    raise AssertionError("nothing has weight")


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_drawn_token_is_where_running_sums_pass_the_uniform_number(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    weights = rng.exponential(size=(2, 50, vocab))
    uniform = rng.random((2, 50, 2))
    found = draw(weights, uniform)
    for place in np.ndindex(2, 50):
        assert found[place] == search(weights[place], *uniform[place])


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("type", [np.float32, np.float64])
def test_a_token_without_weight_is_never_drawn_whatever_the_numbers_are(type: Any, vocab: int) -> None:
    """Weights over many magnitudes, most of them 0, and the ends of the interval of the uniform numbers."""
    rng = np.random.default_rng(vocab)
    weights = 10 ** rng.uniform(-30, 0, (1, 400, vocab)) * (rng.random((1, 400, vocab)) < 0.3)
    weights[..., rng.integers(vocab)] = 1e-9
    ends = np.array([0.0, 2**-23, 0.5, LAST])
    uniform = rng.choice(ends, (1, 400, 2))
    found = draw(weights.astype(type), uniform)
    chosen = np.take_along_axis(weights.astype(type), found[..., None].astype(np.int64), axis=-1)
    assert (chosen > 0).all()


def test_the_ends_of_the_interval_are_the_first_and_the_last_token_with_weight() -> None:
    weights = np.zeros((1, 2, 71), np.float32)
    weights[..., [5, 40, 66]] = [0.2, 0.7, 0.1]
    assert draw(weights, np.array([[[0, 0], [LAST, LAST]]])).tolist() == [[5, 66]]


def test_tokens_of_all_groups_are_drawn_as_often_as_their_weights_say() -> None:
    rng = np.random.default_rng(1)
    weights, uniform = rng.exponential(size=16), rng.integers(0, 2**23, (1, 40_000, 2)) / 2**23
    counts = np.bincount(draw(np.tile(weights, (1, 40_000, 1)), uniform)[0], minlength=16)
    expected = 40_000 * weights / weights.sum()
    # Chi-square with 15 degrees of freedom exceeds 37.70 once in 1000 seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 37.70


def test_rare_tokens_are_drawn_as_often_as_their_weights_say() -> None:
    """A group of weight 1e-6 all told: its members differ by factors, which one number of 23 bits could not tell apart."""
    weights = np.zeros((1, 20_000, 16), np.float32)
    weights[..., 0], weights[..., 12:] = 1.0, np.array([1, 2, 3, 4]) * 1e-7
    rng = np.random.default_rng(0)
    uniform = np.stack((np.full((1, 20_000), LAST), rng.random((1, 20_000))), axis=-1)
    counts = np.bincount(draw(weights, uniform)[0], minlength=16)[12:]
    expected = 20_000 * np.array([1, 2, 3, 4]) / 10
    # Chi-square with 3 degrees of freedom exceeds 16.27 once in 1000 seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 16.27


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
@pytest.mark.parametrize("sharpness", [1.0, 2.5])
@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, vocab=5000), replace(SHAPE, tied_head=True)], ids=str)
def test_the_head_draws_from_the_softmax_at_its_temperature(
    shape: ModelShape, sharpness: float, reading: str, draw_feeds: DrawFeeds, run_graph: RunGraph
) -> None:
    feeds = draw_feeds(shape, "head_drawn") | {"sharpness": np.array([sharpness])}
    found = run_graph(reading, shape, "head_drawn", feeds)
    plain = run_graph(reading, shape, "head", feeds | {"given": found["drawn"]})
    np.testing.assert_array_equal(plain["top_tokens"], found["top_tokens"])
    logits = np.full((*found["drawn"].shape, shape.vocab), np.nan)
    for token in range(shape.vocab) if shape.vocab < 100 else np.unique(found["drawn"]):
        # One token at a time, so that the logits do not come from the code under test.
        logits[..., token] = logit_of(shape, feeds, int(token))
    drawn = np.take_along_axis(logits, found["drawn"][..., None].astype(np.int64), axis=-1)[..., 0]
    np.testing.assert_allclose(found["drawn_logit"], drawn, rtol=1e-4, atol=1e-4)
    if shape.vocab < 100 and reading == "float64":
        weights = np.exp((logits - logits.max(-1, keepdims=True)) * sharpness)
        for place in np.ndindex(found["drawn"].shape):
            assert found["drawn"][place] == search(weights[place], *feeds["uniform"][place])


def logit_of(shape: ModelShape, feeds: Feeds, token: int) -> Array:
    """Guided and biased logit of one token in every candidate row [B, Q]."""
    index = feeds["index"][:, :, None].astype(np.int64)
    hidden = np.take_along_axis(feeds["hidden"], index, axis=1)
    rows = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + shape.norm_eps) * feeds["norm"]
    rows = rows + feeds["cfg_scale"] * np.take_along_axis(feeds["guidance"], index, axis=1)
    column = feeds["embedding"][token] if shape.tied_head else feeds["head"][:, token]
    found: Array = rows @ column + feeds["bias"][token]
    return found
