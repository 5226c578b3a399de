"""Trained weights of one layout as the start of another, as Dream, DiffuLLaMA and SDAR start from trained weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dllm_export.errors import UsageError
from dllm_export.graphs import ModelShape
from dllm_export.tools.demo_model import Weights


def convert_weights(old: ModelShape, weights: Weights, new: ModelShape) -> Weights:
    """Weights of a model without biases and query/key norms for a shape that may have them, and fewer heads of keys.

    Heads of keys and values that become one are averaged (arXiv 2305.13245, section 2.1), biases start at 0, and the norms
    of queries and keys at their usual size, so that scores keep theirs.
    """
    alike = replace(
        old,
        kv_heads=new.kv_heads,
        qkv_bias=new.qkv_bias,
        qk_norm=new.qk_norm,
        rope_float32=new.rope_float32,
        shift=new.shift,
        block=new.block,
    )
    if alike != new or old.kv_heads % new.kv_heads or old.qkv_bias or old.qk_norm:
        raise UsageError(
            f"--from holds a model of shape {old}, which does not become {new}: expected one without biases and query norms "
            f"whose layers, widths and query heads are the same; leave --layers, --hidden, --heads and --mlp as they are there"
        )
    converted = dict(weights)
    for layer in range(new.layers):
        prefix = f"layers.{layer}."
        query, key = torch.split(weights[f"{prefix}qk"], [old.query_width, old.key_width], dim=1)
        key, value = (_merge_heads(old, new, weight) for weight in (key, weights[f"{prefix}v"]))
        converted |= {f"{prefix}qk": torch.cat((query, key), dim=1), f"{prefix}v": value}
        if new.qkv_bias:
            converted |= {
                f"{prefix}{name}_bias": torch.zeros(converted[prefix + name].shape[1]) for name in ("qk", "v")
            }
        if new.qk_norm:
            entering = weights[f"{prefix}norm1"].unsqueeze(1)
            for name, weight in (("q_norm", query), ("k_norm", key)):
                converted[prefix + name] = _usual_size(entering * weight).expand(new.head_dim).clone()
    return converted


def _merge_heads(old: ModelShape, new: ModelShape, weight: Tensor) -> Tensor:  # [D, G*d] -> [D, G'*d]
    return weight.view(len(weight), new.kv_heads, old.kv_heads // new.kv_heads, -1).mean(2).flatten(1)


def _usual_size(weight: Tensor) -> Tensor:  # [D, n] -> []
    """Root mean square of the products of rows of variance 1."""
    return weight.square().sum(0).mean().sqrt()
