"""The demo model on disk: a directory in a published layout, that of GSAI-ML/LLaDA-8B-Base at first, with a byte tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dllm_export.graphs import ModelShape, layer_weights
from dllm_export.graphs.families import Source, TensorNames, detect_family
from dllm_export.tools.demo_layouts import END, LLADA, MASK, Layout
from dllm_export.tools.demo_model import Weights
from dllm_export.tools.random_checkpoint import checkpoint_config, tensor_names

_FUSED = {"qk": ("q", "k"), "gate_up": ("gate", "up"), "qk_bias": ("q_bias", "k_bias")}
"""Weights of the graphs that a checkpoint keeps in two; the others have the names of its slots."""


def stored_tensors(shape: ModelShape, names: TensorNames, weights: Weights) -> Weights:
    """The weights under a layout's names: fused matrices cut, matrices [out, in]."""
    tensors = {names.embedding: weights["embedding"], names.norm: weights["norm"], names.head: weights["head"].T}
    halves = {"q": shape.query_width, "k": shape.key_width, "gate": shape.mlp, "up": shape.mlp}
    for layer in range(shape.layers):
        for name in _layer_names(shape):
            weight, slots = weights[f"layers.{layer}.{name}"], _FUSED.get(name, (name,))
            sizes = [halves[slot.removesuffix("_bias")] for slot in slots] if len(slots) > 1 else [weight.shape[-1]]
            for slot, piece in zip(slots, torch.split(weight, sizes, dim=-1), strict=True):
                tensors[names.in_layer(slot, layer)] = piece.T if piece.dim() == 2 else piece
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def graph_weights(shape: ModelShape, names: TensorNames, tensors: Weights) -> Weights:
    """The inverse of `stored_tensors`."""
    weights = {"embedding": tensors[names.embedding], "norm": tensors[names.norm], "head": tensors[names.head].T}
    for layer in range(shape.layers):
        for name in _layer_names(shape):
            joined = torch.cat([tensors[names.in_layer(slot, layer)] for slot in _FUSED.get(name, (name,))])
            weights[f"layers.{layer}.{name}"] = joined.T if joined.dim() == 2 else joined
    return {name: weight.contiguous() for name, weight in weights.items()}


def _layer_names(shape: ModelShape) -> list[str]:
    return [spec.name for spec in layer_weights(shape)]


def save_checkpoint(
    directory: Path, shape: ModelShape, weights: Weights, report: Mapping[str, object], layout: Layout = LLADA
) -> None:
    """Write the whole directory; `weights` must hold float16 numbers already, `report` becomes training.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = stored_tensors(shape, tensor_names(layout.family), weights)
    halves = {name: weight.detach().half().cpu() for name, weight in tensors.items()}
    config = checkpoint_config(layout.family, shape, mask=MASK, end=END) | {"torch_dtype": "float16"}
    _replace(directory / "model.safetensors", lambda path: save_file(halves, path, metadata={"format": "pt"}))
    for name, text in layout.tokenizer_files().items():
        _write_text(directory / name, text)
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer_config.json", layout.tokenizer_config(shape))
    _write_json(directory / "training.json", report)


def load_weights(directory: Path) -> tuple[ModelShape, Weights]:
    """The shape and the float32 weights of a saved directory of any layout."""
    tensors = load_file(directory / "model.safetensors")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    source = Source(config=settings, tensors=frozenset(tensors))
    config = detect_family(source).read_config(source)
    weights = graph_weights(config.shape, config.names, tensors)
    return config.shape, {name: weight.float() for name, weight in weights.items()}


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    _write_text(path, json.dumps(value, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and move into place, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)
