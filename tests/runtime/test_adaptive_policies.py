"""dynamic-dllm and spa in float64 against their published rules, written out plainly, token for token.

The references keep four features per row and layer in dictionaries, pick rows with Python's sort, and take nothing from the
graphs, the policies or the trunk but the settings' numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dllm_export.runtime import programs
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, DynamicDllm, NoCache, SpaCache
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.tools.eager import EagerModel

OpenModel = Callable[[str], DiffusionLM]
MASK = 96
Rows = list[list[int]]
"""Response rows of each sequence, equally many."""


def drift_of(new: Tensor, old: Tensor) -> Tensor:  # [B, R, W] twice -> [B, R]
    """1 - cosine; less than 1e-6 counts as none (docs/decisions.md)."""
    return (1 - cosine_similarity(new, old, dim=-1, eps=1e-8) - 1e-6).clamp(min=0)


def take(x: Tensor, rows: Rows) -> Tensor:
    return torch.stack([sequence[places] for sequence, places in zip(x, rows, strict=True)])


def put(target: Tensor, rows: Rows, values: Tensor) -> Tensor:
    changed = target.clone()
    for sequence, places, each in zip(changed, rows, values, strict=True):
        sequence[places] = each
    return changed


def largest(drift: Tensor, count: int, first: Rows) -> Rows:
    """The rows of `first`, and `count` others by falling drift, the leftmost of equals."""
    picked = []
    for scores, always in zip(drift.tolist(), first, strict=True):
        others = sorted(set(range(len(scores))) - set(always), key=lambda row: (-scores[row], row))
        picked.append(always + others[:count])
    return picked


@dataclass
class Reference:
    """One pass after another over four features; a subclass says which rows of a layer are recomputed."""

    model: EagerModel
    padding: tuple[int, ...]
    split: int
    policy: Any
    step: int = 0
    before: Tensor | None = None
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, tokens: Tensor) -> Tensor:  # [B, T] -> logits [B, R, V]
        self.step += 1
        self.context = self.model.context(self.padding, tokens.shape[1])
        x = self.model.embed(tokens)
        refresh = self.starts()
        if not refresh:
            x = x[:, self.split :]
            self.plan(tokens)
        for layer, weights in enumerate(self.model.layers):
            x = self.full(layer, weights, x) if refresh else self.partial(layer, weights, x)
        self.before = tokens.clone()
        return self.model.classify(x[:, self.split :] if refresh else x)

    def full(self, layer: int, weights: Any, x: Tensor) -> Tensor:
        inner = self.model.norm(x, weights["attn_norm.weight"])
        query, key, value = (self.model.project(weights, name, inner) for name in ("q_proj", "k_proj", "v_proj"))
        attention = self.model.attend(weights, query, key, value, self.context, self.context)
        mlp = self.model.mlp(weights, x + attention)
        kept = self.layers[layer] = {"prompt key": key[:, : self.split], "prompt value": value[:, : self.split]}
        for name, rows in {"key": key, "value": value, "attention": attention, "mlp": mlp, "x": x}.items():
            kept[name] = rows[:, self.split :]
        self.keep(layer, weights, inner[:, self.split :])
        return x + attention + mlp

    def partial(self, layer: int, weights: Any, x: Tensor) -> Tensor:
        """`x` holds the response alone."""
        kept, model = self.layers[layer], self.model
        inner = model.norm(x, weights["attn_norm.weight"])
        rows = self.pick(layer, weights, x, inner)
        key, value = (model.project(weights, name, inner) for name in ("k_proj", "v_proj"))
        for name, new in {"key": key, "value": value}.items():
            kept[name] = new if name in self.stored_whole else put(kept[name], rows, take(new, rows))
        kept["x"] = x
        self.keep(layer, weights, inner)
        keys, values = (torch.cat((kept[f"prompt {name}"], kept[name]), 1) for name in ("key", "value"))
        query = model.project(weights, "q_proj", take(inner, rows))
        at = self.context.at(torch.tensor(rows) + self.split)
        attention = model.attend(weights, query, keys, values, at, self.context)
        kept["attention"] = put(kept["attention"], rows, attention)
        x = x + kept["attention"]
        kept["mlp"] = put(kept["mlp"], rows, model.mlp(weights, take(x, rows)))
        return x + kept["mlp"]

    stored_whole: tuple[str, ...] = ()
    """Features that a partial step stores for all response rows."""

    def starts(self) -> bool:
        """Whether everything is recomputed in this step."""
        raise NotImplementedError

    def plan(self, tokens: Tensor) -> None:
        """Called at the start of every other step."""

    def pick(self, layer: int, weights: Any, x: Tensor, inner: Tensor) -> Rows:
        raise NotImplementedError

    def keep(self, layer: int, weights: Any, inner: Tensor) -> None:
        """Called when the layer's response rows are known."""


