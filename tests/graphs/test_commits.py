"""Graph `commit` against sorting on the host, ties and padding included; in float64 and on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape
from dllm_export.runtime.transfers.transfer import best_first

Array = NDArray[Any]
Feeds = dict[str, Array]
RunGraph = Callable[[str, ModelShape, str, Feeds], Feeds]

SHAPE = ModelShape(
    layers=1, hidden=8, heads=1, kv_heads=1, head_dim=8, mlp=8, vocab=9, max_length=64, norm_eps=1e-5, rope_theta=1e4
)
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 14))  # B, Q, X


def commit_on_the_host(feeds: Feeds) -> Array:
    """The same, one row after the other."""
    tokens = feeds["tokens"].copy()
    for b, candidate in enumerate(feeds["candidate"]):
        score = np.exp(-feeds["nll"][b].astype(np.float64))
        places = candidate.nonzero()[0]
        chosen = places[best_first(score[places])[: int(feeds["quota"][b])]].tolist()
        chosen += places[score[places] >= np.exp(np.float64(feeds["sure"][0]))].tolist()
        for x in range(tokens.shape[1]):
            if feeds["fresh"][b, x] and feeds["slot"][b, x] in chosen:
                tokens[b, x] = feeds["token"][b, feeds["slot"][b, x]]
    return tokens


@st.composite
def commits(draw: st.DrawFn) -> Feeds:
    """Scores of few values, so that many are equal; candidates that pad; alive rows that name one candidate twice."""
    batch, count, alive = draw(SIZES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    filled = rng.integers(0, count + 1, (batch, 1))
    return {
        "tokens": rng.integers(0, SHAPE.vocab, (batch, alive)).astype(np.int32),
        "slot": rng.integers(0, count, (batch, alive)).astype(np.int32),
        "fresh": rng.random((batch, alive)) < 0.7,
        "token": rng.integers(0, SHAPE.vocab, (batch, count)).astype(np.int32),
        "nll": rng.integers(0, 3, (batch, count)).astype(np.float32) / 2,
        "candidate": np.arange(count) < filled,
        "quota": rng.integers(0, count + 2, batch).astype(np.float32),
        "sure": np.array([draw(st.sampled_from([-9.0, -1.0, -0.5, 0.0, 1.0]))], np.float32),
    }


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
def test_the_rows_that_the_host_would_commit_get_their_tokens(reading: str, run_graph: RunGraph) -> None:
    @settings(max_examples=60, deadline=None)
    @given(commits())
    def check(feeds: Feeds) -> None:
        found = run_graph(reading, SHAPE, "commit", feeds)["tokens_out"]
        np.testing.assert_array_equal(found, commit_on_the_host(feeds))

    check()


@pytest.mark.parametrize("reading", ["float64", "onnxruntime"])
def test_near_ties_are_ordered_as_on_the_host(reading: str, run_graph: RunGraph) -> None:
    """Scores that differ in the last bit, of sure rows and of unsure ones: the log of a float32 sum that has a 1 in it."""
    rng, count = np.random.default_rng(3), 64
    scale = rng.choice(np.array([0.0, 1.2e-7, 0.7, 11.7], np.float32), (1, count))
    nll = np.where(scale > 0, scale + rng.integers(0, 3, (1, count)).astype(np.float32) * np.spacing(scale), 0)
    feeds = {
        "tokens": np.zeros((1, count), np.int32),
        "slot": np.arange(count, dtype=np.int32)[None],
        "fresh": np.ones((1, count), np.bool_),
        "token": np.ones((1, count), np.int32),
        "nll": nll,
        "candidate": np.ones((1, count), np.bool_),
        "sure": np.array([1.0], np.float32),
    }
    if reading == "float64":
        feeds["nll"] = nll.astype(np.float64)
    for quota in range(count + 1):
        given = {**feeds, "quota": np.array([quota], np.float32)}
        np.testing.assert_array_equal(
            run_graph(reading, SHAPE, "commit", given)["tokens_out"], commit_on_the_host(given)
        )
