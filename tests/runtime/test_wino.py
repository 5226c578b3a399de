"""The rule `wino` and the shadow that it verifies with, against plain loops in PyTorch in float64.

The reference appends the shadow to the sequence and runs T + n rows under a mask (T + n) x (T + n) that is written out one
element at a time. With a cache it runs the rows that a policy names, keeps keys before rotation, and then the shadow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dllm_export.errors import StrategyError, UsageError
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import (
    POLICIES,
    CachePolicy,
    Compaction,
    DkvDecode,
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
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.shadow import Shadow
from dllm_export.runtime.transfers import TransferState, Wino
from dllm_export.runtime.transfers.contract import find_fault
from dllm_export.runtime.trunk import Trunk
from dllm_export.tools.eager import Context, EagerModel

OpenModel = Callable[[str], DiffusionLM]
MASK, EOS = 96, 95
EXACT, VISIBLE = 1e-12, 1e-3
BOLD = Wino(accept_threshold=0.12, verify_threshold=0.25, accept_least=3)
"""Thresholds low enough for a random model: it accepts several rows in many steps, and masks some of them again."""


def draw_prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 90, length).tolist() for length in lengths]


# -- the shadow, written out
def with_shadow(
    model: EagerModel, padding: list[int], length: int, block: range, shown: list[list[bool]] | None = None
) -> Context:
    """Rotary rows and the mask of a sequence with its block's shadow behind it."""
    places = torch.tensor([*range(length), *block]).expand(len(padding), -1)
    visible = torch.tensor(draw_mask(tuple(padding), length, block, shown and tuple(map(tuple, shown))))
    return replace(model.context(padding, length).at(places), visible=visible[:, None])


@cache
def draw_mask(
    padding: tuple[int, ...], length: int, block: range, shown: tuple[tuple[bool, ...], ...] | None
) -> list[list[list[bool]]]:
    """Sequence, row, column -> whether the row sees the column, those of the shadow last."""
    size = length + len(block)
    visible = [[[False] * size for _ in range(size)] for _ in padding]
    for sequence, pad in enumerate(padding):
        for row in range(size):
            for column in range(size):
                if column < length:
                    own = row >= length and column == block[row - length]
                    visible[sequence][row][column] = column >= pad and not own
                else:
                    seen = shown is None or shown[sequence][column - length]
                    visible[sequence][row][column] = row >= length and seen
    return visible


def shadow_logits(
    bundle: Bundle, model: EagerModel, canvas: Tensor, padding: list[int], prompt: int, block: range, shown: Any = None
) -> tuple[Tensor, Tensor]:
    """Ours, without a cache: (logits of the response's rows, logits of the shadow's)."""
    shape, session = bundle.manifest.shape, TorchSession(bundle, SessionOptions(provider="torch"), dtype="float64")
    request = RequestShape(batch=len(padding), prompt_rows=prompt, response_rows=canvas.shape[1] - prompt)
    trunk, shadow = Trunk(session, shape, request), Shadow(session, shape, request)
    column, start = np.arange(request.length), np.array(padding)[:, None]
    trunk.start(*rotary_tables(shape, np.maximum(column - start, 0)), column >= start)
    first = StepState.first(
        layers=shape.layers, prompt_rows=prompt, response_rows=request.response_rows, batch=request.batch
    )
    plan = NoCache().plan(first)
    trunk.prepare(plan, canvas.numpy().astype(np.int32))()
    shown = np.ones((request.batch, len(block)), np.bool_) if shown is None else np.array(shown)
    shadow.prepare(trunk, plan, (block.start, block.stop), shown, MASK)()
    real, mirrored = (torch.from_numpy(buffer.read()) for buffer in (trunk.hidden, shadow.hidden))
    return model.classify(real), model.classify(mirrored)


