"""The trained models of other layouts than LLaDA's, cached, on answers that are right or wrong.

Dream's rows predict the next token; SDAR's attend to their own block and those before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.exporter.verify import verify
from dllm_export.runtime.bundle import Bundle
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import BlockCache, CachePolicy, DkvDecode, DllmCache, DualCache, NoCache, PrefixCache
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.transfers import Dream, Dynamic, Quota, Transfer
from dllm_export.tools.worksheets import Worksheet, grade, held_out

MODELS = Path(__file__).resolve().parents[2] / "models"
SHAPES: Mapping[str, Mapping[str, object]] = {
    "dream": {"shift": True, "qkv_bias": True, "qk_norm": False, "heads": 4, "kv_heads": 2, "block": 0},
    "sdar": {"shift": False, "qkv_bias": False, "qk_norm": True, "heads": 4, "kv_heads": 2, "block": 16},
}
"""Layout -> what of its model's shape is special to it."""
SHEETS = held_out(3, seed=11, problems=6)
GREEDY = GenerationOptions(gen_length=48, block_length=16, steps=24, temperature=0.0, top_p=1.0)
"""Two tokens a step in three blocks, so that a block's first token is asked of the row before the block in Dream's layout."""

Models = Mapping[str, Mapping[str, DiffusionLM]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """The exports by layout."""
    root = tmp_path_factory.mktemp("trained")
    return {layout: export(directory_of(layout), root / layout, ExportOptions()) for layout in SHAPES}


@pytest.fixture(scope="module")
def models(bundles: dict[str, Bundle]) -> Iterator[Models]:
    """The exports by layout and provider."""
    with ExitStack() as stack:
        yield {
            layout: {name: stack.enter_context(open_on(bundle, name)) for name in ("onnxruntime", "torch")}
            for layout, bundle in bundles.items()
        }


@pytest.fixture(scope="module")
def uncached(models: Models) -> dict[str, list[str]]:
    """Their answers without a cache."""
    return {layout: answer(models[layout]["onnxruntime"], NoCache()) for layout in SHAPES}


def directory_of(layout: str) -> Path:
    return MODELS / f"worksheets-{layout}-3m"


def open_on(bundle: Bundle, provider: str) -> DiffusionLM:
    return DiffusionLM(bundle, open_session(bundle, SessionOptions(provider=provider, threads=1)))


def answer(
    lm: DiffusionLM,
    policy: CachePolicy,
    *,
    rule: Transfer = Quota(),
    options: GenerationOptions = GREEDY,
    sheets: tuple[Worksheet, ...] = SHEETS,
) -> list[str]:
    return [result.text for result in lm.generate([sheet.prompt for sheet in sheets], options, policy, transfer=rule)]


def count_right(answers: list[str], sheets: tuple[Worksheet, ...] = SHEETS) -> int:
    return sum(sum(grade(sheet, text)) for sheet, text in zip(sheets, answers, strict=True))


@pytest.mark.parametrize("layout", SHAPES)
def test_its_export_verifies(layout: str, bundles: dict[str, Bundle]) -> None:
    report = verify(bundles[layout], SessionOptions(threads=1))
    assert report.passed
    assert report.agreement == 1.0


@pytest.mark.parametrize("layout", SHAPES)
def test_its_card_says_what_its_files_hold(layout: str, bundles: dict[str, Bundle]) -> None:
    place, shape = directory_of(layout), bundles[layout].manifest.shape
    card = (place / "README.md").read_text().replace("\\\n    ", "")
    runs = [json.loads((place / "training.json").read_text())]
    while "resumed" in runs[-1]:
        runs.append(runs[-1]["resumed"])
    assert f"{runs[0]['parameters']:,} parameters" in card
    for run in runs:
        assert f"{run['steps']:,} steps" in card
        assert run["command"].split("tools.train ")[1] in re.sub(r"--output \S+ ", "", card)
    shares = [value for name, value in runs[0]["accuracy"].items() if "100 sheets" in name]
    lines = card.splitlines()
    for kind in ("add", "sort", "reverse", "copy", "look up", "all"):
        stated = " | ".join(f"{share[kind]:.1%}".replace("%", " %") for share in shares)
        assert next(line for line in lines if line.startswith(f"| {kind} |")).endswith(f" | {stated} |")
    assert shares[-1]["all"] >= 0.95
    assert sum(file.stat().st_size for file in place.iterdir()) < 8_000_000
    assert {name: getattr(shape, name) for name in SHAPES[layout]} == SHAPES[layout]


# -- answers
@pytest.mark.parametrize("layout", SHAPES)
def test_it_answers_what_it_was_never_trained_on(layout: str, uncached: dict[str, list[str]]) -> None:
    assert count_right(uncached[layout]) == 18


def test_by_dreams_own_loop_it_answers_as_well(models: Models) -> None:
    """Dream's own rule over one block: 12 steps for 48 tokens, most of them late."""
    options = GenerationOptions(gen_length=48, steps=12, temperature=0.0, top_p=1.0, remasking="entropy")
    assert count_right(answer(models["dream"]["onnxruntime"], NoCache(), rule=Dream(), options=options)) == 18


def test_it_answers_nothing_where_a_row_is_taken_for_its_own_token(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["dream"]
    shape = replace(bundle.manifest.shape, shift=False)
    unshifted = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, shape=shape))
    sheets = SHEETS[:1]
    with open_on(unshifted, "onnxruntime") as lm:
        assert count_right(answer(lm, NoCache(), sheets=sheets), sheets) == 0


