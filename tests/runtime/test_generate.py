"""What holds for every frame of every generation, whatever the policy and the options."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from dllm_export.errors import DllmExportError, UsageError
from dllm_export.exporter.options import ExportOptions
from dllm_export.exporter.pipeline import export
from dllm_export.runtime.generate import Frame
from dllm_export.runtime.model import DiffusionLM
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.policies import CachePolicy, DllmCache, NoCache
from dllm_export.runtime.session import SessionOptions, open_session

OpenModel = Callable[[str], DiffusionLM]

MASK = 96
PROMPTS = [np.random.default_rng(length).integers(0, 90, length).tolist() for length in (12, 7)]
POLICIES: list[CachePolicy] = [
    NoCache(),
    DllmCache(prompt_interval=5, response_interval=3),
    DllmCache(prompt_interval=5, response_interval=3, update_ratio=0.0),
    DllmCache(prompt_interval=3, response_interval=5, update_ratio=1.0, first_layer_rule=False),
]
OPTIONS: list[dict[str, Any]] = [
    {"gen_length": 16},
    {"gen_length": 16, "block_length": 8, "steps": 6},
    {"gen_length": 16, "block_length": 4, "steps": 8, "temperature": 1.5, "remasking": "random"},
    {"gen_length": 8, "steps": 16, "cfg_scale": 1.0},
    {"gen_length": 16, "steps": 1},
]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


@pytest.fixture(scope="module")
def lm(open_model: OpenModel) -> DiffusionLM:
    return open_model("onnxruntime")


def continue_all(lm: DiffusionLM, options: GenerationOptions, policy: CachePolicy) -> list[Frame]:
    return list(lm.stream(lm.continuation(PROMPTS, options), options, policy))


def check_commits(frames: list[Frame], before: NDArray[np.int32]) -> None:
    """Every frame differs from the one before exactly where it says, and only where nothing was decided."""
    for frame in frames:
        np.testing.assert_array_equal(frame.committed, (frame.tokens != before))
        assert (before[frame.committed] == MASK).all(), "a decided token changed"
        assert (frame.tokens[frame.committed] != MASK).all(), "the mask token was committed"
        before = frame.tokens
    assert (before != MASK).all()


@every_policy
@pytest.mark.parametrize("keywords", OPTIONS, ids=str)
def test_a_generation_commits_what_its_schedule_says(
    keywords: dict[str, Any], policy: CachePolicy, lm: DiffusionLM
) -> None:
    options = GenerationOptions(**keywords)
    frames = continue_all(lm, options, policy)
    length = keywords["gen_length"]
    block, steps = keywords.get("block_length", length), keywords.get("steps", length)
    blocks = length // block
    check_commits(frames, np.full((len(PROMPTS), length), MASK, np.int32))
    assert [(frame.step, frame.steps) for frame in frames] == [(step + 1, steps) for step in range(steps)]
    assert [frame.block for frame in frames] == [step * blocks // steps for step in range(steps)]
    counts = np.array([frame.committed.sum(1) for frame in frames])
    each, rest = divmod(block, steps // blocks)
    quota = [each + (step < rest) for step in range(steps // blocks)]
    assert counts.tolist() == [[count] * len(PROMPTS) for count in quota * blocks]
    for number in range(blocks):
        inside = np.any([frame.committed for frame in frames if frame.block == number], axis=0)
        assert inside[:, number * block : (number + 1) * block].all()
        assert inside.sum() == block * len(PROMPTS), "a block reached beyond its rows"


@every_policy
def test_a_frame_belongs_to_its_reader(policy: CachePolicy, lm: DiffusionLM) -> None:
    options = GenerationOptions(gen_length=8)
    untouched = continue_all(lm, options, policy)[-1]
    frames = []
    for frame in lm.stream(lm.continuation(PROMPTS, options), options, policy):
        frames.append(frame.tokens.copy())
        frame.tokens[:], frame.confidence[:] = 0, 0.0
    np.testing.assert_array_equal(frames[-1], untouched.tokens)


def test_confidence_is_the_probability_at_the_step_of_the_commit(lm: DiffusionLM) -> None:
    frames = continue_all(lm, GenerationOptions(gen_length=16), NoCache())
    for before, frame in pairwise(frames):
        assert np.isnan(frame.confidence[frame.tokens == MASK]).all()
        decided = before.tokens != MASK
        np.testing.assert_array_equal(frame.confidence[decided], before.confidence[decided])
    assert ((frames[-1].confidence > 0) & (frames[-1].confidence <= 1)).all()


@pytest.mark.parametrize(("interval", "extra"), [(1, 12), (2, 5 + 3), (7, 5 + 1), (99, 5)])
def test_guidance_adds_a_pass_in_the_first_five_steps_and_at_every_refresh(
    interval: int, extra: int, lm: DiffusionLM
) -> None:
    options = GenerationOptions(gen_length=12, cfg_scale=1.0, cfg_interval=interval)
    frames = continue_all(lm, options, POLICIES[1])
    assert frames[-1].passes == 12 + extra
    assert continue_all(lm, GenerationOptions(gen_length=12), POLICIES[1])[-1].passes == 12


def test_the_watched_rows_are_those_that_the_last_layer_recomputed(lm: DiffusionLM) -> None:
    options, policy = GenerationOptions(gen_length=16), POLICIES[1]
    frames = list(lm.stream(lm.continuation(PROMPTS, options), options, policy, watch=True))
    for frame in frames:
        assert frame.recomputed is not None
        rows = 4 if frame.kind in ("partial", "refresh_prompt") else 16
        assert frame.recomputed.sum(1).tolist() == [rows] * len(PROMPTS)
    assert continue_all(lm, options, policy)[0].recomputed is None


# -- infilling
TEXT = np.random.default_rng(5).integers(0, 90, 20).tolist()
HOLES = {
    "one": [11],
    "scattered": [2, 3, 9, 14, 19],
    "first and last": [0, 19],
    "all": list(range(20)),
}


@every_policy
@pytest.mark.parametrize("places", HOLES.values(), ids=HOLES)
def test_infilling_keeps_what_is_given_and_fills_the_rest(
    places: list[int], policy: CachePolicy, lm: DiffusionLM
) -> None:
    text = [MASK if place in places else token for place, token in enumerate(TEXT)]
    shorter = [*TEXT[:5], MASK, *TEXT[6:9]]
    request = lm.infilling([text, shorter], GenerationOptions())
    frames = list(lm.stream(request, GenerationOptions(), policy))
    prompt = request.shape.prompt_rows
    check_commits(frames, request.canvas[:, prompt:])
    given = request.canvas[:, prompt:] != MASK
    np.testing.assert_array_equal(frames[-1].tokens[given], request.canvas[:, prompt:][given])
    counts = np.array([frame.committed.sum(1) for frame in frames])
    assert len(frames) == len(places)
    assert counts.sum(0).tolist() == [len(places), 1]


@every_policy
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_infilling_in_fewer_steps_fills_everything(steps: int, policy: CachePolicy, lm: DiffusionLM) -> None:
    options = GenerationOptions(steps=steps)
    text = [MASK if place in HOLES["scattered"] else token for place, token in enumerate(TEXT)]
    frames = list(lm.stream(lm.infilling([text], options), options, policy))
    assert len(frames) == steps
    assert (frames[-1].tokens != MASK).all()


def test_a_shorter_text_in_a_batch_is_filled_as_it_is_alone(lm: DiffusionLM) -> None:
    """Its padding lies beside the response of the longer text and must not come back as generated tokens."""
    longer, shorter = [MASK, *TEXT[1:]], [*TEXT[:5], MASK, *TEXT[6:9]]
    options = GenerationOptions()
    together = lm.run(lm.infilling([longer, shorter], options), options)[1]
    alone = lm.run(lm.infilling([shorter], options), options)[0]
    assert (together.tokens, together.finish_reason) == (alone.tokens, alone.finish_reason)


def test_logits_that_overflow_are_an_error_and_not_a_text(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_checkpoints["tied"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.transformer.ln_f.weight"] *= 1e38
    save_file(tensors, model / "model.safetensors")
    bundle = export(model, tmp_path / "bundle", ExportOptions(no_tokenizer=True))
    options = GenerationOptions(gen_length=8)
    with (
        DiffusionLM(bundle, open_session(bundle, SessionOptions(threads=1))) as lm,
        pytest.raises(DllmExportError, match="logits are not finite"),
    ):
        continue_all(lm, options, NoCache())


# -- requests that make no sense
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"gen_length": 16, "block_length": 5}, "divisible by --block-length 5"),
        ({"gen_length": 16, "block_length": 8, "steps": 5}, "divisible by the 2 blocks"),
        ({"gen_length": 600}, "trained for 512"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(keywords: dict[str, Any], message: str, lm: DiffusionLM) -> None:
    with pytest.raises(UsageError, match=message):
        lm.continuation(PROMPTS, GenerationOptions(**keywords))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[]], "empty"), ([[1, MASK]], "mask token"), ([[97]], "outside 0..96"), ([[-1]], "outside"), ([], "no prompt")],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts: list[list[int]], message: str, lm: DiffusionLM) -> None:
    with pytest.raises(UsageError, match=message):
        lm.continuation(prompts, GenerationOptions(gen_length=8))


def test_a_text_without_masks_cannot_be_filled(lm: DiffusionLM) -> None:
    with pytest.raises(UsageError, match="no mask token"):
        lm.infilling([TEXT], GenerationOptions())
