"""The reduced state against the published four-feature formulation, step by step in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache, StepState
from dllm_export.runtime.rope import rotary_tables
from dllm_export.runtime.session import SessionOptions
from dllm_export.runtime.sessions.torch import TorchSession
from dllm_export.runtime.trunk import Trunk
from dllm_export.tools.eager import Context, EagerModel
from dllm_export.tools.four_feature import FourFeatureCache

PADDING = (0, 3)
EXACT = 1e-12
VISIBLE = 1e-3
"""A wrong cache changes logits by at least this; measured controls differ by more than 0.1."""

StepLogits = Callable[[NDArray[np.int32], int], Tensor]
"""`(canvas [B, T], step) -> logits [B, R, V]` in float64."""


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of a request and how it is cached."""

    prompt: int
    response: int
    policy: DllmCache


def case(prompt: int, response: int, kp: int, kr: int, ratio: float, *, first_layer_rule: bool = True) -> Case:
    settings = DllmCache(
        prompt_interval=kp, response_interval=kr, update_ratio=ratio, first_layer_rule=first_layer_rule
    )
    return Case(prompt, response, settings)


CASES = {
    "all-four-cases": case(17, 24, 5, 3, 0.25),
    "short-intervals": case(17, 24, 10, 4, 0.25),
    "multiple": case(9, 32, 8, 8, 0.5),
    "long-prompt": case(40, 16, 7, 2, 0.25),
    "late-prompt": case(17, 24, 6, 5, 0.3),
    "no-update": case(17, 24, 5, 3, 0.0),
    "update-all": case(17, 24, 5, 3, 1.0),
    "no-row-to-update": case(17, 3, 2, 3, 0.25),
    "no-row-and-no-first-layer-rule": case(9, 8, 3, 4, 0.1, first_layer_rule=False),
    "no-first-layer-rule": case(17, 24, 5, 3, 0.25, first_layer_rule=False),
    "no-first-layer-rule-no-update": case(17, 24, 5, 3, 0.0, first_layer_rule=False),
    "prompt-every-step": case(9, 16, 1, 4, 0.25),
    "prompt-once": case(9, 16, 99, 3, 0.25),
}
MAIN = CASES["all-four-cases"]


def first_canvas(model: EagerModel, prompt: int, response: int, seed: int = 0) -> NDArray[np.int32]:
    """Random prompts, the second one padded, and a response of masks."""
    canvas = np.random.default_rng(seed).integers(0, 90, (len(PADDING), prompt + response)).astype(np.int32)
    for row, padding in zip(canvas, PADDING, strict=True):
        row[:padding] = model.eos_token
    canvas[:, prompt:] = model.mask_token
    return canvas


def reduced(bundle: Bundle, model: EagerModel, case: Case, policy: CachePolicy | None = None) -> StepLogits:
    """Our graphs in float64 on the reduced state; only the head is the eager model's."""
    shape = bundle.manifest.shape
    session = TorchSession(bundle, SessionOptions(provider="torch", threads=1), dtype="float64")
    request = RequestShape(batch=len(PADDING), prompt_rows=case.prompt, response_rows=case.response)
    trunk, column = Trunk(session, shape, request), np.arange(request.length)
    start = np.array(PADDING)[:, None]
    trunk.start(*rotary_tables(shape, np.maximum(column - start, 0)), column >= start)

    def run(canvas: NDArray[np.int32], step: int) -> Tensor:
        state = StepState.first(
            layers=shape.layers, prompt_rows=case.prompt, response_rows=case.response, batch=len(PADDING)
        )
        trunk.prepare((policy or case.policy).plan(replace(state, step=step, block_step=step)), canvas)()
        return model.classify(torch.from_numpy(trunk.hidden.read()))

    return run


def context_of(model: EagerModel, case: Case) -> Context:
    return model.context(PADDING, case.prompt + case.response)


def uncached(model: EagerModel, case: Case) -> StepLogits:
    context = context_of(model, case)
    return lambda canvas, _: model.forward(torch.from_numpy(canvas), context)[:, case.prompt :]


def four_feature(model: EagerModel, case: Case, kind: type[FourFeatureCache] = FourFeatureCache) -> StepLogits:
    cache = kind(model, context_of(model, case), case.prompt, case.policy)
    return lambda canvas, step: cache.forward(torch.from_numpy(canvas), step)[:, case.prompt :]


def difference_per_step(model: EagerModel, case: Case, reference: StepLogits, other: StepLogits) -> list[float]:
    """Largest logit difference of each step while the reference decides the tokens, one per sequence and step."""
    canvas, differences = first_canvas(model, case.prompt, case.response), []
    response = canvas[:, case.prompt :]
    for step in range(1, case.response + 1):
        expected = reference(canvas, step)
        differences.append(float((expected - other(canvas, step)).abs().max()))
        expected[:, :, model.mask_token] = -torch.inf
        best, tokens = (found.numpy() for found in expected.softmax(-1).max(-1))
        row = np.where(response == model.mask_token, best, -1.0).argmax(1)
        every = np.arange(len(PADDING))
        response[every, row] = tokens[every, row]
    return differences


