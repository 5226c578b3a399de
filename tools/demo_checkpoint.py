"""The demo model on disk: a directory in the layout of GSAI-ML/LLaDA-8B-Base with a byte tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dllm_export.graphs import ModelShape
from dllm_export.tools.demo_model import MASK, Weights
from dllm_export.tools.llada_config import llada_config

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
"""Ids 256 and up, in this order."""
END = 257

_LAYER_TENSORS = {
    "norm1": ("attn_norm",),
    "qk": ("q_proj", "k_proj"),
    "v": ("v_proj",),
    "out": ("attn_out",),
    "norm2": ("ff_norm",),
    "gate_up": ("ff_proj", "up_proj"),
    "down": ("ff_out",),
}
_TOP_TENSORS = {"embedding": "wte", "norm": "ln_f", "head": "ff_out"}


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: token id = byte value, special tokens from 256 on."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_letters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (as GPT-2 defined it): itself if printable."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def llada_tensors(shape: ModelShape, weights: Weights) -> Weights:
    """The weights under LLaDA's names: fused matrices cut, matrices [out, in]."""
    tensors = {}
    for name, place in _TOP_TENSORS.items():
        tensors[f"model.transformer.{place}.weight"] = weights[name].T if name == "head" else weights[name]
    for layer in range(shape.layers):
        for name, places in _LAYER_TENSORS.items():
            weight = weights[f"layers.{layer}.{name}"]
            pieces = _cut(shape, name, weight.T if weight.dim() == 2 else weight)
            for place, piece in zip(places, pieces, strict=True):
                tensors[f"model.transformer.blocks.{layer}.{place}.weight"] = piece
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def graph_weights(shape: ModelShape, tensors: Weights) -> Weights:
    """The inverse of `llada_tensors`."""
    weights = {}
    for name, place in _TOP_TENSORS.items():
        tensor = tensors[f"model.transformer.{place}.weight"]
        weights[name] = tensor.T if name == "head" else tensor
    for layer in range(shape.layers):
        for name, places in _LAYER_TENSORS.items():
            pieces = [tensors[f"model.transformer.blocks.{layer}.{place}.weight"] for place in places]
            weights[f"layers.{layer}.{name}"] = torch.cat(pieces).T if pieces[0].dim() == 2 else pieces[0]
    return {name: weight.contiguous() for name, weight in weights.items()}


def _cut(shape: ModelShape, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    sizes = {"qk": [shape.query_width, shape.key_width], "gate_up": [shape.mlp, shape.mlp]}
    return torch.split(weight, sizes.get(name, [weight.shape[0]]))


def save_checkpoint(directory: Path, shape: ModelShape, weights: Weights, report: Mapping[str, object]) -> None:
    """Write the whole directory; `weights` must hold float16 numbers already, `report` becomes training.json."""
    directory.mkdir(parents=True, exist_ok=True)
    halves = {name: weight.detach().half().cpu() for name, weight in llada_tensors(shape, weights).items()}
    _replace(directory / "model.safetensors", lambda path: save_file(halves, path, metadata={"format": "pt"}))
    _replace(directory / "tokenizer.json", lambda path: byte_tokenizer().save(str(path)))
    _write_json(directory / "config.json", llada_config(shape, mask=MASK, end=END))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(shape))
    _write_json(directory / "training.json", report)


def load_weights(directory: Path, shape: ModelShape) -> Weights:
    """The float32 weights of a saved directory."""
    weights = graph_weights(shape, load_file(directory / "model.safetensors"))
    return {name: weight.float() for name, weight in weights.items()}


def _tokenizer_config(shape: ModelShape) -> dict[str, object]:
    return {
        "add_prefix_space": False,
        "bos_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL_TOKENS[1],
        "model_max_length": shape.max_length,
        "pad_token": SPECIAL_TOKENS[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    _replace(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` and move into place, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)
