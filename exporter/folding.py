"""Layers whose norms are modulated by the time, for a model that always sees the same time: plain constants.

The block (adaLN, arXiv 2212.09748): x + gate * f(norm(x) * (1 + scale) + shift), with (shift, scale, gate) a linear map of the
time's conditioning. At a fixed time they are constants, which fold into the norm's weight and bias and into what `f` ends
with. Everything is computed in float64 and rounded once, when it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from dllm_export.graphs.steps import TIME_WIDTH


def condition(raw: Mapping[str, Tensor], sigma: float) -> Tensor:  # [C]
    """What a noise level conditions all norms by, from the model's tensors by slot."""
    x = time_table(sigma)
    for slot in ("time1", "time2"):
        x = silu(linear(x, raw[slot].double(), raw[f"{slot}_bias"].double()))
    return x


def fold_layer(raw: Mapping[str, Tensor], conditioning: Tensor) -> dict[str, Tensor]:
    """A layer's tensors by the slots of a layer that is not modulated, all [out, in]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = modulate(raw, "modulation", conditioning, 6)
    query, key, value = raw["qkv"].chunk(3)
    return {
        "norm1": raw["norm1"].double() * (1 + scale1),
        "norm1_bias": shift1,
        "q": query,
        "k": key,
        "v": value,
        "out": gate1[:, None] * raw["out"].double(),
        "norm2": raw["norm2"].double() * (1 + scale2),
        "norm2_bias": shift2,
        "up": raw["up"],
        "up_bias": raw["up_bias"],
        "down": gate2[:, None] * raw["down"].double(),
        "down_bias": gate2 * raw["down_bias"].double(),
    }


def split_layer(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors by the slots of a layer that sees the time: a modulation for each norm, and the gates."""
    query, key, value = raw["qkv"].chunk(3)
    plain = {slot: raw[slot] for slot in ("norm1", "out", "norm2", "up", "up_bias", "down", "down_bias")}
    pieces: dict[str, Tensor] = {}
    for ending in ("", "_bias"):
        shift1, scale1, gate1, shift2, scale2, gate2 = raw[f"modulation{ending}"].chunk(6)
        pieces[f"norm1_modulation{ending}"] = torch.cat((shift1, scale1))
        pieces[f"norm2_modulation{ending}"] = torch.cat((shift2, scale2))
        pieces[f"gate1{ending}"], pieces[f"gate2{ending}"] = gate1, gate2
    return {**plain, "q": query, "k": key, "v": value, **pieces}


def time_table(sigma: float) -> Tensor:  # [256]
    """The numbers that describe a noise level, in float64."""
    half = TIME_WIDTH // 2
    angle = sigma * torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64) / half)
    return torch.cat((angle.cos(), angle.sin()))


def fold_norm(raw: Mapping[str, Tensor], conditioning: Tensor) -> dict[str, Tensor]:
    """The last norm's weight and bias."""
    shift, scale = modulate(raw, "norm_modulation", conditioning, 2)
    return {"norm": raw["norm"].double() * (1 + scale), "norm_bias": shift}


def modulate(raw: Mapping[str, Tensor], slot: str, conditioning: Tensor, count: int) -> tuple[Tensor, ...]:
    """The pieces of a modulation, in float64."""
    return linear(conditioning, raw[slot].double(), raw[f"{slot}_bias"].double()).chunk(count)
