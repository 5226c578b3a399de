"""Time spent inside a provider, or inside strategies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostMark:
    """Now, on the host's clock: a mark of a provider whose programs run while they are called."""

    at: float = field(default_factory=time.perf_counter)

    def seconds_until(self, later: HostMark) -> float:
        """Time from this mark to a later one."""
        return later.at - self.at


@dataclass(slots=True)
class Clock:
    """Adds up the time spent on one kind of work."""

    seconds: float = 0.0

    def time(self, work: Callable[[], T]) -> T:
        """Do such work and count its time: of a provider, running a program or waiting for its results."""
        start = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - start
        return result