@dataclass
class DynamicReference(Reference):
    scores: Tensor | None = None  # [B, L] of the last step

    def __post_init__(self) -> None:
        self.stored_whole = ("value",) if self.policy.variant == "released" else ()

    def starts(self) -> bool:
        every = self.policy.prompt_interval
        if self.step == 1 or (every and (self.step - 1) % every == 0):
            self.scores = None
            return True
        return False

    def plan(self, tokens: Tensor) -> None:
        response, before = tokens[:, self.split :], self.before[:, self.split :]  # type: ignore[index]
        count, size = response.shape[1], min(self.policy.window + 1, response.shape[1])
        self.windows = []
        for now, then in zip(response.tolist(), before.tolist(), strict=True):
            decided = [row for row in range(count) if then[row] == MASK and now[row] != MASK]
            start = (max(decided) if decided else 0) - self.policy.window // 2
            while start < 0:
                start += 1
            while start + size > count:
                start -= 1
            self.windows.append(list(range(start, start + size)))
        self.found: list[Tensor] = []

    def pick(self, layer: int, weights: Any, x: Tensor, inner: Tensor) -> Rows:
        released, kept = self.policy.variant == "released", self.layers[layer]
        new, old = (self.model.project(weights, "v_proj", inner), kept["value"]) if released else (x, kept["x"])
        drift = drift_of(new, old)
        self.found.append(drift.mean(1))
        last, number = self.scores, len(self.model.layers)
        if len(self.found) == number:
            self.scores = torch.stack(self.found, 1)
        if layer == 0 and self.policy.first_layer_rule:
            return [list(range(x.shape[1]))] * len(x)
        shares = []
        for sequence in range(len(x)):
            row = [1.0] * number if released or last is None or not last[sequence].any() else last[sequence].tolist()
            shares.append(int(self.policy.layer_budget * number / sum(row) * row[layer]))
        budget = max(shares)
        while budget % self.policy.bucket:
            budget += 1
        return largest(drift, budget, self.windows)


@dataclass
class SpaReference(Reference):
    rank: int = 0

    def __post_init__(self) -> None:
        self.stored_whole = ("key", "value")
        self.proxies = []
        for weights in self.model.layers:
            value = weights["v_proj.weight"].numpy()  # [G*d, D]
            sizes, directions = np.linalg.eigh(value.T @ value)
            proxy = (directions * np.sqrt(np.maximum(sizes, 0)))[:, ::-1][:, : self.rank]
            self.proxies.append(torch.from_numpy(proxy.astype(np.float32).astype(np.float64)))

    def starts(self) -> bool:
        return (self.step - 1) % self.policy.prompt_interval == 0

    def pick(self, layer: int, weights: Any, x: Tensor, inner: Tensor) -> Rows:
        count, policy = x.shape[1], self.policy
        if layer == 0 or (self.step - 1) % policy.response_interval == 0:
            return [list(range(count))] * len(x)
        z, mu = layer / len(self.model.layers), policy.peak_depth
        left, right = (np.log(ratio / policy.peak_ratio) for ratio in (policy.start_ratio, policy.end_ratio))
        variance = -(mu**2) / (2 * left) if z < mu else -((1 - mu) ** 2) / (2 * right)
        ratio = policy.peak_ratio * np.exp(-((z - mu) ** 2) / (2 * variance))
        ratio = max(ratio, policy.min_ratio) if z < mu else ratio
        drift = drift_of(inner @ self.proxies[layer], self.layers[layer]["indicator"])
        return largest(drift, int(count * ratio), [[] for _ in x])

    def keep(self, layer: int, weights: Any, inner: Tensor) -> None:
        self.layers[layer]["indicator"] = inner @ self.proxies[layer]


