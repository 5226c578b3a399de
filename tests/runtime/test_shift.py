"""Every policy on a model whose rows predict the next token: equal to no cache where it refreshes everything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import msgspec
import pytest

from dllm_export.errors import StrategyError, UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    POLICIES,
    CachePolicy,
    DkvDecode,
    DkvGreedy,
    DllmCache,
    DualCache,
    DynamicDllm,
    FreeCache,
    NoCache,
    PrefixCache,
    Rows,
    SharedPrefix,
    SpaCache,
    SparseCache,
    StepPlan,
    StepState,
    WindowCache,
)
from dllm_export.runtime.policies.contract import suits
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.transfers import TRANSFERS

OpenModel = Callable[[str], DiffusionLM]
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6, 5], [7]]

REFRESHED: Mapping[str, tuple[CachePolicy, dict[str, Any]]] = {
    "none": (NoCache(), {}),
    "dllm-cache": (DllmCache(prompt_interval=1, response_interval=1), {}),
    "dllm-cache, all rows": (DllmCache(prompt_interval=1, response_interval=5, update_ratio=1.0), {}),
    "dynamic-dllm": (DynamicDllm(prompt_interval=1), {}),
    "spa": (SpaCache(prompt_interval=1), {}),
    "prefix": (PrefixCache(), {"block_length": 1}),
    "dual": (DualCache(), {"block_length": 1}),
    "freecache, only its first step": (FreeCache(), {"steps": 1}),
    "window, over everything": (WindowCache(before=99, after=99), {"block_length": 4}),
    "window, full passes": (WindowCache(before=0, after=0, refresh_interval=1), {"block_length": 4}),
    "sparse": (SparseCache(keep_ratio=0.1), {"block_length": 2}),
    "dkv-decode": (DkvDecode(refresh_interval=1), {"block_length": 6}),
    "dkv-greedy": (DkvGreedy(refresh_interval=1), {"block_length": 6, "remasking": "random"}),
    "shared-prefix": (SharedPrefix(refresh_interval=1), {}),
}


@pytest.fixture(scope="module")
def shifted(narrow_bundles: dict[str, Bundle]) -> DiffusionLM:
    """In float64, with an indicator for `spa`."""
    bundle = narrow_bundles["plain"]
    shape = replace(bundle.manifest.shape, shift=True)
    bundle = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, shape=shape))
    return DiffusionLM(bundle, TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64"))


def test_every_policy_is_among_the_cases() -> None:
    full = {name for name, policy in POLICIES.items() if suits(policy, by_blocks=False)}
    assert {policy.name for policy, _ in REFRESHED.values()} == full


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("case", REFRESHED)
def test_told_to_refresh_everything_a_policy_equals_no_cache(case: str, guidance: float, shifted: DiffusionLM) -> None:
    policy, keywords = REFRESHED[case]
    options = GenerationOptions(gen_length=12, cfg_scale=guidance, **keywords)
    request = shifted.continuation(PROMPTS, options)
    if isinstance(policy, SharedPrefix):
        request = shifted.share(shifted.continuation(PROMPTS[:1], options), PROMPTS[0][:4], depth=0)
    found, expected = (shifted.run(request, options, each) for each in (policy, NoCache()))
    assert [result.tokens for result in found] == [result.tokens for result in expected]


CACHES: Mapping[str, CachePolicy] = {
    "dllm-cache": DllmCache(prompt_interval=5, response_interval=3),
    "dynamic-dllm": DynamicDllm(layer_budget=2, window=2, bucket=1),
    "spa": SpaCache(prompt_interval=6, response_interval=4),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_prompt_of_one_token_leads_the_response_alone(name: str, shifted: DiffusionLM) -> None:
    """There is no prompt left to refresh: the response's first row is all of it."""
    options = GenerationOptions(gen_length=8)
    frames = list(shifted.stream(shifted.continuation([[7]], options), options, CACHES[name], watch=True))
    assert frames[-1].passes == 8
    assert {frame.recomputed.shape for frame in frames if frame.recomputed is not None} == {(1, 8)}
    assert {frame.kind for frame in frames} <= {"full", "refresh_response", "partial"}


