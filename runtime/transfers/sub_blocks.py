"""Fast-dLLM v2's loop (arXiv 2509.26328): a first token that is given, then parts of the block in order, by a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class SubBlocks(Transfer):
    """In the leftmost part of the block that has a mask: every row with confidence c > tau, and the surest.

    The first step of a block decides its first row alone. In a model whose rows predict the next token the last row of the
    finished block does that, and the others of the block are only asked when they see it.
    """

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    sub_block: int = option(8, "rows of a part of the block; parts are decided from left to right")
    name: ClassVar[str] = "sub-blocks"
    narrows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")
        if self.sub_block < 1:
            raise UsageError(f"--sub-block is {self.sub_block}, expected at least 1")

    def narrow(self, rows: NDArray[np.int64], block: tuple[int, int], block_step: int) -> NDArray[np.int64]:
        """The masked rows of the leftmost part; in the first step the block's first row."""
        if block_step == 1 and rows[0] == block[0]:
            return np.zeros(1, np.int64)
        parts = (rows - block[0]) // self.sub_block
        return np.flatnonzero(parts == parts[0])

    def choose(self, state: TransferState) -> Choice:
        sure = int(np.count_nonzero(state.confidence > self.threshold))
        return Choice(best_first(state.confidence)[: max(1, sure)])
