"""Exact block decoding: keys and values of finished blocks never change, since their rows see nothing after them.

SDAR (arXiv 2510.06303), LLaDA2.0 (arXiv 2512.15745) and BD3-LM (arXiv 2503.09573) run a finished block once more to store
what its last tokens make of it. Here those rows run along with the first step of the next block: they are read in that step,
and their pass costs no weights of its own.

Fast-dLLM v2 (arXiv 2509.26328) also keeps keys and values within the block that is being decided, by parts of it: its dual
cache. They are stale until the block is finished, and exact then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.policies.policy import Attention, Rows, StepPlan, StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCache:
    """The block's rows, and in its first step those of the blocks that changed since they were last run.

    With `sub_block_cache` a step runs only the part of the block that is being decided, against what the others were when
    they were last run, if the rule looks at that part alone. All of the block is run while the part's first row is masked, and
    in the step after the one that decided the block's first row.
    """

    sub_block_cache: int = option(
        0,
        "rows of a part of the block that steps run alone, of rules that decide it by such parts; 0: all of the block",
    )
    name: ClassVar[str] = "block"
    attention: ClassVar[Attention] = "blocks"

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sub_block_cache")

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
        if self.sub_block_cache and state.block_step > 1 and state.inspected is not None:
            return StepPlan.recompute(state, self._find_parts(state, range(first, end)))
        return StepPlan.recompute(state, Rows.span(first, end, state.batch))

    def _find_parts(self, state: StepState, whole: range) -> Rows:
        """The part that each sequence decides, or `whole`; rows are repeated where other sequences have more."""
        first, end = state.block
        size, lead = self.sub_block_cache, first - state.prompt_rows
        chosen: list[range] = []
        for masked, before, needed in zip(state.masked, state.masked_before, state.needed, strict=True):
            open_rows = np.flatnonzero(masked[lead : lead + end - first])
            if not len(open_rows):
                chosen.append(range(first, first + 1))  # it waits for others
                continue
            start = int(open_rows[0]) // size * size
            part = range(first + start, min(first + start + size, end))
            elsewhere = needed.sum() > needed[lead + start : lead + start + len(part)].sum()
            chosen.append(whole if open_rows[0] == start or before[lead] or elsewhere else part)
        count = max(map(len, chosen))
        return Rows(tuple(tuple(np.resize(rows, count).tolist()) for rows in chosen))