@dataclass(frozen=True)
class Case:
    """A request of two sequences, the second one padded, and how it is decoded."""

    prompt: int
    response: int
    block: int
    each: int = 1
    """Tokens per step."""
    cfg: float = 0.0
    interval: int = 1
    seed: int = 0
    variant: str = "plain"

    @property
    def prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(self.seed)
        return [rng.integers(0, 90, self.prompt - padding).tolist() for padding in self.padding]

    @property
    def padding(self) -> tuple[int, int]:
        return (0, 3)

    @property
    def options(self) -> GenerationOptions:
        return GenerationOptions(
            gen_length=self.response,
            block_length=self.block,
            steps=self.response // self.each,
            cfg_scale=self.cfg,
            cfg_interval=self.interval,
        )


def decode(case: Case, model: EagerModel, make: Callable[[], Reference]) -> Tensor:
    """LLaDA's loop at temperature 0, the surest tokens of the block first. [B, R]"""
    tokens = torch.tensor(
        [
            [model.eos_token] * padding + prompt + [MASK] * case.response
            for padding, prompt in zip(case.padding, case.prompts, strict=True)
        ]
    )
    given, conditional, unconditional = tokens != MASK, make(), make()
    residual = torch.zeros(())
    for start in range(0, case.response, case.block):
        for _ in range(case.block // case.each):
            logits = conditional(tokens)
            if case.cfg:
                step = conditional.step
                if (step - 1) % case.interval == 0 or step <= 5:
                    residual = logits - unconditional(tokens.where(~given, MASK))
                logits = logits + case.cfg * residual
            logits[:, :, MASK] = -torch.inf
            best, proposal = logits.softmax(-1).max(-1)
            response = tokens[:, case.prompt :]
            best = best.where(response == MASK, -1.0)
            best[:, start + case.block :] = -1.0
            for row, order in enumerate(best.sort(dim=1, descending=True, stable=True).indices[:, : case.each]):
                response[row, order] = proposal[row, order]
    return tokens[:, case.prompt :]


def open_precise(bundle: Bundle) -> DiffusionLM:
    return DiffusionLM(bundle, TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64"))


def stream(lm: DiffusionLM, case: Case, policy: CachePolicy, **more: Any) -> Iterator[Frame]:
    return lm.stream(lm.continuation(case.prompts, case.options), case.options, policy, **more)


CASES = {
    "one block": Case(13, 24, 24),
    "blocks": Case(13, 24, 8, seed=1),
    "several tokens a step": Case(9, 24, 12, each=3, seed=2),
    "short prompt": Case(4, 20, 20, each=2, seed=3),
    "guidance": Case(11, 16, 8, cfg=1.5, seed=4),
    "guidance now and then": Case(11, 16, 16, cfg=0.8, interval=3, seed=5),
    "bias and padding": Case(13, 24, 12, each=2, seed=6, variant="bias"),
    "grouped heads": Case(13, 24, 12, seed=7, variant="gqa"),
    "query and key norms": Case(13, 24, 12, seed=8, variant="qk_norm"),
}
DYNAMIC = {
    "exact numbers": DynamicDllm(layer_budget=3, window=4, bucket=1),
    "rounded up": DynamicDllm(layer_budget=3, window=2, bucket=4),
    "newest row alone": DynamicDllm(layer_budget=2, window=0, bucket=1, prompt_interval=6),
    "even the first layer": DynamicDllm(layer_budget=4, window=3, bucket=1, first_layer_rule=False),
    "released": DynamicDllm(layer_budget=3, window=4, bucket=1, variant="released"),
    "released, first layer too": DynamicDllm(
        layer_budget=4, window=2, bucket=2, variant="released", first_layer_rule=False, prompt_interval=7
    ),
}
SPA = {
    "several refreshes": SpaCache(prompt_interval=9, response_interval=4),
    "few refreshes": SpaCache(prompt_interval=50, response_interval=7, peak_ratio=0.4, start_ratio=0.1, end_ratio=0.3),
    "early peak, and layers without a row": SpaCache(
        prompt_interval=11, response_interval=5, peak_depth=0.3, end_ratio=0.01
    ),
    "a least ratio": SpaCache(prompt_interval=50, response_interval=6, min_ratio=0.2),
}


def spread(settings: Iterable[str]) -> list[tuple[str, str]]:
    """Every second pair of a case and settings, as the white fields of a chess board."""
    numbered = product(enumerate(CASES), enumerate(settings))
    return [(name, each) for (row, name), (column, each) in numbered if (row + column) % 2 == 0]


@pytest.mark.parametrize(("name", "settings"), spread(DYNAMIC))
def test_dynamic_dllm_equals_its_rule(
    name: str, settings: str, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    case, policy = CASES[name], DYNAMIC[settings]
    model = tiny_eager[case.variant]
    expected = decode(case, model, lambda: DynamicReference(model, case.padding, case.prompt, policy))
    *_, last = stream(open_precise(tiny_bundles[case.variant]), case, policy)
    assert last.tokens.tolist() == expected.tolist()


@pytest.mark.parametrize(("name", "settings"), spread(SPA))
def test_spa_equals_its_rule(
    name: str, settings: str, narrow_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    case, policy = CASES[name], SPA[settings]
    model, bundle = tiny_eager[case.variant], narrow_bundles[case.variant]
    rank = bundle.manifest.shape.indicator_rank
    expected = decode(case, model, lambda: SpaReference(model, case.padding, case.prompt, policy, rank=rank))
    *_, last = stream(open_precise(bundle), case, policy)
    assert last.tokens.tolist() == expected.tolist()


# -- equalities between policies
EQUAL: dict[str, tuple[CachePolicy, CachePolicy]] = {
    "a window over the response is a response refresh": (
        DynamicDllm(layer_budget=1, window=24),
        DllmCache(prompt_interval=99, response_interval=1),
    ),
    "so is the released window": (
        DynamicDllm(layer_budget=1, window=23, variant="released"),
        DllmCache(prompt_interval=99, response_interval=1),
    ),
    "so is a released budget of all rows": (
        DynamicDllm(layer_budget=24, window=0, variant="released", first_layer_rule=False),
        DllmCache(prompt_interval=99, response_interval=1),
    ),
    "a ratio of 1 everywhere is one": (
        SpaCache(prompt_interval=6, response_interval=5, peak_ratio=1.0, start_ratio=1.0, end_ratio=1.0),
        DllmCache(prompt_interval=6, response_interval=1),
    ),
    "spa refreshed every step is no cache": (SpaCache(prompt_interval=1), NoCache()),
    "dynamic-dllm refreshed every step is no cache": (DynamicDllm(prompt_interval=1), NoCache()),
}


@pytest.mark.parametrize("name", EQUAL)
def test_policies_that_recompute_the_same_rows_give_the_same_numbers(name: str, tiny_bundle: Bundle) -> None:
    lm, case = open_precise(tiny_bundle), Case(13, 24, 8, cfg=0.5, interval=2)
    for first, second in zip(*(stream(lm, case, policy) for policy in EQUAL[name]), strict=True):
        assert first.tokens.tolist() == second.tokens.tolist()
        # Other graphs add in another order: rounding of float64.
        np.testing.assert_allclose(first.confidence, second.confidence, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("policy", "other"),
    [
        (DYNAMIC["exact numbers"], replace(DYNAMIC["exact numbers"], layer_budget=4)),
        (DYNAMIC["exact numbers"], replace(DYNAMIC["exact numbers"], window=6)),
        (DYNAMIC["exact numbers"], replace(DYNAMIC["exact numbers"], variant="released")),
        (DYNAMIC["exact numbers"], replace(DYNAMIC["exact numbers"], prompt_interval=5)),
        (SPA["several refreshes"], replace(SPA["several refreshes"], response_interval=5)),
        (SPA["several refreshes"], replace(SPA["several refreshes"], peak_ratio=0.35)),
        (SPA["several refreshes"], replace(SPA["several refreshes"], min_ratio=0.2)),
    ],
    ids=str,
)
def test_every_setting_is_seen(policy: CachePolicy, other: CachePolicy, tiny_bundle: Bundle) -> None:
    lm, case = open_precise(tiny_bundle), Case(13, 24, 24)
    (*_, first), (*_, second) = (stream(lm, case, each) for each in (policy, other))
    assert np.abs(first.confidence - second.confidence).max() > 1e-3, "a cache too stale to tell from another"


def test_an_indicator_as_wide_as_the_value_picks_as_the_value_does(tiny_bundle: Bundle) -> None:
    """The rows differ in keys alone, which spa refreshes for all: with the same choice the first partial step tells."""
    lm, case = open_precise(tiny_bundle), Case(13, 24, 24, each=3)
    assert tiny_bundle.manifest.shape.indicator_rank == tiny_bundle.manifest.shape.key_width
    flat = SpaCache(response_interval=99, peak_ratio=0.25, start_ratio=0.25, end_ratio=0.25)
    policies = (flat, DllmCache(prompt_interval=50, response_interval=99, update_ratio=0.25))
    spa, dllm = (list(stream(lm, case, policy, watch=True)) for policy in policies)
    assert spa[1].kind == dllm[1].kind == "partial"
    for sequence in range(2):
        assert spa[1].recomputed is not None
        assert dllm[1].recomputed is not None
        assert spa[1].recomputed[sequence].tolist() == dllm[1].recomputed[sequence].tolist()
        assert spa[1].recomputed[sequence].sum() == 6


# -- providers, rows, programs
POLICIES: list[CachePolicy] = [*DYNAMIC.values(), *SPA.values()]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_onnxruntime_decides_what_torch_decides(policy: CachePolicy, open_model: OpenModel) -> None:
    case = Case(12, 24, 8, each=2, cfg=0.5)
    (*_, first), (*_, second) = (stream(open_model(provider), case, policy) for provider in ("onnxruntime", "torch"))
    assert first.tokens.tolist() == second.tokens.tolist()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_step_recomputes_the_rows_that_its_budget_allows(policy: CachePolicy, open_model: OpenModel) -> None:
    frames = list(stream(open_model("onnxruntime"), Case(12, 24, 8), policy, watch=True))
    for frame in frames:
        assert frame.recomputed is not None
        counts = set(frame.recomputed.sum(1).tolist())
        assert len(counts) == 1
        if frame.kind != "partial":
            assert counts == {24}
        elif isinstance(policy, SpaCache):
            assert counts == {policy.budgets(5, 24)[-1]}
        elif isinstance(policy, DynamicDllm) and policy.variant == "released":
            assert counts == {policy.window + 1 + -(-policy.layer_budget // policy.bucket) * policy.bucket}
        else:
            assert isinstance(policy, DynamicDllm)
            assert policy.window + 1 <= max(counts) <= policy.window + 1 + policy.layer_budget * 5 + policy.bucket


def test_a_request_may_follow_another_in_the_same_buffers(open_model: OpenModel) -> None:
    lm, case = open_model("onnxruntime"), Case(12, 24, 8)
    for policy in POLICIES:
        (*_, first), (*_, second) = (stream(lm, case, policy) for _ in range(2))
        assert first.tokens.tolist() == second.tokens.tolist(), policy


def test_few_programs_are_kept_and_a_forgotten_one_is_prepared_again(
    open_model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, case, policy = open_model("onnxruntime"), Case(12, 24, 12), DYNAMIC["even the first layer"]
    (*_, expected) = stream(lm, case, policy)
    for limit in (1, 3):
        monkeypatch.setattr(programs, "PROGRAM_LIMIT", limit)
        fresh = DiffusionLM(lm.bundle, lm.session)
        (*_, last) = stream(fresh, case, policy)
        assert fresh._workspace is not None
        assert len(fresh._workspace.conditional._programs) == limit
        assert last.tokens.tolist() == expected.tokens.tolist()
