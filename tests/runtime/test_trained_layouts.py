"""The trained model of Dream's layout: rows that predict the next token, cached, on answers that are right or wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
from dllm_export.runtime.policies import CachePolicy, DkvDecode, DllmCache, DualCache, NoCache, PrefixCache
from dllm_export.runtime.session import SessionOptions, open_session
from dllm_export.runtime.transfers import Dream, Quota, Transfer
from dllm_export.tools.worksheets import Worksheet, grade, held_out

MODEL = Path(__file__).resolve().parents[2] / "models" / "worksheets-dream-3m"
SHEETS = held_out(3, seed=11, problems=6)
GREEDY = GenerationOptions(gen_length=48, block_length=16, steps=24, temperature=0.0, top_p=1.0)
"""Two tokens a step in three blocks, so that a block's first token is asked of the row before the block."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(MODEL, tmp_path_factory.mktemp("dream") / "bundle", ExportOptions())


@pytest.fixture(scope="module")
def models(bundle: Bundle) -> Iterator[dict[str, DiffusionLM]]:
    """The export by provider."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(open_on(bundle, name)) for name in ("onnxruntime", "torch")}


@pytest.fixture(scope="module")
def uncached(models: dict[str, DiffusionLM]) -> list[str]:
    """Its answers without a cache."""
    return answer(models["onnxruntime"], NoCache())


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


def test_its_export_verifies(bundle: Bundle) -> None:
    report = verify(bundle, SessionOptions(threads=1))
    assert report.passed
    assert report.agreement == 1.0


def test_its_card_says_what_its_files_hold(bundle: Bundle) -> None:
    card, training = (MODEL / "README.md").read_text(), json.loads((MODEL / "training.json").read_text())
    assert f"{training['parameters']:,} parameters" in card
    assert f"{training['steps']:,} steps" in card
    flags = training["command"].split("tools.train ")[1]
    assert flags in card.replace("\\\n    ", "").replace("--output worksheets-dream-3m ", "")
    shares = [value for name, value in training["accuracy"].items() if "100 sheets" in name]
    for kind in ("add", "sort", "reverse", "copy", "look up", "all"):
        assert f" | {' | '.join(f'{share[kind]:.1%}'.replace('%', ' %') for share in shares)} |\n" in next(
            line + "\n" for line in card.splitlines() if line.startswith(f"| {kind} |")
        )
    shape = bundle.manifest.shape
    assert (shape.shift, shape.qkv_bias, shape.heads, shape.kv_heads) == (True, True, 4, 2)


# -- answers
def test_it_answers_what_it_was_never_trained_on(uncached: list[str]) -> None:
    assert count_right(uncached) == 18


def test_by_the_loop_of_its_family_it_answers_as_well(models: dict[str, DiffusionLM]) -> None:
    """Dream's own rule over one block: 12 steps for 48 tokens, most of them late."""
    options = GenerationOptions(gen_length=48, steps=12, temperature=0.0, top_p=1.0, remasking="entropy")
    assert count_right(answer(models["onnxruntime"], NoCache(), rule=Dream(), options=options)) == 18


def test_it_answers_nothing_where_a_row_is_taken_for_its_own_token(bundle: Bundle) -> None:
    shape = replace(bundle.manifest.shape, shift=False)
    unshifted = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, shape=shape))
    sheets = SHEETS[:1]
    with open_on(unshifted, "onnxruntime") as lm:
        assert count_right(answer(lm, NoCache(), sheets=sheets), sheets) == 0


# -- caches
@pytest.mark.parametrize(
    "policy",
    [DllmCache(), DllmCache(prompt_interval=100, response_interval=100), DualCache(), PrefixCache()],
    ids=["dllm-cache", "rarely", "dual", "prefix"],
)
def test_with_a_cache_it_answers_as_without(
    policy: CachePolicy, models: dict[str, DiffusionLM], uncached: list[str]
) -> None:
    assert answer(models["onnxruntime"], policy) == uncached


REFRESHING = {
    "dllm-cache": DllmCache(prompt_interval=1, response_interval=1),
    "updating all": DllmCache(prompt_interval=1, response_interval=2, update_ratio=1.0),
    "dkv-decode": DkvDecode(refresh_interval=1),
}


@pytest.mark.parametrize("provider", ["onnxruntime", "torch"])
def test_refreshing_all_decides_the_same_tokens_in_the_same_steps(
    provider: str, models: dict[str, DiffusionLM]
) -> None:
    lm, options = models[provider], replace(GREEDY, steps=12)
    request = lm.continuation([lm.encode(SHEETS[0].prompt)], options)

    def steps(policy: CachePolicy) -> list[object]:
        return [frame.tokens.tolist() for frame in lm.stream(request, options, policy, transfer=Quota())]

    expected = steps(NoCache())
    assert len(expected) == 12
    assert {name: steps(policy) == expected for name, policy in REFRESHING.items()} == dict.fromkeys(REFRESHING, True)
