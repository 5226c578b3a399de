"""Weights of plain PyTorch out of a bundle, where no checkpoint is at hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dllm_export.errors import IncompatibleError
from dllm_export.runtime.bundle import Bundle
from dllm_export.tools.eager import EagerModel


def unfuse_eager(bundle: Bundle, dtype: torch.dtype, device: str = "cpu") -> EagerModel:
    """The model of a LLaDA bundle, its weights back under their published names: what the export made of them is kept."""
    manifest = bundle.manifest
    shape = manifest.shape
    if manifest.family != "llada":
        raise IncompatibleError(f"plain PyTorch here computes LLaDA models, this bundle holds a '{manifest.family}'")
    query = shape.query_width

    def read(graph: str, layer: int | None = None) -> dict[str, Tensor]:
        arrays = bundle.graph_weights(graph, layer).items()
        return {name: to_tensor(array).to(device, dtype) for name, array in arrays}

    layers = []
    for number in range(shape.layers):
        stored = read("layer_full", number)
        gate, up = stored["gate_up"].T.chunk(2)
        matrices = {
            "q_proj": stored["qk"][:, :query].T,
            "k_proj": stored["qk"][:, query:].T,
            "v_proj": stored["v"].T,
            "attn_out": stored["out"].T,
            "ff_proj": gate,
            "up_proj": up,
            "ff_out": stored["down"].T,
        }
        layer = {f"{name}.weight": matrix.contiguous() for name, matrix in matrices.items()}
        layer |= {"attn_norm.weight": stored["norm1"], "ff_norm.weight": stored["norm2"]}
        if shape.qkv_bias:
            both, value = stored["qk_bias"], stored["v_bias"]
            layer |= {"q_proj.bias": both[:query], "k_proj.bias": both[query:], "v_proj.bias": value}
        layers.append(layer)
    head = read("head")
    top = {"wte.weight": read("embed")["embedding"], "ln_f.weight": head["norm"]}
    if not shape.tied_head:
        top["ff_out.weight"] = head["head"].T.contiguous()
    return EagerModel(
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        eps=shape.norm_eps,
        theta=shape.rope_theta,
        mask_token=manifest.tokens.mask,
        eos_token=manifest.tokens.eos,
        top=top,
        layers=tuple(layers),
    )


def to_tensor(array: NDArray[Any]) -> Tensor:
    """A copy as a tensor, bfloat16 too, which numpy has not."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
