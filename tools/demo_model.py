"""The demo model outside of any export: fresh weights, the forward pass through the graphs, plain LLaDA decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dllm_export.graphs import TOP_TOKENS, ModelShape, TensorSpec, graph_specs, layer_weights
from dllm_export.graphs.heads import head
from dllm_export.graphs.layers import normalize
from dllm_export.graphs.steps import embed, layer_full
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.tools.problems import KINDS
from dllm_export.tools.worksheets import Sheets, Worksheet, grade

MASK = 258
"""Id of `<|mdm_mask|>`; bytes are 0..255, the special tokens follow."""

Weights = dict[str, Tensor]
"""Weights by graph name; those of layer i carry the prefix `layers.i.`."""

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""`layer(hidden, cos, sin, mask, weights) -> hidden`; weights may be wider than hidden."""


def weight_specs(shape: ModelShape) -> dict[str, TensorSpec]:
    """Every weight of the model by its name in `Weights`."""
    graphs = graph_specs(shape)
    specs = {spec.name: spec for spec in (*graphs["embed"].weights, *graphs["head"].weights)}
    for layer in range(shape.layers):
        specs |= {f"layers.{layer}.{spec.name}": spec for spec in layer_weights(shape)}
    return specs


def draw_weights(shape: ModelShape, generator: torch.Generator) -> Weights:
    """Fresh float32 weights: norms 1, matrices N(0, 1/inputs), ends of residual branches 1/(2 layers) of that."""
    weights = {}
    for name, spec in weight_specs(shape).items():
        size = [int(dim) for dim in spec.dims]
        if len(size) == 1:
            weights[name] = torch.ones(size)
            continue
        inputs = shape.hidden if spec.name == "embedding" else size[0]
        branch_end = spec.name in ("out", "down")
        deviation = (inputs * (2 * shape.layers if branch_end else 1)) ** -0.5
        weights[name] = torch.randn(size, generator=generator) * deviation
    return weights


def rope_tables(shape: ModelShape, position: Tensor) -> tuple[Tensor, Tensor]:  # [B, S] -> [B, S, head_dim / 2] twice
    """cos and sin in float32 of every position."""
    half = shape.head_dim // 2
    exponent = torch.arange(half, device=position.device, dtype=torch.float32) / half
    angle = position.unsqueeze(-1) * torch.exp(-math.log(shape.rope_theta) * exponent)
    return angle.cos(), angle.sin()


