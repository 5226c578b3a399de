"""Shared prefixes: the runtime in float64 against the rule written out plainly, and what the store promises.

The reference runs every sequence by itself, without padding and without our graphs. It keeps keys before rotation, and the
rows that enter every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_export.errors import StrategyError
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DualCache, NoCache, SharedPrefix, StepPlan
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.tools.eager import EagerModel

MASK = 96
OpenModel = Callable[[str], DiffusionLM]


# -- the rule, written out
@dataclass
class Entry:
    """What requests share: of layers below the depth keys and values, and the rows that enter the layer after them."""

    keys: list[Tensor]
    values: list[Tensor]
    hidden: Tensor


@dataclass
class Sequence:
    """One sequence and its cached features."""

    model: EagerModel
    tokens: Tensor  # [S]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def full(self, tokens: Tensor, entry: Entry | None, rows: int, depth: int) -> tuple[Tensor, Entry]:
        """Logits [S, V] with every row computed, but for those of the prefix below the depth where an entry is given."""
        model, length = self.model, len(tokens)
        context = model.context((0,), length)
        x, kept = model.embed(tokens[None]), Entry([], [], torch.zeros(()))
        self.keys, self.values = [], []
        for number, layer in enumerate(model.layers):
            if number == depth:
                if entry:
                    x = torch.cat((entry.hidden, x[:, rows:]), dim=1)
                kept.hidden = x[:, :rows].clone()
            inner = model.norm(x, layer["attn_norm.weight"])
            key, value = model.project(layer, "k_proj", inner), model.project(layer, "v_proj", inner)
            if entry and number < depth:
                key[:, :rows], value[:, :rows] = entry.keys[number], entry.values[number]
            kept.keys.append(key[:, :rows].clone())
            kept.values.append(value[:, :rows].clone())
            self.keys.append(key)
            self.values.append(value)
            x = x + model.attend(layer, model.project(layer, "q_proj", inner), key, value, context, context)
            x = x + model.mlp(layer, x)
        return model.classify(x)[0], kept

    def some(self, tokens: Tensor, start: int, end: int) -> Tensor:
        """Logits [S, V] with only the rows from start to end computed, the keys and values of the others cached."""
        model, length = self.model, len(tokens)
        context = model.context((0,), length)
        x = model.embed(tokens[None, start:end])
        at = context.at(torch.arange(start, end)[None])
        for layer, key, value in zip(model.layers, self.keys, self.values, strict=True):
            inner = model.norm(x, layer["attn_norm.weight"])
            key[:, start:end] = model.project(layer, "k_proj", inner)
            value[:, start:end] = model.project(layer, "v_proj", inner)
            x = x + model.attend(layer, model.project(layer, "q_proj", inner), key, value, at, context)
            x = x + model.mlp(layer, x)
        logits = torch.full((length, model.classify(x).shape[-1]), torch.nan, dtype=torch.float64)
        logits[start:end] = model.classify(x)[0]
        return logits


@dataclass
class Reference:
    """Requests one after another over one store."""

    model: EagerModel
    depth: int
    base: CachePolicy
    interval: int = 16
    store: dict[tuple[int, ...], Entry] = field(default_factory=dict)

    def run(self, prompts: list[list[int]], rows: int, length: int, block: int, scale: float = 0.0) -> list[list[int]]:
        """The response of every prompt: one token a step, the surest of the block."""
        tokens = [torch.tensor([*prompt, *[MASK] * length]) for prompt in prompts]
        passes = [[Sequence(self.model, text) for text in tokens] for _ in range(2 if scale else 1)]
        blank = [torch.full_like(text, MASK) for text in tokens]
        for number, text in enumerate(tokens):
            blank[number][len(text) - length :] = text[len(text) - length :]
        for step in range(length):
            first, begin = step % block == 0, step // block * block
            logits = self._step(passes[0], tokens, rows, step, first, (begin, begin + block, length))
            if scale:
                for number, text in enumerate(tokens):
                    blank[number][-length:] = text[-length:]
                other = self._step(passes[1], blank, rows, step, first, (begin, begin + block, length))
                logits = [its + (scale + 1) * (mine - its) for mine, its in zip(logits, other, strict=True)]
            for text, its in zip(tokens, logits, strict=True):
                start = len(text) - length
                its[:, MASK] = -torch.inf
                best, proposal = its.softmax(-1).max(-1)
                best[text != MASK] = -1.0
                best[: start + begin], best[start + begin + block :] = -1.0, -1.0
                row = int(best.argmax())
                text[row] = proposal[row]
        return [text[-length:].tolist() for text in tokens]

    def _step(
        self,
        sequences: list[Sequence],
        tokens: list[Tensor],
        rows: int,
        step: int,
        first: bool,
        place: tuple[int, int, int],
    ) -> list[Tensor]:
        begin, end, length = place
        if isinstance(self.base, NoCache) and step % self.interval:
            return [own.some(text, rows, len(text)) for own, text in zip(sequences, tokens, strict=True)]
        if isinstance(self.base, DualCache) and not first:
            starts = [len(text) - length for text in tokens]
            return [
                own.some(text, start + begin, start + end)
                for own, text, start in zip(sequences, tokens, starts, strict=True)
            ]
        key = tuple(tokens[0][:rows].tolist())
        found = self.store.get(key) if self.depth else None
        results = [own.full(text, found, rows, self.depth) for own, text in zip(sequences, tokens, strict=True)]
        self.store.setdefault(key, results[0][1])
        return [logits for logits, _ in results]


# -- the runtime against it
@contextmanager
def open_float64(bundle: Bundle, **settings: Any) -> Iterator[DiffusionLM]:
    session = TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64")
    with DiffusionLM(bundle, session, **settings) as lm:
        yield lm


def draw_prompts(seed: int, prefix: int, tails: tuple[int, ...]) -> tuple[list[int], list[list[int]]]:
    rng = np.random.default_rng(seed)
    shared: list[int] = rng.integers(0, 90, prefix).tolist()
    return shared, [[*shared, *rng.integers(0, 90, tail).tolist()] for tail in tails]


def shared_tokens(
    lm: DiffusionLM,
    prompts: list[list[int]],
    prefix: list[int],
    depth: int,
    policy: CachePolicy,
    **options: Any,
) -> list[list[int]]:
    settings = GenerationOptions(**options)
    request = lm.share(lm.continuation(prompts, settings), prefix, depth=depth)
    return [list(result.tokens) for result in lm.run(request, settings, policy)]


CASES = [
    # seed, prefix, tails of the first request, tails of the second, R, block, interval
    (0, 11, (5,), (9,), 12, 12, 4),
    (1, 20, (1,), (7,), 12, 4, 16),
    (2, 3, (12, 4), (6, 8), 10, 5, 3),
    (3, 17, (0, 2), (5,), 8, 8, 1),
    (4, 9, (6,), (3, 7), 12, 6, 5),
]


# Every second depth of every case, with one base or the other in turn.
@pytest.mark.parametrize(
    ("case", "depth", "base"),
    [
        (case, depth, (NoCache(), DualCache())[(number + depth) // 2 % 2])
        for number, case in enumerate(CASES)
        for depth in range(number % 2, 6, 2)
    ],
    ids=str,
)
def test_requests_that_share_a_prefix_give_the_tokens_of_the_rule(
    case: tuple[Any, ...], depth: int, base: CachePolicy, tiny_bundle: Bundle, tiny_eager: dict[str, EagerModel]
) -> None:
    seed, rows, first, second, length, block, interval = case
    prefix, prompts = draw_prompts(seed, rows, (*first, *second))
    requests = [prompts[: len(first)], prompts[len(first) :], prompts[: len(first)]]
    reference = Reference(tiny_eager["plain"], depth, base, interval)
    policy = SharedPrefix(base=base, refresh_interval=interval)
    with open_float64(tiny_bundle) as lm:
        for texts in requests:
            expected = reference.run(texts, rows, length, block)
            assert shared_tokens(lm, texts, prefix, depth, policy, gen_length=length, block_length=block) == expected


@pytest.mark.parametrize("base", [NoCache(), DualCache()], ids=lambda base: base.name)
@pytest.mark.parametrize("variant", ["gqa", "bias", "tied", "qk_norm"])
def test_the_rule_holds_for_every_flag_of_the_layer(
    variant: str, base: CachePolicy, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    prefix, prompts = draw_prompts(5, 10, (4, 7, 2))
    reference = Reference(tiny_eager[variant], 1, base, 3)
    with open_float64(tiny_bundles[variant]) as lm:
        for texts in (prompts[:1], prompts[1:]):
            found = shared_tokens(
                lm, texts, prefix, 1, SharedPrefix(base=base, refresh_interval=3), gen_length=12, block_length=4
            )
            assert found == reference.run(texts, 10, 12, 4)


@pytest.mark.parametrize("depth", [2, 5])
def test_guidance_shares_the_prefix_of_each_pass(
    depth: int, tiny_bundle: Bundle, tiny_eager: dict[str, EagerModel]
) -> None:
    prefix, prompts = draw_prompts(6, 9, (4, 6, 5))
    reference = Reference(tiny_eager["plain"], depth, NoCache(), 3)
    policy = SharedPrefix(refresh_interval=3)
    with open_float64(tiny_bundle) as lm:
        for texts in (prompts[:1], prompts[1:]):
            found = shared_tokens(lm, texts, prefix, depth, policy, gen_length=9, cfg_scale=1.5)
            assert found == reference.run(texts, 9, 9, 9, 1.5)
        assert (len(lm.prefixes), lm.prefixes.tokens) == (2, 18)


def test_the_rule_is_not_the_uncached_model(tiny_bundle: Bundle) -> None:
    """Or every equality above would say little."""
    prefix, prompts = draw_prompts(2, 11, (5, 9))
    with open_float64(tiny_bundle) as lm:
        settings = GenerationOptions(gen_length=16)
        plain = [list(result.tokens) for result in lm.run(lm.continuation(prompts[1:], settings), settings)]
        found = {}
        for depth in (0, 2, 5):
            lm.prefixes.clear()
            for number in range(2):
                policy = SharedPrefix(refresh_interval=1)
                found[depth, number] = shared_tokens(lm, [prompts[number]], prefix, depth, policy, gen_length=16)
    assert found[0, 1] == plain, "nothing shared and everything fresh"
    assert found[2, 1] != plain
    assert found[5, 1] != found[2, 1]


# -- equalities
def frames_of(
    lm: DiffusionLM, prompts: list[list[int]], prefix: list[int] | None, depth: int, policy: CachePolicy, **options: Any
) -> list[Frame]:
    settings = GenerationOptions(**options)
    request = lm.continuation(prompts, settings)
    if prefix is not None:
        request = lm.share(request, prefix, depth=depth)
    return list(lm.stream(request, settings, policy, watch=True))


BASES = [NoCache(), DualCache(), DllmCache(prompt_interval=3, response_interval=2), DllmCache(update_ratio=0.0)]


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("provider", ["float64", "torch", "onnxruntime"])
def test_depth_0_and_a_refresh_on_every_step_equal_the_base(
    provider: str, base: CachePolicy, open_model: OpenModel
) -> None:
    prefix, prompts = draw_prompts(7, 8, (5, 3))
    lm, options = open_model(provider), {"gen_length": 12, "block_length": 4}
    expected = frames_of(lm, prompts, None, 0, base, **options)
    found = frames_of(lm, prompts, prefix, 0, SharedPrefix(base=base, refresh_interval=1), **options)
    for mine, its in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine.tokens, its.tokens)
        np.testing.assert_array_equal(mine.confidence, its.confidence)
        np.testing.assert_array_equal(mine.recomputed, its.recomputed)
        assert mine.kind == its.kind


@pytest.mark.parametrize("base", BASES[1:], ids=str)
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_a_hit_in_an_identical_context_equals_no_sharing(depth: int, base: CachePolicy, tiny_bundle: Bundle) -> None:
    """These bases compute everything in the first step alone, which is what the first request stored."""
    prefix, prompts = draw_prompts(8, 10, (6,))
    with open_float64(tiny_bundle) as lm:
        settings = {"gen_length": 2} if base == BASES[2] else {"gen_length": 12}
        expected = frames_of(lm, prompts, None, 0, base, **settings)
        miss, hit = (frames_of(lm, prompts, prefix, depth, SharedPrefix(base=base), **settings) for _ in range(2))
    assert (miss[0].kind, hit[0].kind) == ("full", "split")
    for frames, others in ((miss, expected), (hit, expected)):
        for mine, its in zip(frames, others, strict=True):
            np.testing.assert_array_equal(mine.tokens, its.tokens)
            np.testing.assert_array_equal(mine.recomputed | (frames is hit), its.recomputed | (frames is hit))
            # Products of fewer rows are summed in another order: equal but for the last bits of a float64.
            np.testing.assert_allclose(mine.confidence, its.confidence, rtol=0 if frames is miss else 1e-12)


@pytest.mark.parametrize("name", ["none", "dual", "dllm-cache"])
def test_onnxruntime_gives_the_tokens_of_torch(name: str, open_model: OpenModel) -> None:
    base = {"none": NoCache(), "dual": DualCache(), "dllm-cache": BASES[2]}[name]
    prefix, prompts = draw_prompts(9, 12, (5, 3, 8))
    found = []
    for provider in ("torch", "onnxruntime"):
        lm = open_model(provider)
        lm.prefixes.clear()
        policy = SharedPrefix(base=base, refresh_interval=4)
        found.append(
            [
                shared_tokens(lm, texts, prefix, 3, policy, gen_length=12, block_length=6)
                for texts in (prompts[:1], prompts[1:])
            ]
        )
    assert found[0] == found[1]


# -- requests beside one another
def test_streams_in_turn_give_what_each_gives_alone(tiny_bundle: Bundle) -> None:
    """The budget holds both prefixes and no token more."""
    (first, one), (second, other) = draw_prompts(10, 12, (4,)), draw_prompts(11, 9, (6, 2))
    policy, options = SharedPrefix(refresh_interval=3), GenerationOptions(gen_length=12)
    with open_float64(tiny_bundle) as alone:
        expected = [
            shared_tokens(alone, one, first, 3, policy, gen_length=12),
            shared_tokens(alone, other, second, 3, policy, gen_length=12),
        ]
    with open_float64(tiny_bundle, prefix_budget=21) as lm:
        requests = [
            lm.share(lm.continuation(*each), ids, depth=3)
            for each, ids in (((one, options), first), ((other, options), second))
        ]
        last: list[Any] = [None, None]
        for frames in zip_longest(*(lm.stream(request, options, policy) for request in requests)):
            assert len(lm.prefixes) == 2
            last = [frame or kept for frame, kept in zip(frames, last, strict=True)]
    assert [frame.tokens.tolist() for frame in last] == expected


def test_a_prefix_that_is_held_is_not_evicted_and_the_other_request_runs_unshared(tiny_bundle: Bundle) -> None:
    (first, one), (second, other) = draw_prompts(10, 12, (4,)), draw_prompts(11, 9, (6,))
    policy, options = SharedPrefix(refresh_interval=2), GenerationOptions(gen_length=8)
    with open_float64(tiny_bundle) as alone:
        expected = shared_tokens(alone, one, first, 3, policy, gen_length=8)
    with open_float64(tiny_bundle, prefix_budget=12) as lm:
        held = lm.stream(lm.share(lm.continuation(one, options), first, depth=3), options, policy)
        frames = [next(held)]
        kinds = [
            frame.kind
            for frame in lm.stream(lm.share(lm.continuation(other, options), second, depth=3), options, policy)
        ]
        assert kinds == ["full", "partial"] * 4, "there was no room, so that every refresh computed everything"
        frames += held
        assert frames[-1].tokens.tolist() == expected
        kinds = [
            frame.kind
            for frame in lm.stream(lm.share(lm.continuation(other, options), second, depth=3), options, policy)
        ]
        assert kinds == ["full", "partial"] + ["split", "partial"] * 3, "nobody held the first any more"
        assert lm.prefixes.tokens == 9


def test_a_request_left_halfway_or_failing_gives_its_prefix_back(tiny_bundle: Bundle) -> None:
    prefix, prompts = draw_prompts(12, 8, (3,))
    options = GenerationOptions(gen_length=8)

    class Broken(SharedPrefix):
        def plan(self, state: Any) -> StepPlan:
            if state.step == 3:
                raise RuntimeError("broken")
            return super().plan(state)

    with open_float64(tiny_bundle) as lm:
        request = lm.share(lm.continuation(prompts, options), prefix, depth=2)
        stream = lm.stream(request, options, SharedPrefix())
        next(stream)
        lm.prefixes.clear()
        assert len(lm.prefixes) == 1, "a running request holds it"
        stream.close()  # type: ignore[attr-defined]
        with pytest.raises(StrategyError, match="broken"):
            lm.run(request, options, Broken())
        lm.prefixes.clear()
        assert len(lm.prefixes) == 0


@pytest.mark.parametrize("provider", ["torch", "onnxruntime"])
def test_two_threads_with_a_model_each_do_not_disturb_one_another(provider: str, tiny_bundle: Bundle) -> None:
    drawn = [draw_prompts(13 + number, 10, (4, 7, 2)) for number in range(2)]
    policy = SharedPrefix(refresh_interval=3)

    def answer(lm: DiffusionLM, number: int) -> list[Any]:
        prefix, prompts = drawn[number]
        return [shared_tokens(lm, [prompt], prefix, 2, policy, gen_length=12) for prompt in prompts * 3]

    found: list[Any] = [None, None]

    def work(number: int) -> None:
        with DiffusionLM(tiny_bundle, open_session(tiny_bundle, SessionOptions(provider=provider, threads=1))) as lm:  # type: ignore[arg-type]
            found[number] = answer(lm, number)

    threads = [Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        with DiffusionLM(tiny_bundle, open_session(tiny_bundle, SessionOptions(provider=provider, threads=1))) as lm:  # type: ignore[arg-type]
            assert found[number] == answer(lm, number)
