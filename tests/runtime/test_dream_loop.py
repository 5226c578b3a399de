"""The runtime in float64 against Dream's published loop `diffusion_generate`, written out plainly, token for token.

The loop runs over the eager model without a cache or over the four-feature cache. Documented deviations apply to both sides:
the mask token is never proposed, tokens above temperature 0 are drawn among the 64 likeliest, steps that commit nothing run
no pass, tokens are drawn for the rows alone that `origin` reveals, and a sequence with fewer masks commits those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_export.errors import UsageError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DualCache, NoCache, PrefixCache
from dllm_export.runtime.schedule import reveal_share
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.transfers import Dream, Origin, Quota, Transfer
from dllm_export.tools.eager import EagerModel
from dllm_export.tools.four_feature import FourFeatureCache

MASK, EOS, KNOWN = 96, 95, 64
PROMPTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (13, 9)]
CACHE = DllmCache(prompt_interval=5, response_interval=3)
ALGORITHMS = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Settings:
    """Arguments of diffusion_generate, by their published names."""

    alg: str
    steps: int
    eps: float = 1e-3
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float = 0.0
    seed: int = 0


def predict(logits: Tensor, padding: list[int]) -> Tensor:
    """Of rows -> of the tokens that they predict: the first row of a sequence also predicts itself."""
    return torch.stack([torch.cat((row[: pad + 1], row[pad:-1])) for row, pad in zip(logits, padding, strict=True)])


def passes(model: EagerModel, canvas: Tensor, padding: list[int], prompt: int, policy: CachePolicy) -> Logits:
    """Logits of one pass after another; the last row of the prompt counts as the response's (docs/policies.md)."""
    context, step = model.context(padding, canvas.shape[1]), 0
    if not isinstance(policy, DllmCache):
        return lambda tokens: predict(model.forward(tokens, context), padding)
    cache = FourFeatureCache(model, context, prompt - 1 if prompt else 0, policy)

    def run(tokens: Tensor) -> Tensor:
        nonlocal step
        step += 1
        return predict(cache.forward(tokens, step), padding)

    return run


def sample_tokens(logits: Tensor, settings: Settings, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, confidence) of rows [n, V]: published, but for the random numbers and the tokens that are known."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    unknown = torch.ones_like(logits, dtype=torch.bool).scatter_(1, order[:, :KNOWN], False)
    if settings.temperature > 0:
        logits = logits / settings.temperature
    if settings.temperature not in (0.0, 1.0):
        logits = logits.masked_fill(unknown, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        above = logits.gather(1, order).softmax(-1).cumsum(-1) > settings.top_p
        above = torch.cat((torch.zeros_like(above[:, :1]), above[:, :-1]), dim=1)  # the first one above it stays
        logits = logits.masked_fill(torch.zeros_like(above).scatter_(1, order, above) | unknown, -torch.inf)
    if settings.top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[:, -1:], -torch.inf)
    share = logits.softmax(-1)
    tokens = share.argmax(-1)
    if settings.temperature > 0:
        noise = -torch.log(-torch.log(torch.from_numpy(draw.random((len(logits), KNOWN)))))
        best = (share.log().gather(1, order[:, :KNOWN]) + noise).argmax(-1, keepdim=True)
        tokens = order.gather(1, best)[:, 0]
    if settings.alg == "topk_margin":
        best_two = share.topk(2).values
        return tokens, best_two[:, 0] - best_two[:, 1]
    if settings.alg == "entropy":
        return tokens, (share * torch.log(share + 1e-10)).sum(-1)
    return tokens, share.gather(1, tokens[:, None])[:, 0]


