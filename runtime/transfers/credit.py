"""CreditDecoding (dInfer, arXiv 2510.08666): tokens that were likely in past steps gain in the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dllm_export.errors import UsageError
from dllm_export.graphs import HeadGraph
from dllm_export.runtime.options import option
from dllm_export.runtime.transfers.threshold import Threshold
from dllm_export.runtime.transfers.transfer import Choice, Transfer, TransferState


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit(Transfer):
    """The threshold rule on fused logits = logits + credit_weight log(1 + C), with a credit C per row and token.

    C is 0 at a block's start. Each step C <- credit_decay C, then every row's likeliest token earns max(p)^credit_power.
    """

    threshold: float = option(0.9, "tau: least confidence of a row that is committed")
    credit_weight: float = option(0.7, "how much credit counts in the logits; 0 is the threshold rule")
    credit_decay: float = option(0.8, "share of the credit that is left after a step")
    credit_power: float = option(0.2, "credit earned in a step is the probability to this power")
    name: ClassVar[str] = "credit"
    head: ClassVar[HeadGraph] = "head_credited"

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise UsageError(f"--threshold is {self.threshold}, expected a probability from 0 to 1")
        for name in ("credit_weight", "credit_power"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a number from 0 up")
        if not 0.0 <= self.credit_decay <= 1.0:
            raise UsageError(f"--credit-decay is {self.credit_decay}, expected a share from 0 to 1")

    def head_inputs(self, block_step: int) -> Mapping[str, float]:
        # What the state holds when a block starts belongs to other rows: a decay of 0 forgets it.
        decay = 0.0 if block_step == 1 else self.credit_decay
        return {"credit_decay": decay, "credit_power": self.credit_power, "credit_weight": self.credit_weight}

    def choose(self, state: TransferState) -> Choice:
        return Threshold(threshold=self.threshold).choose(state)
