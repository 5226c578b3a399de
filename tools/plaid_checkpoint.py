"""A Plaid checkpoint with seeded random weights: the four PyTorch files of the release, tensor for tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dllm_export.graphs import ModelShape

GAIN = 1.5
UNITS = 1024
LEVEL_WIDTH = 64


def write_random_plaid(directory: Path, shape: ModelShape, seed: int, dtype: torch.dtype) -> Path:
    """Write the files and return the directory. The schedule's bounds are those that training begins with."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator).mul(GAIN / inputs**0.5)

    def vector(size: int, centre: float) -> Tensor:
        return centre + 0.1 * torch.randn(size, generator=generator)

    d = shape.hidden
    model = {
        "input_linear.weight": matrix(d, shape.latent),
        "selfcond_linear.weight": matrix(d, shape.latent),
        "gamma_linear.weight": matrix(d, LEVEL_WIDTH),
        "rotary_emb.inv_freq": shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim),
        "output_norm.weight": vector(d, 1.0),
        "output_linear.weight": matrix(shape.vocab, d) * d / 256,  # what the width divides it by
        "output_linear.bias": vector(shape.vocab, 0.0),
    }
    for layer in range(shape.layers):
        block = f"blocks.{layer}."
        model |= {
            f"{block}rmsnorm1.weight": vector(d, 1.0),
            f"{block}attn_qkv.weight": matrix(3 * d, d),
            f"{block}attn_out.weight": matrix(d, d),
            f"{block}rmsnorm2.weight": vector(d, 1.0),
            f"{block}mlp.fc1.weight": matrix(4 * d, d),
            f"{block}mlp.fc2.weight": matrix(d, 4 * d),
        }
    units = {name: torch.randn(dims, generator=generator) for name, dims in SCHEDULE.items()}
    parts = {
        "model": model,
        "embedding_matrix": {"matrix": torch.randn(shape.vocab, shape.latent, generator=generator)},
        "noise_schedule": units,
        "gamma_bounds": {"gamma_0": torch.tensor(-3.0), "gamma_1": torch.tensor(6.0)},
    }
    for name, tensors in parts.items():
        torch.save({key: tensor.to(dtype) for key, tensor in tensors.items()}, directory / f"{name}.pt")
    return directory


SCHEDULE = {"W1": (UNITS, 1), "b1": (UNITS,), "W2": (1, UNITS)}