def diffusion_generate(logits_of: Logits, canvas: Tensor, settings: Settings) -> tuple[Tensor, int]:
    """(canvas without masks, forward passes). Sequence i draws from seed + i: for rows first, then for tokens."""
    x, ran = canvas.clone(), 0
    times = torch.linspace(1, settings.eps, settings.steps + 1)
    draws = [np.random.default_rng(settings.seed + number) for number in range(len(x))]
    for step in range(settings.steps):
        masked, chance, last = x == MASK, 1 - times[step + 1] / times[step], step == settings.steps - 1
        mean = masked.sum() / len(x)
        count = int(mean) + 1 if last else int(mean * chance)
        if not count and settings.alg != "origin":
            continue
        numbers: list[Any] = [None] * len(x)
        if settings.alg == "origin" or settings.alg_temp > 0:
            numbers = [draw.random(int(rows.sum())) for draw, rows in zip(draws, masked, strict=True)]
        if settings.alg == "origin":
            reveals = [torch.from_numpy(own) < (1.0 if last else chance.item()) for own in numbers]
            if not any(rows.any() for rows in reveals):
                continue
        logits, ran = logits_of(x), ran + 1
        logits[:, :, MASK] = -torch.inf
        for number, draw in enumerate(draws):
            places = masked[number].nonzero()[:, 0]
            if settings.alg == "origin":
                places = places[reveals[number]]
            tokens, confidence = sample_tokens(logits[number, places], settings, draw)
            if settings.alg == "origin":
                chosen = torch.arange(len(places))
            elif settings.alg_temp > 0:  # a multinomial without replacement, by the Gumbel numbers of its softmax
                keys = confidence / settings.alg_temp - torch.log(-torch.log(torch.from_numpy(numbers[number])))
                chosen = keys.sort(descending=True, stable=True).indices[: len(places) if last else count]
            else:
                chosen = confidence.sort(descending=True, stable=True).indices[: len(places) if last else count]
            x[number, places[chosen]] = tokens[chosen]
    return x, ran


def options_of(settings: Settings, **more: Any) -> tuple[GenerationOptions, Transfer]:
    """The same settings by our names."""
    options = GenerationOptions(
        steps=settings.steps,
        temperature=settings.temperature,
        top_p=settings.top_p or 1.0,
        top_k=settings.top_k,
        remasking=ALGORITHMS.get(settings.alg),  # type: ignore[arg-type]
        seed=settings.seed,
        **more,
    )
    if settings.alg == "origin":
        return options, Origin(eps=settings.eps)
    return options, Dream(eps=settings.eps, alg_temp=settings.alg_temp)


@pytest.fixture(scope="module")
def lm(tiny_bundles: dict[str, Bundle]) -> DiffusionLM:
    bundle = tiny_bundles["dream"]
    return DiffusionLM(bundle, TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64"))


def left_padded(texts: list[list[int]]) -> tuple[Tensor, list[int]]:
    width = max(map(len, texts))
    padding = [width - len(text) for text in texts]
    return torch.tensor([[EOS] * pad + text for pad, text in zip(padding, texts, strict=True)]), padding


CASES: Mapping[str, dict[str, Any]] = {
    "one token a step": {"steps": 24},
    "few steps": {"steps": 7},
    "more steps than tokens": {"steps": 40},
    "one step": {"steps": 1},
    "another end": {"steps": 12, "eps": 0.3},
    "cold": {"steps": 12, "temperature": 0.4, "seed": 3},
    "warm": {"steps": 20, "temperature": 1.0, "seed": 4},
    "hot": {"steps": 9, "temperature": 1.7, "seed": 5},
    "nucleus, greedy": {"steps": 16, "top_p": 0.7},
    "nucleus": {"steps": 16, "temperature": 0.8, "top_p": 0.8, "seed": 6},
    "as published": {"steps": 24, "temperature": 0.2, "top_p": 0.95, "seed": 7},
    "few tokens": {"steps": 16, "temperature": 1.2, "top_k": 3, "seed": 8},
    "both filters": {"steps": 16, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "seed": 9},
    "drawn rows": {"steps": 12, "alg_temp": 0.3, "seed": 10},
    "drawn rows and tokens": {"steps": 30, "alg_temp": 0.1, "temperature": 0.3, "top_p": 0.95, "seed": 11},
}


CACHED = ("one token a step", "more steps than tokens", "drawn rows and tokens")
LOOPS = [
    # Without a cache every second pair, as the white fields of a chess board.
    *((case, alg, NoCache()) for row, case in enumerate(CASES) for alg in [*ALGORITHMS, "origin"][row % 2 :: 2]),
    *((case, alg, CACHE) for case in CACHED for alg in [*ALGORITHMS, "origin"]),
]


@pytest.mark.parametrize(("case", "alg", "policy"), LOOPS, ids=str)
def test_a_continuation_equals_the_published_loop(
    case: str, alg: str, policy: CachePolicy, lm: DiffusionLM, tiny_eager: dict[str, EagerModel]
) -> None:
    settings = Settings(alg=alg, **CASES[case])
    canvas, padding = left_padded([[*prompt, *[MASK] * 24] for prompt in PROMPTS])
    logits_of = passes(tiny_eager["dream"], canvas, padding, 13, policy)
    expected, ran = diffusion_generate(logits_of, canvas, settings)
    options, rule = options_of(settings, gen_length=24)
    *_, last = lm.stream(lm.continuation(PROMPTS, options), options, policy, rule)
    assert last.tokens.tolist() == expected[:, 13:].tolist()
    assert last.passes == ran


TEXTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (20, 16)]
HOLES = {"behind a prompt": ([6, 7, 11, 15], [3, 9, 10, 14]), "from the first row": ([0, 8, 9, 19], [0, 1, 2, 15])}


