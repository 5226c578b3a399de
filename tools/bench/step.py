"""One step as a column's process sees it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_export.tools.bench.roofline import Work

NOTHING = Work()


@dataclass(frozen=True, slots=True)
class Step:
    """Its kind, its time, the share of it spent in a provider, the response after it, and what it had to do."""

    kind: str
    seconds: float
    engine_seconds: float | None
    tokens: NDArray[np.int64]  # [R]
    work: Work = NOTHING
