"""Token lists -> a checked canvas with masks to fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import SamplerDefaults, SpecialTokens
from dllm_export.runtime.blocks import fill_blocks
from dllm_export.runtime.buffers import RequestShape
from dllm_export.runtime.options import GenerationOptions
from dllm_export.runtime.schedule import Schedule, make_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Rows at the start of every prompt that other requests share."""

    rows: int
    depth: int
    """Layers, counted from the first, that take its features from other requests."""


@dataclass(frozen=True, slots=True)
class Request:
    """Left-padded canvases and how to fill them. The response starts at the same column in every sequence."""

    canvas: NDArray[np.int32]  # [B, S]
    padding: NDArray[np.int64]  # [B] pad rows on the left
    shape: RequestShape
    schedule: Schedule
    infilling: bool = False
    """Whether masks were given in a text rather than appended to a prompt."""
    prefix: Prefix | None = None
    wanted: int | None = None
    """Tokens of each sequence that were asked for, where the blocks that hold them are longer; None: all."""

    @property
    def predictors(self) -> NDArray[np.int32]:
        """For every response row the place, in what is alive with the response, of the row that predicts it [B, R].

        That is the row itself, or with a shift the one before it; the first row of a sequence then predicts itself too.
        """
        shape, places = self.shape, np.arange(self.shape.response_rows, dtype=np.int32)
        if not shape.shift:
            return np.tile(places, (shape.batch, 1))
        first = np.maximum(self.padding - shape.led.prompt_rows, 0).astype(np.int32)
        rows: NDArray[np.int32] = np.maximum(places[None, :] + np.int32(shape.lead - 1), first[:, None])
        return rows


STEPS = 4096
"""Steps of a continuous model's published sampler, whatever the length."""


def unconditional(
    count: int, options: GenerationOptions, shape: ModelShape, tokens: SpecialTokens, sampler: SamplerDefaults
) -> Request:
    """Texts out of nothing, for a continuous model."""
    if not shape.latent:
        raise UsageError("this model continues prompts or fills in texts; only continuous models sample without")
    if count < 1:
        raise UsageError(f"{count} texts were asked for, expected at least 1")
    length = options.gen_length or sampler.gen_length
    if length > shape.max_length:
        raise UsageError(f"--gen-length is {length}, but the model was trained for {shape.max_length}: lower it")
    schedule = make_schedule(length, length, options.steps or STEPS)
    return make_request([[tokens.mask] * length] * count, schedule, shape, tokens)


def refuse_prompt(shape: ModelShape) -> None:
    """A continuous model takes no text."""
    if shape.latent:
        raise UsageError(
            "this model samples unconditionally and takes no prompt: guiding it by a text takes gradients through the network, "
            "which no engine has; leave the prompt out"
        )


def continuation(
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    shape: ModelShape,
    tokens: SpecialTokens,
    sampler: SamplerDefaults,
) -> Request:
    """Prompts followed by masks."""
    refuse_prompt(shape)
    if not prompts:
        raise UsageError("no prompt was given; pass at least one")
    length = options.gen_length or sampler.gen_length
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UsageError(f"prompt {number} is empty; a diffusion LLM needs at least one token to condition on")
        if tokens.mask in prompt:
            raise UsageError(
                f"prompt {number} holds the mask token, which is what gets generated; use infilling for it"
            )
    longest = max(map(len, prompts))
    if longest + length > shape.max_length:
        raise UsageError(
            f"{longest} prompt tokens and {length} to generate make {longest + length}, but the model was trained for "
            f"{shape.max_length}: shorten the prompt or lower --gen-length"
        )
    if shape.block:
        return continue_blocks(prompts, length, options, shape, tokens)
    canvases = [[*prompt, *[tokens.mask] * length] for prompt in prompts]
    block = options.block_length or (length if options.gen_length else min(sampler.block_length, length))
    schedule = make_schedule(length, block, options.steps or length)
    return make_request(canvases, schedule, shape, tokens)


