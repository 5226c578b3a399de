"""What the demo model is trained on: answers with some tokens masked, as a whole or block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dllm_export.graphs import ModelShape
from dllm_export.tools.demo_layouts import END, MASK
from dllm_export.tools.demo_model import Layer, View, Weights, classify, run_layers, view_rows
from dllm_export.tools.worksheets import CELL, PROBLEMS, Sheets

LONGEST = CELL * PROBLEMS[1]
"""Bytes of the longest answer."""


@dataclass(frozen=True, slots=True)
class NoisyAnswers:
    """A batch with masked answers; the last N rows of S, or with a shift those before them, are to say what was there."""

    tokens: Tensor  # [B, S]
    view: View
    answers: Tensor  # [B, N]
    shares: Tensor  # [B, N] what each row's cross-entropy counts in the loss; 0 where nothing is masked


def masked_loss(
    shape: ModelShape,
    weights: Weights,
    sheets: Sheets,
    generator: torch.Generator,
    *,
    layer: Layer,
    dtype: torch.dtype,
    least: float = 0.0,
) -> Tensor:
    """LLaDA's supervised objective (arXiv 2502.09992, equation 5), averaged over the batch.

    The prompt stays clean, each answer token is masked with probability p = (1 - 1e-3) t + 1e-3, t ~ U(least, 1) per
    sheet, and the cross-entropy of the masked tokens is divided by p and by the answer length. A model that attends by
    blocks has t per block (Block Diffusion, arXiv 2503.09573, equation 8).
    """
    noisy = (mask_blocks if shape.block else mask_answers)(shape, sheets, generator, least)
    hidden = run_layers(shape, weights, noisy.tokens, noisy.view, layer=layer, dtype=dtype)
    last = hidden.shape[1] - shape.shift
    logits = classify(shape, weights, hidden[:, last - noisy.answers.shape[1] : last])
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), noisy.answers.flatten(), reduction="none")
    return (losses * noisy.shares.flatten()).sum()


def mask_answers(shape: ModelShape, sheets: Sheets, generator: torch.Generator, least: float) -> NoisyAnswers:
    """One t for each sheet, stratified over the batch."""
    tokens, start = _send_sheets(sheets, generator.device)
    count, length = len(tokens), sheets.answer_length
    answers = tokens[:, -length:]
    offset = torch.rand((), generator=generator, device=tokens.device)
    p = _probability((offset + torch.arange(count, device=tokens.device) / count) % 1.0, least).unsqueeze(1)
    masked = torch.rand((count, length), generator=generator, device=tokens.device) < p
    noisy = torch.cat((tokens[:, :-length], torch.where(masked, MASK, answers)), dim=1)
    return NoisyAnswers(noisy, view_rows(shape, start, tokens.shape[1]), answers.long(), masked / p / (count * length))


def mask_blocks(shape: ModelShape, sheets: Sheets, generator: torch.Generator, least: float) -> NoisyAnswers:
    """Every block of every sheet with a t of its own, stratified over all, in one pass.

    The sheets are clean, and a noisy copy of their last blocks follows: those of the answer, with what the prompt has in the
    first of them. A clean row sees clean rows up to the end of its block; a noisy one its own noisy block and the clean
    ones before it, as a block does that is being decided. The answer's last block is filled with END, because generation
    decides it to its end.
    """
    block, device = shape.block, generator.device
    tokens, start = _send_sheets(sheets, device)
    count, length, columns = len(tokens), sheets.answer_length, -(-tokens.shape[1] // block) * block
    start = start + columns - tokens.shape[1]
    tail = (start % block).unsqueeze(1)  # rows from the end of the answer to the end of its block
    before, after = torch.zeros_like(tokens[:, :block]), torch.full_like(tokens[:, :block], END)
    wide = torch.cat((before[:, : columns - tokens.shape[1]], tokens, after), dim=1)
    column = torch.arange(columns, device=device)
    clean, view = wide.gather(1, column + tail), view_rows(shape, start - tail.squeeze(1), columns)
    copied = -(-LONGEST // block) * block + block
    answers = clean[:, -copied:]
    decided = column[-copied:] >= columns - tail - length
    drawn = torch.randperm(count * copied // block, generator=generator, device=device) / (count * copied // block)
    t = (torch.rand((), generator=generator, device=device) + drawn) % 1.0
    p = _probability(t.view(count, -1), least).repeat_interleave(block, dim=1)
    masked = (torch.rand(p.shape, generator=generator, device=device) < p) & decided
    return NoisyAnswers(
        torch.cat((clean, torch.where(masked, MASK, answers)), dim=1),
        _view_copies(view, block, copied),
        answers.long(),
        masked / p / (count * (length + tail)),
    )


def _view_copies(view: View, block: int, copied: int) -> View:
    """The view of sequences, of blocks of `block` rows, with that of noisy copies of their last `copied` rows behind it."""
    columns = view.position.shape[1]
    number = torch.arange(columns, device=view.position.device) // block
    noisy = number[-copied:]
    own = noisy.unsqueeze(1) == noisy
    earlier = view.mask[:, -copied:] & (number < noisy.unsqueeze(1))
    nothing = view.mask.new_zeros((len(view.mask), columns, copied))
    mask = torch.cat(
        (torch.cat((view.mask, nothing), dim=2), torch.cat((earlier, own.expand(len(earlier), -1, -1)), dim=2)), dim=1
    )
    return View(torch.cat((view.position, view.position[:, -copied:]), dim=1), mask)


def _probability(t: Tensor, least: float) -> Tensor:
    """That a token is masked, at times t ~ U(0, 1)."""
    return (1 - 1e-3) * (least + (1 - least) * t) + 1e-3


def _send_sheets(sheets: Sheets, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, columns] and start [B] on the device."""
    return _send(sheets.tokens, device).to(torch.int32), _send(sheets.start, device)


def _send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; through pinned memory, so that the host need not wait for the step before."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
