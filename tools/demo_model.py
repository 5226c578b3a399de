"""The demo model outside of any export: fresh weights, the forward pass through the graphs, plain decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dllm_export.graphs import TOP_TOKENS, ModelShape, TensorSpec, graph_specs, layer_weights
from dllm_export.graphs.heads import head
from dllm_export.graphs.layers import find_visible, normalize
from dllm_export.graphs.steps import embed, layer_full
from dllm_export.graphs.torch_ops import TorchOps
from dllm_export.tools.demo_layouts import MASK
from dllm_export.tools.problems import KINDS
from dllm_export.tools.worksheets import Worksheet, grade

COLUMN_STEP = 8
"""What the columns of a batch are rounded up to, for kernels that want aligned rows."""

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
    """Fresh float32 weights: norms 1, biases 0, matrices N(0, 1/inputs), ends of residual branches 1/(2 layers) of that."""
    weights = {}
    for name, spec in weight_specs(shape).items():
        size = [int(dim) for dim in spec.dims]
        if len(size) == 1:
            weights[name] = torch.zeros(size) if spec.name.endswith("_bias") else torch.ones(size)
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


class SharedKeys(TorchOps):
    """Keys that query heads share are repeated for each: no kernel that takes a mask on a GPU shares them itself."""

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        shared = query.shape[2] // key.shape[2]
        key, value = (x.repeat_interleave(shared, dim=2) if shared > 1 else x for x in (key, value))
        return super().attention(query, key, value, mask)


def layer_runner(shape: ModelShape) -> Layer:
    """The graph `layer_full` as a function of tensors only, so that it can be compiled once for all layers."""

    def run(hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        tensors = {name: weight.to(hidden.dtype) for name, weight in weights.items()}
        tensors |= {"hidden": hidden, "cos": cos, "sin": sin, "mask": mask}
        return layer_full(SharedKeys(), shape, tensors)["hidden_out"]

    return run


@dataclass(frozen=True, slots=True)
class View:
    """Where the rows of a batch of sequences stand and what they see."""

    position: Tensor  # [B, S]
    mask: Tensor  # [B, S] keys that all rows see, or [B, S, S] those that each row sees


def view_rows(shape: ModelShape, start: Tensor, columns: int) -> View:
    """Sequences in so many columns that begin at `start` [B]; what is before it is padding.

    Of a model that attends by blocks, every sequence must begin at a multiple of its block.
    """
    column = torch.arange(columns, device=start.device)
    visible = column >= start.unsqueeze(1)
    position = (column - start.unsqueeze(1)).clamp(min=0)
    if not shape.block:
        return View(position, visible)
    block = torch.where(visible, column // shape.block, columns)  # padding sees all, so that it sees something
    return View(position, find_visible(TorchOps(), {"mask": visible, "block": block}, all_rows=True))


def run_layers(
    shape: ModelShape, weights: Weights, tokens: Tensor, view: View, *, layer: Layer, dtype: torch.dtype
) -> Tensor:
    """Hidden rows [B, S, D] in `dtype` after the last layer."""
    cos, sin = rope_tables(shape, view.position)
    hidden = embed(TorchOps(), shape, {"tokens": tokens, "embedding": weights["embedding"].to(dtype)})["hidden_out"]
    names = [spec.name for spec in layer_weights(shape)]
    for number in range(shape.layers):
        hidden = layer(hidden, cos, sin, view.mask, {name: weights[f"layers.{number}.{name}"] for name in names})
    return hidden


def classify(shape: ModelShape, weights: Weights, hidden: Tensor) -> Tensor:  # [B, Q, D] -> [B, Q, V]
    """Logits in float32, as the head graph computes them before its statistics."""
    rows = normalize(TorchOps(), shape, hidden, {"norm": weights["norm"].to(hidden.dtype)}, "norm")
    return (rows @ weights["head"].to(hidden.dtype)).float()


@torch.no_grad()
def decode(
    shape: ModelShape, weights: Weights, prompts: Sequence[bytes], length: int, block: int, dtype: torch.dtype
) -> list[bytes]:
    """`length` answer bytes for each prompt by LLaDA's sampler: temperature 0, one token a step, surest token first.

    Blocks of `block` tokens are filled from left to right; the last one may be shorter. A model that attends by blocks has
    its own ones instead, counted from the prompt's first token, and fills the last to its end, which is cut off. Special
    tokens read as 0.
    """
    device = weights["embedding"].device
    grid = shape.block or COLUMN_STEP
    tails = [-(len(prompt) + length) % shape.block if shape.block else 0 for prompt in prompts]
    rows = [[*prompt, *[MASK] * (length + tail)] for prompt, tail in zip(prompts, tails, strict=True)]
    columns = -(-max(map(len, rows)) // grid) * grid
    tokens = torch.tensor([[0] * (columns - len(row)) + row for row in rows], dtype=torch.int32, device=device)
    start = torch.tensor([columns - len(row) for row in rows], device=device)
    view, every = view_rows(shape, start, columns), torch.arange(len(rows), device=device)
    constants = {
        "norm": weights["norm"].to(dtype),
        "head": weights["head"].to(dtype),
        "bias": torch.zeros(shape.vocab, device=device),
        "cfg_scale": torch.zeros(1, device=device, dtype=dtype),
    }
    layer, top, block = layer_runner(shape), min(TOP_TOKENS, shape.vocab), shape.block or block
    first = columns - length - max(tails)
    for begin in range(first // shape.block * shape.block if shape.block else first, columns, block):
        places = torch.arange(begin, min(begin + block, columns), device=device)
        index = (places - int(shape.shift)).to(torch.int32).expand(len(rows), -1)
        for _ in places:
            hidden = run_layers(shape, weights, tokens, view, layer=layer, dtype=dtype)
            inputs = {"hidden": hidden, "index": index, "guidance": torch.zeros_like(hidden), "given": index * 0}
            found = head(TorchOps(), shape, {**inputs, **constants}, top=top)
            masked = tokens[:, places] == MASK
            sure = torch.where(masked, found["confidence"], -1.0).argmax(dim=1)
            decided = torch.where(masked[every, sure], found["token"][every, sure], tokens[every, places[sure]])
            tokens[every, places[sure]] = decided
    answers = torch.where(tokens < 256, tokens, 0).tolist()
    return [bytes(row[columns - tail - length : columns - tail]) for row, tail in zip(answers, tails, strict=True)]


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
