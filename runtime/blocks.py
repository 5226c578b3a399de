"""Blocks of a model that attends by blocks: a row sees its own one and those before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def number_blocks(visible: NDArray[np.bool_], length: int) -> NDArray[np.int32]:
    """The number of every row's block [B, S], for blocks of `length` rows that are counted from the first column.

    Padding comes after all others: nobody sees it, but its rows need a key to see.
    """
    rows = visible.shape[1]
    numbers: NDArray[np.int32] = np.where(visible, np.arange(rows) // length, rows).astype(np.int32)
    return numbers


def fill_blocks(prompt: int, gen_length: int, length: int, anchor: str = "prompt") -> tuple[int, int]:
    """(rows of the prompt's full blocks, rows of the blocks after them) for a prompt and what is generated after it.

    Blocks are counted from the prompt's first token. What the prompt has beyond its full blocks lies in the first block that
    is decided. With the anchor `response` a block begins with the first mask instead, and the prompt's first block may have
    padding in front, which counts among its rows. The last block is decided to its end, past `gen_length`, as the published
    loops of SDAR and LLaDA2 do.
    """
    if anchor == "response":
        return -(-prompt // length) * length, -(-gen_length // length) * length
    full = prompt // length * length
    return full, -(-(prompt - full + gen_length) // length) * length
