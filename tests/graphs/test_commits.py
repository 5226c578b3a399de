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
        score = np.exp((feeds["top_logits"][b, :, 0] - feeds["logsumexp"][b]).astype(np.float64))
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
    top_logits = -np.sort(-rng.integers(-3, 3, (batch, count, SHAPE.vocab)).astype(np.float32))
    filled = rng.integers(0, count + 1, (batch, 1))
    return {
        "tokens": rng.integers(0, SHAPE.vocab, (batch, alive)).astype(np.int32),
        "slot": rng.integers(0, count, (batch, alive)).astype(np.int32),
        "fresh": rng.random((batch, alive)) < 0.7,
        "token": rng.integers(0, SHAPE.vocab, (batch, count)).astype(np.int32),
        "top_logits": top_logits,
        "logsumexp": top_logits[:, :, 0] + rng.integers(0, 3, (batch, count)).astype(np.float32) / 2,
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
    """Scores that differ in the last bit, or do not once the difference is rounded as the head's type rounds it."""
    rng, count = np.random.default_rng(3), 64
    logits = np.float32(17.3) + rng.integers(-2, 3, (1, count)).astype(np.float32) * np.spacing(np.float32(17.3))
    total = np.float32(33.1) + rng.integers(-1, 2, (1, count)).astype(np.float32) * np.spacing(np.float32(33.1))
    feeds = {
        "tokens": np.zeros((1, count), np.int32),
        "slot": np.arange(count, dtype=np.int32)[None],
        "fresh": np.ones((1, count), np.bool_),
        "token": np.ones((1, count), np.int32),
        "top_logits": np.repeat(logits[:, :, None], SHAPE.vocab, axis=2),
        "logsumexp": total,
        "candidate": np.ones((1, count), np.bool_),
        "sure": np.array([1.0], np.float32),
    }
    if reading == "float64":
        feeds |= {name: feeds[name].astype(np.float64) for name in ("top_logits", "logsumexp")}
    for quota in range(count + 1):
        given = {**feeds, "quota": np.array([quota], np.float32)}
        np.testing.assert_array_equal(
            run_graph(reading, SHAPE, "commit", given)["tokens_out"], commit_on_the_host(given)
        )