def test_the_eager_oracle_is_alive(tiny_eager: dict[str, EagerModel]) -> None:
    model = tiny_eager["plain"]
    logits = uncached(model, MAIN)(first_canvas(model, MAIN.prompt, MAIN.response), 1)
    assert logits.std(dim=1).min() > 0.01, "rows hardly differ, so that the comparisons below would see little"


# -- the reduced state is exact
@pytest.mark.parametrize("name", CASES)
def test_the_reduced_state_gives_the_logits_of_the_four_feature_formulation(
    name: str, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager["plain"]
    ours = reduced(tiny_bundles["plain"], model, CASES[name])
    assert max(difference_per_step(model, CASES[name], four_feature(model, CASES[name]), ours)) < EXACT


@pytest.mark.parametrize("variant", ["gqa", "bias", "tied", "qk_norm", "dream"])
def test_the_reduced_state_is_exact_for_every_flag_of_the_layer(
    variant: str, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager[variant]
    ours = reduced(tiny_bundles[variant], model, MAIN)
    assert max(difference_per_step(model, MAIN, four_feature(model, MAIN), ours)) < EXACT


class UnplacedQueries(FourFeatureCache):
    """Rotates response rows as if the response started the sequence."""

    def _place(self, rows: Tensor) -> Tensor:
        return rows


class ForgottenValues(FourFeatureCache):
    """Never overwrites the values of rows that are not refreshed."""

    def _store_values(self, layer: int, value: Tensor) -> None:
        pass


class LeastDrifted(FourFeatureCache):
    """Picks the rows that drifted least."""

    def _verify(self, layer: int, inner: Tensor) -> Tensor:
        chosen = super()._verify(layer, inner)
        return inner.shape[1] - 1 - chosen


@pytest.mark.parametrize("broken", [UnplacedQueries, ForgottenValues, LeastDrifted])
def test_a_broken_cache_is_seen(
    broken: type[FourFeatureCache], tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager["plain"]
    ours = reduced(tiny_bundles["plain"], model, MAIN)
    assert max(difference_per_step(model, MAIN, four_feature(model, MAIN, broken), ours)) > VISIBLE


@pytest.mark.parametrize(
    "other",
    [
        case(17, 24, 99, 3, 0.25),
        case(17, 24, 5, 4, 0.25),
        case(17, 24, 5, 3, 0.3),
        case(17, 24, 5, 3, 0.25, first_layer_rule=False),
    ],
    ids=["stale prompt", "later response", "more rows", "no first-layer rule"],
)
def test_another_schedule_is_seen(
    other: Case, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager["plain"]
    ours = reduced(tiny_bundles["plain"], model, MAIN)
    assert max(difference_per_step(model, MAIN, four_feature(model, other), ours)) > VISIBLE


# -- equalities between policies
@pytest.mark.parametrize("variant", ["plain", "gqa", "bias", "tied", "qk_norm", "dream"])
def test_without_a_cache_the_graphs_give_the_logits_of_the_published_model(
    variant: str, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager[variant]
    ours = reduced(tiny_bundles[variant], model, MAIN, NoCache())
    assert max(difference_per_step(model, MAIN, uncached(model, MAIN), ours)) < EXACT


@pytest.mark.parametrize("other", [case(17, 12, 1, 1, 0.25), case(17, 12, 1, 5, 1.0)], ids=["Kp=Kr=1", "Kp=1,rho=1"])
def test_refreshing_everything_on_every_step_equals_no_cache(
    other: Case, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager["plain"]
    ours = reduced(tiny_bundles["plain"], model, other)
    assert max(difference_per_step(model, other, uncached(model, other), ours)) < EXACT


def test_updating_all_rows_equals_refreshing_the_response_on_every_step(
    tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model, bundle, every = tiny_eager["plain"], tiny_bundles["plain"], case(17, 16, 7, 5, 1.0)
    refreshed = reduced(bundle, model, every, replace(every.policy, response_interval=1))
    assert max(difference_per_step(model, every, refreshed, reduced(bundle, model, every))) < EXACT


@pytest.mark.parametrize(
    "stale", [case(17, 16, 99, 3, 1.0), case(17, 16, 1, 3, 0.25)], ids=["stale prompt", "stale response"]
)
def test_a_cache_differs_from_no_cache_from_the_second_step_on(
    stale: Case, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model = tiny_eager["plain"]
    ours = reduced(tiny_bundles["plain"], model, stale)
    first, *later = difference_per_step(model, stale, uncached(model, stale), ours)
    assert first < EXACT, "the first step of every policy computes everything"
    assert max(later) > VISIBLE


@pytest.mark.parametrize("name", ["all-four-cases", "no-update", "no-first-layer-rule", "no-row-to-update"])
def test_steps_that_change_no_token_repeat_the_logits_of_the_full_step(
    name: str, tiny_bundles: dict[str, Bundle], tiny_eager: dict[str, EagerModel]
) -> None:
    model, settings = tiny_eager["plain"], CASES[name]
    ours = reduced(tiny_bundles["plain"], model, settings)
    canvas = first_canvas(model, settings.prompt, settings.response)
    first = ours(canvas, 1)
    for step in range(2, 12):
        assert float((ours(canvas, step) - first).abs().max()) < EXACT
