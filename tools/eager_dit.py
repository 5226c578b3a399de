"""MDLM's, BD3-LM's and SEDD's transformer as published, in plain PyTorch: a test oracle.

Written from the published modelling code (arXiv 2406.07524, 2310.16834) over a checkpoint's own tensors: norms are modulated by
the noise level in every layer, nothing is folded. It shares nothing with the graphs, the exporter or the runtime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, silu

PREFIX = "backbone."
EPS, THETA, TIME_WIDTH = 1e-5, 1e4, 256


@dataclass(frozen=True, slots=True)
class EagerDit:
    """A loaded checkpoint. Tensors keep their published names without a prefix, and stay [out, in]."""

    heads: int
    layers: int
    tensors: Mapping[str, Tensor]
    block: int = 0
    """Rows of BD3-LM's blocks; 0 where every row sees all."""

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:  # [B, T], [B] -> [B, T, V]
        """The output layer's numbers at these noise levels."""
        conditioning = self.condition(sigma)
        x = embedding(tokens, self.tensors["vocab_embed.embedding"])
        for layer in range(self.layers):
            x = self.run_block(f"blocks.{layer}.", x, conditioning)
        shift, scale = self.modulation("output_layer.", conditioning, 2)
        inner = self.norm(x, "output_layer.norm_final") * (1 + scale) + shift
        return self.apply("output_layer.linear", inner)

    def condition(self, sigma: Tensor) -> Tensor:  # [B] -> [B, C]
        """The noise level's conditioning of every norm."""
        half = TIME_WIDTH // 2
        places = torch.arange(half, dtype=torch.float64)
        angle = sigma.double()[:, None] * torch.exp(-math.log(10_000) * places / half)
        table = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.tensors["sigma_map.mlp.0.weight"].dtype)
        return silu(self.apply("sigma_map.mlp.2", silu(self.apply("sigma_map.mlp.0", table))))

    def run_block(self, block: str, x: Tensor, conditioning: Tensor) -> Tensor:
        """A layer: attention and MLP, each behind a modulated norm and a gate."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(block, conditioning, 6)
        inner = self.norm(x, f"{block}norm1") * (1 + scale1) + shift1
        x = x + gate1 * self.attend(block, inner)
        inner = self.norm(x, f"{block}norm2") * (1 + scale2) + shift2
        return x + gate2 * self.apply(f"{block}mlp.2", gelu(self.apply(f"{block}mlp.0", inner), approximate="tanh"))

    def attend(self, block: str, x: Tensor) -> Tensor:
        """Attention of rows that are rotated by their positions, to all or to their own block and those before."""
        batch, length, width = x.shape
        packed = self.apply(f"{block}attn_qkv", x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(2))  # [B, heads, T, d]
        scores = rotate(query) @ rotate(key).transpose(-1, -2) / math.sqrt(width // self.heads)
        blocks = torch.arange(length) // (self.block or length)
        scores = scores.masked_fill(blocks[None, :] > blocks[:, None], -torch.inf)
        mixed = torch.softmax(scores, dim=-1) @ value
        return self.apply(f"{block}attn_out", mixed.transpose(1, 2).reshape(batch, length, width))

    def modulation(self, place: str, conditioning: Tensor, count: int) -> tuple[Tensor, ...]:
        """Shift, scale and gate of each branch, [B, 1, D]."""
        return self.apply(f"{place}adaLN_modulation", conditioning).unsqueeze(1).chunk(count, dim=-1)

    def norm(self, x: Tensor, name: str) -> Tensor:
        """LayerNorm with a weight and no bias."""
        return layer_norm(x, x.shape[-1:], eps=EPS) * self.tensors[f"{name}.weight"]

    def apply(self, name: str, x: Tensor) -> Tensor:
        """A linear map, with its bias where it has one."""
        return linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))


def rotate(x: Tensor) -> Tensor:  # [B, heads, T, d]
    """Rotary embedding: dimension j turns with j + d/2."""
    length, width = x.shape[-2:]
    frequency = THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def load_eager_dit(directory: Path, dtype: torch.dtype = torch.float64) -> EagerDit:
    """The model of a checkpoint directory with one model.safetensors file."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = config.get("model", config)
    stored = load_file(directory / "model.safetensors")
    tensors = {name.removeprefix(PREFIX): tensor.to(dtype) for name, tensor in stored.items()}
    return EagerDit(
        heads=settings["n_heads"], layers=settings["n_blocks"], tensors=tensors, block=settings.get("block_size", 0)
    )
