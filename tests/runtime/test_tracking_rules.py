"""Rules that remember, against their formulas step by step, and whole generations against a plain loop.

The loop runs in PyTorch in float64 over every logit of every row; each rule stands here once more, for one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllm_export.errors import UsageError
from dllm_export.graphs import TensorType
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DualCache, NoCache
from dllm_export.runtime.session import Buffer, SessionOptions, open_session
from dllm_export.runtime.transfers import AdaptiveThreshold, Credit, Klass, SlowFast, Threshold, Transfer, TransferState
from dllm_export.tools.eager import Context, EagerModel
from dllm_export.tools.four_feature import FourFeatureCache

OpenModel = Callable[[str], DiffusionLM]
MASK = 96
PROMPTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (13, 9)]
CACHE = DllmCache(prompt_interval=5, response_interval=3)
POLICIES: list[CachePolicy] = [NoCache(), CACHE, DualCache()]


# -- the rules, plainly
class Rule(Protocol):
    """One sequence through one block after another."""

    def step(self, logits: Tensor, masked: list[int], number: int) -> tuple[list[int], Tensor]:
        """Logits [L, V] of a block, its masked rows, the step in the block from 1 -> (rows to commit, tokens [L])."""
        ...


def surest(confidence: Tensor, masked: list[int]) -> int:
    return max(masked, key=lambda row: (float(confidence[row]), -row))


class PlainKlass:
    def __init__(self, rule: Klass) -> None:
        self.rule = rule
        self.former, self.moves = torch.empty(0), list[list[float]]()

    def step(self, logits: Tensor, masked: list[int], number: int) -> tuple[list[int], Tensor]:
        p = logits.softmax(-1)
        if number == 1:
            self.moves = [[] for _ in p]
        else:
            for moves, now, before in zip(self.moves, p, self.former, strict=True):
                some = now > 0
                moves.append(float((now[some] * (now[some] / before[some]).log()).sum()))
        self.former = p
        confidence, tokens = p.max(-1)

        def at_rest(row: int) -> bool:
            last = self.moves[row][-self.rule.kl_steps :]
            return len(last) == self.rule.kl_steps and all(move < self.rule.kl_limit for move in last)

        chosen = [row for row in masked if confidence[row] >= self.rule.threshold and at_rest(row)]
        return chosen or [surest(confidence, masked)], tokens


class PlainAdaptive:
    def __init__(self, rule: AdaptiveThreshold) -> None:
        self.rule = rule
        self.former, self.limits = torch.empty(0), list[float]()

    def step(self, logits: Tensor, masked: list[int], number: int) -> tuple[list[int], Tensor]:
        p = logits.softmax(-1)
        if number == 1:
            self.limits = [self.rule.threshold] * len(p)
        else:
            for row, (now, before) in enumerate(zip(p, self.former, strict=True)):
                second = float(now.sort(descending=True).values[1])
                cosine = float(now @ before / (now.norm() * before.norm()))
                self.limits[row] += -self.rule.alpha * (1 - second) + self.rule.beta * (1 - cosine)
        self.former = p
        confidence, tokens = p.max(-1)
        chosen = {row for row in masked if confidence[row] >= self.limits[row]} | {surest(confidence, masked)}
        return sorted(chosen), tokens


class PlainCredit:
    def __init__(self, rule: Credit) -> None:
        self.rule = rule
        self.credit = torch.empty(0)

    def step(self, logits: Tensor, masked: list[int], number: int) -> tuple[list[int], Tensor]:
        self.credit = torch.zeros_like(logits) if number == 1 else self.credit * self.rule.credit_decay
        for row in masked:
            best = int(logits[row].argmax())
            self.credit[row, best] += logits[row].softmax(-1)[best] ** self.rule.credit_power
        fused = logits + self.rule.credit_weight * (1 + self.credit).log()
        confidence, tokens = fused.softmax(-1).max(-1)
        chosen = {row for row in masked if confidence[row] >= self.rule.threshold} | {surest(confidence, masked)}
        return sorted(chosen), tokens


class PlainSlowFast:
    """Rows are counted from the block's start here."""

    def __init__(self, rule: SlowFast) -> None:
        self.rule = rule
        self.phase, self.start, self.end, self.estimates = "explore", 0, 0, list[int]()

    def step(self, logits: Tensor, masked: list[int], number: int) -> tuple[list[int], Tensor]:
        confidence, tokens = logits.softmax(-1).max(-1)
        if number == 1:
            self.phase, self.start, self.estimates = "explore", 0, []
        elif self.phase == "fast" and all(row >= self.end for row in masked):
            self.phase, self.start, self.estimates = "explore", self.end, []
        allowed = masked
        if self.phase == "fast":
            allowed = [row for row in masked if row < self.end]
        else:
            reached = [row for row in masked if confidence[row] >= self.rule.span_confidence]
            self.end = max(reached) + 1 if reached else self.start + 1
            self.estimates.append(self.end)
            last = self.estimates[-2:]
            if (len(last) == 2 and abs(last[0] - last[1]) / 2 < 1) or len(self.estimates) == self.rule.explore_steps:
                self.phase = "fast"
        sure = [row for row in allowed if confidence[row] >= self.rule.threshold]
        return sure if len(sure) >= 2 else [surest(confidence, allowed)], tokens