def half_decided(prompts: list[list[int]], length: int, seed: int = 0) -> tuple[Tensor, list[int], int]:
    """(canvas with about half of its response decided, padding, rows before the response)."""
    rng, width = np.random.default_rng(seed), max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    answers = np.where(rng.random((len(prompts), length)) < 0.5, rng.integers(0, 90, (len(prompts), length)), MASK)
    rows = [[EOS] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    return torch.tensor(np.concatenate((rows, answers), axis=1)), padding, width


@pytest.mark.parametrize("variant", ["plain", "gqa", "bias", "tied"])
@pytest.mark.parametrize("block", [range(13, 21), range(19, 24), range(20, 21)], ids=str)
def test_the_shadow_has_the_logits_of_rows_that_were_appended_and_changes_no_other(
    variant: str, block: range, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager[variant]
    canvas, padding, prompt = half_decided(draw_prompts(1, 13, 9), 11)
    length = canvas.shape[1]
    appended = torch.cat((canvas, torch.full((2, len(block)), MASK)), dim=1)
    logits = model.forward(appended, with_shadow(model, padding, length, block))
    plain = model.forward(canvas, model.context(padding, length))
    response, mirrored = shadow_logits(tiny_bundles[variant], model, canvas, padding, prompt, block)
    assert (logits[:, prompt:length] - plain[:, prompt:]).abs().max() < EXACT, "real rows never see the shadow"
    assert (response - plain[:, prompt:]).abs().max() < EXACT
    assert (mirrored - logits[:, length:]).abs().max() < EXACT
    decided = canvas[:, block.start : block.stop] != MASK
    if decided.any():
        assert (mirrored - plain[:, block.start : block.stop])[decided].abs().min(-1)[0].max() > 0, "not the real rows"


def test_a_shadow_that_is_not_shown_is_seen_by_nobody(tiny_bundle: Bundle, tiny_eager: dict[str, EagerModel]) -> None:
    model, block = tiny_eager["plain"], range(15, 21)
    canvas, padding, prompt = half_decided(draw_prompts(2, 13, 9), 11)
    shown = [[True, False, True, True, False, True], [False, False, True, False, True, True]]
    appended = torch.cat((canvas, torch.full((2, len(block)), MASK)), dim=1)
    context = with_shadow(model, padding, canvas.shape[1], block, shown)
    expected = model.forward(appended, context)[:, canvas.shape[1] :]
    _, found = shadow_logits(tiny_bundle, model, canvas, padding, prompt, block, shown)
    _, other = shadow_logits(tiny_bundle, model, canvas, padding, prompt, block)
    assert (found - expected).abs().max() < EXACT
    assert (found - other).abs().max() > VISIBLE


# -- the rule, written out
def accept_and_doubt(
    rule: Wino, confidence: dict[int, float], verified: dict[int, float], last: int
) -> tuple[set[int], set[int]]:
    """Row -> confidence of the masked rows, row -> shadow probability of the decided ones, and how many the last step
    accepted, at first 30: (rows to commit, rows to mask again), as WINO's algorithm states it."""
    cap = min(max(int(rule.accept_share * len(confidence)), rule.accept_least), rule.accept_most)
    accepted = {row for row, value in confidence.items() if value > rule.accept_threshold}
    if len(accepted) > cap:
        accepted = set(sorted(confidence, key=lambda row: (-confidence[row], row))[:cap])
    elif not accepted:
        accepted = {max(confidence, key=lambda row: (confidence[row], -row))}
    doubtful: set[int] = set()
    if len(accepted) > 1:
        doubtful = {row for row, value in verified.items() if value < rule.verify_threshold}
        if len(doubtful) >= last:
            doubtful = set(sorted(verified, key=lambda row: (verified[row], row))[: last - 1])
    return accepted, doubtful


RowRule = Callable[[int, range, int], range]
"""(step in the block, block, rows of a sequence) -> the rows that a policy recomputes."""

ROWS: dict[str, tuple[CachePolicy, RowRule]] = {
    "dual": (DualCache(), lambda step, block, length: range(length) if step == 1 else block),
    "prefix": (PrefixCache(), lambda step, block, length: range(0 if step == 1 else block.start, length)),
    "sparse": (SparseCache(keep_ratio=1.0), lambda step, block, length: range(length) if step <= 2 else block),
}


class PlainCache:
    """Logits of a step that recomputes some rows, and of the shadow against what they left."""

    def __init__(self, model: EagerModel, padding: list[int], length: int, rows: RowRule) -> None:
        self.model, self.padding, self.length, self.rows = model, padding, length, rows
        self.context = model.context(padding, length)
        self.caches: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, block: range, number: int) -> tuple[Tensor, Tensor]:
        model, rows = self.model, self.rows(number, block, self.length)
        batch = len(self.padding)
        at = self.context.at(torch.tensor(rows).expand(batch, -1))
        shadow_at = self.context.at(torch.tensor(block).expand(batch, -1))
        both = with_shadow(model, self.padding, self.length, block)
        below = Context(both.cos, both.sin, None if both.visible is None else both.visible[:, :, self.length :])
        x, shadow = model.embed(tokens[:, rows]), model.embed(torch.full((batch, len(block)), MASK))
        for place, layer in enumerate(model.layers):
            key, value = self.project(layer, x)
            if len(rows) < self.length:
                old_key, old_value = (cached.clone() for cached in self.caches[place])
                old_key[:, rows], old_value[:, rows] = key, value
                key, value = old_key, old_value
            self.caches = [*self.caches[:place], (key, value), *self.caches[place + 1 :]]
            joined = (torch.cat(pair, dim=1) for pair in zip((key, value), self.project(layer, shadow), strict=True))
            shadow = self.finish(layer, shadow, *joined, shadow_at, below)
            x = self.finish(layer, x, key, value, at, self.context)
        logits = torch.zeros(*tokens.shape, model.classify(x).shape[-1], dtype=x.dtype)
        logits[:, rows] = model.classify(x)
        return logits, model.classify(shadow)

    def project(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.model.norm(x, layer["attn_norm.weight"])
        return self.model.project(layer, "k_proj", inner), self.model.project(layer, "v_proj", inner)

    def finish(self, layer: Any, x: Tensor, key: Tensor, value: Tensor, at: Context, context: Context) -> Tensor:
        inner = self.model.norm(x, layer["attn_norm.weight"])
        x = x + self.model.attend(layer, self.model.project(layer, "q_proj", inner), key, value, at, context)
        return x + self.model.mlp(layer, x)


def plain_loop(
    model: EagerModel, rule: Wino, prompts: list[list[int]], length: int, block_length: int, rows: RowRule | None = None
) -> tuple[list[list[int]], int, int]:
    """All prompts as one left-padded batch: (responses, steps, rows masked again)."""
    width, again, steps = max(map(len, prompts)), 0, 0
    padding = [width - len(prompt) for prompt in prompts]
    canvas = torch.tensor(
        [[EOS] * pad + prompt + [MASK] * length for pad, prompt in zip(padding, prompts, strict=True)]
    )
    total = canvas.shape[1]
    cache = None if rows is None else PlainCache(model, padding, total, rows)
    for start in range(width, total, block_length):
        block, number, last = range(start, start + block_length), 0, [30] * len(prompts)
        while (canvas[:, block] == MASK).any():
            steps, number = steps + 1, number + 1
            if cache is None:
                appended = torch.cat((canvas, torch.full((len(prompts), block_length), MASK)), dim=1)
                both = model.forward(appended, with_shadow(model, padding, total, block))
                logits, shadow = both[:, :total], both[:, total:]
            else:
                logits, shadow = cache.forward(canvas, block, number)
            logits[:, :, MASK] = shadow[:, :, MASK] = -torch.inf
            best, tokens = logits.softmax(-1).max(-1)
            share = shadow.softmax(-1)
            for sequence, text in enumerate(canvas):
                masked = [row for row in block if text[row] == MASK]
                if not masked:
                    continue
                decided = {row: float(share[sequence, row - start, text[row]]) for row in block if text[row] != MASK}
                confidence = {row: float(best[sequence, row]) for row in masked}
                commit, doubtful = accept_and_doubt(rule, confidence, decided, last[sequence])
                for row in commit:
                    text[row] = tokens[sequence, row]
                for row in doubtful:
                    text[row] = MASK
                last[sequence], again = len(commit), again + len(doubtful)
    return canvas[:, width:].tolist(), steps, again


RULES = {
    "bold": BOLD,
    "verifying little": replace(BOLD, verify_threshold=0.1),
    "doubting all": replace(BOLD, verify_threshold=1.0, accept_threshold=0.08),
    "capped": replace(BOLD, accept_threshold=0.0, accept_least=2, accept_share=0.3, accept_most=4),
}


@pytest.mark.parametrize(("block_length", "seed"), [(8, 0), (12, 1), (24, 0)])
@pytest.mark.parametrize("name", RULES)
def test_without_a_cache_a_batch_gives_the_tokens_of_the_loop_with_appended_rows(
    name: str, block_length: int, seed: int, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    prompts, options = draw_prompts(seed, 13, 9), GenerationOptions(gen_length=24, block_length=block_length)
    expected, steps, again = plain_loop(tiny_eager["plain"], RULES[name], prompts, 24, block_length)
    lm = open_model("float64")
    found = lm.run(lm.continuation(prompts, options), options, NoCache(), RULES[name])
    assert [list(result.tokens) for result in found] == expected
    assert found[0].passes == steps < 24
    assert again > 0 or name == "verifying little", "nothing was masked again, so that this test sees half of the rule"


@pytest.mark.parametrize("block_length", [8, 24])
@pytest.mark.parametrize("name", ROWS)
def test_with_a_cache_the_shadow_runs_against_what_the_step_attended_to(
    name: str, block_length: int, open_model: OpenModel, tiny_eager: dict[str, EagerModel]
) -> None:
    prompts, options = draw_prompts(4, 13, 9), GenerationOptions(gen_length=24, block_length=block_length)
    (policy, rows), rule, lm = ROWS[name], RULES["doubting all"], open_model("float64")
    expected, steps, again = plain_loop(tiny_eager["plain"], rule, prompts, 24, block_length, rows)
    found = lm.run(lm.continuation(prompts, options), options, policy, rule)
    assert [list(result.tokens) for result in found] == expected
    assert found[0].passes == steps
    assert again > 0


# -- policies
REFRESHING: dict[str, CachePolicy] = {
    "window": WindowCache(refresh_interval=1),
    "dkv-decode": DkvDecode(refresh_interval=1),
    "dllm-cache": DllmCache(prompt_interval=1, response_interval=1),
    "dllm-cache, all rows": DllmCache(prompt_interval=1, response_interval=3, update_ratio=1.0),
    "shared-prefix": SharedPrefix(refresh_interval=1),
    "shared-prefix of dllm-cache": SharedPrefix(base=DllmCache(prompt_interval=1, response_interval=1)),
}
"""Policies that recompute every row in every step."""

CACHING: dict[str, CachePolicy] = {
    "dllm-cache": DllmCache(prompt_interval=5, response_interval=3),
    "dllm-cache, some layers skipped": DllmCache(prompt_interval=4, response_interval=2, update_ratio=0.0),
    "dynamic-dllm": DynamicDllm(layer_budget=3, window=3),
    "prefix": PrefixCache(),
    "dual": DualCache(),
    "freecache": FreeCache(),
    "window": WindowCache(before=2, after=2),
    "dkv-decode": DkvDecode(),
    "sparse": SparseCache(),
    "shared-prefix": SharedPrefix(refresh_interval=3),
    "shared-prefix of window": SharedPrefix(base=WindowCache(refresh_interval=3)),
}


def answer(lm: DiffusionLM, policy: CachePolicy, rule: Wino, prompts: list[list[int]], block: int) -> list[list[int]]:
    options = GenerationOptions(gen_length=24, block_length=block)
    request = lm.continuation(prompts, options)
    if isinstance(policy, SharedPrefix):
        lm.prefixes.clear()
        request = lm.share(request, prompts[0][:4], depth=0 if policy in REFRESHING.values() else 2)
    return [list(result.tokens) for result in lm.run(request, options, policy, rule)]


def count_again(frames: list[Frame]) -> int:
    """Rows that were masked again, over all steps."""
    return sum(int(((old.tokens != MASK) & (new.tokens == MASK)).sum()) for old, new in pairwise(frames))


def same_start(seed: int) -> list[list[int]]:
    start, first, second = draw_prompts(seed, 4, 9, 5)
    return [start + first, start + second]


@pytest.mark.parametrize("block", [12, 24])
@pytest.mark.parametrize("name", REFRESHING)
def test_a_policy_that_refreshes_everything_gives_the_tokens_of_none(
    name: str, block: int, open_model: OpenModel
) -> None:
    lm, prompts = open_model("float64"), same_start(5)
    rule = RULES["doubting all"]
    assert answer(lm, REFRESHING[name], rule, prompts, block) == answer(lm, NoCache(), rule, prompts, block)


@pytest.mark.parametrize("block", [12, 24])
@pytest.mark.parametrize("name", CACHING)
def test_every_policy_decides_every_row_and_masks_again_on_the_way(
    name: str, block: int, open_model: OpenModel
) -> None:
    lm, prompts = open_model("onnxruntime"), same_start(6)
    options = GenerationOptions(gen_length=24, block_length=block)
    request = lm.continuation(prompts, options)
    if isinstance(CACHING[name], SharedPrefix):
        lm.prefixes.clear()
        request = lm.share(request, prompts[0][:4], depth=2)
    frames = list(lm.stream(request, options, CACHING[name], RULES["doubting all"]))
    assert (frames[-1].tokens != MASK).all()
    assert count_again(frames) > 0
    assert len(frames) <= 24


def test_no_policy_is_forgotten_here() -> None:
    used = {policy.name for policy in CACHING.values()} | {"none"}
    # spa needs a bundle with an indicator: below. dkv-greedy goes with no rule but quota; block is for models without a shadow.
    assert used == POLICIES.keys() - {"spa", "dkv-greedy", "block"}


def test_a_policy_with_indicators_runs_the_shadow_too(narrow_bundles: dict[str, Bundle]) -> None:
    bundle = narrow_bundles["plain"]
    with DiffusionLM(bundle, TorchSession(bundle, SessionOptions(provider="torch"), dtype="float64")) as lm:
        every = SpaCache(prompt_interval=1, response_interval=1)
        some = SpaCache(response_interval=4)
        rule, prompts = RULES["doubting all"], draw_prompts(7, 13, 9)
        assert answer(lm, every, rule, prompts, 12) == answer(lm, NoCache(), rule, prompts, 12)
        assert all(MASK not in tokens for tokens in answer(lm, some, rule, prompts, 12))


class Narrowing(SparseCache):
    """Compacts for the rows that are still masked, and runs them alone."""

    name: ClassVar[str] = "narrowing"

    def plan(self, state: StepState) -> StepPlan:
        if state.block_step == 1:
            return StepPlan.refresh(state, keep_delta=False)
        if state.block_step == 2:
            rows = Rows.padded(state.candidates, state.prompt_rows, 1)
            return StepPlan.refresh(state, keep_delta=False, compaction=Compaction(rows, (5,)))
        assert state.compacted is not None
        return StepPlan.recompute(state, state.compacted.rows, compaction=state.compacted)


def test_a_compacted_cache_without_the_whole_block_is_refused(open_model: OpenModel) -> None:
    lm, options = open_model("float64"), GenerationOptions(gen_length=24, block_length=24)
    request = lm.continuation(draw_prompts(8, 9), options)
    one = replace(BOLD, accept_most=1)
    with pytest.raises(StrategyError, match="does not hold all rows of its block, 9 to 32, which a decoding rule"):
        lm.run(request, options, Narrowing(), one)


# -- providers, batches, given text
@pytest.mark.parametrize("policy", [NoCache(), CACHING["dllm-cache"], DualCache(), SparseCache()], ids=str)
def test_providers_give_the_same_tokens_and_a_request_leaves_nothing_to_the_next(
    policy: CachePolicy, open_model: OpenModel
) -> None:
    prompts, rule, found = draw_prompts(9, 13, 9), RULES["doubting all"], []
    for lm in map(open_model, ("float64", "torch", "onnxruntime")):
        found += [answer(lm, policy, rule, prompts, 12) for _ in range(2)]
    assert found == [found[0]] * 6


@pytest.mark.parametrize("policy", [NoCache(), DualCache(), SparseCache()], ids=str)
def test_a_batch_gives_the_tokens_of_its_single_runs(policy: CachePolicy, open_model: OpenModel) -> None:
    lm, prompts, rule = open_model("float64"), draw_prompts(10, 13, 5, 9), RULES["doubting all"]
    singles = [answer(lm, policy, rule, [prompt], 12)[0] for prompt in prompts]
    assert answer(lm, policy, rule, prompts, 12) == singles


def test_given_text_between_masks_is_never_masked_again_and_has_no_shadow_that_others_see(
    open_model: OpenModel,
) -> None:
    """Texts whose first masks lie apart: in a batch the shorter one's block holds given text, which must not show."""
    lm, rule, texts = open_model("float64"), RULES["doubting all"], draw_prompts(11, 26, 15)
    for text, places in zip(texts, (range(5, 26, 2), range(9, 15)), strict=True):
        for place in places:
            text[place] = MASK
    alone = [lm.run(lm.infilling([text], GenerationOptions()), transfer=rule)[0].tokens for text in texts]
    frames = list(lm.stream(lm.infilling(texts, GenerationOptions()), transfer=rule))
    width = frames[0].tokens.shape[1]
    for sequence, text in enumerate(texts):
        assert frames[-1].tokens[sequence, width - len(alone[sequence]) :].tolist() == list(alone[sequence])
        given = [(place - len(text), token) for place, token in enumerate(text) if token != MASK]
        for frame in frames:
            assert all(frame.tokens[sequence, place] == token for place, token in given if -place <= width)
    assert count_again(frames) > 0


def test_a_step_without_decided_rows_runs_no_shadow(open_model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, options, runs = open_model("torch"), GenerationOptions(gen_length=8, block_length=8), []
    prepare = Shadow.prepare
    monkeypatch.setattr(Shadow, "prepare", lambda *given: runs.append(1) or prepare(*given))  # type: ignore[func-returns-value]
    everything = replace(BOLD, accept_threshold=0.0, accept_least=8)
    one = replace(BOLD, accept_most=1)
    for rule, steps in ((everything, 1), (one, 8)):
        runs.clear()
        found = lm.run(lm.continuation(draw_prompts(12, 9), options), options, NoCache(), rule)[0]
        assert (found.passes, len(runs)) == (steps, steps - 1)


# -- the formula on random rows
PROBABILITIES = st.sampled_from([0.0, 0.2, 0.5, 0.6, 0.61, 0.8, 0.9, 0.95, 1.0]) | st.floats(0.0, 1.0)
SETTINGS = st.builds(
    Wino,
    accept_threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.0]),
    verify_threshold=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    accept_share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    accept_least=st.integers(1, 7),
    accept_most=st.integers(1, 20),
)


def state_of(
    number: int, size: int, confidence: dict[int, float], verified: dict[int, float], memory: object
) -> TransferState:
    """What the loop tells a rule about a block of this size that starts at row 0."""
    rows, decided = (np.array(sorted(values), np.int64) for values in (confidence, verified))
    sure, doubted = (np.array([values[row] for row in sorted(values)], np.float64) for values in (confidence, verified))
    return TransferState(
        quota=1,
        block=(0, size),
        block_step=number,
        block_masks=size,
        rows=rows,
        ranking=sure,
        confidence=sure,
        second=np.zeros(len(rows)),
        entropy=np.zeros(len(rows)),
        decided=decided,
        decided_confidence=np.ones(len(decided)),
        verified=doubted,
        memory=memory,
    )


@given(st.data(), st.integers(1, 40), SETTINGS)
def test_the_rule_follows_its_formula_step_by_step_and_keeps_its_contract(
    data: st.DataObject, size: int, rule: Wino
) -> None:
    masked, decided, last, memory, number = set(range(size)), set[int](), 30, None, 0
    while masked:
        number += 1
        confidence = {row: data.draw(PROBABILITIES) for row in sorted(masked)}
        verified = {row: data.draw(PROBABILITIES) for row in sorted(decided)}
        state = state_of(number, size, confidence, verified, memory)
        choice = rule.choose(state)
        assert find_fault(rule, choice, state) is None
        commit, again = set(state.rows[choice.commit].tolist()), set(state.decided[choice.remask].tolist())
        assert (commit, again) == accept_and_doubt(rule, confidence, verified, last)
        masked, decided = masked - commit | again, decided - again | commit
        last, memory = len(commit), choice.memory
    assert number <= size


@given(st.lists(PROBABILITIES, min_size=1, max_size=30), st.lists(PROBABILITIES, max_size=30), st.integers(1, 9))
def test_a_cap_of_one_commits_the_surest_row_and_masks_nothing_again(
    sure: list[float], verified: list[float], memory: int
) -> None:
    rows = dict(enumerate(sure))
    others = {len(sure) + place: value for place, value in enumerate(verified)}
    choice = Wino(accept_most=1).choose(state_of(2, len(rows) + len(others), rows, others, memory))
    assert (choice.commit.tolist(), choice.remask.tolist()) == ([sure.index(max(sure))], [])


def test_a_cap_of_one_decodes_one_token_a_step(open_model: OpenModel) -> None:
    lm, options = open_model("torch"), GenerationOptions(gen_length=24, block_length=8)
    request, one = lm.continuation(draw_prompts(3, 13), options), replace(RULES["doubting all"], accept_most=1)
    before = 0
    for frame in lm.stream(request, options, NoCache(), one):
        assert int((frame.tokens != MASK).sum()) == before + 1
        before += 1
    plain = lm.run(request, options)[0]
    assert (before, plain.tokens) == (24, tuple(frame.tokens[0].tolist()))


def test_the_defaults_are_the_published_ones() -> None:
    rule = Wino()
    assert (rule.accept_threshold, rule.verify_threshold) == (0.6, 0.9)
    assert (rule.accept_share, rule.accept_least, rule.accept_most) == (0.7, 5, 20)


# -- what does not go together
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wino(accept_threshold=1.5), "--accept-threshold is 1.5, expected a probability from 0 to 1"),
        (lambda: Wino(verify_threshold=-0.1), "--verify-threshold is -0.1"),
        (lambda: Wino(verify_threshold=float("nan")), "--verify-threshold is nan"),
        (lambda: Wino(accept_share=2.0), "--accept-share is 2.0, expected a share from 0 to 1"),
        (lambda: Wino(accept_least=0), "--accept-least is 0, expected at least 1"),
        (lambda: Wino(accept_most=0), "--accept-most is 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Wino], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cfg_scale": 1.0}, "--cfg-scale does not go with --transfer wino, which asks the conditional pass alone"),
        ({"early_stop": True}, "--early-stop does not go with --transfer wino"),
        ({"steps": 4}, "--steps has no effect with --transfer wino"),
        ({"remasking": "entropy"}, "--remasking entropy has no effect with --transfer wino"),
    ],
)
def test_options_that_the_rule_cannot_keep_are_refused(
    keywords: dict[str, Any], message: str, open_model: OpenModel
) -> None:
    lm, options = open_model("torch"), GenerationOptions(gen_length=8, **keywords)
    with pytest.raises(UsageError, match=message):
        lm.run(lm.continuation(draw_prompts(0, 5), options), options, NoCache(), Wino())
