"""Rotary tables, made once per request on the host."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dllm_export.graphs import ModelShape


def rotary_tables(
    shape: ModelShape, positions: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:  # [B, S] -> two of [B, S, r / 2]
    """cos and sin of position * theta^(-2j/r), for the r dimensions of a head that are rotated.

    Frequencies and angles round to float32, as in the published code (whose float32 power may differ in the last bit).
    """
    exponent = np.arange(0, shape.rotary_width, 2, dtype=np.float32) / np.float32(shape.rotary_width)
    frequency = (1.0 / np.power(np.float32(shape.rope_theta), exponent)).astype(np.float32)
    angle = (positions[:, :, None].astype(np.float32) * frequency).astype(np.float64)
    return np.cos(angle), np.sin(angle)
