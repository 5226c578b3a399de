"""Checkpoint tensors -> the layout the graphs bind: [in, out], query|key fused, gate|up fused, one file per layer.

Experts are stacked as they are stored, [E, out, in], with rows of gate and up in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dllm_export.errors import CheckpointError
from dllm_export.exporter.checkpoint import Checkpoint, Load, all_finite
from dllm_export.exporter.folding import condition, fold_layer, fold_norm, split_layer
from dllm_export.exporter.pack import save_tensors
from dllm_export.exporter.probe import PROBE_SIGMA, LoadExpert, Probe
from dllm_export.exporter.proxy import make_proxy
from dllm_export.graphs import COUNTED, DType, Experts
from dllm_export.graphs.families import ModelConfig
from dllm_export.runtime.manifest import WeightRecord

TORCH_TYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
KEPT_SLOTS = (
    *("norm1_bias", "norm2_bias", "v_bias", "up_bias", "down_bias", "q_norm", "k_norm", "router", "router_bias"),
    *("norm1_modulation", "norm1_modulation_bias", "gate1", "gate1_bias"),
    *("norm2_modulation", "norm2_modulation_bias", "gate2", "gate2_bias"),
)
"""Weights that a graph has one by one, where a model has them at all."""
ENTERING = ("latent_in", "estimate_in", "level_in")
"""Matrices by which a continuous model's vectors and noise level enter."""
FOLDER = "weights"
EMBEDDING_FILE = f"{FOLDER}/embedding.safetensors"
HEAD_FILE = f"{FOLDER}/head.safetensors"
TIME_FILE = f"{FOLDER}/time.safetensors"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Where every weight of the graphs went."""

    layers: tuple[dict[str, WeightRecord], ...]
    model: dict[str, WeightRecord]
    notes: tuple[str, ...] = ()
    """What was left out, as sentences."""


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
        if config.shape.latent:
            probe.enter({slot: load(names.others[slot]) for slot in ENTERING})
        else:
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
            raw = load_layer(config, load, layer)
            expert = partial(load_expert, config, load, layer)
            probe.run_layer(raw, expert)
            if conditioning is not None:
                raw = split_layer(raw) if config.shape.conditioning else fold_layer(raw, conditioning)
            for slot in ("out", "down") if config.branch_scale != 1 else ():
                raw[slot] = raw[slot].double() * config.branch_scale
            weights = fuse_layer(raw)
            if config.shape.experts is not None and config.shape.has_experts(layer):
                weights |= stack_experts(config.shape.experts, config.shape.hidden, expert, TORCH_TYPES[dtype])
            if config.shape.indicator_rank:
                weights["proxy"] = make_proxy(raw["v"], config.shape.indicator_rank)
            layers.append(_save(weights, dtype, root, layer_file(layer)))
            weights.clear()
            raw.clear()  # or the shard stays mapped
        yield None
    model |= _write_model(checkpoint, dtype, root, probe, conditioning)
    yield StoredWeights(tuple(layers), model, tuple(_find_spare_head(checkpoint)))


def _find_spare_head(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence where a checkpoint with a tied head holds another one; a copy of the embedding, as iLLaDA's, is nothing."""
    names = checkpoint.config.names
    if not checkpoint.config.shape.tied_head or names.head not in checkpoint.shards:
        return
    with checkpoint.reading() as load:
        if not torch.equal(load(names.head), load(names.embedding)):
            yield f"tied head: config.json says so, though '{names.head}' is there and differs from the embedding"


def load_layer(config: ModelConfig, load: Load, layer: int) -> dict[str, torch.Tensor]:
    """Tensors of a layer by slot, experts aside; q, k and v are cut out of one where a checkpoint fuses them."""
    shape = config.shape
    raw = {slot: load(config.names.in_layer(slot, layer)) for slot in config.stored_slots(layer)}
    if "qkv" in raw and not config.conditioning:
        widths = [shape.query_width, shape.key_width, shape.key_width]
        raw |= dict(zip("qkv", torch.split(raw.pop("qkv"), widths), strict=True))
    return raw


