"""The runtime in float64 against the published LLaDA sampler, written out plainly, token for token.

The sampler runs over the eager model without a cache or over the four-feature cache. One documented deviation applies to
both sides: the mask token is never proposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DualCache, NoCache
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.transfers import Quota, Threshold, Transfer
from dllm_export.tools.eager import EagerModel
from dllm_export.tools.four_feature import FourFeatureCache

MASK, EOS = 96, 95
PROMPTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (13, 9)]
CACHE = DllmCache(prompt_interval=5, response_interval=3)
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Canvas:
    """Left-padded token ids [B, T] with masks to fill from column `prompt` on."""

    tokens: Tensor
    padding: tuple[int, ...]
    prompt: int
    shift: bool = False

    @property
    def lead(self) -> int:
        """Prompt rows that predict into the response; a cache counts them as its rows (docs/policies.md)."""
        return int(self.shift and self.prompt > 0)

    def predict(self, logits: Tensor) -> Tensor:  # [B, T, V] of rows -> of the tokens that they predict
        """With a shift a token's logits are those of the row before it; the first token's are of its own row."""
        if not self.shift:
            return logits
        rows = zip(logits, self.padding, strict=True)
        return torch.stack([torch.cat((row[: pad + 1], row[pad:-1])) for row, pad in rows])


def left_padded(texts: list[list[int]], prompt: int, *, shift: bool = False) -> Canvas:
    width = max(map(len, texts))
    padding = tuple(width - len(text) for text in texts)
    rows = [[EOS] * pad + text for pad, text in zip(padding, texts, strict=True)]
    return Canvas(torch.tensor(rows), padding, prompt, shift)


def passes(model: EagerModel, canvas: Canvas, policy: CachePolicy) -> Logits:
    """Logits of one pass after another, with a cache and a step counter of their own."""
    context, step = model.context(canvas.padding, canvas.tokens.shape[1]), 0
    if not isinstance(policy, DllmCache):
        return lambda tokens: canvas.predict(model.forward(tokens, context))
    cache = FourFeatureCache(model, context, canvas.prompt - canvas.lead, policy)

    def run(tokens: Tensor) -> Tensor:
        nonlocal step
        step += 1
        return canvas.predict(cache.forward(tokens, step))

    return run


def guided(model: EagerModel, canvas: Canvas, policy: CachePolicy, scale: float, interval: int) -> Logits:
    """Classifier-free guidance: uncond + (scale + 1)(cond - uncond), the residual kept between refreshes."""
    conditional, unconditional = passes(model, canvas, policy), passes(model, canvas, policy)
    given = canvas.tokens != MASK
    step, residual = 0, torch.zeros(())

    def run(tokens: Tensor) -> Tensor:
        nonlocal step, residual
        step += 1
        logits = conditional(tokens)
        if (step - 1) % interval != 0 and step > 5:
            return logits + scale * residual
        blank = unconditional(tokens.where(~given, MASK))
        residual = logits - blank
        return blank + (scale + 1) * (logits - blank)

    return run


def transfer_counts(masked: Tensor, steps: int) -> Tensor:  # [B, block] -> [B, steps]
    total = masked.sum(1, keepdim=True)
    counts = (total // steps).repeat(1, steps)
    for row, rest in zip(counts, (total % steps)[:, 0].tolist(), strict=True):
        row[:rest] += 1
    return counts


def published_sampler(
    logits_of: Logits, canvas: Canvas, block: int, steps: int, ends: tuple[int, int], options: GenerationOptions
) -> Tensor:
    """LLaDA's loop at temperature 0; `steps` are those of a block. Sequence i ranks at random from seed + i. [B, R]"""
    x, (eos, end_of_turn) = canvas.tokens.clone(), ends
    draws = [np.random.default_rng(options.seed + row) for row in range(len(x))]
    for start in range(canvas.prompt, x.shape[1], block):
        end = start + block
        for counts in transfer_counts(x[:, start:end] == MASK, steps).T:
            masked = x == MASK
            if options.early_stop and not masked[:, :end].any():
                break
            logits = logits_of(x)
            logits[:, :, MASK] = -torch.inf
            if options.logits_eos_inf:
                logits[:, :, eos] = -torch.inf
            proposal = logits.argmax(-1)
            if options.confidence_eos_eot_inf:
                logits[:, :, [eos, end_of_turn]] = -torch.inf
            share = logits.softmax(-1)
            confidence = share.gather(2, proposal.unsqueeze(2)).squeeze(2)
            if options.remasking in ("margin", "entropy"):
                gap, entropy = share.topk(2).values, -torch.special.entr(share).sum(-1)
                ranks = gap[..., 0] - gap[..., 1] if options.remasking == "margin" else entropy
                last = torch.isin(proposal, torch.tensor(ends)) & options.confidence_eos_eot_inf
                confidence = ranks.where(~last, -1e9)
            confidence[:, end:] = -torch.inf
            confidence = confidence.where(masked, -torch.inf)
            if options.remasking == "random":
                for ranks, draw in zip(confidence, draws, strict=True):
                    open_rows = ranks.isfinite()
                    ranks[open_rows] = torch.from_numpy(draw.random(int(open_rows.sum())))
            order = confidence.sort(dim=1, descending=True, stable=True).indices
            for row, places, count in zip(range(len(x)), order, counts.tolist(), strict=True):
                places = places[: min(count, int(masked[row, :end].sum()))]
                x[row, places] = proposal[row, places]
            if options.early_stop:
                stop_early(x[:, canvas.prompt :], eos, end_of_turn)
    return x[:, canvas.prompt :]