def continue_blocks(
    prompts: Sequence[Sequence[int]], length: int, options: GenerationOptions, shape: ModelShape, tokens: SpecialTokens
) -> Request:
    """Prompts followed by masks to the end of a block, for a model that attends by blocks; `length` tokens are wanted.

    All sequences have their blocks in the same columns: they are padded by whole blocks, or in front of the prompt's first
    one where blocks are counted from the response.
    """
    block = options.block_length or shape.block
    wanted = -(-length // block) * block
    schedule = make_schedule(wanted, block, options.steps or wanted)
    filled = [fill_blocks(len(prompt), length, block, shape.block_anchor) for prompt in prompts]
    rows, width = max(rows for _, rows in filled), 0
    canvases = []
    for prompt, (full, _) in zip(prompts, filled, strict=True):
        masks = full + rows - len(prompt) if shape.block_anchor == "prompt" else rows
        canvases.append([*prompt, *[tokens.mask] * masks])
        width = max(width, full + rows)
    request = make_request(canvases, replace(schedule, gen_length=rows), shape, tokens, width)
    return replace(request, wanted=length)


def infilling(
    canvases: Sequence[Sequence[int]], options: GenerationOptions, shape: ModelShape, tokens: SpecialTokens
) -> Request:
    """Canvases with masks anywhere. Rows from the first mask of any sequence on are treated as response."""
    refuse_prompt(shape)
    if not canvases:
        raise UsageError("no prompt was given; pass at least one text with mask tokens")
    for number, canvas in enumerate(canvases, 1):
        if tokens.mask not in canvas:
            raise UsageError(f"text {number} holds no mask token, so there is nothing to fill in")
    if options.gen_length or options.block_length:
        raise UsageError("--gen-length and --block-length do not apply to infilling: the masks in the text decide")
    if shape.block:
        raise UsageError(
            "this model attends by blocks, so that a mask does not see what comes after its block and infilling would not heed "
            "the text on the right: continue a prompt instead"
        )
    if options.early_stop:
        raise UsageError("--early-stop does not apply to infilling, where text was given after the masks: leave it out")
    masks = max(list(canvas).count(tokens.mask) for canvas in canvases)
    steps = min(options.steps or masks, masks)
    tail = max(len(canvas) - list(canvas).index(tokens.mask) for canvas in canvases)
    return replace(make_request(canvases, make_schedule(tail, tail, steps), shape, tokens), infilling=True)


def make_request(
    canvases: Sequence[Sequence[int]],
    schedule: Schedule,
    shape: ModelShape,
    tokens: SpecialTokens,
    least_width: int = 0,
) -> Request:
    """Left-pad to one length, at least `least_width`, and check it."""
    width = max(least_width, *(len(canvas) for canvas in canvases))
    if width > shape.max_length:
        raise UsageError(
            f"the text is {width} tokens long, masks included, but the model was trained for {shape.max_length}"
        )
    canvas = np.full((len(canvases), width), tokens.pad, np.int32)
    for row, ids in enumerate(canvases):
        if not all(0 <= token < shape.vocab or token == tokens.mask for token in (min(ids), max(ids))):
            raise UsageError(
                f"text {row + 1} holds a token id outside 0..{shape.vocab - 1}; it was made by another tokenizer"
            )
        canvas[row, width - len(ids) :] = ids
    padding = np.array([width - len(ids) for ids in canvases], np.int64)
    request = RequestShape(
        batch=len(canvases),
        prompt_rows=width - schedule.gen_length,
        response_rows=schedule.gen_length,
        shift=shape.shift,
    )
    return Request(canvas, padding, request, schedule)


def share_prefix(request: Request, tokens: Sequence[int], depth: int, layers: int) -> Request:
    """The same request, with these tokens named as the start that all its prompts have."""
    if not tokens:
        raise UsageError("the prefix of --prefix-file is empty, expected at least one token; leave the flag out")
    if not 0 <= depth <= layers:
        raise UsageError(f"--prefix-depth is {depth}, expected 0 to {layers}, the layers of this model")
    wanted = np.array(tokens)
    for number, (canvas, padding) in enumerate(zip(request.canvas, request.padding.tolist(), strict=True), 1):
        prompt = canvas[padding : request.shape.prompt_rows]
        if len(tokens) > len(prompt):
            raise UsageError(
                f"the prefix of --prefix-file is {len(tokens)} tokens long, longer than prompt {number}, which has "
                f"{len(prompt)} before its first mask: share a shorter one"
            )
        if len(tokens) > len(prompt) - request.shape.lead:
            raise UsageError(
                f"the prefix of --prefix-file is all of prompt {number}, whose last token this model needs fresh in every "
                f"step, because it predicts the next one: share at least one token less"
            )
        different = np.flatnonzero(prompt[: len(tokens)] != wanted)
        if len(different):
            place = int(different[0])
            raise UsageError(
                f"prompt {number} does not start with the prefix of --prefix-file: its token {place + 1} is {prompt[place]}, "
                f"expected {wanted[place]}; begin the prompt with exactly that text, or leave the flag out"
            )
    return replace(request, prefix=Prefix(rows=len(tokens), depth=depth))
