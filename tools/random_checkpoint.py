"""A LLaDA checkpoint with seeded random weights in the published layout, for tests and benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm_export.graphs import ModelShape
from dllm_export.tools.llada_config import llada_config

GAIN = 1.5
"""Standard deviation of a matrix times the square root of its inputs. Below 1 rows and steps hardly differ, which hides
errors."""


def write_random_checkpoint(
    directory: Path, shape: ModelShape, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Path:
    """Write config.json and model.safetensors and return the directory; `device` draws the numbers, each its own.

    The mask is the last token of the vocabulary; the one before it ends a text and pads.
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawn = random_tensors(shape, torch.Generator(device).manual_seed(seed))
    tensors = {name: tensor.to("cpu", dtype) for name, tensor in drawn.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = llada_config(shape, mask=shape.vocab - 1, end=shape.vocab - 2)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return directory


def random_tensors(shape: ModelShape, generator: torch.Generator) -> dict[str, Tensor]:
    """Every tensor by its published name; matrices are [out, in], norms lie around 1."""

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator, device=generator.device).mul(GAIN / inputs**0.5)

    def vector(size: int, centre: float) -> Tensor:
        return centre + 0.1 * torch.randn(size, generator=generator, device=generator.device)

    d, query, kv, mlp = shape.hidden, shape.query_width, shape.key_width, shape.mlp
    tensors = {
        "wte.weight": torch.randn(shape.vocab, d, generator=generator, device=generator.device),
        "ln_f.weight": vector(d, 1.0),
    }
    if not shape.tied_head:
        tensors["ff_out.weight"] = matrix(shape.vocab, d)
    for layer in range(shape.layers):
        block = {
            "attn_norm.weight": vector(d, 1.0),
            "q_proj.weight": matrix(query, d),
            "k_proj.weight": matrix(kv, d),
            "v_proj.weight": matrix(kv, d),
            "attn_out.weight": matrix(d, query),
            "ff_norm.weight": vector(d, 1.0),
            "ff_proj.weight": matrix(mlp, d),
            "up_proj.weight": matrix(mlp, d),
            "ff_out.weight": matrix(d, mlp),
        }
        if shape.qkv_bias:
            block |= {f"{name}_proj.bias": vector(size, 0.0) for name, size in (("q", query), ("k", kv), ("v", kv))}
        tensors |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
    return {f"model.transformer.{name}": tensor for name, tensor in tensors.items()}