def layer_runner(shape: ModelShape) -> Layer:
    """The graph `layer_full` as a function of tensors only, so that it can be compiled once for all layers."""

    def run(hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        tensors = {name: weight.to(hidden.dtype) for name, weight in weights.items()}
        tensors |= {"hidden": hidden, "cos": cos, "sin": sin, "mask": mask}
        return layer_full(TorchOps(), shape, tensors)["hidden_out"]

    return run


def run_layers(
    shape: ModelShape, weights: Weights, tokens: Tensor, start: Tensor, *, layer: Layer, dtype: torch.dtype
) -> Tensor:
    """Hidden rows [B, S, D] in `dtype` after the last layer. Columns before `start` [B] are padding."""
    column = torch.arange(tokens.shape[1], device=tokens.device)
    mask = column >= start.unsqueeze(1)
    cos, sin = rope_tables(shape, (column - start.unsqueeze(1)).clamp(min=0))
    hidden = embed(TorchOps(), shape, {"tokens": tokens, "embedding": weights["embedding"].to(dtype)})["hidden_out"]
    names = [spec.name for spec in layer_weights(shape)]
    for number in range(shape.layers):
        hidden = layer(hidden, cos, sin, mask, {name: weights[f"layers.{number}.{name}"] for name in names})
    return hidden


def classify(shape: ModelShape, weights: Weights, hidden: Tensor) -> Tensor:  # [B, Q, D] -> [B, Q, V]
    """Logits in float32, as the head graph computes them before its statistics."""
    rows = normalize(TorchOps(), shape, hidden, {"norm": weights["norm"].to(hidden.dtype)}, "norm")
    return (rows @ weights["head"].to(hidden.dtype)).float()


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
    sheet, and the cross-entropy of the masked tokens is divided by p and by the answer length. t is stratified over the
    batch.
    """
    device = generator.device
    tokens = _send(sheets.tokens, device).to(torch.int32)
    start = _send(sheets.start, device)
    length = sheets.answer_length
    answers = tokens[:, -length:].long()
    count = len(answers)
    offset = torch.rand((), generator=generator, device=device)
    t = (offset + torch.arange(count, device=device) / count) % 1.0
    t = least + (1 - least) * t
    p = ((1 - 1e-3) * t + 1e-3).unsqueeze(1)
    masked = torch.rand((count, length), generator=generator, device=device) < p
    noisy = torch.cat((tokens[:, :-length], torch.where(masked, MASK, tokens[:, -length:])), dim=1)
    hidden = run_layers(shape, weights, noisy, start, layer=layer, dtype=dtype)
    logits = classify(shape, weights, hidden[:, -length:])
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
    return (losses.view(count, length) * masked / p).sum() / (count * length)


def _send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; through pinned memory, so that the host need not wait for the step before."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@torch.no_grad()
def decode(
    shape: ModelShape, weights: Weights, prompts: Sequence[bytes], length: int, block: int, dtype: torch.dtype
) -> list[bytes]:
    """`length` answer bytes for each prompt by LLaDA's sampler: temperature 0, one token a step, surest token first.

    Blocks of `block` tokens are filled from left to right; the last one may be shorter. Special tokens read as 0.
    """
    device = weights["embedding"].device
    width = -(-max(map(len, prompts)) // 8) * 8
    rows = [bytes(width - len(prompt)) + prompt for prompt in prompts]
    tokens = torch.full((len(rows), width + length), MASK, dtype=torch.int32)
    tokens[:, :width] = torch.tensor([list(row) for row in rows], dtype=torch.int32)
    tokens = tokens.to(device)
    start = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    every = torch.arange(len(rows), device=device)
    constants = {
        "norm": weights["norm"].to(dtype),
        "head": weights["head"].to(dtype),
        "bias": torch.zeros(shape.vocab, device=device),
        "cfg_scale": torch.zeros(1, device=device, dtype=dtype),
    }
    layer = layer_runner(shape)
    for first in range(width, width + length, block):
        places = torch.arange(first, min(first + block, width + length), device=device)
        index = places.to(torch.int32).expand(len(rows), -1)
        for _ in places:
            hidden = run_layers(shape, weights, tokens, start, layer=layer, dtype=dtype)
            top = min(TOP_TOKENS, shape.vocab)
            inputs = {"hidden": hidden, "index": index, "guidance": torch.zeros_like(hidden), "given": index * 0}
            found = head(TorchOps(), shape, {**inputs, **constants}, top=top)
            sure = torch.where(tokens[:, places] == MASK, found["confidence"], -1.0).argmax(dim=1)
            tokens[every, places[sure]] = found["token"][every, sure]
    answers = tokens[:, width:]
    return [bytes(row) for row in torch.where(answers < 256, answers, 0).tolist()]


def evaluate(
    shape: ModelShape, weights: Weights, sheets: Sequence[Worksheet], block: int, dtype: torch.dtype
) -> dict[str, float]:
    """Share of problems answered exactly, by kind and for `all`."""
    results: dict[str, list[bool]] = {kind.name: [] for kind in KINDS}
    for size in sorted({len(sheet.answer) for sheet in sheets}):
        group = [sheet for sheet in sheets if len(sheet.answer) == size]
        run = partial(decode, shape, weights, length=size, block=min(block, size), dtype=dtype)
        for sheet, answer in zip(group, run([sheet.prompt.encode() for sheet in group]), strict=True):
            for problem, right in zip(sheet.problems, grade(sheet, answer.decode("latin-1")), strict=True):
                results[problem.kind].append(right)
    shares = {kind: sum(rights) / len(rights) for kind, rights in results.items() if rights}
    every = [right for rights in results.values() for right in rights]
    return {**shares, "all": sum(every) / len(every)}
