"""A bounded store of captured steps: the least recently replayed one makes room. Pure: what it stores only needs `close`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar


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
