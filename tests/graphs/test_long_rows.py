"""Sums of long rows in two stages: those of numpy, for vocabularies that tiles divide and that they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dllm_export.graphs.long_rows import TILE, sum_row, tile_width
from dllm_export.graphs.torch_ops import TorchOps

VOCABULARIES = {126464: 512, 151936: 128, 50368: 64, 50258: 50258, 50257: 50257, 512: 512, 1024: 512, 96: 32, 71: 71}
"""Tokens -> places of a tile: LLaDA, Qwen, GPT-2 with and without padding and a mask, and small ones."""


@pytest.mark.parametrize(("count", "width"), VOCABULARIES.items())
def test_a_row_is_cut_into_whole_tiles_or_not_at_all(count: int, width: int) -> None:
    assert tile_width(count) == width
    assert count % width == 0
    assert width <= TILE or width == count


@pytest.mark.parametrize("count", VOCABULARIES)
def test_sums_are_those_of_the_whole_row(count: int) -> None:
    rows = np.random.default_rng(count).normal(size=(2, 3, count))
    x = torch.from_numpy(rows)
    # Any order of float64 additions of so few numbers is within 1e-9.
    np.testing.assert_allclose(sum_row(TorchOps(), x, count).numpy(), rows.sum(-1), rtol=0, atol=1e-9)
