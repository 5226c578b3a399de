"""How far a TensorRT build is, and how to stop it: the library reports every step and asks whether to go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any


@dataclass(slots=True)
class Phase:
    """One phase of a build; phases nest."""

    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Nested phases as one share from 0 to 1 that never falls. The library calls from any of its threads."""

    def __init__(self, report: Callable[[float], None]) -> None:
        self.failure: BaseException | None = None
        """What stopped the build, for the caller to raise once the library has let go."""
        self._report = report
        self._phases: dict[str, Phase] = {}
        self._share = 0.0
        self._lock = Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins within a step of its parent."""
        with self._lock:
            self._phases[name] = Phase(parent, steps)

    def finish(self, name: str) -> None:
        """A phase is over; its parent's step follows."""
        with self._lock:
            self._phases.pop(name, None)

    def step(self, name: str, step: int) -> bool:
        """Whether the build goes on after this step of a phase."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
            self._share = max(self._share, self._share_within(None))
            share = self._share
        if self.failure is None:
            # An exception must not pass through the library: it would end the process instead of the build.
            try:
                self._report(share)
            except BaseException as error:
                self.failure = error
        return self.failure is None

    def _share_within(self, parent: str | None) -> float:
        inner = [
            min(1.0, (phase.done + self._share_within(name)) / max(1, phase.steps))
            for name, phase in self._phases.items()
            if phase.parent == parent
        ]
        return max(inner, default=0.0)


def make_monitor(module: Any, progress: BuildProgress) -> Any | None:
    """The library's progress monitor, or None for 8.6, which has none and builds to the end."""
    if not hasattr(module, "IProgressMonitor"):
        return None

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.start(name, parent, steps)

        def phase_finish(self, name: str) -> None:
            progress.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            return progress.step(name, step)

    return Monitor()
