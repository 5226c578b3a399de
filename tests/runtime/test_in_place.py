"""Caches that a provider writes while it reads them need no second copy, and change no token."""

from __future__ import annotations

from math import prod

import pytest

from dllm_export.graphs import TensorType
from dllm_export.runtime.buffers import Buffers, RequestShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    CachePolicy,
    DllmCache,
    DualCache,
    DynamicDllm,
    FreeCache,
    SpaCache,
    SparseCache,
)
from dllm_export.runtime.session import FEATURES, Buffer, Session, SessionOptions
from dllm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession
from dllm_export.runtime.sessions.torch import TorchSession

PROMPT = [3, 14, 15, 92, 65]
CACHED = DllmCache(prompt_interval=4, response_interval=2)
LONG = GenerationOptions(gen_length=24)
"""Long enough for a wrong row to change a token."""
PROVIDERS = {"torch": TorchSession, "onnxruntime": OnnxRuntimeSession}


def open_session(provider: str, bundle: Bundle, *, prepack: str = "auto") -> Session:
    options = SessionOptions(provider=provider, threads=1, prepack=prepack)  # type: ignore[arg-type]
    return PROVIDERS[provider](bundle, options)


class Counting:
    """Another session, which says how many numbers its buffers hold; caches are in two halves where it is told so."""

    def __init__(self, inner: Session, in_place: frozenset[str]) -> None:
        self.provider, self.few_sizes, self.queues = inner.provider, inner.few_sizes, inner.queues
        self.prepare, self.fetch, self.mark = inner.prepare, inner.fetch, inner.mark
        self.inspect, self.close = inner.inspect, inner.close
        self._inner, self.in_place, self.elements = inner, in_place, 0

    def allocate(self, dims: tuple[int, ...], type: TensorType) -> Buffer:
        self.elements += prod(dims)
        return self._inner.allocate(dims, type)


def answer(lm: DiffusionLM, policy: CachePolicy) -> list[tuple[bytes, bytes]]:
    """Tokens and confidence of every step, to the bit."""
    frames = lm.stream(lm.continuation([PROMPT], LONG), LONG, policy)
    return [(frame.tokens.tobytes(), frame.confidence.tobytes()) for frame in frames]


@pytest.mark.parametrize(("provider", "prepack"), [("torch", "auto"), ("onnxruntime", "on")])
@pytest.mark.parametrize(
    "policy",
    [
        CACHED,
        DllmCache(update_ratio=0.0),
        DynamicDllm(layer_budget=1, window=0, bucket=1),
        SpaCache(),
        DualCache(),
        SparseCache(),
        FreeCache(),
    ],
    ids=lambda one: f"{one.name}-{one.update_ratio}" if isinstance(one, DllmCache) else one.name,
)
def test_caches_written_in_place_give_the_tokens_of_two_copies(
    policy: CachePolicy, provider: str, prepack: str, tiny_bundle: Bundle
) -> None:
    found, allocated = [], []
    for in_place in (True, False):
        inner = open_session(provider, tiny_bundle, prepack=prepack)
        session = Counting(inner, inner.in_place if in_place else frozenset())
        with DiffusionLM(tiny_bundle, session) as lm:
            found.append([answer(lm, one) for one in (policy, CACHED, policy)])
        allocated.append(session.elements)
    assert found[0] == found[1]
    assert allocated[0] < allocated[1]


def test_graphs_that_merge_rows_are_not_given_a_cache_as_its_own_result(tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, open_session("onnxruntime", tiny_bundle, prepack="off")) as lm:
        assert not lm.session.in_place


@pytest.mark.parametrize("provider", PROVIDERS)
def test_in_place_only_what_is_compared_with_new_rows_has_two_halves(provider: str, tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, open_session(provider, tiny_bundle)) as lm:
        shape, request = tiny_bundle.manifest.shape, RequestShape(batch=1, prompt_rows=5, response_rows=8)
        buffers = Buffers(lm.session, shape, request)
        names = (*FEATURES, "input", "indicator")
        shared = {name for name in names if buffers.cache(name, 0, 0) is buffers.cache(name, 0, 1)}
        # PyTorch computes all results before it writes any; of ONNX Runtime only a scatter waits for who reads the cache.
        assert shared == (FEATURES | {"indicator"} if provider == "torch" else FEATURES)