def load_expert(config: ModelConfig, load: Load, layer: int, slot: str, expert: int) -> torch.Tensor:
    """gate, up or down of one expert, [out, in]."""
    return load(config.names.of_expert(slot, layer, expert))


def stack_experts(experts: Experts, hidden: int, load: LoadExpert, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All experts of a layer, each copied from its shard to its place: beside the result no more than one is in memory."""
    gate_up = torch.empty(experts.count, experts.mlp, 2, hidden, dtype=dtype)
    down = torch.empty(experts.count, hidden, experts.mlp, dtype=dtype)
    for expert in range(experts.count):
        for place, slot in enumerate(("gate", "up")):
            gate_up[expert, :, place].copy_(load(slot, expert))
        down[expert].copy_(load("down", expert))
    return {"expert_gate_up": gate_up.flatten(1, 2), "expert_down": down}


def _write_model(
    checkpoint: Checkpoint, dtype: DType, root: Path, probe: Probe, conditioning: torch.Tensor | None
) -> dict[str, WeightRecord]:
    """Embedding and head, one after the other: they are the largest tensors, and both at once would set the peak."""
    names, tied = checkpoint.config.names, checkpoint.config.shape.tied_head
    with checkpoint.reading() as load:
        table = load(names.embedding)
        if checkpoint.config.shape.latent:
            entering = {slot: load(names.others[slot]).T for slot in ENTERING}
            entering["estimate_in"] = entering["estimate_in"].double() * checkpoint.config.shape.latent**0.5
            probe.latents = find_latents(table)
            records = _save({"latents": probe.latents, **entering}, dtype, root, EMBEDDING_FILE)
        else:
            records = _save({"embedding": table}, dtype, root, EMBEDDING_FILE)
    with checkpoint.reading() as load:
        raw = {"norm": load(names.norm), "head": load(names.embedding if tied else names.head)}
        raw |= {slot: load(name) for slot, name in names.others.items() if not slot.startswith("time")}
        probe.finish(raw)
        weights = {"norm": raw["norm"]}
        if checkpoint.config.shape.conditioning:
            weights |= {slot: transpose(raw[slot]) for slot in ("norm_modulation", "norm_modulation_bias")}
        elif conditioning is not None:
            weights = fold_norm(raw, conditioning)
        scale = checkpoint.config.head_scale
        weights |= {} if tied else {"head": raw["head"].T if scale == 1 else raw["head"].T.double() * scale}
        if "head_bias" in raw:
            weights["head_bias"] = raw["head_bias"].double() + checkpoint.config.logit_offset
        return records | _save(weights, dtype, root, HEAD_FILE)


def find_latents(table: torch.Tensor) -> torch.Tensor:
    """The vectors that stand for tokens: rows of a length of 1, in float64."""
    rows = table.double()
    return rows.div(torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-8)


def fuse_layer(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical slots [out, in] -> the graphs' weights [in, out]."""
    weights = {
        "norm1": raw["norm1"],
        "qk": torch.cat((raw["q"], raw["k"])).T,
        "v": raw["v"].T,
        "out": raw["out"].T,
        "norm2": raw["norm2"],
    }
    for prefix in ("", "shared_"):
        if f"{prefix}gate" in raw:
            weights[f"{prefix}gate_up"] = torch.cat((raw[f"{prefix}gate"], raw[f"{prefix}up"])).T
        elif f"{prefix}up" in raw:
            weights[f"{prefix}up"] = raw[f"{prefix}up"].T
        if f"{prefix}down" in raw:
            weights[f"{prefix}down"] = raw[f"{prefix}down"].T
    if "q_bias" in raw:
        weights["qk_bias"] = torch.cat((raw["q_bias"], raw["k_bias"]))
    return weights | {slot: transpose(raw[slot]) for slot in KEPT_SLOTS if slot in raw}


def transpose(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix as [in, out]; a bias as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def _save(tensors: dict[str, torch.Tensor], dtype: DType, root: Path, file: str) -> dict[str, WeightRecord]:
    converted = {}
    for name, tensor in tensors.items():
        converted[name] = _convert(tensor, torch.float32 if name in COUNTED else TORCH_TYPES[dtype])
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
