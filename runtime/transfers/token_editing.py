"""LLaDA2.1's loop (arXiv 2602.08676): masks become tokens, and decided tokens other tokens, each by a threshold of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllm_export.errors import UsageError
from dllm_export.runtime.options import option, require_at_least
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState, best_first


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEditing(Transfer):
    """Mask to token: every row with confidence c > threshold, or the surest. Token to token: a decided row whose likeliest
    token is another one with a probability > editing_threshold gets that.

    A pass that begins without masks is a review. A block ends with the review that edits nothing, or with the last of
    `max_post_steps`: the tokens that a pass commits are first looked at as tokens by the pass after it, so that nothing is
    known to stand before a review, and without reviews to come there would be no number of them to limit.
    """

    threshold: float = option(0.95, "tau: least confidence of a row that is committed")
    editing_threshold: float = option(0.9, "probability above which another token takes a decided one's place")
    max_post_steps: int = option(16, "passes over a block that has no masks; the last of them ends it")
    name: ClassVar[str] = "token-editing"
    edits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("threshold", "editing_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} is {getattr(self, name)}, expected a probability from 0 to 1")
        require_at_least(self, 0, "max_post_steps")

    @property
    def extra_steps(self) -> int:
        """The reviews."""
        return self.max_post_steps

    def choose(self, state: TransferState) -> Choice:
        assert state.rival is not None
        review = not len(state.rows)
        # The memory is the number of the block's reviews so far.
        reviews = (0 if state.block_step == 1 else state.memory) + review
        edit = np.flatnonzero(state.rival > self.editing_threshold)  # never a nan
        sure = int(np.count_nonzero(state.confidence > self.threshold))
        return Choice(
            best_first(state.confidence)[: max(sure, 1)],
            edit=edit,
            goes_on=(len(edit) > 0 or not review) and reviews < self.max_post_steps,
            memory=reviews,
        )
