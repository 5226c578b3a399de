"""Time spent inside a provider, or inside strategies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dllm_export.runtime.session import Mark, Program

T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """Adds up the host's time spent on one kind of work."""

    seconds: float = 0.0

    def time(self, work: Callable[[], T]) -> T:
        """Do such work and count its time."""
        start = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - start
        return result


@dataclass(slots=True)
class EngineClock:
    """What a generation takes of its provider: time of programs, on the device's clock where they are queued."""

    mark: Callable[[], Mark]
    """The session's."""
    host: Clock = field(default_factory=Clock)
    """Time that the host spends there: running or queueing programs, and waiting for their results."""
    _spans: list[tuple[Mark, Mark]] = field(init=False, default_factory=list)

    def run(self, program: Program) -> None:
        """Run or queue a program."""
        start = self.mark()
        self.host.time(program)
        self._spans.append((start, self.mark()))

    def wait(self, work: Callable[[], T]) -> T:
        """Ask for results, or wait for them."""
        return self.host.time(work)

    def take(self, *, ahead: bool = False) -> float:
        """Seconds of the programs since they were last taken; with `ahead` the last one counts the next time."""
        taken, self._spans = (self._spans[:-1], self._spans[-1:]) if ahead else (self._spans, [])
        return sum(start.seconds_until(end) for start, end in taken)