def plain(rule: Transfer) -> Rule:
    if isinstance(rule, SlowFast):
        return PlainSlowFast(rule)
    if isinstance(rule, Klass):
        return PlainKlass(rule)
    if isinstance(rule, AdaptiveThreshold):
        return PlainAdaptive(rule)
    assert isinstance(rule, Credit)
    return PlainCredit(rule)


# -- the caches, plainly
class PlainDual:
    """Keys and values of all rows from a block's first step; in the others the block's rows are computed against them."""

    def __init__(self, model: EagerModel, context: Context) -> None:
        self.model, self.context = model, context
        self.caches: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, block: slice, number: int) -> Tensor:
        model = self.model
        everything = slice(0, tokens.shape[1])
        rows = everything if number == 1 else block
        if number == 1:
            self.caches = [(torch.empty(0), torch.empty(0))] * len(model.layers)
        x = model.embed(tokens[:, rows])
        at = self.context.at(torch.arange(tokens.shape[1])[rows].expand(len(tokens), -1))
        for place, layer in enumerate(model.layers):
            inner = model.norm(x, layer["attn_norm.weight"])
            query, key, value = (model.project(layer, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
            if number > 1:
                old_key, old_value = (cached.clone() for cached in self.caches[place])
                old_key[:, rows], old_value[:, rows] = key, value
                key, value = old_key, old_value
            self.caches[place] = key, value
            x = x + model.attend(layer, query, key, value, at, self.context)
            x = x + model.mlp(layer, x)
        logits = torch.zeros(*tokens.shape, model.classify(x).shape[-1], dtype=x.dtype)
        logits[:, rows] = model.classify(x)
        return logits


def passes(model: EagerModel, context: Context, prompt: int, policy: CachePolicy) -> Callable[..., Tensor]:
    """`(tokens [B, T], block, step, step in the block) -> logits [B, T, V]` with caches of their own."""
    if isinstance(policy, DualCache):
        dual = PlainDual(model, context)
        return lambda tokens, block, _, number: dual.forward(tokens, block, number)
    if isinstance(policy, DllmCache):
        cache = FourFeatureCache(model, context, prompt, policy)
        return lambda tokens, _, step, __: cache.forward(tokens, step)
    return lambda tokens, *_: model.forward(tokens, context)


def plain_loop(
    model: EagerModel, rule: Transfer, policy: CachePolicy, length: int, block_length: int, scale: float = 0.0
) -> tuple[list[list[int]], int]:
    """Both prompts as one left-padded batch: (responses, steps)."""
    prompt = max(map(len, PROMPTS))
    padding = [prompt - len(text) for text in PROMPTS]
    canvas = torch.tensor(
        [[model.eos_token] * pad + text + [MASK] * length for pad, text in zip(padding, PROMPTS, strict=True)]
    )
    given = canvas != MASK
    context, rules, steps = model.context(padding, canvas.shape[1]), [plain(rule) for _ in PROMPTS], 0
    conditional, unconditional = (passes(model, context, prompt, policy) for _ in range(2))
    for start in range(prompt, canvas.shape[1], block_length):
        block, number = slice(start, start + block_length), 0
        while (canvas[:, block] == MASK).any():
            steps, number = steps + 1, number + 1
            logits = conditional(canvas, block, steps, number)
            if scale:
                blank = unconditional(canvas.where(~given, MASK), block, steps, number)
                logits = blank + (scale + 1) * (logits - blank)
            logits[:, :, MASK] = -torch.inf
            for sequence, one in enumerate(rules):
                masked = (canvas[sequence, block] == MASK).nonzero()[:, 0].tolist()
                if masked:
                    chosen, tokens = one.step(logits[sequence, block], masked, number)
                    for row in chosen:
                        canvas[sequence, start + row] = tokens[row]
    return canvas[:, prompt:].tolist(), steps


RULES: dict[str, Transfer] = {
    "klass": Klass(threshold=0.05, kl_limit=0.05),
    "klass of three steps": Klass(threshold=0.02, kl_limit=0.3, kl_steps=3),
    "apd": AdaptiveThreshold(threshold=0.2, alpha=0.02, beta=0.01),
    "apd that rises": AdaptiveThreshold(threshold=0.12, alpha=0.002, beta=0.5),
    "slow-fast": SlowFast(threshold=0.2, span_confidence=0.15),
    "slow-fast in spans of a row": SlowFast(threshold=0.2, span_confidence=1.0, explore_steps=1),
    "slow-fast of long exploration": SlowFast(threshold=0.15, span_confidence=0.3, explore_steps=3),
    "credit": Credit(threshold=0.3),
    "heavy credit": Credit(threshold=0.5, credit_weight=3.0, credit_decay=0.5, credit_power=0.6),
}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", RULES)
def test_a_batch_gives_the_tokens_of_a_plain_loop(
    name: str, policy: CachePolicy, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    lm, rule, options = open_model("float64"), RULES[name], GenerationOptions(gen_length=24, block_length=12)
    expected, steps = plain_loop(tiny_eager["plain"], rule, policy, 24, 12)
    found = lm.run(lm.continuation(PROMPTS, options), options, policy, rule)
    assert [list(result.tokens) for result in found] == expected
    assert found[0].passes == steps < 24, "a rule that decides one token a step shows nothing"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", ["klass", "apd", "credit"])
def test_a_rule_with_a_state_goes_with_guidance(
    name: str, policy: CachePolicy, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    lm, rule = open_model("float64"), RULES[name]
    options = GenerationOptions(gen_length=24, block_length=12, cfg_scale=0.6)
    expected, _ = plain_loop(tiny_eager["plain"], rule, policy, 24, 12, scale=0.6)
    found = lm.run(lm.continuation(PROMPTS, options), options, policy, rule)
    assert [list(result.tokens) for result in found] == expected


@pytest.mark.parametrize("name", ["klass", "apd", "credit"])
def test_onnxruntime_gives_the_tokens_of_the_reference(name: str, open_model: OpenModel) -> None:
    options = GenerationOptions(gen_length=24, block_length=8)
    tokens = []
    for provider in ("float64", "onnxruntime"):
        lm = open_model(provider)
        request = lm.continuation(PROMPTS, options)
        for _ in range(2):  # what the first request left in the state must not show in the second
            tokens.append([result.tokens for result in lm.run(request, options, NoCache(), RULES[name])])
    assert tokens == [tokens[0]] * 4


@pytest.mark.parametrize(("rule", "share"), [(Klass(), 8), (AdaptiveThreshold(), 8), (Credit(), 8), (SlowFast(), 0)])
def test_a_state_takes_the_bytes_that_the_documentation_says(rule: Transfer, share: int, tiny_bundle: Bundle) -> None:
    batch, block, vocab, taken = len(PROMPTS), 12, 97, 0
    session = open_session(tiny_bundle, SessionOptions(threads=1))
    allocate = session.allocate

    def count(dims: tuple[int, ...], type: TensorType) -> Buffer:
        nonlocal taken
        buffer = allocate(dims, type)
        taken += buffer.read().nbytes if len(dims) == 3 and dims[-1] == vocab else 0
        return buffer

    session.allocate = count  # type: ignore[method-assign]
    with DiffusionLM(tiny_bundle, session) as lm:
        options = GenerationOptions(gen_length=24, block_length=block)
        for _ in range(2):
            lm.run(lm.continuation(PROMPTS, options), options, NoCache(), rule)
    assert taken == share * batch * block * vocab


# -- equalities between rules
@pytest.mark.parametrize(
    "rule", [SlowFast(threshold=1.0, span_confidence=0.0), SlowFast(threshold=1.0, explore_steps=99)]
)
def test_slow_fast_that_trusts_nothing_decodes_one_token_a_step(rule: Transfer, open_model: OpenModel) -> None:
    """Spans to the block's end leave the order to confidence alone."""
    lm, options = open_model("float64"), GenerationOptions(gen_length=24, block_length=8)
    request = lm.continuation(PROMPTS[:1], options)
    found, one = (lm.run(request, options, NoCache(), each)[0] for each in (rule, Threshold(threshold=1.0)))
    assert (found.passes, one.passes) == (24, 24)
    if rule.span_confidence == 0.0:
        assert found.tokens == one.tokens


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize(
    "rule",
    [
        AdaptiveThreshold(threshold=0.2, alpha=0.0, beta=0.0),
        Credit(threshold=0.2, credit_weight=0.0),
        Klass(threshold=0.2, kl_limit=float("inf")),
    ],
    ids=lambda rule: rule.name,
)
def test_a_rule_without_its_addition_is_the_threshold_rule(
    rule: Transfer, policy: CachePolicy, open_model: OpenModel
) -> None:
    lm, options = open_model("float64"), GenerationOptions(gen_length=24, block_length=8)
    request = lm.continuation(PROMPTS, options)
    found, expected = (lm.run(request, options, policy, each) for each in (rule, Threshold(threshold=0.2)))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert found[0].passes == expected[0].passes < 24


@pytest.mark.parametrize(
    "rule",
    [
        AdaptiveThreshold(threshold=0.2, alpha=0.0, beta=0.0),
        Credit(threshold=0.2, credit_weight=0.0),
        Klass(threshold=0.2, kl_limit=float("inf")),
    ],
    ids=lambda rule: rule.name,
)
def test_given_text_within_the_block_of_an_infilling_changes_nothing(rule: Transfer, open_model: OpenModel) -> None:
    lm, options = open_model("float64"), GenerationOptions()
    texts = [[MASK if place % 3 else place for place in range(start, 25)] for start in (4, 9)]
    request = lm.infilling(texts, options)
    found, expected = (lm.run(request, options, NoCache(), each) for each in (rule, Threshold(threshold=0.2)))
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert found[0].passes == expected[0].passes


@pytest.mark.parametrize("name", RULES)
def test_an_early_stop_takes_rows_from_a_rule_with_a_state(name: str, open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=24, block_length=12)
    tokens = lm.bundle.manifest.tokens
    plain_run = lm.run(lm.continuation(PROMPTS, options), options, NoCache(), RULES[name])
    end = plain_run[0].tokens[3]
    manifest = msgspec.structs.replace(lm.bundle.manifest, tokens=replace(tokens, eos=end))
    stopping = DiffusionLM(replace(lm.bundle, manifest=manifest), lm.session)
    early = replace(options, early_stop=True)
    frames = list(stopping.stream(stopping.continuation(PROMPTS, early), early, NoCache(), RULES[name]))
    last = frames[-1].tokens
    assert (last != MASK).all()
    assert np.isnan(frames[-1].confidence).any(), "nothing was filled in"
    assert len(frames) <= plain_run[0].passes


# -- formulas on random rows
@st.composite
def histories(draw: st.DrawFn) -> list[np.ndarray]:
    """Logits [L, V] of a few steps of a block; later ones move less, so that rows come to rest."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    rows, tokens, steps = draw(st.integers(1, 9)), draw(st.integers(2, 7)), draw(st.integers(1, 7))
    logits = rng.normal(size=(rows, tokens)) * draw(st.sampled_from([0.5, 2.0, 6.0]))
    speed = draw(st.sampled_from([0.0, 0.02, 0.5]))
    return [logits + speed * rng.normal(size=logits.shape) / number for number in range(1, steps + 1)]


def state_of(
    logits: np.ndarray, former: np.ndarray | None, masked: list[int], number: int, memory: object
) -> TransferState:
    """What the loop tells a rule about these logits."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p, rows = np.exp(log_p), np.array(masked)
    moved, alike = np.full(len(p), np.nan), np.full(len(p), np.nan)
    if former is not None:
        log_q = former - np.log(np.exp(former).sum(1, keepdims=True))
        q = np.exp(log_q)
        moved = (p * (log_p - log_q)).sum(1)
        alike = (p * q).sum(1) / np.sqrt((p**2).sum(1) * (q**2).sum(1))
    ordered = np.sort(p, axis=1)[:, ::-1]
    return TransferState(
        quota=1,
        block=(0, len(p)),
        block_step=number,
        block_masks=len(p),
        rows=rows,
        ranking=ordered[rows, 0],
        confidence=ordered[rows, 0],
        second=ordered[rows, 1],
        entropy=-(p * log_p).sum(1)[rows],
        divergence=moved[rows],
        similarity=alike[rows],
        decided=np.setdiff1d(np.arange(len(p)), rows),
        decided_confidence=np.ones(len(p) - len(rows)),
        memory=memory,
    )


KLASSES = st.builds(
    Klass,
    threshold=st.sampled_from([0.0, 0.3, 0.9]),
    kl_limit=st.sampled_from([0.0, 1e-3, 0.1]),
    kl_steps=st.integers(1, 3),
)
ADAPTIVE = st.builds(
    AdaptiveThreshold,
    threshold=st.sampled_from([0.3, 0.9, 1.0]),
    alpha=st.sampled_from([0.0, 0.001, 0.1, 0.4]),
    beta=st.sampled_from([0.0, 0.0008, 0.5]),
)


SLOW_FAST = st.builds(
    SlowFast,
    threshold=st.sampled_from([0.2, 0.5, 0.9]),
    span_confidence=st.sampled_from([0.0, 0.3, 0.7]),
    explore_steps=st.integers(1, 4),
)


@given(histories(), st.one_of(KLASSES, ADAPTIVE, SLOW_FAST))
def test_a_rule_with_a_memory_follows_its_formula_step_by_step(history: list[np.ndarray], rule: Transfer) -> None:
    formula, masked = plain(rule), list(range(len(history[0])))
    memory, former = None, None
    for number, logits in enumerate(history, 1):
        expected, _ = formula.step(torch.from_numpy(logits), masked, number)
        choice = rule.choose(state_of(logits, former, masked, number, memory))
        chosen = [masked[place] for place in choice.commit]
        assert len(set(chosen)) == len(chosen) >= 1
        assert sorted(chosen) == sorted(expected)
        masked, memory, former = [row for row in masked if row not in chosen], choice.memory, logits
        if not masked:
            return


# -- options
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Klass(threshold=2.0), "--threshold is 2.0, expected a probability"),
        (lambda: Klass(kl_limit=-1.0), "--kl-limit is -1.0, expected 0 or more"),
        (lambda: Klass(kl_steps=0), "--kl-steps is 0, expected at least 1"),
        (lambda: AdaptiveThreshold(threshold=-0.1), "--threshold is -0.1"),
        (lambda: AdaptiveThreshold(alpha=-1.0), "--alpha is -1.0, expected a number from 0 up"),
        (lambda: AdaptiveThreshold(beta=float("nan")), "--beta is nan"),
        (lambda: SlowFast(threshold=1.5), "--threshold is 1.5"),
        (lambda: SlowFast(span_confidence=-1.0), "--span-confidence is -1.0"),
        (lambda: SlowFast(explore_steps=0), "--explore-steps is 0, expected at least 1"),
        (lambda: Credit(threshold=1.1), "--threshold is 1.1"),
        (lambda: Credit(credit_weight=-0.1), "--credit-weight is -0.1"),
        (lambda: Credit(credit_power=float("inf")), "--credit-power is inf"),
        (lambda: Credit(credit_decay=1.5), "--credit-decay is 1.5, expected a share from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Transfer], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_credit_refuses_end_tokens_ranked_last(open_model: OpenModel) -> None:
    lm, options = open_model("onnxruntime"), GenerationOptions(gen_length=8, confidence_eos_eot_inf=True)
    with pytest.raises(UsageError, match="--confidence-eos-eot-inf does not go with --transfer credit"):
        lm.run(lm.continuation(PROMPTS, options), options, NoCache(), Credit())
    lm.run(lm.continuation(PROMPTS, options), options, NoCache(), Klass())
