"""What the four files of a Plaid checkpoint say of its sizes, in place of a config.json; and its noise schedule as one file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.nn.functional import softplus

from dllm_export.errors import CheckpointError
from dllm_export.exporter.pack import save_tensors

SCHEDULE = "schedule.safetensors"
BLOCK = re.compile(r"model\.blocks\.(\d+)\.")
ROTARY = "model.rotary_emb.inv_freq"

Shapes = Mapping[str, tuple[int, ...]]


def read_sizes(shapes: Shapes) -> dict[str, object]:
    """The configuration that the training script was called with, as far as tensors show it."""
    vocab, latent = _size(shapes, "embedding_matrix.matrix", 2)
    blocks = [int(match[1]) for name in shapes if (match := BLOCK.match(name))]
    sizes: dict[str, object] = {
        "vocab_size": vocab,
        "embed_dim": latent,
        "dim": _size(shapes, "model.input_linear.weight", 2)[0],
        "n_blocks": max(blocks, default=-1) + 1,
    }
    if ROTARY in shapes:
        sizes["head_dim"] = 2 * _size(shapes, ROTARY, 1)[0]
    return sizes


def _size(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    file, _, tensor = name.partition(".")
    if name not in shapes:
        raise CheckpointError(f"{file}.pt has no tensor '{tensor}'; this is no Plaid checkpoint, or another part of it")
    if len(shapes[name]) != rank:
        raise CheckpointError(f"{file}.pt: tensor '{tensor}' has shape {shapes[name]}, expected {rank} dimensions")
    return shapes[name]


def write_schedule(raw: Mapping[str, Tensor], root: Path) -> str:
    """Tensors of the schedule by slot -> numbers in float64 for `runtime/noise_schedule.py`; returns the file's name."""
    numbers = {
        "rate": softplus(raw["schedule_in"].double())[:, 0],
        "bias": raw["schedule_bias"].double(),
        "share": 0.01 * softplus(raw["schedule_out"].double())[0],
        "first": raw["gamma_first"].double().reshape(1),
        "last": raw["gamma_last"].double().reshape(1),
    }
    if not numbers["first"] < numbers["last"]:
        raise CheckpointError(
            f"gamma_bounds.pt: gamma_0 is {numbers['first'].item():g} and gamma_1 {numbers['last'].item():g}; noise must rise "
            f"from the first to the second"
        )
    save_tensors({name: tensor.contiguous() for name, tensor in numbers.items()}, root / SCHEDULE)
    return SCHEDULE