def stop_early(response: Tensor, eos: int, end_of_turn: int) -> None:
    """Masks behind an end become end-of-text, in place."""
    for row in response:
        ended = False
        for place, token in enumerate(row.tolist()):
            if ended and token == MASK:
                row[place] = eos
            ended |= token in (eos, end_of_turn)


def open_with_ends(bundle: Bundle, ends: tuple[int, int], *, shift: bool = False) -> DiffusionLM:
    """The runtime in float64, with these tokens in the role of end-of-text and end-of-turn."""
    tokens = replace(bundle.manifest.tokens, eos=ends[0], end_of_turn=ends[1])
    shape = replace(bundle.manifest.shape, shift=shift)
    bundle = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, tokens=tokens, shape=shape))
    return DiffusionLM(bundle, TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64"))


def frequent_tokens(tokens: Tensor) -> tuple[int, int]:
    """Two tokens that the model likes, so that options about them change something."""
    (first, _), (second, _) = Counter(tokens.flatten().tolist()).most_common(2)
    return first, second


def sizes(options: GenerationOptions) -> tuple[int, int]:
    """Block length and steps per block."""
    assert options.gen_length is not None
    block = options.block_length or options.gen_length
    return block, (options.steps or options.gen_length) * block // options.gen_length


CONTINUATIONS: Mapping[str, dict[str, Any]] = {
    "one block": {},
    "blocks": {"block_length": 6},
    "remainders": {"block_length": 8, "steps": 9},
    "several tokens a step": {"steps": 5},
    "no end of text": {"logits_eos_inf": True, "block_length": 12},
    "end of text last": {"confidence_eos_eot_inf": True, "steps": 12},
    "both end options": {"confidence_eos_eot_inf": True, "logits_eos_inf": True},
    "random order": {"remasking": "random", "block_length": 12, "steps": 8, "seed": 3},
    "largest gap": {"remasking": "margin", "block_length": 12, "steps": 8},
    "least entropy": {"remasking": "entropy", "steps": 10},
    "largest gap, end of text last": {"remasking": "margin", "confidence_eos_eot_inf": True},
    "least entropy, end of text last": {"remasking": "entropy", "confidence_eos_eot_inf": True, "steps": 12},
    "least entropy, guidance, no end of text": {"remasking": "entropy", "cfg_scale": 0.7, "logits_eos_inf": True},
    "largest gap, guidance": {"remasking": "margin", "cfg_scale": 1.2, "cfg_interval": 2, "block_length": 8},
    "early stop": {"early_stop": True},
    "early stop in blocks": {"early_stop": True, "block_length": 6, "steps": 12},
    "early stop, guidance": {"early_stop": True, "cfg_scale": 0.5, "block_length": 12},
    "guidance": {"cfg_scale": 1.5},
    "guidance refreshed every third step": {"cfg_scale": 0.8, "cfg_interval": 3, "block_length": 12},
}


SHIFTED = ("blocks", "several tokens a step", "random order", "early stop", "guidance refreshed every third step")
CASES = [*((name, False) for name in CONTINUATIONS), *((name, True) for name in SHIFTED)]


@pytest.mark.parametrize("policy", [NoCache(), CACHE], ids=["none", "dllm-cache"])
@pytest.mark.parametrize(("name", "shift"), CASES)
def test_continuation_equals_the_published_sampler(
    name: str, shift: bool, policy: CachePolicy, tiny_bundle: Bundle, tiny_eager: dict[str, EagerModel]
) -> None:
    model, options = tiny_eager["plain"], GenerationOptions(gen_length=24, **CONTINUATIONS[name])
    canvas = left_padded([[*prompt, *[MASK] * 24] for prompt in PROMPTS], prompt=13, shift=shift)
    block, steps = sizes(options)
    reference = guided if options.cfg_scale else passes
    extra = (options.cfg_scale, options.cfg_interval) if options.cfg_scale else ()

    def published(ends: tuple[int, int], options: GenerationOptions) -> Tensor:
        return published_sampler(reference(model, canvas, policy, *extra), canvas, block, steps, ends, options)

    ends = (EOS, EOS)
    if options.logits_eos_inf or options.confidence_eos_eot_inf or options.early_stop:
        plain = published(ends, GenerationOptions(gen_length=24))
        ends = frequent_tokens(plain)
        expected = published(ends, options)
        assert not torch.equal(plain, expected), "the option changed nothing, so that this test cannot see it"
    else:
        expected = published(ends, options)
    with open_with_ends(tiny_bundle, ends, shift=shift) as lm:
        results = lm.run(lm.continuation(PROMPTS, options), options, policy)
    assert [list(result.tokens) for result in results] == expected.tolist()


def holes(text: list[int], places: list[int]) -> list[int]:
    return [MASK if place in places else token for place, token in enumerate(text)]


TEXTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (20, 16)]
INFILLINGS = {
    "in the middle": ([holes(TEXTS[0], [6, 7, 11, 15]), holes(TEXTS[1], [3, 9, 10, 14])], 6),
    "from the first row to the last": ([holes(TEXTS[0], [0, 8, 9, 19]), holes(TEXTS[1], [2, 15])], 0),
}


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"cfg_scale": 1.0, "cfg_interval": 2}], ids=str)
@pytest.mark.parametrize("policy", [NoCache(), CACHE, replace(CACHE, update_ratio=0.0)], ids=str)
@pytest.mark.parametrize("name", INFILLINGS)
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_infilling_equals_the_published_sampler(
    shift: bool,
    name: str,
    policy: CachePolicy,
    options: dict[str, Any],
    tiny_bundle: Bundle,
    tiny_eager: dict[str, EagerModel],
) -> None:
    model, settings = tiny_eager["plain"], GenerationOptions(**options)
    texts, prompt = INFILLINGS[name]
    canvas = left_padded(texts, prompt, shift=shift)
    rows = canvas.tokens.shape[1] - prompt
    logits_of = (
        guided(model, canvas, policy, settings.cfg_scale, settings.cfg_interval)
        if settings.cfg_scale
        else passes(model, canvas, policy)
    )
    expected = published_sampler(logits_of, canvas, rows, settings.steps or 4, (EOS, EOS), settings)
    with open_with_ends(tiny_bundle, (EOS, EOS), shift=shift) as lm:
        *_, last = lm.stream(lm.infilling(texts, settings), settings, policy)
    assert last.tokens.tolist() == expected.tolist()


