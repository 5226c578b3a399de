"""A checkpoint of any family with seeded random weights in the published layout, for tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm_export.graphs import ModelShape
from dllm_export.graphs.families import MLP_SLOTS, TensorNames, dit, huggingface, layer_slots, llada, llada2
from dllm_export.graphs.families.family import MODULATED_SLOTS
from dllm_export.tools.dit_config import bd3lm_config, mdlm_config, sedd_config
from dllm_export.tools.huggingface_config import huggingface_config
from dllm_export.tools.llada_config import llada_config
from dllm_export.tools.plaid_checkpoint import write_random_plaid

GAIN = 1.5
"""Standard deviation of a matrix times the square root of its inputs. Below 1 rows and steps hardly differ, which hides
errors."""

CONDITIONING = 16
"""Width of what the time conditions the norms by, in families whose norms are modulated."""
TIME_WIDTH = 256


def write_random_checkpoint(
    directory: Path,
    shape: ModelShape,
    *,
    family: str = "llada",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shards: int = 1,
) -> Path:
    """Write config.json and the weights and return the directory; `device` draws the numbers, each its own.

    The mask is the last token of the vocabulary; the one before it ends a text and pads.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if family == "plaid":
        return write_random_plaid(directory, shape, seed, dtype)
    drawn = random_tensors(shape, torch.Generator(device).manual_seed(seed), family)
    write_shards(directory, {name: tensor.to("cpu", dtype) for name, tensor in drawn.items()}, shards)
    config = checkpoint_config(family, shape, mask=shape.vocab - 1, end=shape.vocab - 2)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return directory


def checkpoint_config(family: str, shape: ModelShape, *, mask: int, end: int) -> dict[str, object]:
    """config.json of a family with the sizes and flags of this shape."""
    if family == "llada":
        return llada_config(shape, mask=mask, end=end)
    if family == "bd3lm":
        return bd3lm_config(shape, conditioning=CONDITIONING, mask=mask, end=end)
    if family == "mdlm":
        return mdlm_config(shape, conditioning=CONDITIONING, mask=mask, end=end)
    if family == "sedd":
        return sedd_config(shape, conditioning=CONDITIONING, end=end)
    return huggingface_config(family, shape, mask=mask, end=end)


def write_shards(directory: Path, tensors: Mapping[str, Tensor], count: int) -> None:
    """model.safetensors, or so many shards of it with their index."""
    names, metadata = sorted(tensors), {"format": "pt"}
    if count == 1:
        save_file({name: tensors[name] for name in tensors}, directory / "model.safetensors", metadata=metadata)
        return
    files = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::count]}, directory / file, metadata=metadata)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: files[place % count] for place, name in enumerate(names)},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def tensor_names(family: str) -> TensorNames:
    """What the family's checkpoints call their tensors."""
    if family in ("mdlm", "bd3lm", "sedd"):
        return dit.tensor_names("" if family == "sedd" else "backbone.")
    named = {"llada": llada.tensor_names(1), "llada2": llada2.NAMES}
    return named.get(family, huggingface.MOE_NAMES if family.endswith("-moe") else huggingface.NAMES)


def random_tensors(shape: ModelShape, generator: torch.Generator, family: str = "llada") -> dict[str, Tensor]:
    """Every tensor by its published name; matrices are [out, in], norms lie around 1."""

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator, device=generator.device).mul(GAIN / inputs**0.5)

    def vector(size: int, centre: float) -> Tensor:
        return centre + 0.1 * torch.randn(size, generator=generator, device=generator.device)

    def draw(slot: str) -> Tensor:
        outputs, inputs = sizes[slot]
        if slot.endswith("modulation_bias"):  # of shifts, scales and gates alike, far enough from nothing to be seen
            return vector(outputs, 0.5)
        return matrix(outputs, inputs) if inputs else vector(outputs, 0.0 if slot.endswith("bias") else 1.0)

    time = CONDITIONING
    d, query, kv, mlp = shape.hidden, shape.query_width, shape.key_width, shape.mlp
    sizes = {
        "norm1": (d, 0), "q": (query, d), "k": (kv, d), "v": (kv, d), "out": (d, query), "norm2": (d, 0),
        "gate": (mlp, d), "up": (mlp, d), "down": (d, mlp), "q_bias": (query, 0), "k_bias": (kv, 0), "v_bias": (kv, 0),
        "q_norm": (shape.head_dim, 0), "k_norm": (shape.head_dim, 0), "qkv": (query + 2 * kv, d),
        "up_bias": (mlp, 0), "down_bias": (d, 0), "modulation": (6 * d, time), "modulation_bias": (6 * d, 0),
        "head_bias": (shape.vocab, 0), "norm_modulation": (2 * d, time), "norm_modulation_bias": (2 * d, 0),
        "time1": (time, TIME_WIDTH), "time1_bias": (time, 0), "time2": (time, time), "time2_bias": (time, 0),
    }  # fmt: skip
    experts = shape.experts
    if experts is not None:
        sizes |= {"router": (experts.count, d), "router_bias": (experts.count, 0)}
        for prefix, width in (("shared_", experts.shared), ("expert_", experts.mlp)):
            sizes |= {f"{prefix}gate": (width, d), f"{prefix}up": (width, d), f"{prefix}down": (d, width)}
    names = tensor_names(family)
    tensors = {
        names.embedding: torch.randn(shape.vocab, d, generator=generator, device=generator.device),
        names.norm: vector(d, 1.0),
    }
    if not shape.tied_head:
        tensors[names.head] = matrix(shape.vocab, d)
    tensors |= {name: draw(slot) for slot, name in names.others.items()}
    for layer in range(shape.layers):
        # In the order of the slots, each tensor once: sets would draw another checkpoint in every process.
        slots = MODULATED_SLOTS if names.others else layer_slots(shape, layer)
        stored = dict.fromkeys(slots if names.others else map(names.stored, slots))
        tensors |= {names.in_layer(slot, layer): draw(slot) for slot in stored}
        if experts is not None and shape.has_experts(layer):
            for number in range(experts.count):
                tensors |= {names.of_expert(slot, layer, number): draw(f"expert_{slot}") for slot in MLP_SLOTS}
    return tensors