@dataclass(frozen=True)
class BlockAlone:
    """Fast-dLLM's dual cache as if there were no shift: the row that predicts a block's first token is stale."""

    name: ClassVar[str] = "block-alone"

    def plan(self, state: StepState) -> StepPlan:
        if state.block_step == 1:
            return StepPlan.refresh(state, keep_delta=False)
        return StepPlan.recompute(state, Rows.span(*state.block, state.batch))


def test_a_policy_that_freezes_the_last_row_of_the_prompt_is_refused(shifted: DiffusionLM) -> None:
    options = GenerationOptions(gen_length=8)
    sentence = (
        "the cache policy 'block-alone' gave a wrong plan for step 2: position 5 of sequence 0 predicts what may be decided "
        "in this step, but is not among its rows"
    )
    with pytest.raises(StrategyError, match=re.escape(sentence)):
        # The likeliest first token is decided in one of the steps; until then its predictor must run.
        shifted.run(shifted.continuation(PROMPTS[:1], options), options, BlockAlone())


# -- pairs
SMALL: Mapping[str, CachePolicy] = {
    **CACHES,
    "window": WindowCache(before=1, after=0),
    "sparse": SparseCache(keep_ratio=0.3),
    "dkv-decode": DkvDecode(refresh_interval=0, bucket=1),
    "dkv-greedy": DkvGreedy(nearest=1, bucket=1),
    "shared-prefix": SharedPrefix(),
}
"""Settings that leave rows out of a short request."""


@pytest.mark.parametrize("rule", TRANSFERS)
@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if suits(policy, by_blocks=False)])
def test_every_policy_goes_with_every_rule_or_says_why_not(name: str, rule: str, shifted: DiffusionLM) -> None:
    policy, transfer = SMALL.get(name, POLICIES[name]()), TRANSFERS[rule]()
    foreseen = name == "dkv-greedy" and rule == "quota"
    options = GenerationOptions(gen_length=8, block_length=4, remasking="random" if foreseen else None, seed=3)
    request = shifted.continuation(PROMPTS[:1], options)
    if name == "shared-prefix":
        request = shifted.share(request, PROMPTS[0][:4], depth=2)
    reasons = {
        "wino": "asks a token's own row whether the token still holds, and this model predicts a token from the row before it",
        "sedd": "reads a model's ratios of probabilities at a noise level",
    }
    known = TRANSFERS[rule].reveals or foreseen
    reason = "must know which rows a step decides" if name == "dkv-greedy" and not known else reasons.get(rule)
    if rule in ("sedd-uniform", "ancestral"):
        reason = f"--transfer {rule}"  # of an option that is refused before the model is looked at
    if reason is None:
        (result,) = shifted.run(request, options, policy, transfer)
        assert 96 not in result.tokens
        assert len(result.tokens) == 8
        return
    with pytest.raises(UsageError, match=re.escape(reason)):
        shifted.run(request, options, policy, transfer)


@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", ["none", "dllm-cache", "dual", "dkv-decode"])
def test_every_provider_gives_the_tokens_of_the_reference(name: str, provider: str, open_shifted: OpenModel) -> None:
    policy = {**CACHES, "none": NoCache(), "dual": DualCache(), "dkv-decode": DkvDecode(refresh_interval=5)}[name]
    options = GenerationOptions(gen_length=24, block_length=8, cfg_scale=0.6)
    results = []
    for each in ("float64", provider):
        lm = open_shifted(each)
        results.append([result.tokens for result in lm.run(lm.continuation(PROMPTS, options), options, policy)])
    assert results[0] == results[1]


def test_without_the_shift_the_same_weights_give_other_tokens(open_model: OpenModel, open_shifted: OpenModel) -> None:
    options = GenerationOptions(gen_length=12)
    found = [
        lm("float64").run(lm("float64").continuation(PROMPTS, options), options) for lm in (open_model, open_shifted)
    ]
    assert [result.tokens for result in found[0]] != [result.tokens for result in found[1]]