@pytest.mark.parametrize("alg", [*ALGORITHMS, "origin"])
@pytest.mark.parametrize("policy", [NoCache(), CACHE], ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", HOLES)
def test_infilling_equals_the_published_loop(
    name: str, policy: CachePolicy, alg: str, lm: DiffusionLM, tiny_eager: dict[str, EagerModel]
) -> None:
    settings = Settings(alg=alg, steps=3, temperature=0.6, seed=2)
    texts = [
        [MASK if place in holes else token for place, token in enumerate(text)]
        for text, holes in zip(TEXTS, HOLES[name], strict=True)
    ]
    options, rule = options_of(settings)
    request = lm.infilling(texts, options)
    prompt = request.shape.prompt_rows
    canvas, padding = left_padded(texts)
    expected, _ = diffusion_generate(passes(tiny_eager["dream"], canvas, padding, prompt, policy), canvas, settings)
    *_, last = lm.stream(request, options, policy, rule)
    assert last.tokens.tolist() == expected[:, prompt:].tolist()


@pytest.mark.parametrize("rule", [Dream(), Dream(alg_temp=0.2), Origin()], ids=str)
@pytest.mark.parametrize("policy", [PrefixCache(), DualCache()], ids=lambda policy: policy.name)
def test_where_every_step_is_full_a_cache_changes_nothing(policy: CachePolicy, rule: Transfer, lm: DiffusionLM) -> None:
    options = GenerationOptions(gen_length=12, block_length=1, temperature=0.5, steps=12)
    request = lm.continuation(PROMPTS, options)
    found, expected = (lm.run(request, options, each, rule) for each in (policy, NoCache()))
    assert [result.tokens for result in found] == [result.tokens for result in expected]


@pytest.mark.parametrize("rule", [None, Dream(alg_temp=0.2), Origin()], ids=str)
def test_a_batch_gives_what_its_sequences_give_alone(rule: Transfer | None, lm: DiffusionLM) -> None:
    together = lm.run(
        lm.continuation(PROMPTS, GenerationOptions(gen_length=16)), GenerationOptions(gen_length=16), transfer=rule
    )
    for number, prompt in enumerate(PROMPTS):
        own = GenerationOptions(gen_length=16, seed=number)
        assert lm.run(lm.continuation([prompt], own), own, transfer=rule)[0].tokens == together[number].tokens


@pytest.mark.parametrize("rule", [None, Dream(alg_temp=0.2), Origin()], ids=str)
@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
def test_every_provider_gives_the_tokens_of_the_reference(
    provider: str, rule: Transfer | None, lm: DiffusionLM, tiny_bundles: dict[str, Bundle]
) -> None:
    bundle, options = tiny_bundles["dream"], GenerationOptions(gen_length=24, seed=1)
    with DiffusionLM(bundle, open_session(bundle, SessionOptions(provider=provider, threads=1))) as other:
        for policy in (NoCache(), CACHE, DualCache()):
            runs = [each.run(each.continuation(PROMPTS, options), options, policy, rule) for each in (lm, other)]
            assert [result.tokens for result in runs[0]] == [result.tokens for result in runs[1]]


# -- defaults of the family
def test_a_dream_bundle_samples_as_published_unless_told_otherwise(lm: DiffusionLM) -> None:
    settled, rule = lm.settle(GenerationOptions())
    assert (settled.temperature, settled.top_p, settled.remasking, rule) == (0.2, 0.95, "entropy", Dream())
    settled, rule = lm.settle(GenerationOptions(temperature=0.0, top_p=1.0, remasking="margin"), Quota())
    assert (settled.temperature, settled.top_p, settled.remasking, rule) == (0.0, 1.0, "margin", Quota())
    assert lm.continuation([[1, 2]], GenerationOptions()).schedule.block_length == 256


def test_a_llada_bundle_samples_as_before(tiny_bundle: Bundle) -> None:
    with DiffusionLM(tiny_bundle, open_session(tiny_bundle, SessionOptions(provider="torch"))) as model:
        settled, rule = model.settle(GenerationOptions())
    assert (settled.temperature, settled.top_p, settled.top_k) == (0.0, 1.0, None)
    assert (settled.remasking, rule) == ("low_confidence", Quota())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Dream(eps=0.0), "--eps is 0.0, expected a number above 0 and below 1"),
        (lambda: Origin(eps=1.0), "--eps is 1.0, expected a number above 0 and below 1"),
        (lambda: Dream(alg_temp=-0.1), "--alg-temp is -0.1, expected a number from 0 up"),
        (lambda: GenerationOptions(top_p=0.0), "--top-p is 0.0, expected a probability above 0 and up to 1"),
        (lambda: GenerationOptions(top_p=1.1), "--top-p is 1.1, expected a probability above 0 and up to 1"),
        (lambda: GenerationOptions(top_k=0), "--top-k is 0, expected at least 1"),
        (lambda: GenerationOptions(top_k=65), "--top-k is 65, expected at most 64, the tokens that a head returns"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_the_name_of_its_flag(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()


# -- the schedule
def counts(steps: int, masks: int, eps: float = 1e-3) -> list[int]:
    """What each step commits of one sequence, by the runtime's schedule."""
    found, left = [], masks
    for step in range(1, steps + 1):
        (count,) = Dream(eps=eps).quotas(np.array([masks]), np.array([left]), step, steps).tolist()
        found.append(count)
        left -= count
    return found


def published_counts(steps: int, masks: int, eps: float = 1e-3) -> list[int]:
    times, found, left = torch.linspace(1, eps, steps + 1), [], masks
    for step in range(steps):
        share = 1 - times[step + 1] / times[step]
        found.append(int(torch.tensor(float(left)) * share) if step < steps - 1 else left)
        left -= found[-1]
    return found


@pytest.mark.parametrize("length", [2, 16, 64, 256, 512])
def test_with_a_step_for_each_token_the_first_commits_none_and_the_last_two(length: int) -> None:
    assert counts(length, length) == [0, *[1] * (length - 2), 2]


def test_with_twice_as_many_steps_as_tokens_half_of_them_commit_nothing() -> None:
    found = counts(512, 256)
    assert (sum(found), found.count(0)) == (256, 257)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 64, 100, 128, 200, 256, 300, 512, 768])
def test_counts_are_those_of_the_published_arithmetic(steps: int) -> None:
    for masks in (1, 5, 64, 128, 333, 600):
        for eps in (1e-3, 1e-5, 0.1):
            assert counts(steps, masks, eps) == published_counts(steps, masks, eps), (masks, eps)


def test_a_share_is_a_fall_of_the_time_relative_to_the_time() -> None:
    assert float(reveal_share(1, 4, 0.2)) == pytest.approx(0.2)
    assert float(reveal_share(4, 4, 0.2)) == pytest.approx(0.5)
