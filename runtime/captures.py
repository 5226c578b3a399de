"""Captured steps: a bounded store in which the least recently replayed one makes room, and programs that use it.

Pure: a provider says how it queues its calls and how it captures them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Generic, Protocol, TypeVar

from dllm_export.runtime.session import CaptureReport, GraphCall, Program


class Closeable(Protocol):
    """Something that holds device resources."""

    def close(self) -> object:
        """Free them."""
        ...


C = TypeVar("C", bound=Closeable)


class Captures(Generic[C]):
    """At most `limit` values by key; 0 stores nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.evicted = 0
        self._values: OrderedDict[Hashable, C] = OrderedDict()

    def get(self, key: Hashable) -> C | None:
        """The value, which then counts as the most recently used."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def add(self, key: Hashable, value: C) -> None:
        """Store a value as the most recently used; what it replaces and what no longer fits is closed."""
        self.discard(key)
        self._values[key] = value
        while len(self._values) > self.limit:
            _, oldest = self._values.popitem(last=False)
            oldest.close()
            self.evicted += 1

    def discard(self, key: Hashable) -> None:
        """Close and forget the value of a key, if there is one."""
        value = self._values.pop(key, None)
        if value is not None:
            value.close()

    def clear(self) -> None:
        """Close and forget everything."""
        while self._values:
            self._values.popitem()[1].close()

    def __iter__(self) -> Iterator[tuple[Hashable, C]]:
        return iter(tuple(self._values.items()))

    def __len__(self) -> int:
        return len(self._values)


class Replayable(Closeable, Protocol):
    """A recorded sequence of device work."""

    @property
    def replays(self) -> int:
        """How often it ran."""
        ...

    def replay(self) -> None:
        """Queue the whole sequence."""
        ...


@dataclass(frozen=True, slots=True)
class NamedCapture:
    """A captured program, and its graph calls in words."""

    capture: Replayable
    calls: str

    def close(self) -> None:
        """Free the capture."""
        self.capture.close()


@dataclass(eq=False, slots=True)
class CapturedProgram:
    """Calls in order: queued one by one at the first run, captured at the second, replayed from then on.

    The first run initialises what a capture must not contain. A store of no captures queues at every run.
    """

    store: Captures[NamedCapture]
    queue: Program
    capture: Callable[[Program], Replayable]
    calls: str
    _warm: bool = field(init=False, default=False)

    def __call__(self) -> None:
        captured = self.store.get(id(self))
        if captured is None and self._warm and self.store.limit:
            captured = NamedCapture(self.capture(self.queue), self.calls)
            self.store.add(id(self), captured)
        if captured is None:
            self.queue()
            self._warm = True
        else:
            captured.capture.replay()

    def __del__(self) -> None:
        self.store.discard(id(self))


def report_captures(store: Captures[NamedCapture]) -> tuple[CaptureReport, ...]:
    """What a session's report says of its captures."""
    return tuple(CaptureReport(calls=held.calls, replays=held.capture.replays) for _, held in store)


def describe_calls(calls: Sequence[GraphCall]) -> str:
    """A program in a few words, such as embed, 32 layer_adaptive."""
    return ", ".join(_runs(call.graph for call in calls))


def _runs(names: Iterator[str]) -> Iterator[str]:
    for name, group in groupby(names):
        count = len(list(group))
        yield f"{count} {name}" if count > 1 else name
