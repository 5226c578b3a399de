"""Checkpoint tensors -> the layout the graphs bind: [in, out], query|key fused, gate|up fused, one file per layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dllm_export.errors import CheckpointError
from dllm_export.exporter.checkpoint import Checkpoint, all_finite
from dllm_export.exporter.folding import condition, fold_layer, fold_norm, split_layer
from dllm_export.exporter.pack import save_tensors
from dllm_export.exporter.probe import PROBE_SIGMA, Probe
from dllm_export.exporter.proxy import make_proxy
from dllm_export.graphs import DType
from dllm_export.runtime.manifest import WeightRecord

TORCH_TYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
KEPT_SLOTS = (
    *("norm1_bias", "norm2_bias", "v_bias", "up_bias", "down_bias", "q_norm", "k_norm"),
    *("norm1_modulation", "norm1_modulation_bias", "gate1", "gate1_bias"),
    *("norm2_modulation", "norm2_modulation_bias", "gate2", "gate2_bias"),
)
"""Weights that a graph has one by one, where a model has them at all."""
FOLDER = "weights"
EMBEDDING_FILE = f"{FOLDER}/embedding.safetensors"
HEAD_FILE = f"{FOLDER}/head.safetensors"
TIME_FILE = f"{FOLDER}/time.safetensors"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Where every weight of the graphs went."""

    layers: tuple[dict[str, WeightRecord], ...]
    model: dict[str, WeightRecord]


def layer_file(layer: int) -> str:
    """The weights file of a layer."""
    return f"{FOLDER}/layer.{layer:03d}.safetensors"


def write_weights(checkpoint: Checkpoint, dtype: DType, root: Path, probe: Probe) -> Iterator[StoredWeights | None]:
    """Convert layer by layer; yields None after each layer and the bindings at the end.

    One layer is in memory at a time. The probe sees every tensor as the checkpoint stores it, before conversion.
    """
    (root / FOLDER).mkdir()
    config, names = checkpoint.config, checkpoint.config.names
    with checkpoint.reading() as load:
        probe.embed(load(names.embedding))
        time = {slot: load(name) for slot, name in names.others.items() if slot.startswith("time")}
        sigma = PROBE_SIGMA if config.shape.conditioning else 0.0
        conditioning = condition(time, sigma) if config.conditioning else None
        probe.condition(conditioning, sigma)
        model = {}
        if config.shape.conditioning:
            model = _save({slot: transpose(tensor) for slot, tensor in time.items()}, dtype, root, TIME_FILE)
    layers = []
    for layer in range(config.shape.layers):
        with checkpoint.reading() as load:
            raw = {slot: load(names.in_layer(slot, layer)) for slot in config.layer_slots}
            probe.run_layer(raw)
            if conditioning is not None:
                raw = split_layer(raw) if config.shape.conditioning else fold_layer(raw, conditioning)
            weights = fuse_layer(raw)
            if config.shape.indicator_rank:
                weights["proxy"] = make_proxy(raw["v"], config.shape.indicator_rank)
            layers.append(_save(weights, dtype, root, layer_file(layer)))
            weights.clear()
            raw.clear()  # or the shard stays mapped
        yield None
    yield StoredWeights(tuple(layers), model | _write_model(checkpoint, dtype, root, probe, conditioning))


def _write_model(
    checkpoint: Checkpoint, dtype: DType, root: Path, probe: Probe, conditioning: torch.Tensor | None
) -> dict[str, WeightRecord]:
    """Embedding and head, one after the other: they are the largest tensors, and both at once would set the peak."""
    names, tied = checkpoint.config.names, checkpoint.config.shape.tied_head
    with checkpoint.reading() as load:
        records = _save({"embedding": load(names.embedding)}, dtype, root, EMBEDDING_FILE)
    with checkpoint.reading() as load:
        raw = {"norm": load(names.norm), "head": load(names.embedding if tied else names.head)}
        raw |= {slot: load(name) for slot, name in names.others.items() if not slot.startswith("time")}
        probe.finish(raw)
        weights = {"norm": raw["norm"]}
        if checkpoint.config.shape.conditioning:
            weights |= {slot: transpose(raw[slot]) for slot in ("norm_modulation", "norm_modulation_bias")}
        elif conditioning is not None:
            weights = fold_norm(raw, conditioning)
        weights |= {} if tied else {"head": raw["head"].T}
        if "head_bias" in raw:
            weights["head_bias"] = raw["head_bias"].double() + checkpoint.config.logit_offset
        return records | _save(weights, dtype, root, HEAD_FILE)


def fuse_layer(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical slots [out, in] -> the graphs' weights [in, out]."""
    up = {"gate_up": torch.cat((raw["gate"], raw["up"])).T} if "gate" in raw else {"up": raw["up"].T}
    weights = {
        "norm1": raw["norm1"],
        "qk": torch.cat((raw["q"], raw["k"])).T,
        "v": raw["v"].T,
        "out": raw["out"].T,
        "norm2": raw["norm2"],
        **up,
        "down": raw["down"].T,
    }
    if "q_bias" in raw:
        weights["qk_bias"] = torch.cat((raw["q_bias"], raw["k_bias"]))
    return weights | {slot: transpose(raw[slot]) for slot in KEPT_SLOTS if slot in raw}


def transpose(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix as [in, out]; a bias as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def _save(tensors: dict[str, torch.Tensor], dtype: DType, root: Path, file: str) -> dict[str, WeightRecord]:
    converted = {}
    for name, tensor in tensors.items():
        converted[name] = _convert(tensor, TORCH_TYPES[dtype])
        if not all_finite(converted[name]):
            remedy = {
                "float16": "export with --dtype bfloat16 or float32",
                "bfloat16": "export with --dtype float32",
            }.get(dtype, "no type here can hold it")
            raise CheckpointError(f"a value of '{name}' in {file} overflows {dtype}; {remedy}")
    save_tensors(converted, root / file)
    return {name: WeightRecord(file=file, tensor=name) for name in converted}


def _convert(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in this type and contiguous, in at most one copy."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
