"""Time spent inside a provider."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """Adds up the time spent inside a provider."""

    seconds: float = 0.0

    def time(self, work: Callable[[], T]) -> T:
        """Do provider work, such as running a program or waiting for its results, and count its time."""
        start = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - start
        return result
