"""ONNX Runtime against torch, token for token in float32, and requests that must not influence one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest

from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache
from dllm_export.runtime.session import Buffer, GraphCall, SessionOptions, open_session
from dllm_export.runtime.sessions.onnxruntime import OnnxRuntimeSession

OpenModel = Callable[[str], DiffusionLM]

PROMPTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (17, 9, 14)]
POLICIES: Mapping[str, CachePolicy] = {
    "none": NoCache(),
    "refresh-all": DllmCache(prompt_interval=1, response_interval=1),
    "short": DllmCache(prompt_interval=5, response_interval=3),
    "multiple": DllmCache(prompt_interval=6, response_interval=2, update_ratio=0.5),
    "prompt-only": DllmCache(prompt_interval=4, response_interval=1),
    "update-none": DllmCache(prompt_interval=5, response_interval=3, update_ratio=0.0),
    "update-all": DllmCache(prompt_interval=5, response_interval=3, update_ratio=1.0),
    "too-few-rows": DllmCache(prompt_interval=3, response_interval=4, update_ratio=0.01),
    "no-first-layer-rule": DllmCache(prompt_interval=5, response_interval=3, first_layer_rule=False),
}
OPTIONS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"block_length": 4, "steps": 12},
    "temperature": {"temperature": 0.9, "seed": 3},
    "random remasking": {"remasking": "random", "block_length": 8},
    "guidance": {"cfg_scale": 1.5, "cfg_interval": 2},
    "end options": {"logits_eos_inf": True, "confidence_eos_eot_inf": True, "temperature": 0.5},
}


@dataclass(frozen=True, slots=True)
class Pair:
    """The same bundle on both providers."""

    onnxruntime: DiffusionLM
    torch: DiffusionLM


@pytest.fixture(scope="module")
def pair(open_model: OpenModel) -> Pair:
    return Pair(open_model("onnxruntime"), open_model("torch"))


def tokens(
    lm: DiffusionLM, options: GenerationOptions, policy: CachePolicy, prompts: list[list[int]] = PROMPTS
) -> list[tuple[int, ...]]:
    return [result.tokens for result in lm.run(lm.continuation(prompts, options), options, policy)]


@pytest.mark.parametrize(
    ("policy", "option"),
    [
        (policy, option)
        for row, policy in enumerate(POLICIES)
        for column, option in enumerate(OPTIONS)
        if (row + column) % 2 == 0  # every second pair, as the white fields of a chess board
    ],
)
def test_onnxruntime_gives_the_tokens_of_torch(policy: str, option: str, pair: Pair) -> None:
    options = GenerationOptions(gen_length=16, **OPTIONS[option])
    results = [tokens(lm, options, POLICIES[policy]) for lm in (pair.onnxruntime, pair.torch)]
    assert results[0] == results[1]


@pytest.mark.parametrize("option", ["plain", "temperature", "guidance"])
@pytest.mark.parametrize("policy", ["none", "short", "update-none"])
@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
def test_a_batch_gives_what_each_prompt_gives_alone(provider: str, policy: str, option: str, pair: Pair) -> None:
    lm: DiffusionLM = getattr(pair, provider)
    options = {"gen_length": 16, "seed": 3, **OPTIONS[option]}
    together = tokens(lm, GenerationOptions(**options), POLICIES[policy])
    for row, prompt in enumerate(PROMPTS):
        alone = GenerationOptions(**{**options, "seed": options["seed"] + row})
        assert tokens(lm, alone, POLICIES[policy], [prompt]) == [together[row]]


def test_a_seed_decides_the_text_and_another_seed_gives_another(pair: Pair) -> None:
    def draw(lm: DiffusionLM, seed: int) -> list[tuple[int, ...]]:
        return tokens(lm, GenerationOptions(gen_length=16, temperature=1.0, seed=seed), POLICIES["short"])

    assert draw(pair.onnxruntime, 7) == draw(pair.onnxruntime, 7) == draw(pair.torch, 7)
    assert draw(pair.onnxruntime, 7) != draw(pair.onnxruntime, 11)


def test_the_caches_of_one_request_do_not_reach_the_next(pair: Pair, open_model: OpenModel) -> None:
    """The buffers of a request shape are used again; here by texts of other lengths and another policy."""
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=16, cfg_scale=0.5)
    used, fresh = [PROMPTS[0], PROMPTS[1]], [PROMPTS[2], PROMPTS[0]]
    tokens(lm, options, POLICIES["update-none"], used)
    assert tokens(lm, options, POLICIES["short"], fresh) == tokens(pair.torch, options, POLICIES["short"], fresh)


@pytest.mark.parametrize("same", [False, True], ids=["two models", "one model"])
@pytest.mark.parametrize("providers", [("onnxruntime", "onnxruntime"), ("torch", "torch"), ("onnxruntime", "torch")])
def test_two_requests_step_by_step_in_turn_give_what_each_gives_alone(
    providers: tuple[str, str], same: bool, open_model: OpenModel
) -> None:
    lms = [open_model(provider) for provider in providers]
    lms = [lms[0], lms[0]] if same else lms
    settings = [
        (GenerationOptions(gen_length=16, temperature=0.8), POLICIES["short"], PROMPTS[:2]),
        (GenerationOptions(gen_length=16, cfg_scale=1.0), POLICIES["no-first-layer-rule"], [PROMPTS[2], PROMPTS[0]]),
    ]
    alone = [tokens(lm, *setting) for lm, setting in zip(lms, settings, strict=True)]
    streams = [
        lm.stream(lm.continuation(prompts, options), options, policy)
        for lm, (options, policy, prompts) in zip(lms, settings, strict=True)
    ]
    last = [next(streams[0]), next(streams[1])]
    for frames in zip_longest(*streams):
        last = [frame or kept for frame, kept in zip(frames, last, strict=True)]
    assert [[tuple(row) for row in frame.tokens.tolist()] for frame in last] == alone


def test_a_request_that_was_left_halfway_does_not_reach_the_next(open_model: OpenModel) -> None:
    lm, options, policy = open_model("onnxruntime"), GenerationOptions(gen_length=16), POLICIES["short"]
    expected = tokens(lm, options, policy)
    frames = lm.stream(lm.continuation(PROMPTS, options), options, policy)
    for _ in range(4):
        next(frames)
    assert tokens(lm, options, policy) == expected


def test_programs_of_onnxruntime_share_the_calls_that_they_have_in_common(tiny_bundle: Bundle) -> None:
    width = tiny_bundle.manifest.shape.hidden
    with OnnxRuntimeSession(tiny_bundle, SessionOptions(threads=1)) as session:

        def call(values: list[int]) -> tuple[GraphCall, Buffer]:
            tokens, hidden = session.allocate((1, 3), "int32"), session.allocate((1, 3, width), "compute")
            tokens.write(np.array([values], np.int32))
            return GraphCall("embed", None, {"tokens": tokens, "hidden_out": hidden}), hidden

        (one, first), (other, second) = call([1, 2, 3]), call([4, 5, 6])
        programs = [session.prepare([one]), session.prepare([one]), session.prepare([other])]
        assert len(session._bound) == 2
        programs.pop()()
        programs.pop()()
        assert (second.read() != first.read()).any(), "equal graphs over other buffers are other calls"
        programs.clear()
        assert len(session._bound) == 0, "and nothing stays bound for programs that are gone"


@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
def test_buffers_that_are_read_together_are_copies_of_each(provider: str, tiny_bundle: Bundle) -> None:
    with closing(open_session(tiny_bundle, SessionOptions(provider=provider, threads=1))) as session:
        buffers = [session.allocate((2, 3), type) for type in ("int32", "float32")]
        for place, buffer in enumerate(buffers):
            buffer.write(np.arange(6).reshape(2, 3) + place)
        found = session.fetch(buffers)()
        for array in found:
            array[:] = 0
        assert [array.tolist() for array in session.fetch(buffers)()] == [
            [[0, 1, 2], [3, 4, 5]],
            [[1, 2, 3], [4, 5, 6]],
        ]
        assert session.fetch(buffers[:1])()[0].dtype == np.int32
