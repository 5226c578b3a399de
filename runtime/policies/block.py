"""Exact block decoding: keys and values of finished blocks never change, since their rows see nothing after them.

SDAR (arXiv 2510.06303), LLaDA2.0 (arXiv 2512.15745) and BD3-LM (arXiv 2503.09573) run a finished block once more to store
what its last tokens make of it. Here those rows run along with the first step of the next block: they are read in that step,
and their pass costs no weights of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.runtime.policies.policy import Attention, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCache:
    """The block's rows, and in its first step those of the blocks that changed since they were last run."""

    name: ClassVar[str] = "block"
    attention: ClassVar[Attention] = "blocks"

    def plan(self, state: StepState) -> StepPlan:
        first, end = state.block
        if state.step == 1:
            first = 0
        else:
            # Rows that were masked when the last step began have changed since, or may have.
            changed = np.flatnonzero(state.masked_before.any(0))
            oldest = state.prompt_rows + int(changed[0]) if len(changed) else first
            first -= max(0, -(-(first - oldest) // (end - first))) * (end - first)
        if state.shift and first > state.prompt_rows and state.needed[:, first - 1 - state.prompt_rows].any():
            first -= 1  # this row, of a finished block, predicts the block's first token
        return StepPlan.recompute(state, Rows.span(first, end, state.batch))