def test_by_sdars_own_rule_it_answers_as_well_in_fewer_passes(models: Models) -> None:
    """`low_confidence_dynamic` decides all that it is sure of: three blocks, of which none takes more than four passes."""
    lm, options = models["sdar"]["onnxruntime"], GenerationOptions(gen_length=48)
    results = lm.generate([sheet.prompt for sheet in SHEETS], options, BlockCache(), Dynamic())
    assert count_right([result.text for result in results]) == 18
    assert results[0].passes <= 12


# -- caches
CACHES: Mapping[str, tuple[str, CachePolicy]] = {
    "dllm-cache": ("dream", DllmCache()),
    "rarely": ("dream", DllmCache(prompt_interval=100, response_interval=100)),
    "dual": ("dream", DualCache()),
    "prefix": ("dream", PrefixCache()),
    "blocks kept": ("sdar", BlockCache()),
}


@pytest.mark.parametrize("cache", CACHES)
def test_with_a_cache_it_answers_as_without(cache: str, models: Models, uncached: dict[str, list[str]]) -> None:
    layout, policy = CACHES[cache]
    assert answer(models[layout]["onnxruntime"], policy) == uncached[layout]


REFRESHING: Mapping[str, Mapping[str, CachePolicy]] = {
    "dream": {
        "dllm-cache": DllmCache(prompt_interval=1, response_interval=1),
        "updating all": DllmCache(prompt_interval=1, response_interval=2, update_ratio=1.0),
        "dkv-decode": DkvDecode(refresh_interval=1),
    },
    "sdar": {"block": BlockCache()},
}
"""Exact policies: what they take from a cache is what they would compute."""


@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
@pytest.mark.parametrize("layout", SHAPES)
def test_an_exact_cache_decides_the_same_tokens_in_the_same_steps(layout: str, provider: str, models: Models) -> None:
    lm, options = models[layout][provider], replace(GREEDY, steps=12)
    request = lm.continuation([lm.encode(SHEETS[0].prompt)], options)

    def steps(policy: CachePolicy) -> list[object]:
        return [frame.tokens.tolist() for frame in lm.stream(request, options, policy, transfer=Quota())]

    expected, exact = steps(NoCache()), REFRESHING[layout]
    # The prompt ends within a block of SDAR's, so that the response lies in four of them.
    assert len(expected) == {"dream": 12, "sdar": 16}[layout]
    assert {name: steps(policy) == expected for name, policy in exact.items()} == dict.fromkeys(exact, True)