def text_of(tokens: tuple[int, ...], ends: tuple[int, int]) -> list[int]:
    """What is shown: everything before the first end."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    return list(tokens[: places[0]]) if places else list(tokens)


@pytest.mark.parametrize("rule", [Quota(), Threshold(threshold=0.2)], ids=["quota", "threshold"])
@pytest.mark.parametrize("policy", [NoCache(), CACHE, DualCache()], ids=lambda policy: policy.name)
def test_an_early_stop_fills_what_follows_an_end_without_a_pass(
    policy: CachePolicy, rule: Transfer, tiny_bundle: Bundle
) -> None:
    """From left to right an end comes when all before it is decided, so that the text must be the same."""
    options = GenerationOptions(gen_length=24, block_length=1)
    with open_with_ends(tiny_bundle, (EOS, EOS)) as lm:
        plain = lm.run(lm.continuation(PROMPTS, options), options, policy, rule)
    ends = (plain[0].tokens[9], plain[1].tokens[4])
    with open_with_ends(tiny_bundle, ends) as lm:
        request = lm.continuation(PROMPTS, options)
        plain, stop = lm.run(request, options, policy, rule), replace(options, early_stop=True)
        frames = list(lm.stream(request, stop, policy, rule))
        stopped = lm.summarize(request, frames, 1.0)
    shown = [text_of(result.tokens, ends) for result in plain]
    assert [text_of(result.tokens, ends) for result in stopped] == shown
    assert [result.finish_reason for result in stopped] == [result.finish_reason for result in plain] == ["stop"] * 2
    longest = max(map(len, shown))
    assert (len(frames), frames[-1].passes, frames[-1].steps) == (longest + 1, longest + 1, 24)
    before = np.full((2, 24), MASK)
    for frame in frames:
        assert np.array_equal(frame.committed, frame.tokens != before), "a frame says what it changed"
        before = frame.tokens
    for result, text in zip(stopped, shown, strict=True):
        behind = len(text) + 1
        assert result.tokens[behind:] == (ends[0],) * (24 - behind)
        assert np.isfinite(result.confidence[:behind]).all()
        assert np.isnan(result.confidence[behind:]).all()
