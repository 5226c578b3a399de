"""Prompts and canvases -> a checked request; every refusal states the rule and the remedy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import SamplerDefaults, SpecialTokens
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.request import Request, continuation, infilling, share_prefix

MASK, PAD = 9, 8
SHAPE = ModelShape(
    layers=1,
    hidden=8,
    heads=1,
    kv_heads=1,
    head_dim=8,
    mlp=8,
    vocab=10,
    max_length=32,
    norm_eps=1e-5,
    rope_theta=1e4,
)
TOKENS = SpecialTokens(mask=MASK, eos=PAD, pad=PAD)
SAMPLER = SamplerDefaults(gen_length=16, block_length=16)


SHIFTED = replace(SHAPE, shift=True)


def ask(*prompts: list[int], **options: int) -> Request:
    return continuation(prompts, GenerationOptions(**options), SHAPE, TOKENS, SAMPLER)


def fill(*canvases: list[int], **options: int) -> Request:
    return infilling(canvases, GenerationOptions(**options), SHAPE, TOKENS)


def test_prompts_are_padded_on_the_left_and_followed_by_masks() -> None:
    request = ask([1, 2, 3], [4], gen_length=4)
    assert request.canvas.tolist() == [[1, 2, 3, MASK, MASK, MASK, MASK], [PAD, PAD, 4, MASK, MASK, MASK, MASK]]
    assert request.canvas.dtype == np.int32
    assert request.padding.tolist() == [0, 2]
    assert (request.shape.batch, request.shape.prompt_rows, request.shape.response_rows) == (2, 3, 4)


def test_defaults_come_from_the_family_and_one_token_is_committed_per_step() -> None:
    schedule = ask([1]).schedule
    assert (schedule.gen_length, schedule.block_length, schedule.steps) == (16, 16, 16)
    assert ask([1], gen_length=8).schedule.block_length == 8
    blocks = ask([1], gen_length=12, block_length=4, steps=6).schedule
    assert (blocks.blocks, blocks.steps_per_block) == (3, 2)


@pytest.mark.parametrize(
    ("canvases", "lead", "predictors"),
    [
        ([[1, 2, MASK, 3, MASK], [4, 1, MASK, MASK]], 1, [[0, 1, 2], [0, 1, 2]]),
        ([[1, 2, MASK, 3, MASK], [MASK, 3, 4]], 1, [[0, 1, 2], [1, 1, 2]]),
        ([[MASK, 2, MASK], [3, MASK]], 0, [[0, 0, 1], [1, 1, 1]]),
    ],
)
def test_with_a_shift_a_row_is_predicted_by_the_one_before_it_and_a_first_row_by_itself(
    canvases: list[list[int]], lead: int, predictors: list[list[int]]
) -> None:
    request = infilling(canvases, GenerationOptions(), SHIFTED, TOKENS)
    assert (request.shape.lead, request.shape.led.length) == (lead, request.shape.length)
    assert request.shape.led.response_rows == request.shape.response_rows + lead
    assert request.predictors.tolist() == predictors
    plain = infilling(canvases, GenerationOptions(), SHAPE, TOKENS)
    assert plain.shape.lead == 0
    assert plain.predictors.tolist() == [list(range(plain.shape.response_rows))] * len(canvases)


def test_with_a_shift_a_shared_prefix_leaves_the_last_token_of_a_prompt() -> None:
    request = continuation([[1, 2, 3], [1, 2, 4, 5]], GenerationOptions(gen_length=4), SHIFTED, TOKENS, SAMPLER)
    assert share_prefix(request, [1, 2], 1, 1).prefix is not None
    with pytest.raises(UsageError, match=r"is all of prompt 1, whose last token this model needs fresh in every step"):
        share_prefix(replace(request, canvas=request.canvas[:1], padding=request.padding[:1]), [1, 2, 3], 1, 1)


def test_a_prompt_of_the_full_length_is_accepted_and_one_token_more_is_not() -> None:
    assert ask([1] * 28, gen_length=4).canvas.shape == (1, 32)
    with pytest.raises(UsageError, match=r"29 prompt tokens and 4 to generate make 33.*trained for 32: shorten"):
        ask([1] * 29, gen_length=4)


def test_an_empty_prompt_is_refused_by_number() -> None:
    with pytest.raises(UsageError, match=r"prompt 2 is empty.*at least one token"):
        ask([1], [])


def test_a_mask_in_a_prompt_points_to_infilling() -> None:
    with pytest.raises(UsageError, match=r"prompt 1 holds the mask token.*infilling"):
        ask([1, MASK])


@pytest.mark.parametrize("token", [-1, 10, 2**31])
def test_a_token_outside_the_vocabulary_is_refused_with_the_range(token: int) -> None:
    with pytest.raises(UsageError, match=r"text 2 holds a token id outside 0\.\.9"):
        ask([1], [2, token])
    with pytest.raises(UsageError, match=r"outside 0\.\.9"):
        fill([MASK, token])


def test_a_length_that_blocks_do_not_fill_is_refused_with_the_block_lengths_that_do() -> None:
    with pytest.raises(
        UsageError, match=r"--gen-length 12 is not divisible by --block-length 5.*among 1, 2, 3, 4, 6, 12"
    ):
        ask([1], gen_length=12, block_length=5)
    with pytest.raises(UsageError, match=r"--gen-length 4 is not divisible by --block-length 8"):
        ask([1], gen_length=4, block_length=8)


def test_steps_that_do_not_divide_over_the_blocks_are_refused_with_the_factor() -> None:
    with pytest.raises(UsageError, match=r"--steps 7 is not divisible by the 3 blocks.*a multiple of 3"):
        ask([1], gen_length=12, block_length=4, steps=7)


@pytest.mark.parametrize("option", ["steps", "gen_length", "block_length"])
@pytest.mark.parametrize("value", [0, -4])
def test_a_count_below_one_is_refused_by_flag(option: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is {value}, expected at least 1"):
        ask([1], **{option: value})


def test_no_prompt_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="no prompt"):
        ask()
    with pytest.raises(UsageError, match="no prompt"):
        fill()


# -- infilling
def test_infilling_starts_at_the_first_mask_of_any_sequence() -> None:
    request = fill([1, 2, MASK, 3, MASK], [MASK, 4])
    assert request.canvas.tolist() == [[1, 2, MASK, 3, MASK], [PAD, PAD, PAD, MASK, 4]]
    assert request.padding.tolist() == [0, 3]
    assert (request.shape.prompt_rows, request.shape.response_rows) == (2, 3)
    assert (request.schedule.blocks, request.schedule.steps) == (1, 2)


def test_infilling_takes_no_more_steps_than_there_are_masks() -> None:
    assert fill([1, MASK, MASK], steps=1).schedule.steps == 1
    assert fill([1, MASK, MASK], steps=99).schedule.steps == 2


def test_a_text_without_a_mask_is_refused_by_number() -> None:
    with pytest.raises(UsageError, match="text 2 holds no mask token"):
        fill([MASK], [1, 2])
    with pytest.raises(UsageError, match="text 1 holds no mask token"):
        fill([])


@pytest.mark.parametrize("option", ["gen_length", "block_length"])
def test_lengths_do_not_apply_to_infilling(option: str) -> None:
    with pytest.raises(UsageError, match="do not apply to infilling: the masks in the text decide"):
        fill([1, MASK], **{option: 4})


def test_a_canvas_longer_than_the_model_was_trained_for_is_refused() -> None:
    assert fill([1] * 31 + [MASK]).canvas.shape == (1, 32)
    with pytest.raises(
        UsageError, match="the text is 33 tokens long, masks included, but the model was trained for 32"
    ):
        fill([1] * 32 + [MASK])


def test_an_early_stop_does_not_apply_to_infilling() -> None:
    with pytest.raises(UsageError, match="--early-stop does not apply to infilling"):
        fill([1, MASK], early_stop=True)
